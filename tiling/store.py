"""TileStore: the box that everything that trains reads. One folder per slide, one writer per slide.

STORE/store.json says what is in it, STORE/slides/<slide_id>/ is whole or not there at all, STORE/index.parquet lists
the kept tiles of all slides.
"""

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tiling import atomic
from tiling.byte_ranges import Place, RemotePath, place_of, ranges_of
from tiling.described import Format
from tiling.errors import DamageError, StoreError, UsageError
from tiling.index import SLIDES, open_index
from tiling.progress import say
from tiling.settings import TileSettings
from tiling.shard import ShardedArray
from tiling.stain import SlideColour, normaliser, read_target

TILE_STORE = Format("tile store", 2, "store.json", StoreError, "bony tile")
DESCRIPTION = TILE_STORE.file
WORK = "work"
PREVIEW = "preview.html"
TILES, MASKS = "tiles.zarr", "masks.zarr"
MASK_CODEC = "zstd"
_CHECKSUM = "sha256"
# Parts of a batch for each thread: enough that none waits long for the last.
_PARTS_EACH = 4


@dataclass(frozen=True)
class Description:
    """What STORE/store.json says. No patient data.

    Args:
        settings: How its tiles were cut.
        dataset: Which layout they come from.
        class_names: Names of the classes.
        class_map: What mask values and annotations' names mean, where the user may say so.
        ids: How slide ids came about: "as given", or the fingerprint of the key that private ones are hashed with; ""
            where all are public.
    """

    settings: TileSettings
    dataset: str
    class_names: tuple[str, ...]
    class_map: dict[str, str | None] | None = None
    ids: str = ""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        values = {
            "software": f"bony {version('bony')}",
            "dataset": self.dataset,
            "class_names": list(self.class_names),
            "class_map": self.class_map,
            "ids": self.ids,
            "settings": self.settings.to_json(),
        }
        return TILE_STORE.describe(values)


def _checksum(values: dict[str, Any]) -> str:
    """sha256 of what store.json says, its own checksum left out."""
    said = {key: value for key, value in values.items() if key != _CHECKSUM}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def read_description(store: Place) -> Description:
    """Read STORE/store.json.

    Raises:
        StoreError: It is missing, unreadable, of another format version, or does not match its own checksum.
    """
    value = TILE_STORE.read(store)
    place = str(store / DESCRIPTION)
    try:
        settings = TileSettings.from_json(value["settings"])
        names = tuple(value["class_names"])
        description = Description(settings, value["dataset"], names, value["class_map"], value["ids"])
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise StoreError(f"cannot be read ({type(error).__name__}: {error})", place) from error
    if value.get(_CHECKSUM) != _checksum(TILE_STORE.describe(value)):
        raise StoreError("does not match the checksum that it holds", place, "make the store again")
    return description


def prepare(store: Path, description: Description) -> None:
    """Make a new store, or check that an existing one was made with the same settings.

    Raises:
        StoreError: The folder holds something else, or a store with other settings; the message names the first key.
    """
    if not (store / DESCRIPTION).exists():
        if store.exists() and not _is_new(store):
            raise StoreError("exists and is no tile store", store, "choose another --out")
        (store / SLIDES).mkdir(parents=True, exist_ok=True)
        _write_description(store, description)
    known = read_description(store)
    if description.ids and not known.ids:  # the first slide whose id is private
        known = replace(known, ids=description.ids)
        _write_description(store, known)
    elif description.ids not in ("", known.ids):
        what = "store was made with other slide ids (--no-deidentify, or another --id-key)"
        raise StoreError(what, store, "use the same, or choose another --out")
    ours, theirs = description.to_json(), known.to_json()
    for key in ("dataset", "class_names", "class_map"):
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


def _write_description(store: Path, description: Description) -> None:
    values = description.to_json()
    atomic.write_json(store / DESCRIPTION, values | {_CHECKSUM: _checksum(values)})


def _is_new(store: Path) -> bool:
    """Whether a folder is empty, or holds no more than another part of the same job has just put there."""
    if not store.is_dir():
        return False
    names = {path.name for path in store.iterdir()} - {PREVIEW}
    begun = {name for name in names if name in (SLIDES, DESCRIPTION) or name.startswith(f".{DESCRIPTION}.")}
    return names == begun and (DESCRIPTION in names or SLIDES not in names or not any((store / SLIDES).iterdir()))


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by key, each threshold a key of its own; ``thresholds`` itself says whether there are any."""
    limits = settings["thresholds"] or {}
    return {**settings, "thresholds": bool(limits), **limits}


class TileStore:
    """Reader of a store: rows of the index to pixels. Safe to use from many threads.

    Args:
        store: Its folder, or a URL of any file system that fsspec knows, from which ranges of bytes are read.
        threads: How many threads ``read`` decodes with.
        stain_target: Tiles are given the H&E stains of this one (``tiling.stain``): "reference", or a JSON file of a
            slide's colour. Slides whose stains are not known are left as they are.

    Attributes:
        path: Where it is.
        fingerprint: Identity of the content, as recorded by the index.
        slide_ids: The slides that have kept tiles.
        slide_of_row: Number in ``slide_ids`` of every row, int32 (N,).
        unnormalised: With a stain target: the slides that are left as they are.

    Raises:
        StoreError: Not a store, another format version, or no up-to-date index.
    """

    def __init__(self, store: str | Path, threads: int = 1, stain_target: str | Path | None = None) -> None:
        self.path: Place = place_of(store)
        self.description = read_description(self.path)
        self._index = open_index(self.path)
        self.fingerprint = self._index.fingerprint
        self.slide_ids: list[str] = self._index.slide_id.dictionary.to_pylist()
        self.slide_of_row = np.asarray(self._index.slide_id.indices.to_numpy(zero_copy_only=False), np.int32)
        self._row: np.ndarray = self._index.read(["row"])["row"].to_numpy()
        self._folder = (self.path if isinstance(self.path, RemotePath) else self.path.resolve()) / SLIDES
        self._arrays: dict[tuple[int, str], ShardedArray] = {}
        self._files = ranges_of(self.path)
        self._parts = threads * _PARTS_EACH if threads > 1 else 1
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tiles") if threads > 1 else None
        self._normalisers = self._make_normalisers(stain_target) if stain_target is not None else {}
        self.unnormalised = (
            []
            if stain_target is None
            else [name for n, name in enumerate(self.slide_ids) if n not in self._normalisers]
        )
        if self.unnormalised:
            say(f"{store}: the stains of {len(self.unnormalised)} of {len(self.slide_ids)} slides are not known")

    def _make_normalisers(self, stain_target: str | Path) -> dict[int, Callable[[np.ndarray], np.ndarray]]:
        """For each slide whose stains are known, by number."""
        target, colours = read_target(stain_target), self._index.colours()
        return {
            number: normaliser(SlideColour.from_json(colours[slide_id]).stains, target)
            for number, slide_id in enumerate(self.slide_ids)
            if slide_id in colours
        }

    def __len__(self) -> int:
        """Number of kept tiles."""
        return len(self._row)

    @cached_property
    def index(self) -> pa.Table:
        """One row per kept tile (tiling.index), in the order that ``read`` counts."""
        return self._index.read()

    @property
    def tile_px(self) -> int:
        """Side of a tile."""
        return self.description.settings.tile_px

    @property
    def mpp(self) -> float:
        """Mean true scale of the tiles, um/px."""
        values = self._index.read(["mpp"])["mpp"].cast(pa.float32()).to_numpy()
        return float(np.mean(values, dtype=np.float64)) if len(values) else float("nan")

    def labels(self) -> np.ndarray:
        """Label of every tile, int64 (N,); ``tiling.labels.UNLABELLED`` where there is none."""
        return np.asarray(self._index.read(["label"])["label"].to_numpy(), np.int64)

    def rows_of_slide(self, number: int) -> np.ndarray:
        """Index rows of one slide of ``slide_ids``, int64, ascending: they stand together, slide after slide."""
        first, end = np.searchsorted(self.slide_of_row, (number, number + 1))
        return np.arange(first, end)

    def _array(self, slide: int, name: str) -> ShardedArray:
        known = self._arrays.get((slide, name))
        if known is None:
            codec = self.description.settings.codec if name == TILES else MASK_CODEC
            known = ShardedArray(self._folder / self.slide_ids[slide] / name, codec)
            self._arrays[slide, name] = known
        return known

    def _read_slide(self, slide: int, rows: np.ndarray, out: list[np.ndarray], name: str) -> None:
        """Some items of one slide's array, ascending."""
        try:
            self._array(slide, name).read(self._row[rows].tolist(), out, self._files)
        except DamageError as error:
            place = f"{self.path}: slide {self.slide_ids[slide]}, {error.where}"
            raise DamageError(
                error.what, place, "run `bony verify` on the store, then tile that slide again"
            ) from error

    def read(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Pixels of some tiles.

        Args:
            rows: Index rows, integer, shape (n,).
            out: Where to put them, uint8, shape (n, px, px, 3), contiguous; made when not given.

        Returns:
            uint8, shape (n, px, px, 3).

        Raises:
            DamageError: A checksum differs or bytes are missing; the message names slide and tile.
        """
        shape = (len(rows), self.tile_px, self.tile_px, 3)
        target = np.empty(shape, np.uint8) if out is None else out
        if target.shape != shape or target.dtype != np.uint8 or not target.flags.c_contiguous:
            raise ValueError(f"out must be contiguous uint8 of shape {shape}, is {target.dtype} {target.shape}")
        rows = np.asarray(rows, np.int64)
        slides = self.slide_of_row[rows]
        order = np.lexsort((self._row[rows], slides))  # as they lie on disk

        def fill(places: np.ndarray) -> None:
            """Read the tiles of some places of the batch."""
            for group in np.split(places, np.flatnonzero(np.diff(slides[places])) + 1):
                slide, tiles = int(slides[group[0]]), [target[place] for place in group.tolist()]
                self._read_slide(slide, rows[group], tiles, TILES)
                if slide in self._normalisers:
                    for tile in tiles:
                        tile[:] = self._normalisers[slide](tile)

        parts = [part for part in np.array_split(order, self._parts) if len(part)]
        list(map(fill, parts) if self._pool is None else self._pool.map(fill, parts))
        return target

    def read_mask(self, row: int) -> np.ndarray:
        """Mask values of one tile, uint8, shape (px, px).

        Raises:
            DamageError: The slide has no masks, or its bytes are damaged.
        """
        mask = np.empty((self.tile_px, self.tile_px), np.uint8)
        self._read_slide(int(self.slide_of_row[row]), np.array([row]), [mask], MASKS)
        return mask

    def close(self) -> None:
        """Close files and threads."""
        if self._pool is not None:
            self._pool.shutdown()
        self._files.close()

    def __enter__(self) -> "TileStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
