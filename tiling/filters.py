"""Tile filters as pure functions: tiles give metrics, metrics and thresholds give verdicts.

Everything is measured on area means at 1/2 or 1/4 scale, where JPEG noise averages out and which cost little:

- ``empty``: share of near-white, unsaturated pixels (glass), at 1/4.
- ``dark``: share of near-black pixels (the scanner's border), at 1/4.
- ``pen``: share of pixels in colours of ink that stains lack, at 1/4. Haematoxylin and eosin absorb green at least as
  much as red (Ruifrok & Johnston 2001), so what lets clearly more green than red pass is green, cyan or blue ink; the
  same of dark blues, of red without any green or blue, and of dark grey. Colour rules for ink as in HistoQC (Janowczyk
  et al. 2019); bounds our own, as ratios, since a ratio of intensities is a difference of optical densities.
- ``edges``: share of pixels whose Sobel gradient exceeds ``EDGE_STRENGTH`` grey levels per pixel, at 1/4.
- ``texture``: mean standard deviation of grey values in windows of 7 x 7 pixels, side by side, at 1/4 (Haralick 1979's
  local-variance texture measure); low means homogeneous: glass, dye, a fold.
- ``sharpness``: root mean square of the Laplacian at 1/2 (the focus measure of Pech-Pacheco et al. 2000), in every
  eighth row, divided by ``texture``: what is out of focus keeps its coarse structure and loses the fine one.

docs/filters.md has the figures behind the defaults.
"""

from dataclasses import asdict, dataclass

import cv2
import numpy as np

from tiling.errors import UsageError

METRICS = ("empty", "dark", "pen", "edges", "texture", "sharpness")
# The reason of each metric, in the same order: the first that fails is the one that is told.
REASONS = ("empty", "dark", "pen", "edges", "texture", "blur")
NEAR_WHITE, UNSATURATED = 215, 18
NEAR_BLACK = 30
# Cold ink: green > 1.2 red + 3, and no grey.
GREEN_TO_RED, SATURATED = (1.2, 3), 20
# Navy ink: little red, clearly more blue, and hardly less green.
LITTLE_RED, BLUE_OVER_RED, RED_OVER_GREEN = 90, 40, 12
# Red ink: red > 3 times green and blue, and bright enough to be told from brown.
RED_TO_REST, BRIGHT_RED = 3.0, 100
# Black ink.
DARK_INK, GREYISH = 90, 30
EDGE_STRENGTH = 12.0
WINDOW = 7
LINE_STEP = 8


@dataclass(frozen=True)
class Thresholds:
    """What a tile must satisfy to be kept.

    Args:
        min_tissue: Least share of tissue mask under the tile; below it the tile is not even decoded.
        max_empty: Largest ``empty``.
        max_dark: Largest ``dark``.
        max_pen: Largest ``pen``.
        min_edges: Least ``edges``.
        min_texture: Least ``texture``, in grey levels.
        min_sharpness: Least ``sharpness``.
    """

    min_tissue: float = 0.25
    max_empty: float = 0.8
    max_dark: float = 0.1
    max_pen: float = 0.1
    min_edges: float = 0.03
    min_texture: float = 4.0
    min_sharpness: float = 0.4

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            top = 255.0 if name in ("min_texture", "min_sharpness") else 1.0
            if not 0 <= value <= top:
                raise UsageError(f"{name} is {value}, must lie in 0 to {top:g}")


def measure(tiles: np.ndarray) -> np.ndarray:
    """Metrics of RGB tiles; each tile's depend on that tile alone.

    Args:
        tiles: uint8, shape (n, px, px, 3), px at least 16.

    Returns:
        float32, shape (n, len(METRICS)).
    """
    halves = np.empty((len(tiles), *(side // 2 for side in tiles.shape[1:3]), 3), np.uint8)
    for tile, half in zip(tiles, halves, strict=True):
        halve(tile, half)
    return measure_halves(halves)


def halve(tile: np.ndarray, out: np.ndarray) -> None:
    """Area means of 2 x 2 pixels, uint8 (px, px, 3) -> (px // 2, px // 2, 3); an odd last row and column are left out.

    Who has just made a tile halves it at once, while it is still in the processor's cache.
    """
    height, width = out.shape[:2]
    cv2.resize(tile[: 2 * height, : 2 * width], (width, height), dst=out, interpolation=cv2.INTER_AREA)


def measure_halves(halves: np.ndarray) -> np.ndarray:
    """``measure`` of tiles that ``halve`` has halved."""
    n = len(halves)
    if n == 0:
        return np.zeros((0, len(METRICS)), np.float32)
    quarter = _halved(halves)
    grey = _grey(quarter)
    texture = _texture(grey)
    sharpness = _laplacian(halves) / np.maximum(texture, 1)
    columns = [*(_share(mask, n) for mask in _colours(quarter)), _edges(grey), texture, sharpness]
    return np.stack(columns, axis=1).astype(np.float32)


def verdicts(metrics: np.ndarray, thresholds: Thresholds) -> list[str]:
    """Why each tile is rejected, one of REASONS, or "" to keep it; ``metrics`` is (n, len(METRICS))."""
    empty, dark, pen, edges, texture, sharpness = metrics.T
    failed = np.stack(
        [
            empty > thresholds.max_empty,
            dark > thresholds.max_dark,
            pen > thresholds.max_pen,
            edges < thresholds.min_edges,
            texture < thresholds.min_texture,
            sharpness < thresholds.min_sharpness,
        ],
        axis=1,
    )
    first = failed.argmax(axis=1)
    return [REASONS[reason] if any_failed else "" for reason, any_failed in zip(first, failed.any(axis=1), strict=True)]


def _tall(tiles: np.ndarray) -> np.ndarray:
    """Tiles (n, h, w, ...) below each other, (n * h, w, ...): one call of OpenCV then does them all."""
    return tiles.reshape(-1, *tiles.shape[2:])


def _halved(tiles: np.ndarray) -> np.ndarray:
    """Area means of 2 x 2 pixels: (n, h, w, 3) -> (n, h // 2, w // 2, 3); an odd last row and column are left out."""
    n, height, width = (len(tiles), *(side // 2 for side in tiles.shape[1:3]))
    even = np.ascontiguousarray(tiles[:, : 2 * height, : 2 * width])
    # Twice by 2 takes a third of the time of once by 4.
    small = cv2.resize(_tall(even), (width, n * height), interpolation=cv2.INTER_AREA)
    return np.asarray(small).reshape(n, height, width, 3)


def _grey(tiles: np.ndarray) -> np.ndarray:
    """Luma, (n, h, w, 3) -> (n, h, w)."""
    return np.asarray(cv2.cvtColor(_tall(tiles), cv2.COLOR_RGB2GRAY)).reshape(tiles.shape[:3])


def _colours(tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks, bool, of the pixels that are empty, dark, of a pen; plane by plane, since numpy is slow along 3."""
    red, green, blue = (np.asarray(plane) for plane in cv2.split(_tall(tiles)))
    rest = np.maximum(green, blue)
    brightest, darkest = np.maximum(red, rest), np.minimum(np.minimum(red, green), blue)
    spread = brightest - darkest
    # OpenCV's arithmetic, unlike numpy's, stays within 0 to 255.
    empty = (darkest >= NEAR_WHITE) & (spread <= UNSATURATED)
    dark = brightest < NEAR_BLACK
    cold = (green > np.asarray(cv2.convertScaleAbs(red, None, *GREEN_TO_RED))) & (spread > SATURATED)
    navy = (red < LITTLE_RED) & (np.asarray(cv2.subtract(blue, red)) > BLUE_OVER_RED)
    navy &= np.asarray(cv2.subtract(red, green)) < RED_OVER_GREEN
    hot = (red > np.asarray(cv2.convertScaleAbs(rest, None, RED_TO_REST))) & (red > BRIGHT_RED)
    black = (brightest < DARK_INK) & (spread < GREYISH) & ~dark
    return empty, dark, cold | navy | hot | black


def _share(mask: np.ndarray, n: int) -> np.ndarray:
    """Share of set pixels of each of ``n`` tiles, (n,)."""
    return np.asarray(cv2.reduce(mask.view(np.uint8).reshape(n, -1), 1, cv2.REDUCE_AVG, dtype=cv2.CV_32F))[:, 0]


def _edges(grey: np.ndarray) -> np.ndarray:
    """Share of pixels on edges, (n, h, w) -> (n,); the outermost ones are left out: they would see the next tile."""
    across, down = (np.asarray(slope).astype(np.float32) for slope in cv2.spatialGradient(_tall(grey)))
    # Sobel's kernel sums to 8 per grey level of slope.
    strong = across * across + down * down > (8 * EDGE_STRENGTH) ** 2
    return _share(np.ascontiguousarray(strong.reshape(grey.shape)[:, 1:-1, 1:-1]), len(grey))


def _texture(grey: np.ndarray) -> np.ndarray:
    """Mean local standard deviation, (n, h, w) -> (n,)."""
    n, side = grey.shape[:2]
    window = min(WINDOW, side)
    count = side // window
    whole = np.ascontiguousarray(grey[:, : count * window, : count * window])
    values, size = _tall(whole).astype(np.float32), (count, n * count)
    mean = cv2.resize(values, size, interpolation=cv2.INTER_AREA)
    square = cv2.resize(values * values, size, interpolation=cv2.INTER_AREA)
    return np.asarray(np.sqrt(np.maximum(square - mean * mean, 0)).reshape(n, -1).mean(axis=1))


def _laplacian(tiles: np.ndarray) -> np.ndarray:
    """Root mean square of the luma's Laplacian in every LINE_STEP-th row, (n, h, w, 3) -> (n,)."""
    n, height = tiles.shape[:2]
    count = (height - 3) // LINE_STEP + 1
    lines = np.stack([tiles[:, first::LINE_STEP][:, :count] for first in range(3)])
    above, line, below = _grey(lines.reshape(3 * n, *lines.shape[2:])).astype(np.int16).reshape(3, n, count, -1)
    bend = (above + below - 4 * line)[..., 1:-1] + line[..., :-2] + line[..., 2:]
    return np.asarray(np.sqrt(np.square(bend, dtype=np.float64).reshape(n, -1).mean(axis=1)))
