"""What every slide is, whatever its format: levels, scale, segments that become RGB pixels, an overview."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tiling.codec import JpegSettings
from tiling.errors import SlideError
from tiling.grid import MPP_RANGE, Level
from tiling.limits import Limits
from tiling.segments import SegmentGrid, shrink

OVERVIEW_SIDE = 2048
BACKGROUND = 255
COPY_AGAIN = "copy it again from its source"
# Of one level, this much less is enough for a tissue mask.
_SINGLE_LEVEL_SHRINK = 4
_SQUARE_TOLERANCE = 0.01
_GIVE_MPP = "give the true scale with --slide-mpp"


class Slide(ABC):
    """A pyramid of levels made of compressed segments.

    Attributes:
        path: The file.
        levels: Finest first; sizes in each level's own pixels.
        stated_mpp: um per level-0 pixel along x and y as the file says, believed or not; None when it does not say.
    """

    path: Path
    levels: tuple[Level, ...]
    stated_mpp: tuple[float, float] | None = None
    _given_mpp: float | None = None

    @property
    def mpp(self) -> float | None:
        """um per level-0 pixel: the one given, else what the file says, None when it does not say.

        Raises:
            SlideError: None was given, and the file's pixels are not square or its scale is absurd.
        """
        if self._given_mpp is not None or self.stated_mpp is None:
            return self._given_mpp
        return _believed(self.stated_mpp, self.path)

    @mpp.setter
    def mpp(self, given: float | None) -> None:
        self._given_mpp = given

    @abstractmethod
    def segment_grid(self, level: int) -> SegmentGrid:
        """How a level is divided into segments."""

    @abstractmethod
    def read_segment(self, level: int, number: int) -> np.ndarray:
        """Pixels of one segment, uint8, (h, w, 3).

        Raises:
            SlideError: The segment is damaged.
        """

    def compressed_sizes(self, level: int) -> np.ndarray | None:
        """Bytes of each segment in the file, int64 (segments,), 0 where it is left out; None where nobody knows."""
        del level
        return None

    def jpeg(self, level: int) -> JpegSettings | None:
        """Settings of the source's own JPEG compression at a level, None where it is something else."""
        del level
        return None

    def overview(self) -> tuple[np.ndarray, np.ndarray]:
        """The lowest level, reduced by a power of two where it is still large (over OVERVIEW_SIDE).

        Returns:
            Pixels, uint8 (H, W, 3), and where they are unknown because a segment is damaged, bool (H, W).
        """
        level = self.levels[-1]
        factor = overview_shrink(level, _SINGLE_LEVEL_SHRINK if len(self.levels) == 1 else 1)
        grid = self.segment_grid(level.index)
        return shrink(grid, lambda number: self.read_segment(level.index, number), factor)

    @abstractmethod
    def close(self) -> None:
        """Release the file."""

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def overview_shrink(level: Level, least: int) -> int:
    """Power of two, at least ``least``, by which a level shrinks to OVERVIEW_SIDE or less."""
    factor = least
    while max(level.width, level.height) > factor * OVERVIEW_SIDE:
        factor *= 2
    return factor


def _believed(stated: tuple[float, float], path: Path) -> float:
    """Mean of what the file says along x and y, where it is square and sane."""
    along_x, along_y = stated
    low, high = MPP_RANGE
    if not (low <= along_x <= high and low <= along_y <= high):
        raise SlideError(
            f"its header says {along_x:.4g} x {along_y:.4g} um/px, {low:g} to {high:g} is believed", path, _GIVE_MPP
        )
    if not math.isclose(along_x, along_y, rel_tol=_SQUARE_TOLERANCE):
        raise SlideError(f"pixels are not square: {along_x:.4g} x {along_y:.4g} um", path, _GIVE_MPP)
    return (along_x + along_y) / 2


def make_levels(sizes: Sequence[tuple[int, int]], limits: Limits, path: Path) -> tuple[Level, ...]:
    """Levels from (width, height) pairs, finest first.

    Raises:
        SlideError: There are none, or they are over a limit.
    """
    if not sizes:
        raise SlideError("no image in it", path)
    limits.check_levels(sizes, path)
    width, height = sizes[0]
    return tuple(
        Level(number, w, h, (width / w + height / h) / 2, (width / w, height / h))
        for number, (w, h) in enumerate(sizes)
    )


def to_rgb(pixels: np.ndarray) -> np.ndarray:
    """Grey (H, W) or (H, W, 1), grey and alpha, RGB or RGBA to RGB (H, W, 3); what is transparent is background."""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    samples = pixels.shape[2]
    if samples == 3:
        return pixels
    rgb = np.repeat(pixels[..., :1], 3, axis=2) if samples < 3 else pixels[..., :3].copy()
    if samples in (2, 4):
        rgb[pixels[..., -1] == 0] = BACKGROUND
    return rgb
