"""Verify and repair a store: files against checksums, tile counts against rows, the index against the slides."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tiling import atomic
from tiling.errors import DamageError, StoreError
from tiling.index import (
    INDEX,
    INDEX_SUM,
    ROWS,
    SLIDES,
    build_index,
    fingerprint,
    is_plain_name,
    open_index,
    slide_facts,
    slide_folders,
)  # fmt: skip
from tiling.progress import progress
from tiling.quarantine import QUARANTINE, read_quarantine
from tiling.shard import ShardedArray
from tiling.store import TILES, WORK, read_description


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


def _slides(store: Path) -> dict[Path, list[str]]:
    """Everything wrong with each slide's folder of a store."""
    codec = read_description(store).settings.codec
    folders = sorted(folder for folder in (store / SLIDES).glob("*") if folder.is_dir() or folder.is_symlink())
    found = {}
    with progress("verifying", len(folders), "slides") as advance:
        for folder in folders:
            is_link = folder.is_symlink()  # what it leads to is not looked at
            found[folder] = [f"{folder}: is a symbolic link"] if is_link else _slide_problems(folder, codec)
            advance()
    return found


def _index_problem(store: Path) -> str:
    """What is wrong with the index, or ""."""
    try:
        stated = open_index(store).fingerprint
    except StoreError as error:
        return str(error)
    is_current = stated == fingerprint(store)
    return "" if is_current else f"{store / INDEX}: index is older than the slides; run `bony index {store}`"


def _quarantine_problems(store: Path) -> list[str]:
    """Lines that are none, or that name what can be no slide."""
    try:
        named = [line["slide_id"] for line in read_quarantine(store)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{store / QUARANTINE}: cannot be read ({type(error).__name__}: {error})"]
    return [f"{store / QUARANTINE}: {name!r} can be no slide's id" for name in named if not is_plain_name(name)]


def store_problems(store: Path) -> list[str]:
    """Everything wrong with a store, one line each; empty when it is sound.

    Raises:
        StoreError: It is no store, of another format version, or its store.json is damaged.
    """
    return [line for lines in _slides(store).values() for line in lines] + listing_problems(store)


def listing_problems(store: Path) -> list[str]:
    """What is wrong with a store's index and quarantine list, one line each; its slides are not read."""
    problem = _index_problem(store)
    return ([problem] if problem else []) + _quarantine_problems(store)


def repair(store: Path) -> list[str]:
    """Move broken slides to STORE/work, where the next `bony tile` makes them again, and rebuild the index if need be.

    Nothing is deleted but an index of no slide.

    Returns:
        What was done, one line each; empty when the store is sound.

    Raises:
        StoreError: It is no store, of another format version, or its store.json is damaged: that takes a new store.
    """
    done = []
    for folder, problems in _slides(store).items():
        if problems:
            aside = atomic.set_aside(folder, store / WORK)
            done.append(f"{problems[0]}; moved to {aside}: tile that slide again")
    if not slide_folders(store):
        gone = [path for name in (INDEX, INDEX_SUM) if (path := store / name).exists()]
        for path in gone:
            path.unlink()
        return done + [f"{path}: removed, no slide is left" for path in gone]
    if problem := _index_problem(store):
        build_index(store)
        done.append(f"{problem}; rebuilt")
    return done
