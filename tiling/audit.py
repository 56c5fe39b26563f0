"""Is a store sound? Files against checksums, tile counts against rows, the index against the slides."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tiling import atomic
from tiling.errors import DamageError, StoreError
from tiling.index import INDEX, ROWS, SLIDES, fingerprint, read_index, slide_facts
from tiling.progress import progress
from tiling.shard import ShardedArray
from tiling.store import TILES, read_description


def _slide_problems(folder: Path, codec: str) -> list[str]:
    """Everything wrong with one slide's folder."""
    found = atomic.damaged_files(folder)
    if found:
        return found
    try:
        rows = pq.read_table(folder / ROWS)
        stated = slide_facts(rows)["slide_id"]
        tiles = ShardedArray(folder / TILES, codec)
    except (DamageError, pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
        return [f"{folder}: {error}"]
    kept = sum(rows["kept"].to_pylist())
    if tiles.shape[0] != kept:
        found.append(f"{folder}: {tiles.shape[0]} tiles, but {kept} kept rows")
    if stated != folder.name:
        found.append(f"{folder}: rows say slide {stated}")
    return found


def store_problems(store: Path) -> list[str]:
    """Everything wrong with a store, one line each; empty when it is sound.

    Raises:
        StoreError: It is no store, or of another format version.
    """
    codec = read_description(store).settings.codec
    folders = sorted(folder for folder in (store / SLIDES).glob("*") if folder.is_dir() or folder.is_symlink())
    found = []
    with progress("verifying", len(folders), "slides") as advance:
        for folder in folders:
            found += [f"{folder}: is a symbolic link"] if folder.is_symlink() else _slide_problems(folder, codec)
            advance()
    try:
        _, about = read_index(store)
    except StoreError as error:
        return [*found, str(error)]
    if not found and about["fingerprint"] != fingerprint(store):
        found.append(f"{store / INDEX}: index is older than the slides; run `bony index {store}`")
    return found
