"""A TIFF's list of pages walked byte by byte, before anything that trusts it: no circle, not too long, not cut.

Values of tags are left alone, but for how many segments a page claims and where its SubIFDs lie (TIFF 6.0; BigTIFF;
NDPI is classic TIFF whose offsets of pages have 8 bytes, as OpenSlide describes it).
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tiling.errors import SlideError
from tiling.limits import Limits
from tiling.pyramid import COPY_AGAIN

_SEGMENT_TAGS = frozenset({273, 279, 324, 325, 65426})
_SUB_PAGES = 330
_SUB_PAGE_BYTES = {4: 4, 13: 4, 16: 8, 18: 8}
_MAX_TAGS = 4096


@dataclass(frozen=True)
class _Layout:
    """Sizes of a TIFF's fields: struct formats, and where the offset of the first page stands."""

    order: str
    count: str
    tag: str
    offset: str
    first: int


_CLASSIC, _BIG, _NDPI = ("H", "HHI4s", "I", 4), ("Q", "HHQ8s", "Q", 8), ("H", "HHI4s", "Q", 4)


def is_tiff(path: Path) -> bool:
    """Whether a file begins like a TIFF, whatever its name."""
    with path.open("rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def check_pages(path: Path, limits: Limits) -> None:
    """Walk the pages and SubIFDs of a TIFF.

    Raises:
        SlideError: No TIFF, pages in a circle, more pages or segments than the limits, or a list that is cut.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        _Walk(file, path, limits).run()
    finally:
        os.close(file)


class _Walk:
    """One walk over a file's pages."""

    def __init__(self, file: int, path: Path, limits: Limits) -> None:
        self._file, self._path, self._limits = file, path, limits
        self._size = os.fstat(file).st_size
        self._seen: set[int] = set()
        self._layout = self._read_layout()

    def run(self) -> None:
        (at,) = self._unpack(self._layout.offset, self._layout.first)
        while at:
            at, sub_pages = self._page(at)
            for sub_page in sub_pages:
                self._page(sub_page)

    def _read_layout(self) -> _Layout:
        start = os.pread(self._file, 4, 0)
        order = {b"II": "<", b"MM": ">"}.get(start[:2])
        version = struct.unpack(order + "H", start[2:])[0] if order and len(start) == 4 else 0
        if order is None or version not in (42, 43):
            raise SlideError("not a TIFF: it does not begin like one", self._path)
        if version == 43:
            return _Layout(order, *_BIG)
        return _Layout(order, *(_NDPI if self._path.suffix.lower() == ".ndpi" and order == "<" else _CLASSIC))

    def _unpack(self, fields: str, at: int) -> tuple[int, ...]:
        """Integers of the file; the list of pages does not end where they lie past it."""
        size = struct.calcsize(self._layout.order + fields)
        data = os.pread(self._file, size, at) if at <= self._size else b""
        if len(data) != size:
            raise SlideError(
                f"list of pages does not end: it goes on at byte {at} of {self._size}", self._path, COPY_AGAIN
            )
        return struct.unpack(self._layout.order + fields, data)

    def _page(self, at: int) -> tuple[int, list[int]]:
        """Offsets of the next page and of this one's SubIFDs."""
        if at in self._seen:
            raise SlideError(f"list of pages runs in a circle: it comes back to byte {at}", self._path)
        self._seen.add(at)
        self._limits.check_pages(len(self._seen), self._path)
        layout = self._layout
        (count,) = self._unpack(layout.count, at)
        if count > _MAX_TAGS:
            raise SlideError(f"page at byte {at} claims {count:,} tags, limit is {_MAX_TAGS:,}", self._path)
        tags = at + struct.calcsize("=" + layout.count)
        size = struct.calcsize("=" + layout.tag)
        (following,) = self._unpack(layout.offset, tags + count * size)
        block = os.pread(self._file, count * size, tags)
        return following, list(self._sub_pages(block))

    def _sub_pages(self, block: bytes) -> Iterator[int]:
        """Offsets of the SubIFDs named in a page's tags, whose segments are counted by the way."""
        for code, kind, count, value in struct.iter_unpack(self._layout.order + self._layout.tag, block):
            if code in _SEGMENT_TAGS:
                self._limits.check_segments(count, self._path)
            if code == _SUB_PAGES and kind in _SUB_PAGE_BYTES:
                self._limits.check_pages(count, self._path)
                size = _SUB_PAGE_BYTES[kind]
                fields = f"{count}{'I' if size == 4 else 'Q'}"
                if count * size <= len(value):
                    yield from struct.unpack(self._layout.order + fields, value[: count * size])
                else:
                    yield from self._unpack(
                        fields, int.from_bytes(value, "little" if self._layout.order == "<" else "big")
                    )
