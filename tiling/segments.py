"""Compressed source segments, each decoded at most once, cut into tiles in row order.

A segment is the unit that a slide's file compresses: a TIFF tile or strip, a restart interval of an NDPI, a block read
through OpenSlide. Tiles come in row order, so a segment can be dropped as soon as the tiles have passed it, and a
segment that no tile needs is never decoded. Damage stays inside its segment.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np

from tiling.errors import GridError, SlideError


@dataclass(frozen=True)
class SegmentGrid:
    """Segments of one level: sizes in level pixels; segments are numbered row by row."""

    width: int
    height: int
    segment_width: int
    segment_height: int

    @cached_property
    def columns(self) -> int:
        """Segments per row."""
        return -(-self.width // self.segment_width)

    @cached_property
    def rows(self) -> int:
        """Rows of segments."""
        return -(-self.height // self.segment_height)

    def corner(self, number: int) -> tuple[int, int]:
        """x, y of a segment's first pixel, in level pixels."""
        row, column = divmod(number, self.columns)
        return column * self.segment_width, row * self.segment_height

    def under(self, x: int, y: int, span: int) -> list[int]:
        """Numbers of the segments that a square box touches."""
        if x < 0 or y < 0 or x + span > self.width or y + span > self.height:
            raise GridError(f"box at {x}, {y} of {span} px lies outside a level of {self.width} x {self.height} px")
        columns = range(x // self.segment_width, (x + span - 1) // self.segment_width + 1)
        rows = range(y // self.segment_height, (y + span - 1) // self.segment_height + 1)
        return [row * self.columns + column for row in rows for column in columns]


Decode = Callable[[int], np.ndarray]


@dataclass
class RowReader:
    """Cuts boxes that come in row order (y never decreases), decoding each segment at most once.

    Args:
        grid: Segments of the level.
        decode: Segment number -> pixels, uint8, shape (h, w, channels); raises SlideError for a damaged one.
    """

    grid: SegmentGrid
    decode: Decode

    def __post_init__(self) -> None:
        self.decoded = 0
        self.damaged: dict[int, str] = {}
        self._held: dict[int, np.ndarray] = {}
        self._row = 0

    def _segment(self, number: int) -> np.ndarray | None:
        """Pixels of a segment, None when it is damaged."""
        held = self._held.get(number)
        if held is None and number not in self.damaged:
            try:
                held = self._held[number] = self.decode(number)
                self.decoded += 1
            except SlideError as error:
                self.damaged[number] = error.what
        return held

    def cut(self, x: int, y: int, span: int, out: np.ndarray | None = None) -> np.ndarray | None:
        """Pixels of a box, uint8 (span, span, channels), in ``out`` if given; None where a segment is damaged."""
        numbers = self.grid.under(x, y, span)
        self._forget_above(numbers[0] // self.grid.columns)
        parts = [part for number in numbers if (part := self._segment(number)) is not None]
        if len(parts) < len(numbers):
            return None
        out = np.empty((span, span, parts[0].shape[2]), np.uint8) if out is None else out
        for number, pixels in zip(numbers, parts, strict=True):
            left, top = self.grid.corner(number)
            left, top = left - x, top - y
            # Slices end by themselves where the box or the segment ends.
            box = out[max(top, 0) : top + pixels.shape[0], max(left, 0) : left + pixels.shape[1]]
            box[:] = pixels[max(-top, 0) : span - top, max(-left, 0) : span - left]
        return out

    def _forget_above(self, row: int) -> None:
        if row > self._row:
            first = row * self.grid.columns
            self._held = {number: pixels for number, pixels in self._held.items() if number >= first}
            self._row = row
        elif row < self._row:
            raise GridError(f"box in segment row {row} after row {self._row}: boxes must come in row order")


def shrink(grid: SegmentGrid, decode: Decode, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """A whole level at 1/factor by area mean, one block of segments in memory at a time.

    Returns:
        Pixels, uint8, shape (ceil(H / factor), ceil(W / factor), 3), and where they are unknown, because a segment
        does not decode: bool, shape (ceil(H / factor), ceil(W / factor)). Unknown pixels are white.
    """
    out = np.full((-(-grid.height // factor), -(-grid.width // factor), 3), 255, np.uint8)
    unknown = np.zeros(out.shape[:2], bool)
    for left, top, block, whole in _blocks(grid, decode, factor):
        height, width = -(-block.shape[0] // factor), -(-block.shape[1] // factor)
        small = cv2.resize(block, (width, height), interpolation=cv2.INTER_AREA) if factor > 1 else block
        place = np.s_[top // factor : top // factor + height, left // factor : left // factor + width]
        out[place], unknown[place] = small, not whole
    return out, unknown


def _blocks(grid: SegmentGrid, decode: Decode, factor: int) -> Iterator[tuple[int, int, np.ndarray, bool]]:
    """Left, top, pixels of each block, and whether all of it decodes.

    Segments are joined until a block's sides are multiples of ``factor`` (NDPI's are 8 px high).
    """
    across, down = (math.lcm(factor, side) // side for side in (grid.segment_width, grid.segment_height))
    for first_row in range(0, grid.rows, down):
        for first_column in range(0, grid.columns, across):
            left, top = first_column * grid.segment_width, first_row * grid.segment_height
            width = min(across * grid.segment_width, grid.width - left)
            height = min(down * grid.segment_height, grid.height - top)
            block, whole = np.full((height, width, 3), 255, np.uint8), True
            for row in range(first_row, min(first_row + down, grid.rows)):
                for column in range(first_column, min(first_column + across, grid.columns)):
                    try:
                        pixels = decode(row * grid.columns + column)
                    except SlideError:
                        whole = False
                        continue
                    x, y = column * grid.segment_width - left, row * grid.segment_height - top
                    pixels = pixels[: height - y, : width - x]  # TIFF tiles reach past the level's edge
                    block[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
            yield left, top, block, whole
