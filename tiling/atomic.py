"""Files and folders that are whole or not there at all: temporary name, fsync, rename, sha256.

A *box* is a folder whose last written file is ``COMPLETE``: JSON with the sha256 of every other file in it.
A box is built under a temporary name and renamed into place, so a reader never sees half of one.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tiling.errors import DamageError

COMPLETE = "COMPLETE"
_CHUNK = 1 << 20


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_folder(folder: Path) -> None:
    """Make a rename or a new name inside ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` atomically: a crash leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by indented JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def box_files(folder: Path) -> list[str]:
    """Relative POSIX paths of all files of a box but ``COMPLETE``, sorted."""
    files = (path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    return sorted(name for path in files if (name := path.relative_to(folder).as_posix()) != COMPLETE)


def seal(folder: Path) -> None:
    """Fsync every file of a finished box and write ``COMPLETE`` last."""
    digests = {}
    for name in box_files(folder):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    for path in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
        fsync_folder(path)
    write_json(folder / COMPLETE, {"sha256": digests})


def damaged_files(folder: Path) -> list[str]:
    """Everything wrong with a sealed box, one line per file; empty when it is sound.

    Lists files that are missing, changed or not in the list, and a missing or unreadable ``COMPLETE``.
    """
    try:
        digests = json.loads((folder / COMPLETE).read_bytes())["sha256"]
    except FileNotFoundError:
        return [f"{folder / COMPLETE}: missing"]
    except (ValueError, KeyError, TypeError):
        return [f"{folder / COMPLETE}: unreadable"]
    present = set(box_files(folder))
    found = [f"{folder / name}: not listed in {COMPLETE}" for name in sorted(present - digests.keys())]
    for name, digest in sorted(digests.items()):
        if name not in present:
            found.append(f"{folder / name}: missing")
        elif sha256_file(folder / name) != digest:
            found.append(f"{folder / name}: sha256 differs from {COMPLETE}")
    return found


def require_sound(folder: Path) -> None:
    """Raise DamageError naming the first damaged file of a sealed box, before anything in it is parsed."""
    found = damaged_files(folder)
    if found:
        raise DamageError(found[0], do="run `bony verify` for the whole list, then redo that part")


def read_listed(folder: Path, name: str) -> bytes:
    """Bytes of one file of a sealed box, checked against ``COMPLETE``.

    Raises:
        DamageError: The file or ``COMPLETE`` is missing, unreadable or changed.
    """
    try:
        digest = json.loads((folder / COMPLETE).read_bytes())["sha256"][name]
        data = (folder / name).read_bytes()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamageError(f"cannot be read ({type(error).__name__}: {error})", folder / name) from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise DamageError(f"sha256 differs from {COMPLETE}", folder / name, "redo that part")
    return data


def box_digest(folder: Path) -> str:
    """Identity of a sealed box: sha256 of its ``COMPLETE`` file, which lists every other file's."""
    return sha256_file(folder / COMPLETE)


@contextmanager
def building(final: Path, work: Path) -> Iterator[Path]:
    """Build a box in a fresh folder under ``work``; seal it and rename it to ``final`` on success.

    On an error the half-made folder is removed and nothing stands at ``final``. When another writer was first,
    its box stays and ours is dropped.
    """
    temporary = work / f"{final.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    while not temporary.is_dir():
        with suppress(FileNotFoundError):  # another writer has just removed the empty ``work``
            temporary.mkdir(parents=True)
    try:
        yield temporary
        seal(temporary)
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.rename(final)
        except OSError:
            if not (final / COMPLETE).exists():
                raise
        fsync_folder(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # another writer may still be at work in it
            work.rmdir()


def stands(final: Path, work: Path) -> bool:
    """Whether a sound box stands at ``final``; a broken one is set aside under ``work``, so that it can be redone."""
    if not final.exists():
        return False
    if not damaged_files(final):
        return True
    set_aside(final, work)
    return False


def set_aside(folder: Path, work: Path) -> Path:
    """Move a broken box out of the way, under ``work``; returns where it lies now."""
    work.mkdir(parents=True, exist_ok=True)
    number = 0
    while (aside := work / f"{folder.name}.broken{number}").exists():
        number += 1
    folder.rename(aside)
    fsync_folder(folder.parent)
    return aside
