"""The Parquet index over all slides of a store: one row per kept tile, always rebuildable from the slides.

Slide-level facts (provider, grade, mpp) stand in dictionary columns, so that the index alone answers "which tiles".
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tiling import atomic
from tiling.byte_ranges import Place
from tiling.errors import StoreError

INDEX, INDEX_SUM = "index.parquet", "index.sha256"
ROWS = "rows.parquet"
SLIDES = "slides"
METADATA_KEY, COLOURS_KEY = b"bony", b"bony_colours"
COVERAGE = "coverage_"
COLOUR = "colour"
_TILE_COLUMNS = ("image", "x", "y", "label", "split", "tissue_fraction")
_SLIDE_COLUMNS = {
    "slide_id": pa.string(), "provider": pa.string(), "gleason_score": pa.string(), "isup_grade": pa.int8(),
    "mpp": pa.float32(),
}  # fmt: skip
# A shared file system answers slowly, but many at a time.
_THREADS = 8


def slide_facts(table: pa.Table) -> dict[str, Any]:
    """Slide-level facts of a slide's rows."""
    facts: dict[str, Any] = json.loads(table.schema.metadata[METADATA_KEY])
    return facts


def is_plain_name(name: object) -> bool:
    """Whether a slide's id is the name of a folder, and nothing that leads elsewhere."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def _for_each(function: Callable[[Path], Any], folders: Sequence[Path]) -> list[Any]:
    """Results in the folders' order; each thread takes every so manieth."""
    results: list[Any] = [None] * len(folders)

    def some(first: int) -> None:
        for number in range(first, len(folders), _THREADS):
            results[number] = function(folders[number])

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(some, range(_THREADS)))
    return results


def slide_folders(store: Path) -> list[Path]:
    """Finished slides of a store, sorted by id."""
    root = store / SLIDES
    if not root.is_dir():
        return []
    folders = sorted(root.iterdir())
    finished = _for_each(lambda folder: (folder / atomic.COMPLETE).is_file(), folders)
    return [folder for folder, whole in zip(folders, finished, strict=True) if whole]


def fingerprint(store: Path) -> str:
    """Identity of a store's content: sha256 over its slides' ids and digests; the index does not count."""
    return _fingerprint(slide_folders(store))


def _fingerprint(folders: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for folder, own in zip(folders, _for_each(atomic.box_digest, folders), strict=True):
        digest.update(f"{folder.name} {own}\n".encode())
    return digest.hexdigest()


def _slide_part(folder: Path) -> tuple[pa.Table, dict[str, Any]]:
    """Kept tiles of one slide, numbered as in its arrays, and its facts."""
    file = pq.ParquetFile(pa.BufferReader(atomic.read_listed(folder, ROWS)))
    coverage = [name for name in file.schema_arrow.names if name.startswith(COVERAGE)]
    table = file.read([*_TILE_COLUMNS, *coverage, "kept"], use_threads=False)  # the slides have threads
    kept = table.filter(table["kept"]).drop_columns("kept")
    numbers = pa.array(np.arange(len(kept), dtype=np.int32))
    return kept.append_column("row", numbers).replace_schema_metadata(None), slide_facts(table)


def build_index(store: Path) -> pa.Table:
    """Write STORE/index.parquet from the slides' rows, atomically, and return it.

    Raises:
        StoreError: The store has no finished slide.
        DamageError: The rows of a slide are damaged.
    """
    folders = slide_folders(store)
    if not folders:
        raise StoreError("no finished slide in this store", store, "tile some slides first")
    parts = _for_each(_slide_part, folders)
    table = pa.concat_tables([part for part, _ in parts], promote_options="default").combine_chunks()
    facts = [facts for part, facts in parts if len(part)]
    slide_of_row = pa.array(np.repeat(np.arange(len(facts)), [len(part) for part, _ in parts if len(part)]))
    for name, kind in _SLIDE_COLUMNS.items():
        of_slides = pa.array([fact[name] for fact in facts], kind).dictionary_encode()
        table = table.append_column(name, of_slides.take(slide_of_row))
    about = {"slides": [folder.name for folder in folders], "fingerprint": _fingerprint(folders)}
    colours = {fact["slide_id"]: fact[COLOUR] for fact in facts if fact.get(COLOUR)}
    metadata = {METADATA_KEY: about, COLOURS_KEY: colours}
    table = table.replace_schema_metadata({key: json.dumps(value).encode() for key, value in metadata.items()})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    # A crash between the two leaves an index that does not match: it is refused, and rebuilt by `bony index`.
    atomic.write_bytes(store / INDEX, data)
    atomic.write_bytes(store / INDEX_SUM, _sum_line(data))
    return table


def _sum_line(data: bytes) -> bytes:
    """What STORE/index.sha256 holds, as sha256sum writes it."""
    return f"{hashlib.sha256(data).hexdigest()}  {INDEX}\n".encode()


@dataclass(frozen=True)
class Index:
    """An index whose checksum is right and whose slides are there; its columns are decoded when they are asked for.

    Args:
        slides: Ids of all finished slides.
        fingerprint: Identity of the store's content.
        slide_id: Slide of every row, a dictionary array.
    """

    slides: tuple[str, ...]
    fingerprint: str
    slide_id: pa.DictionaryArray
    _data: bytes

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Some columns, or all."""
        return self._open().read(columns)

    def _open(self) -> pq.ParquetFile:
        """Each caller its own: two threads may ask."""
        return pq.ParquetFile(pa.BufferReader(self._data))

    def colours(self) -> dict[str, Any]:
        """What ``tiling.stain`` knows of each slide, by id; slides of which it knows nothing are left out."""
        found: dict[str, Any] = json.loads(self._open().schema_arrow.metadata.get(COLOURS_KEY, b"{}"))
        return found


def open_index(store: Place) -> Index:
    """The index of a store; behind a URL, which nobody can list, its slides are taken to be there.

    Raises:
        StoreError: There is none, it does not match its checksum, it does not list the slides that are there, or it
            names what is no slide of the store.
    """
    path, do = store / INDEX, f"run `bony index {store}`"
    data = _checked_bytes(store, do)
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        about = json.loads(file.schema_arrow.metadata[METADATA_KEY])
        encoded = file.read(["slide_id"])["slide_id"].combine_chunks()
        slides, named = about["slides"], encoded.dictionary.to_pylist()
        index = Index(tuple(slides), about["fingerprint"], encoded, data)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"index cannot be read ({error})", str(path), do) from error
    if isinstance(store, Path):
        present = [folder.name for folder in slide_folders(store)]
        if present != slides:
            raise StoreError(f"index lists {len(slides)} slides, the store has {len(present)}", store, do)
    strange = [name for name in slides if not is_plain_name(name)] or sorted(set(named) - set(slides))
    if strange:
        raise StoreError(f"index names {strange[0]!r}, which is no slide of this store", str(path), do)
    return index


def _checked_bytes(store: Place, do: str) -> bytes:
    """Bytes of STORE/index.parquet that match STORE/index.sha256."""
    path = store / INDEX
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise StoreError("the store has no index", str(store), do) from error
    except OSError as error:
        raise StoreError(f"cannot be read ({error})", str(path), do) from error
    try:
        stated = (store / INDEX_SUM).read_bytes()
    except OSError as error:
        raise StoreError(f"its checksum cannot be read ({error})", str(path), do) from error
    if _sum_line(data) != stated:
        raise StoreError(f"sha256 differs from {INDEX_SUM}", str(path), do)
    return data


def read_index(store: Place) -> tuple[pa.Table, dict[str, Any]]:
    """The whole index and what it says of itself (``slides``, ``fingerprint``).

    Raises:
        StoreError: As ``open_index``.
    """
    index = open_index(store)
    return index.read(), {"slides": list(index.slides), "fingerprint": index.fingerprint}
