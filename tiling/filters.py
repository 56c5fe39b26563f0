"""Tile filters as pure functions: a tile gives metrics, metrics and thresholds give a verdict.

All metrics are computed at 1/4 scale (area mean), where JPEG noise and single nuclei average out.

- ``empty``: share of near-white, unsaturated pixels (glass).
- ``edges``: share of pixels whose Sobel gradient magnitude exceeds ``EDGE_STRENGTH`` grey levels per pixel.
- ``texture``: mean over 7 x 7 pixel windows of the local standard deviation of grey values (Haralick 1979's
  local-variance texture measure); low means homogeneous: blur, glass, dye, a fold.
"""

from dataclasses import asdict, dataclass

import cv2
import numpy as np

from tiling.errors import UsageError

REDUCTION = 4
NEAR_WHITE = 215
UNSATURATED = 18
EDGE_STRENGTH = 12.0
WINDOW = 7


@dataclass(frozen=True)
class Thresholds:
    """What a tile must satisfy to be kept.

    Args:
        min_tissue: Least share of tissue mask under the tile; below it the tile is not even decoded.
        max_empty: Largest ``empty``.
        min_edges: Least ``edges``.
        min_texture: Least ``texture``, in grey levels.
    """

    min_tissue: float = 0.5
    max_empty: float = 0.8
    min_edges: float = 0.03
    min_texture: float = 4.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            top = 255.0 if name == "min_texture" else 1.0
            if not 0 <= value <= top:
                raise UsageError(f"{name} is {value}, must lie in 0 to {top:g}")


@dataclass(frozen=True)
class Metrics:
    """Filter metrics of one tile."""

    empty: float
    edges: float
    texture: float


def measure(tile: np.ndarray) -> Metrics:
    """Metrics of one RGB tile, uint8, shape (px, px, 3)."""
    side = max(tile.shape[0] // REDUCTION, 1)
    small = cv2.resize(tile, (side, side), interpolation=cv2.INTER_AREA)
    darkest = small.min(axis=2)
    brightest = small.max(axis=2)
    empty = (darkest >= NEAR_WHITE) & (brightest - darkest <= UNSATURATED)
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32)
    # Sobel's kernel sums to 8 per grey level of slope.
    gradient = cv2.magnitude(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1)) / 8
    mean = cv2.blur(grey, (WINDOW, WINDOW))
    variance = cv2.blur(grey * grey, (WINDOW, WINDOW)) - mean * mean
    return Metrics(
        empty=float(empty.mean()),
        edges=float((gradient > EDGE_STRENGTH).mean()),
        texture=float(np.sqrt(np.maximum(variance, 0)).mean()),
    )


def verdict(metrics: Metrics, thresholds: Thresholds) -> str:
    """Reason to reject a tile (``empty``, ``edges`` or ``texture``), or "" to keep it."""
    if metrics.empty > thresholds.max_empty:
        return "empty"
    if metrics.edges < thresholds.min_edges:
        return "edges"
    if metrics.texture < thresholds.min_texture:
        return "texture"
    return ""
