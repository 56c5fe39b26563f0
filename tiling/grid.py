"""Pure tile geometry: which level to cut, how large a tile is there, and where the tiles stand.

Nothing here touches a file. Boxes on a level are in that level's pixels; ``level0`` boxes are in level-0 pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tiling.errors import GridError

MPP_RANGE = (0.05, 10.0)
# PANDA's 0.45 to 0.50 um/px all count as 0.5.
MPP_TOLERANCE = 0.12
ERROR_ABSURD_MPP = "slide says {mpp:.6g} um/px, outside {low} to {high}"
ERROR_TOO_COARSE = (
    "finest level has {mpp:.4g} um/px, coarser than the {target:.4g} um/px asked for (tolerance {tolerance:.0%})"
)


@dataclass(frozen=True)
class Level:
    """One pyramid level.

    Args:
        index: Its number, 0 the finest.
        width: Width in its own pixels.
        height: Height in its own pixels.
        downsample: Level-0 pixels per pixel of it, mean of both axes, as in OpenSlide.
        downsample_xy: The same along x and along y, which differ where a writer rounded the level's size; None where
            both are ``downsample``.
    """

    index: int
    width: int
    height: int
    downsample: float
    downsample_xy: tuple[float, float] | None = None


@dataclass(frozen=True)
class Cut:
    """How tiles are cut: ``span`` level pixels of ``level`` become ``px`` tile pixels, at ``mpp`` um/px."""

    level: Level
    span: int
    px: int
    mpp: float

    @property
    def resampled(self) -> bool:
        """Whether tiles are area-resampled rather than cut pixel for pixel."""
        return self.span != self.px


def choose_cut(levels: Sequence[Level], slide_mpp: float, px: int, target_mpp: float | None, tolerance: float) -> Cut:
    """Level and tile span for a target scale.

    A level within ``tolerance`` of the target is used as it is and its true mpp recorded; otherwise the nearest
    finer level is area-resampled.

    Args:
        levels: Pyramid, finest first.
        slide_mpp: um per level-0 pixel.
        px: Side of a stored tile.
        target_mpp: Wanted um per tile pixel; None cuts level 0 as it is.
        tolerance: Relative difference up to which a level counts as the target.

    Returns:
        The cut; its ``mpp`` is the true scale of the stored tiles.

    Raises:
        GridError: ``slide_mpp`` is absurd, or every level is coarser than the target.

    >>> pyramid = [Level(0, 4096, 4096, 1.0), Level(1, 1024, 1024, 4.0)]
    >>> choose_cut(pyramid, 0.48, 224, 0.5, 0.12).mpp
    0.48
    >>> choose_cut(pyramid, 0.25, 224, 0.5, 0.12).span
    448
    """
    low, high = MPP_RANGE
    if not low <= slide_mpp <= high:
        raise GridError(
            ERROR_ABSURD_MPP.format(mpp=slide_mpp, low=low, high=high),
            do="give the true one with --slide-mpp",
        )
    if target_mpp is None:
        return Cut(levels[0], px, px, slide_mpp)
    error = [abs(slide_mpp * level.downsample / target_mpp - 1) for level in levels]
    nearest = min(range(len(levels)), key=error.__getitem__)
    if error[nearest] <= tolerance:
        return Cut(levels[nearest], px, px, slide_mpp * levels[nearest].downsample)
    finer = [level for level in levels if slide_mpp * level.downsample < target_mpp]
    if not finer:
        raise GridError(
            ERROR_TOO_COARSE.format(mpp=slide_mpp * levels[0].downsample, target=target_mpp, tolerance=tolerance),
            do="tiles are never enlarged: choose a coarser --mpp or --mpp native",
        )
    source = finer[-1]
    span = round(px * target_mpp / (slide_mpp * source.downsample))
    return Cut(source, span, px, slide_mpp * source.downsample * span / px)


def tile_corners(width: int, height: int, span: int, margin: tuple[int, int] = (0, 0)) -> np.ndarray:
    """Corners of all whole, non-overlapping tiles, row by row.

    Args:
        width: Level width in pixels.
        height: Level height in pixels.
        span: Tile side in level pixels.
        margin: First tile's x and y.

    Returns:
        x, y in level pixels, int64, shape (N, 2); N is 0 when no whole tile fits.

    >>> tile_corners(500, 250, 224).tolist()
    [[0, 0], [224, 0]]
    """
    if span < 1:
        raise GridError(f"tile span of {span} px, at least 1 is needed")
    xs = np.arange(margin[0], width - span + 1, span, dtype=np.int64)
    ys = np.arange(margin[1], height - span + 1, span, dtype=np.int64)
    return np.stack([np.tile(xs, len(ys)), np.repeat(ys, len(xs))], axis=1)


def to_level0(corners: np.ndarray, level: Level) -> np.ndarray:
    """Level corners (N, 2) as level-0 pixels, int64, rounded to the nearest pixel; each axis by its own downsample.

    >>> to_level0(np.array([[1000, 1000]]), Level(1, 25000, 1250, 4.0004, (4.0, 4.0008))).tolist()
    [[4000, 4001]]
    """
    return np.asarray(np.rint(corners * np.array(level.downsample_xy or level.downsample)), np.int64)
