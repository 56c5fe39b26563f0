"""Which DICOM files belong to one slide: the instances of a series, told by SeriesInstanceUID.

A slide in DICOM is a folder of files, one per level and more for label and overview; OpenSlide opens the whole series
from any of them. Only the head of each file is read, up to the tag (DICOM PS3.5, 7.1; PS3.10, 7.1).
"""

import mmap
from collections.abc import Sequence
from pathlib import Path

from tiling.errors import SlideError

DICOM_SUFFIX = ".dcm"
_MAGIC_AT, _MAGIC = 128, b"DICM"
_SERIES = (0x0020, 0x000E)
_LONG_VRS = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
_ITEM_GROUP, _UNDEFINED = 0xFFFE, 0xFFFFFFFF
_ITEM_END, _SEQUENCE_END = 0xE00D, 0xE0DD


def one_per_series(files: Sequence[Path]) -> list[Path]:
    """The first file, by name, of each series in each folder.

    A file that does not say its series stands for itself: it will be quarantined, and the others go on.
    """
    first: dict[tuple[Path, str], Path] = {}
    for file in sorted(files):
        try:
            series = series_of(file)
        except SlideError:
            series = f"none: {file.name}"
        first.setdefault((file.parent, series), file)
    return list(first.values())


def series_of(path: Path) -> str:
    """SeriesInstanceUID of a DICOM file with little-endian elements, as all slides have.

    Raises:
        SlideError: It is no DICOM, or does not say its series.
    """
    if path.stat().st_size <= _MAGIC_AT:
        raise SlideError("not a DICOM file: it is too short", path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[_MAGIC_AT : _MAGIC_AT + len(_MAGIC)] != _MAGIC:
            raise SlideError("not a DICOM file: it does not begin like one", path)
        at, depth = _MAGIC_AT + len(_MAGIC), 0
        while at + 8 <= len(data):
            tag = _number(data, at, 2), _number(data, at + 2, 2)
            value, length, nests = _element(data, at)
            if depth == 0 and tag == _SERIES:
                return data[value : value + length].rstrip(b"\0 ").decode("ascii", "replace")
            if depth == 0 and tag > _SERIES:
                break
            # Sequences and items of unknown length are gone through, all others skipped.
            depth += nests - (tag in ((_ITEM_GROUP, _ITEM_END), (_ITEM_GROUP, _SEQUENCE_END)))
            at = value if nests else value + length
    raise SlideError("its DICOM header does not say which series it belongs to", path)


def _element(data: mmap.mmap, at: int) -> tuple[int, int, bool]:
    """Where the value of the element at ``at`` begins, its length, and whether it nests others up to an end mark."""
    group, vr = _number(data, at, 2), data[at + 4 : at + 6]
    if group == _ITEM_GROUP or not (vr.isalpha() and vr.isupper()):
        value, length = at + 8, _number(data, at + 4, 4)
    elif vr in _LONG_VRS:
        value, length = at + 12, _number(data, at + 8, 4)
    else:
        value, length = at + 8, _number(data, at + 6, 2)
    return value, length, length == _UNDEFINED


def _number(data: mmap.mmap, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "little")
