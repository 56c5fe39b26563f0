"""Tissue mask from a slide's overview, and the share of tissue under each tile."""

import cv2
import numpy as np

# Saturation (max - min channel) below which nothing is tissue, and above which everything is: bounds on Otsu's
# threshold, which alone would split a slide that is all tissue, or find tissue in an empty one.
SATURATION_RANGE = (8, 24)
SMOOTHING = 5
DARK_BACKGROUND = 60


def is_brightfield(rgb: np.ndarray) -> bool:
    """Whether an overview (H, W, 3) is bright-field: a tenth of it is light in every channel."""
    darkest, _ = _extremes(rgb)
    return bool(np.count_nonzero(darkest > DARK_BACKGROUND) > darkest.size / 10)


def _extremes(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest channel of each pixel, uint8 (H, W): plane by plane, since numpy is slow along 3."""
    red, green, blue = cv2.split(rgb)
    return np.asarray(cv2.min(cv2.min(red, green), blue)), np.asarray(cv2.max(cv2.max(red, green), blue))


def tissue_mask(rgb: np.ndarray, largest_hole: float = 0.0) -> np.ndarray:
    """Where there is tissue.

    Otsu's threshold (Otsu 1979) on smoothed saturation, bounded to ``SATURATION_RANGE``, then closing of narrow gaps,
    removal of specks, and filling of holes: a gland's lumen belongs to the tissue around it (as in CLAM, Lu et al.
    2021); tiles that are mostly lumen are the emptiness filter's to judge.

    Args:
        rgb: Overview of the slide, uint8, shape (H, W, 3).
        largest_hole: Area up to which holes are filled, in pixels of the overview.

    Returns:
        Mask, bool, shape (H, W).
    """
    smooth = cv2.medianBlur(rgb, SMOOTHING) if min(rgb.shape[:2]) >= SMOOTHING else rgb
    darkest, brightest = _extremes(smooth)
    saturation = brightest - darkest
    otsu, _ = cv2.threshold(saturation, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    mask = (saturation > np.clip(otsu, *SATURATION_RANGE)).astype(np.uint8)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (SMOOTHING, SMOOTHING))
    mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, kernel)
    mask = cv2.morphologyEx(mask, cv2.MORPH_OPEN, kernel)
    return _filled(np.asarray(mask), largest_hole)


def _filled(mask: np.ndarray, largest: float) -> np.ndarray:
    """A mask of 0 and 1, as bool, its holes of up to ``largest`` pixels filled; what reaches the edge is no hole."""
    outlines, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    # A hole's outline runs through the pixels around it; Pick's theorem gives the number of pixels inside.
    holes = [
        outline
        for outline, (*_, parent) in zip(outlines, hierarchy[0] if len(outlines) else (), strict=True)
        if parent >= 0 and cv2.contourArea(outline) - len(outline) / 2 + 1 <= largest
    ]
    return np.asarray(cv2.drawContours(mask.copy(), holes, -1, 1, cv2.FILLED)) > 0


def tissue_fraction(mask: np.ndarray, boxes: np.ndarray, downsample: tuple[float, float]) -> np.ndarray:
    """Share of tissue under each tile.

    Args:
        mask: Tissue mask of an overview, bool, shape (H, W).
        boxes: Tile corners, shape (N, 4) as x0, y0, x1, y1 in level pixels.
        downsample: Level pixels per mask pixel, along x and y.

    Returns:
        Fraction in [0, 1], float32, shape (N,). Boxes are rounded to whole mask pixels, at least one.

    >>> half = np.repeat([[True, False]], 4, axis=0)
    >>> tissue_fraction(half, np.array([[0, 0, 20, 40], [0, 0, 10, 10]]), (10, 10)).tolist()
    [0.5, 1.0]
    """
    if len(boxes) == 0:
        return np.zeros(0, np.float32)
    height, width = mask.shape
    sums = np.zeros((height + 1, width + 1), np.int64)
    sums[1:, 1:] = mask.cumsum(axis=0).cumsum(axis=1)
    x0 = np.clip(np.rint(boxes[:, 0] / downsample[0]).astype(np.int64), 0, width - 1)
    y0 = np.clip(np.rint(boxes[:, 1] / downsample[1]).astype(np.int64), 0, height - 1)
    x1 = np.clip(np.rint(boxes[:, 2] / downsample[0]).astype(np.int64), x0 + 1, width)
    y1 = np.clip(np.rint(boxes[:, 3] / downsample[1]).astype(np.int64), y0 + 1, height)
    inside = sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0]
    return (inside / ((x1 - x0) * (y1 - y0))).astype(np.float32)
