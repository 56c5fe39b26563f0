"""The Parquet index over all slides of a store: one row per kept tile, always rebuildable from the slides.

Slide-level facts (provider, grade, mpp) stand in dictionary columns, so that the index alone answers "which tiles".
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tiling import atomic
from tiling.errors import StoreError

INDEX, INDEX_SUM = "index.parquet", "index.sha256"
ROWS = "rows.parquet"
SLIDES = "slides"
METADATA_KEY = b"bony"
COVERAGE = "coverage_"
_TILE_COLUMNS = ("image", "x", "y", "label", "split", "tissue_fraction")
_SLIDE_COLUMNS = ("provider", "isup_grade", "gleason_score", "mpp")


def rows_table(columns: dict[str, Any], coverage_names: tuple[str, ...], slide: dict[str, Any]) -> pa.Table:
    """The table of one slide's candidates.

    Args:
        columns: Column name -> values, one per candidate; ``coverage`` holds a tuple of shares or an empty tuple.
        coverage_names: Names of the mask's values; empty without a mask.
        slide: Slide-level facts, stored in the table's metadata.
    """
    types = {
        "image": pa.int32(), "x": pa.int64(), "y": pa.int64(), "kept": pa.bool_(), "reason": pa.string(),
        "tissue_fraction": pa.float32(), "empty": pa.float32(), "edges": pa.float32(), "texture": pa.float32(),
        "label": pa.int16(), "split": pa.string(),
    }  # fmt: skip
    table = pa.table({name: pa.array(columns[name], kind) for name, kind in types.items()})
    for position, name in enumerate(coverage_names):
        shares = [share[position] if share else None for share in columns["coverage"]]
        table = table.append_column(f"{COVERAGE}{name}", pa.array(shares, pa.float32()))
    return table.replace_schema_metadata({METADATA_KEY: json.dumps(slide, sort_keys=True).encode()})


def slide_facts(table: pa.Table) -> dict[str, Any]:
    """Slide-level facts of a slide's rows."""
    facts: dict[str, Any] = json.loads(table.schema.metadata[METADATA_KEY])
    return facts


def slide_folders(store: Path) -> list[Path]:
    """Finished slides of a store, sorted by id."""
    root = store / SLIDES
    if not root.is_dir():
        return []
    return sorted(folder for folder in root.iterdir() if (folder / atomic.COMPLETE).is_file())


def fingerprint(store: Path) -> str:
    """Identity of a store's content: sha256 over its slides' ids and digests; the index does not count."""
    digest = hashlib.sha256()
    for folder in slide_folders(store):
        digest.update(f"{folder.name} {atomic.box_digest(folder)}\n".encode())
    return digest.hexdigest()


def _slide_part(folder: Path) -> pa.Table:
    """Index rows of one slide: its kept tiles, numbered as in its arrays."""
    table = pq.read_table(pa.BufferReader(atomic.read_listed(folder, ROWS)))
    facts = slide_facts(table)
    kept = table.filter(table["kept"])
    coverage = [name for name in kept.column_names if name.startswith(COVERAGE)]
    part = kept.select([*_TILE_COLUMNS, *coverage])
    part = part.append_column("row", pa.array(range(len(part)), pa.int32()))
    count = len(part)
    constants = {
        "slide_id": (facts["slide_id"], pa.string()), "provider": (facts["provider"], pa.string()),
        "gleason_score": (facts["gleason_score"], pa.string()), "isup_grade": (facts["isup_grade"], pa.int8()),
        "mpp": (facts["mpp"], pa.float32()),
    }  # fmt: skip
    for name, (value, kind) in constants.items():
        column = pa.repeat(pa.scalar(value, kind), count)
        part = part.append_column(name, pc.dictionary_encode(column))
    return part.replace_schema_metadata(None)


def build_index(store: Path) -> pa.Table:
    """Write STORE/index.parquet from the slides' rows, atomically, and return it.

    Raises:
        StoreError: The store has no finished slide.
        DamageError: The rows of a slide are damaged.
    """
    folders = slide_folders(store)
    if not folders:
        raise StoreError("no finished slide in this store", store, "tile some slides first")
    table = pa.concat_tables(
        [_slide_part(folder) for folder in folders], promote_options="default"
    ).unify_dictionaries()
    about = {"slides": [folder.name for folder in folders], "fingerprint": fingerprint(store)}
    table = table.replace_schema_metadata({METADATA_KEY: json.dumps(about).encode()})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    # A crash between the two leaves an index that does not match: it is refused, and rebuilt by `bony index`.
    atomic.write_bytes(store / INDEX, data)
    atomic.write_bytes(store / INDEX_SUM, f"{hashlib.sha256(data).hexdigest()}  {INDEX}\n".encode())
    return table


def read_index(store: Path) -> tuple[pa.Table, dict[str, Any]]:
    """The index and what it says of itself (``slides``, ``fingerprint``).

    Raises:
        StoreError: There is none, it does not match its checksum, or it does not list the slides that are there.
    """
    path = store / INDEX
    if not path.is_file():
        raise StoreError("the store has no index", store, f"run `bony index {store}`")
    data = path.read_bytes()
    try:
        stated = (store / INDEX_SUM).read_text().split()[0]
    except (OSError, ValueError, IndexError) as error:
        raise StoreError(f"its checksum cannot be read ({error})", path, f"run `bony index {store}`") from error
    if hashlib.sha256(data).hexdigest() != stated:
        raise StoreError(f"sha256 differs from {INDEX_SUM}", path, f"run `bony index {store}`")
    try:
        table = pq.read_table(pa.BufferReader(data))
        about: dict[str, Any] = json.loads(table.schema.metadata[METADATA_KEY])
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"index cannot be read ({error})", path, f"run `bony index {store}`") from error
    present = [folder.name for folder in slide_folders(store)]
    if present != about["slides"]:
        raise StoreError(
            f"index lists {len(about['slides'])} slides, the store has {len(present)}",
            store,
            f"run `bony index {store}`",
        )
    return table, about
