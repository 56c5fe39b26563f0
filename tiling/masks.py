"""Mask values under a box of a slide: from a label image, or from annotations drawn at the scale of the box."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import shapely
from PIL import Image

from tiling import labels
from tiling.annotations import ANNOTATION_SUFFIXES, Drawing, polygons, read_annotations
from tiling.datasets import Source
from tiling.errors import MaskError
from tiling.grid import Cut
from tiling.labels import Scheme
from tiling.limits import DEFAULT_LIMITS, Limits
from tiling.segments import Decode, RowReader, SegmentGrid
from tiling.slide import IMAGE_SUFFIXES, Slide, open_slide

_JPEG_SUFFIXES = frozenset({".jpg", ".jpeg"})


class MaskReader(Protocol):
    """Stored mask values (``labels.Scheme``) under boxes that come in row order: y never decreases."""

    def at(self, x: int, y: int, span: int) -> np.ndarray | None:
        """Values under a box of the cut level.

        Args:
            x: Left edge in pixels of the cut level.
            y: Top edge.
            span: Side.

        Returns:
            uint8, square: (span, span), or more where the label image is finer; None when it is damaged there.

        Raises:
            MaskError: The mask holds a value that its scheme does not know.
        """
        ...

    def close(self) -> None:
        """Release the file."""


def open_mask(source: Source, slide: Slide, cut: Cut, limits: Limits = DEFAULT_LIMITS) -> MaskReader | None:
    """The mask of a slide, None where it has none.

    Raises:
        SlideError: The mask cannot be opened.
        MaskError: It does not fit the slide, or has no scheme.
    """
    if source.mask is None:
        return None
    if source.scheme is None:
        raise MaskError("what the mask's values mean is not known", source.mask, "give it with --class-map FILE")
    return open_mask_file(source.mask, source.scheme, slide, cut, limits)


def open_mask_file(path: Path, scheme: Scheme, slide: Slide, cut: Cut, limits: Limits = DEFAULT_LIMITS) -> MaskReader:
    """``open_mask`` of a mask or annotation file."""
    if path.suffix.lower() in ANNOTATION_SUFFIXES:
        return PolygonMask(path, scheme, slide, cut)
    return RasterMask(path, scheme, slide, cut, limits)


@dataclass(frozen=True)
class TileLabels:
    """What a mask says of a tile.

    Args:
        mask: Stored values, uint8 (px, px).
        coverage: Share of each stored value, of the mask at its own resolution.
        label: Class, or ``labels.UNLABELLED``.
    """

    mask: np.ndarray
    coverage: tuple[float, ...]
    label: int


def tile_labels(reader: MaskReader, x: int, y: int, cut: Cut, scheme: Scheme, min_share: float) -> TileLabels | None:
    """Mask, coverage and label of the tile whose corner is at x, y of the cut level; None where the mask is damaged.

    Raises:
        MaskError: The mask holds a value that its scheme does not know.
    """
    values = reader.at(x, y, cut.span)
    if values is None:
        return None
    shares = labels.coverage(values, scheme)
    if values.shape[0] != cut.px:
        values = np.asarray(cv2.resize(values, (cut.px, cut.px), interpolation=cv2.INTER_NEAREST))
    return TileLabels(values, tuple(shares.tolist()), labels.label(shares, scheme, min_share))


class RasterMask:
    """A label image of the slide's level-0 size, or a whole number of times smaller: its first channel.

    The level of the cut level's size is read where there is one, else level 0. A coarser image is looked up at each
    pixel's centre. The values of a plain JPEG are taken for the nearest ones that are known.
    """

    def __init__(self, path: Path, scheme: Scheme, slide: Slide, cut: Cut, limits: Limits) -> None:
        self._path, self._scheme = path, scheme
        self._lossy = path.suffix.lower() in _JPEG_SUFFIXES
        self._file: Slide | None = None
        if path.suffix.lower() in IMAGE_SUFFIXES:
            values = _label_image(path)
            grid = SegmentGrid(values.shape[1], values.shape[0], values.shape[1], values.shape[0])
            decode: Decode = lambda _: values  # noqa: E731
            _require_fit(grid, slide, path)
        else:
            # Large areas of one value compress a thousandfold, and the slide's size bounds what is read.
            self._file = open_slide(path, limits=replace(limits, ratio=math.inf))
            try:
                grid, decode = _level_under(self._file, slide, cut)
            except MaskError:
                self._file.close()
                raise
        self._scale = grid.width / cut.level.width, grid.height / cut.level.height
        self._coarse = max(self._scale) < 1
        self._side = round(cut.span * self._scale[0]) if not self._coarse else int(cut.span * max(self._scale)) + 2
        self._last = grid.width - self._side, grid.height - self._side
        self._reader = _padded(grid, decode, self._side)

    def at(self, x: int, y: int, span: int) -> np.ndarray | None:
        """Values under a box of the cut level."""
        if not self._coarse:
            left, top = (
                max(0, min(round(first * scale), last))
                for first, scale, last in zip((x, y), self._scale, self._last, strict=True)
            )
            values = self._reader.cut(left, top, self._side)
            return None if values is None else self._stored(values[..., 0])
        columns, rows = (
            ((first + np.arange(span) + 0.5) * scale).astype(np.int64)
            for first, scale in zip((x, y), self._scale, strict=True)
        )
        values = self._reader.cut(int(columns[0]), int(rows[0]), self._side)
        if values is None:
            return None
        return self._stored(values[(rows - rows[0])[:, None], columns - columns[0], 0])

    def _stored(self, values: np.ndarray) -> np.ndarray:
        try:
            return self._scheme.stored(values, self._lossy)
        except MaskError as error:
            raise MaskError(error.what, self._path, error.do) from error

    def close(self) -> None:
        """Release the file."""
        if self._file is not None:
            self._file.close()


def _require_fit(grid: SegmentGrid, slide: Slide, path: Path) -> None:
    """Refuse a label image whose size is not the slide's level 0 divided by a whole number, however rounded."""
    ours = slide.levels[0]
    times = max(1, round(ours.width / grid.width))
    if abs(grid.width - ours.width / times) >= 1 or abs(grid.height - ours.height / times) >= 1:
        raise MaskError(
            f"mask is {grid.width} x {grid.height} px, its slide {ours.width} x {ours.height} px",
            path,
            "masks must have the slide's level-0 size, or a whole fraction of it",
        )


def _level_under(mask: Slide, slide: Slide, cut: Cut) -> tuple[SegmentGrid, Decode]:
    """The mask's level of the cut level's size, else its level 0."""
    _require_fit(mask.segment_grid(0), slide, mask.path)
    size = cut.level.width, cut.level.height
    number = next((level.index for level in mask.levels if (level.width, level.height) == size), 0)
    return mask.segment_grid(number), lambda segment: mask.read_segment(number, segment)


def _padded(grid: SegmentGrid, decode: Decode, side: int) -> RowReader:
    """Reader of the first channel; boxes may reach ``side`` pixels past the right and lower edge, into no values."""
    wide = SegmentGrid(grid.width + side, grid.height + side, grid.segment_width, grid.segment_height)

    def first_channel(number: int) -> np.ndarray:
        """A segment's values, (h, w, 1)."""
        row, column = divmod(number, wide.columns)
        out = np.zeros((grid.segment_height, grid.segment_width, 1), np.uint8)
        if row < grid.rows and column < grid.columns:
            # A TIFF's tiles may reach past the level's lower edge, and past the grid's only row.
            pixels = decode(row * grid.columns + column)[: grid.segment_height, : grid.segment_width]
            out[: pixels.shape[0], : pixels.shape[1]] = pixels.reshape(*pixels.shape[:2], -1)[..., :1]
        return out

    return RowReader(wide, first_channel)


def _label_image(path: Path) -> np.ndarray:
    """Values of a PNG or JPEG mask: indices of a palette, else the first channel, uint8 (H, W)."""
    try:
        with Image.open(path) as image:
            values = np.asarray(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MaskError("mask does not decode", path, "copy it again from its source") from error
    values = values[..., 0] if values.ndim == 3 else values
    if values.max() > 255 or values.min() < 0:
        raise MaskError(f"mask holds value {values.max()}, 0 to 255 are read", path)
    return np.ascontiguousarray(values, np.uint8)


class PolygonMask:
    """Annotations, drawn at the cut level's scale (``annotations.Drawing``)."""

    def __init__(self, path: Path, scheme: Scheme, slide: Slide, cut: Cut) -> None:
        annotations = read_annotations(path)
        try:
            values = [scheme.stored_of_class(one.names) for one in annotations]
        except MaskError as error:
            raise MaskError(error.what, path, error.do) from error
        kept = [(one, value) for one, value in zip(annotations, values, strict=True) if value is not None]
        shapes, origin = polygons([one for one, _ in kept])
        level0 = slide.levels[0]
        if len(shapes) and not shapely.intersects(shapes, shapely.box(0, 0, level0.width, level0.height)).any():
            left, top, right, bottom = shapely.total_bounds(shapes)
            raise MaskError(
                f"all annotations lie outside the slide of {level0.width} x {level0.height} px: from "
                f"{left:.0f}, {top:.0f} to {right:.0f}, {bottom:.0f}",
                path,
                "their coordinates must be level-0 pixels of this slide",
            )
        scale = cut.level.width / level0.width, cut.level.height / level0.height
        self._drawing = Drawing(shapes, np.array([value for _, value in kept], np.int64)[origin], scale)

    def at(self, x: int, y: int, span: int) -> np.ndarray:
        """Values under a box of the cut level, uint8 (span, span)."""
        return self._drawing.at(x, y, span)

    def close(self) -> None:
        """Nothing is open."""
