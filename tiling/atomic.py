"""Files and folders that are whole or not there at all: temporary name, fsync, rename, sha256.

A *box* is a folder whose last written file lists the sha256 of every other file in it, in ``sha256sum``'s own format:
``COMPLETE``, or ``SHA256SUMS`` in a bundle, where partners look for that name. A box is built under a temporary name
and renamed into place, so a reader never sees half of one.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tiling.errors import DamageError

COMPLETE, SUMS = "COMPLETE", "SHA256SUMS"
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


def box_files(folder: Path, listing: str = COMPLETE) -> list[str]:
    """Relative POSIX paths of all files of a box but its listing, sorted."""
    files = (path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    return sorted(name for path in files if (name := path.relative_to(folder).as_posix()) != listing)


def _listed(digests: Mapping[str, str]) -> bytes:
    """The one way to write a listing."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())).encode()


def read_listing(folder: Path, listing: str = COMPLETE) -> dict[str, str]:
    """Digest of every file of a box, by name.

    Raises:
        DamageError: The listing is missing, or not byte for byte as it would be written.
    """
    path = folder / listing
    try:
        data = path.read_bytes()
        pairs = [line.split("  ", 1) for line in data.decode().splitlines()]
        digests = {name: digest for digest, name in pairs}
    except FileNotFoundError as error:
        raise DamageError("missing", path) from error
    except (OSError, ValueError) as error:
        raise DamageError("unreadable", path) from error
    if _listed(digests) != data:
        raise DamageError("unreadable", path)
    return digests


def seal(folder: Path, listing: str = COMPLETE) -> None:
    """Fsync every file of a finished box and write its listing last."""
    digests = {}
    for name in box_files(folder, listing):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    for path in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
        fsync_folder(path)
    write_bytes(folder / listing, _listed(digests))


def damaged_files(folder: Path, listing: str = COMPLETE) -> list[str]:
    """Everything wrong with a sealed box, one line per file; empty when it is sound.

    Lists files that are missing, changed, links (which may lead out of the box) or not in the listing, and a missing
    or unreadable listing.
    """
    try:
        digests = read_listing(folder, listing)
    except DamageError as error:
        return [str(error)]
    present = set(box_files(folder, listing))
    found = [f"{folder / name}: not listed in {listing}" for name in sorted(present - digests.keys())]
    for name, digest in sorted(digests.items()):
        if name not in present:  # a name that leads out of the box is never present
            found.append(f"{folder / name}: missing")
        elif (folder / name).is_symlink():
            found.append(f"{folder / name}: is a symbolic link")
        elif sha256_file(folder / name) != digest:
            found.append(f"{folder / name}: sha256 differs from {listing}")
    return found


def require_sound(folder: Path, listing: str = COMPLETE) -> None:
    """Raise DamageError naming the first damaged file of a sealed box, before anything in it is parsed."""
    found = damaged_files(folder, listing)
    if found:
        raise DamageError(found[0], do="run `bony verify` for the whole list, then redo that part")


def read_listed(folder: Path, name: str) -> bytes:
    """Bytes of one file of a sealed box, checked against ``COMPLETE``.

    Raises:
        DamageError: The file or ``COMPLETE`` is missing, unreadable or changed.
    """
    digest = read_listing(folder).get(name)
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise DamageError(f"cannot be read ({type(error).__name__}: {error})", folder / name) from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise DamageError(f"sha256 differs from {COMPLETE}", folder / name, "redo that part")
    return data


def box_digest(folder: Path, listing: str = COMPLETE) -> str:
    """Identity of a sealed box: sha256 of its listing, which holds every other file's."""
    return sha256_file(folder / listing)


@contextmanager
def building(final: Path, work: Path, listing: str = COMPLETE, token: str | None = None) -> Iterator[Path]:
    """Build a box in a fresh folder under ``work``; seal it and rename it to ``final`` on success.

    On an error the half-made folder is removed and nothing stands at ``final``. When another writer was first,
    its box stays and ours is dropped. The fresh folder is named after ``token``, or this process.
    """
    temporary = work / f"{final.name}.{token or os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    while not temporary.is_dir():
        with suppress(FileNotFoundError):  # another writer has just removed the empty ``work``
            temporary.mkdir(parents=True)
    try:
        yield temporary
        seal(temporary, listing)
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.rename(final)
        except OSError:
            if not (final / listing).exists():
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
