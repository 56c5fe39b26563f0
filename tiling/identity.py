"""De-identification: which slide ids may be seen, what stands for the others, and messages without file names.

A slide id comes from a file's name, and a hospital's file names hold case numbers, names and dates. An id is kept only
where it is a public one of its data set; any other becomes a keyed hash. Key and list of names are private files, which
lie outside the store.
"""

import csv
import fcntl
import hmac
import io
import os
import re
import tempfile
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from tiling.atomic import fsync_folder
from tiling.datasets import Dataset, Source, safe_id
from tiling.errors import UsageError

# TCGA barcodes of patients and of slides, with or without the file's UUID, as in the names that the GDC gives:
# https://docs.gdc.cancer.gov/Encyclopedia/pages/TCGA_Barcode/
_TCGA = (
    r"TCGA-\w{2}-\w{4}(-\d{2}[A-Z](-\d{2}(-(TS|MS|BS|DX)\w{1,2})?)?)?([._][0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})?"
)
# Data set (Dataset.name) -> the slide ids that its publishers gave to everybody; all others are private.
PUBLIC_IDS: Mapping[str, re.Pattern[str]] = {
    name: re.compile(pattern, re.ASCII)
    for name, pattern in {
        # image_id of Kaggle's PANDA challenge. Only there: elsewhere 32 hex digits may be an unkeyed MD5 of a case.
        "panda": r"[0-9a-f]{32}",
        # What stands before _Block_ in the patches' names of SICAPv2 (doi:10.17632/9xxm58dvs3), as 18B0001159D.
        "sicapv2": r"\d{2}B\d{6,8}[A-Z]?",
        # The official parts of a MedMNIST file (medmnist.com).
        "medmnist": r"train|val|test",
        "slides": _TCGA,
        "pairs": _TCGA,
        "tiles": _TCGA,
    }.items()
}
FOLDER = "[folder]"
_KEY = re.compile(r"[0-9a-f]{64}\n")
_COLUMNS = ("slide_id", "name", "path")
_LAYOUT = frozenset({"train_images", "train_label_masks"})  # names of folders that a data set's layout gives
_WORD = 4  # a shorter name may be a word or a number of any message


def private_files(store: Path, key_file: Path | None) -> tuple[Path, Path]:
    """Where the key and the list of names lie: beside the store, unless the key is given.

    Raises:
        UsageError: The key would lie inside the store, and leave with it.
    """
    store = store.resolve()
    if key_file is not None and key_file.resolve().is_relative_to(store):
        raise UsageError("the key of slide ids lies inside the store", key_file, "name a private file outside of it")
    beside = store.with_name(f"{store.name}.id-key")
    return key_file or beside, store.with_name(f"{store.name}.ids.csv")


def deidentified(dataset: Dataset, key_file: Path, names: Path, made_with: str | None = None) -> Dataset:
    """The data set under ids that may be seen: public ones as they are, others as HMAC-SHA256 of the id, 16 hex digits.

    The id comes from names, not from where the folder lies, so a folder that moves keeps its ids.

    Args:
        dataset: What ``tiling.datasets`` found.
        key_file: The key; made, once for all processes, when an id needs it and it is not there.
        names: Private CSV of replaced ids with original name and path; what it lists already stays.
        made_with: Fingerprint of the key that the store's ids were made with, where there are some already.

    Returns:
        The sources under their new ids, sorted by them; remarks without names of files and folders.

    Raises:
        UsageError: The key is unreadable, or not the one of this store, or ``names`` is no such list.
    """
    private = [source for source in dataset.sources if not _is_public(dataset.name, source.slide_id)]
    new_ids, ids = {source.slide_id: source.slide_id for source in dataset.sources}, ""
    if private:
        key = _this_key(key_file, made_with)
        ids = _fingerprint(key)
        new_ids |= {source.slide_id: hashed_id(key, source.slide_id) for source in private}
        if len(set(new_ids.values())) < len(new_ids):
            raise UsageError("two slides get the same id", key_file, "use another key for this store")
        _list_names(names, key_file, {new_ids[source.slide_id]: source for source in private})
    renamed = [replace(source, slide_id=new_ids[source.slide_id]) for source in dataset.sources]
    hidden = [new for new, old in zip(renamed, dataset.sources, strict=True) if new.slide_id != old.slide_id]
    return replace(
        dataset,
        ids=ids,
        sources=tuple(sorted(renamed, key=lambda source: source.slide_id)),
        remarks=_public_remarks(dataset.remarks, hidden, {source.images[0].parent for source in renamed}),
    )


def _public_remarks(remarks: Sequence[str], hidden: Sequence[Source], folders: Collection[Path]) -> tuple[str, ...]:
    """Remarks about any source; of what may be 100,000 files only those whose stem is in a remark are looked at."""
    text = "\n".join(remarks).lower()
    files = {path: stand_in for source in hidden for path, stand_in in _files(source).items()}
    named = _names({path: stand_in for path, stand_in in files.items() if path.stem.lower() in text})
    return tuple(_masked(remark, _folder_names(folders) | named) for remark in remarks)


def _is_public(dataset: str, slide_id: str) -> bool:
    pattern = PUBLIC_IDS.get(dataset)
    return pattern is not None and pattern.fullmatch(slide_id) is not None


def hashed_id(key: bytes, slide_id: str) -> str:
    """What stands for a private slide id: the first 16 hex digits of its HMAC-SHA256."""
    return hmac.digest(key, f"slide {slide_id}".encode(), "sha256").hex()[:16]


def key_fingerprint(key_file: Path) -> str | None:
    """What store.json may say of a key, to recognise it; None where there is no key.

    Raises:
        UsageError: The file holds no key.
    """
    return _fingerprint(_read_key(key_file)) if key_file.exists() else None


def _fingerprint(key: bytes) -> str:
    return hmac.digest(key, b"fingerprint", "sha256").hex()[:16]


def _this_key(key_file: Path, made_with: str | None) -> bytes:
    """The key, which must be the one that the store's ids were made with; a new one for a store without."""
    do = "put the right key back (--id-key), or choose another --out: under other ids every slide would be tiled twice"
    if made_with is not None and not key_file.exists():
        raise UsageError("the key that this store's slide ids were made with is missing", key_file, do)
    if not key_file.exists():
        _make_key(key_file)
    key = _read_key(key_file)
    if made_with not in (None, _fingerprint(key)):
        raise UsageError(
            f"not the key that this store's slide ids were made with (fingerprint {made_with})", key_file, do
        )
    return key


def _read_key(key_file: Path) -> bytes:
    try:
        text = key_file.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"key of slide ids cannot be read ({type(error).__name__})", key_file) from error
    if not _KEY.fullmatch(text):
        do = "it must hold 64 hex digits and a line end; name a file that is not there, and one is made"
        raise UsageError("holds no key of slide ids", key_file, do)
    return bytes.fromhex(text)


def _make_key(key_file: Path) -> None:
    """Put a new key there, unless another process was first."""
    with _private(key_file, f"{os.urandom(32).hex()}\n".encode()) as made, suppress(FileExistsError):
        # A link, unlike a rename, never replaces; unlike O_EXCL it shows the others the whole key or none.
        os.link(made, key_file)


@contextmanager
def _private(final: Path, data: bytes) -> Iterator[Path]:
    """A finished temporary file beside ``final`` that only its owner reads; removed if it still stands at the end."""
    final.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{final.name}.", dir=final.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield Path(name)
        fsync_folder(final.parent)
    finally:
        Path(name).unlink(missing_ok=True)


def _list_names(path: Path, key_file: Path, sources: Mapping[str, Source]) -> None:
    """Add sources, by new id, to the list of names."""
    with key_file.open("rb") as lock:
        with suppress(OSError):  # a file system without locks: only other slides at the same instant could get lost
            fcntl.flock(lock, fcntl.LOCK_EX)
        listed = _read_names(path)
        files = {new_id: source.images[0] for new_id, source in sources.items()}
        added = {
            new_id: dict(zip(_COLUMNS, (new_id, file.name, str(file.absolute())), strict=True))
            for new_id, file in files.items()
        }
        if added.items() <= listed.items():
            return
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for _, row in sorted((listed | added).items()))
        with _private(path, text.getvalue().encode(errors="surrogateescape")) as made:
            made.replace(path)


def _read_names(path: Path) -> dict[str, dict[str, str]]:
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        reader = csv.DictReader(file)
        columns, rows = tuple(reader.fieldnames or ()), list(reader)
    if columns != _COLUMNS or any(None in row or None in row.values() for row in rows):
        raise UsageError("is no list of slide ids", path, f"its columns must be {', '.join(_COLUMNS)}; move it away")
    return {row["slide_id"]: row for row in rows}


def public_text(text: str, source: Source) -> str:
    """A message about a source without the names of its files and folders: its slide id stands for them.

    Paths, file names and stems are found inside other words too, in any case, escaped as in URLs, ``repr`` or JSON. A
    name that could be a word of the message (lower-case letters only, or under 4 characters) is replaced only as a part
    of the source's own paths. An image among several is told by its number in the rows.
    """
    names = _names(_files(source))
    spelt = {spelling: stand_in for name, stand_in in names.items() for spelling in _spellings(name)}
    return _masked(text, spelt)


def _files(source: Source) -> dict[Path, str]:
    """A source's files -> what stands for each."""
    files = dict.fromkeys(source.images, source.slide_id)
    if len(source.images) > 1:
        files = {path: f"{source.slide_id}#{number}" for number, path in enumerate(source.images)}
    if source.image_masks is not None:
        files |= dict(zip(source.image_masks, files.values(), strict=True))
    if source.mask is not None:
        files[source.mask] = source.slide_id
    return files


def _names(files: Mapping[Path, str]) -> dict[str, str]:
    """Everything that names files and the folders above them -> what stands for it."""
    names = _folder_names({path.parent for path in files})
    for path, stand_in in files.items():
        parts = path.absolute().parts
        names |= {"/".join(parts[-length:]).replace("//", "/"): stand_in for length in range(1, len(parts) + 1)}
        names |= dict.fromkeys((str(path), path.stem, path.name.split(".")[0], safe_id(path.stem)), stand_in)
    names.pop("", None)
    return names


def _folder_names(folders: Collection[Path]) -> dict[str, str]:
    """Names of folders and of those above them, unless they could be words; paths of the folders themselves."""
    above = {part for folder in folders for part in folder.absolute().parts[1:]}
    telling = {name for name in above if not _may_be_a_word(name)} - _LAYOUT
    paths = {str(path) for folder in folders for path in (folder, folder.absolute()) if path.name}
    return dict.fromkeys(telling | paths, FOLDER)


def _spellings(name: str) -> set[str]:
    """How messages may write a name: quoted, escaped, with white space collapsed (as errors do), in other Unicode."""
    raw = os.fsencode(name)
    plain = {name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name), " ".join(name.split())}
    escaped = {repr(name)[1:-1], ascii(name)[1:-1], repr(raw)[2:-1], quote(raw), quote(raw, safe="")}
    return plain | escaped


def _may_be_a_word(name: str) -> bool:
    return len(name) < _WORD or (name.isascii() and name.isalpha() and name.islower())


def _masked(text: str, names: Mapping[str, str]) -> str:
    """Text with every name replaced, longer ones first, in one pass: what stands for a name is not looked at again."""
    lower = text.lower()
    found = sorted((name for name in names if name.lower() in lower), key=lambda name: (-len(name), name))
    if not found:
        return text
    anywhere = re.compile("|".join(f"({_pattern(name)})" for name in found))
    return anywhere.sub(lambda match: names[found[(match.lastindex or 1) - 1]], text)


def _pattern(name: str) -> str:
    """Regular expression for a name, without groups: where a message may hold it by chance, only as a word or path."""
    text = re.escape(name)
    if _may_be_a_word(name):
        return rf"(?<=[/\\'\"]){text}(?=[/\\'\"._-])"
    if name.isascii() and name.isalpha():  # "Slides" is no part of "slides"
        return text
    if name.isdigit():
        return rf"(?<!\d){text}(?!\d)"
    return f"(?i:{text})"
