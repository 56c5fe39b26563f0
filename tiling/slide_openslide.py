"""Formats that only OpenSlide reads (MRXS, SCN, BIF, VMS, DICOM, Philips and Trestle TIFF), in blocks."""

from pathlib import Path
from typing import Any

import numpy as np
import openslide

from tiling.errors import SlideError
from tiling.grid import Level
from tiling.limits import DEFAULT_LIMITS, Limits
from tiling.pyramid import Slide, make_levels, to_rgb
from tiling.segments import SegmentGrid

OPENSLIDE_BLOCK = 512


class OpenSlideSlide(Slide):
    """A slide read through OpenSlide, reopened after an error, because OpenSlide latches the first one.

    What OpenSlide says of an error is not passed on: it may quote the file's own words.

    Args:
        path: The file; of a slide of several files the one that OpenSlide opens.
        limits: What its header may claim.

    Raises:
        SlideError: OpenSlide cannot open it, or it is over a limit.
    """

    def __init__(self, path: Path, limits: Limits = DEFAULT_LIMITS) -> None:
        self.path = path
        self._handle = self._open()
        try:
            levels = make_levels(list(self._handle.level_dimensions), limits, path)
        except SlideError:
            self._handle.close()
            raise
        # OpenSlide's own mean, so that a block's corner comes back as the pixel it was asked for.
        means = self._handle.level_downsamples
        self.levels = tuple(
            Level(level.index, level.width, level.height, float(means[level.index]), level.downsample_xy)
            for level in levels
        )
        self.stated_mpp = _stated_mpp(self._handle.properties)

    def _open(self) -> Any:
        try:
            return openslide.OpenSlide(self.path)
        except openslide.OpenSlideError as error:
            raise SlideError(f"OpenSlide cannot open it ({type(error).__name__})", self.path) from None

    def segment_grid(self, level: int) -> SegmentGrid:
        """Square blocks of OPENSLIDE_BLOCK px."""
        chosen = self.levels[level]
        return SegmentGrid(chosen.width, chosen.height, OPENSLIDE_BLOCK, OPENSLIDE_BLOCK)

    def read_segment(self, level: int, number: int) -> np.ndarray:
        """Pixels of one block, composed over white where the slide has none."""
        grid, chosen = self.segment_grid(level), self.levels[level]
        x, y = grid.corner(number)
        size = min(OPENSLIDE_BLOCK, chosen.width - x), min(OPENSLIDE_BLOCK, chosen.height - y)
        corner = round(x * chosen.downsample), round(y * chosen.downsample)
        try:
            rgba = np.asarray(self._handle.read_region(corner, level, size))
        except openslide.OpenSlideError as error:
            self._handle.close()
            self._handle = self._open()
            raise SlideError(
                f"block {number} of level {level} does not decode ({type(error).__name__})", self.path
            ) from None
        return to_rgb(rgba)

    def close(self) -> None:
        """Release the file."""
        self._handle.close()


def _stated_mpp(properties: Any) -> tuple[float, float] | None:
    """um per level-0 pixel along x and y; None where either is missing or no number."""
    try:
        return float(properties[openslide.PROPERTY_NAME_MPP_X]), float(properties[openslide.PROPERTY_NAME_MPP_Y])
    except (KeyError, ValueError):
        return None
