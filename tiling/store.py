"""TileStore: the box that everything that trains reads. One folder per slide, one writer per slide.

STORE/store.json says what is in it, STORE/slides/<slide_id>/ is whole or not there at all, STORE/index.parquet lists
the kept tiles of all slides.
"""

import os
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa

from tiling import atomic
from tiling.described import Format
from tiling.errors import DamageError, StoreError
from tiling.index import SLIDES, read_index
from tiling.settings import TileSettings
from tiling.shard import ShardedArray

TILE_STORE = Format("tile store", 1, "store.json", StoreError, "bony tile")
DESCRIPTION = TILE_STORE.file
WORK = "work"
TILES, MASKS = "tiles.zarr", "masks.zarr"
MASK_CODEC = "zstd"
_OPEN_SHARDS = 256


@dataclass(frozen=True)
class Description:
    """What STORE/store.json says: settings, data set, class names. No patient data."""

    settings: TileSettings
    dataset: str
    class_names: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        values = {
            "software": f"bony {version('bony')}",
            "dataset": self.dataset,
            "class_names": list(self.class_names),
            "settings": self.settings.to_json(),
        }
        return TILE_STORE.describe(values)


def read_description(store: Path) -> Description:
    """Read STORE/store.json.

    Raises:
        StoreError: It is missing, unreadable, or of another format version.
    """
    value = TILE_STORE.read(store)
    try:
        return Description(TileSettings.from_json(value["settings"]), value["dataset"], tuple(value["class_names"]))
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"cannot be read ({type(error).__name__}: {error})", store / DESCRIPTION) from error


def prepare(store: Path, description: Description) -> None:
    """Make a new store, or check that an existing one was made with the same settings.

    Raises:
        StoreError: The folder holds something else, or a store with other settings; the message names the first key.
    """
    if not (store / DESCRIPTION).exists():
        if store.exists() and (not store.is_dir() or any(store.iterdir())):
            raise StoreError("exists and is no tile store", store, "choose another --out")
        (store / SLIDES).mkdir(parents=True)
        atomic.write_json(store / DESCRIPTION, description.to_json())
        return
    known = read_description(store)
    ours, theirs = description.to_json(), known.to_json()
    for key in ("dataset", "class_names"):
        if ours[key] != theirs[key]:
            raise StoreError(
                f"store was made with {key} = {theirs[key]}, not {ours[key]}", store, "choose another --out"
            )
    made_with = _flat(theirs["settings"])
    for key, value in _flat(ours["settings"]).items():
        if made_with[key] != value:
            raise StoreError(
                f"store was made with {key} = {made_with[key]}, not {value}",
                store,
                "use the same settings, or choose another --out",
            )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by key, each threshold a key of its own; ``thresholds`` itself says whether there are any."""
    limits = settings["thresholds"] or {}
    return {**settings, "thresholds": bool(limits), **limits}


class _Descriptors:
    """Least-recently-used open files, shared by threads; a file in use is never closed under its reader."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, Lock()
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._users: dict[int, int] = {}

    @contextmanager
    def reading(self) -> Iterator[Any]:
        """Gives an ``opener``: path -> descriptor, valid until the block ends."""
        held: list[int] = []

        def opener(path: Path) -> int:
            """An open descriptor of a file."""
            with self._lock:
                descriptor = self._open.pop(path, None)
                if descriptor is None:
                    descriptor = os.open(path, os.O_RDONLY)
                self._open[path] = descriptor
                self._users[descriptor] = self._users.get(descriptor, 0) + 1
                held.append(descriptor)
                return descriptor

        try:
            yield opener
        finally:
            with self._lock:
                for descriptor in held:
                    self._users[descriptor] -= 1
                idle = [path for path, descriptor in self._open.items() if not self._users[descriptor]]
                for path in idle[: max(0, len(self._open) - self._most)]:
                    descriptor = self._open.pop(path)
                    del self._users[descriptor]
                    os.close(descriptor)

    def close(self) -> None:
        """Close every file."""
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()
            self._users.clear()


class TileStore:
    """Reader of a store: rows of the index to pixels. Safe to use from many threads.

    Args:
        path: The store.
        threads: How many threads ``read`` decodes with.

    Attributes:
        index: One row per kept tile (tiling.index), in the order that ``read`` counts.
        fingerprint: Identity of the content, as recorded by the index.

    Raises:
        StoreError: Not a store, another format version, or no up-to-date index.
    """

    def __init__(self, path: Path, threads: int = 1) -> None:
        self.path = path
        self.description = read_description(path)
        self.index, about = read_index(path)
        self.fingerprint: str = about["fingerprint"]
        encoded = self.index["slide_id"].combine_chunks()
        encoded = encoded.chunk(0) if isinstance(encoded, pa.ChunkedArray) else encoded
        self.slide_ids: list[str] = encoded.dictionary.to_pylist()
        self.slide_of_row: np.ndarray = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int32)
        self._row: np.ndarray = self.index["row"].to_numpy()
        self._arrays: dict[tuple[int, str], ShardedArray] = {}
        self._files = _Descriptors(_OPEN_SHARDS)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tiles") if threads > 1 else None

    def __len__(self) -> int:
        """Number of kept tiles."""
        return len(self._row)

    @property
    def tile_px(self) -> int:
        """Side of a tile."""
        return self.description.settings.tile_px

    @property
    def mpp(self) -> float:
        """Mean true scale of the tiles, um/px."""
        values = self.index["mpp"].cast(pa.float32()).to_numpy()
        return float(np.mean(values, dtype=np.float64)) if len(values) else float("nan")

    def labels(self) -> np.ndarray:
        """Label of every tile, int64 (N,); ``tiling.labels.UNLABELLED`` where there is none."""
        return np.asarray(self.index["label"].to_numpy(), np.int64)

    def rows_of_slide(self, number: int) -> np.ndarray:
        """Index rows of one slide of ``slide_ids``, int64, ascending: they stand together, slide after slide."""
        first, end = np.searchsorted(self.slide_of_row, (number, number + 1))
        return np.arange(first, end)

    def _array(self, slide: int, name: str) -> ShardedArray:
        known = self._arrays.get((slide, name))
        if known is None:
            codec = self.description.settings.codec if name == TILES else MASK_CODEC
            known = ShardedArray(self.path / SLIDES / self.slide_ids[slide] / name, codec)
            self._arrays[slide, name] = known
        return known

    def _read_one(self, index_row: int, name: str) -> np.ndarray:
        slide, row = int(self.slide_of_row[index_row]), int(self._row[index_row])
        try:
            with self._files.reading() as opener:
                return self._array(slide, name).read(row, opener)
        except DamageError as error:
            place = f"{self.path}: slide {self.slide_ids[slide]}, tile {row}"
            raise DamageError(
                f"{error}", place, "run `bony verify` on the store, then tile that slide again"
            ) from error

    def read(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Pixels of some tiles.

        Args:
            rows: Index rows, integer, shape (n,).
            out: Where to put them, uint8, shape (n, px, px, 3); made when not given.

        Returns:
            uint8, shape (n, px, px, 3).

        Raises:
            DamageError: A checksum differs or bytes are missing; the message names slide and tile.
        """
        if out is None:
            out = np.empty((len(rows), self.tile_px, self.tile_px, 3), np.uint8)
        target = out

        def fill(place: int) -> None:
            target[place] = self._read_one(int(rows[place]), TILES)

        list(map(fill, range(len(rows))) if self._pool is None else self._pool.map(fill, range(len(rows))))
        return out

    def read_mask(self, row: int) -> np.ndarray:
        """Mask values of one tile, uint8, shape (px, px).

        Raises:
            DamageError: The slide has no masks, or its bytes are damaged.
        """
        return self._read_one(row, MASKS)

    def close(self) -> None:
        """Close files and threads."""
        if self._pool is not None:
            self._pool.shutdown()
        self._files.close()

    def __enter__(self) -> "TileStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
