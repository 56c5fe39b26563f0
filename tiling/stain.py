"""The H&E stains of a slide, and tiles as if they had been stained like another slide.

Macenko et al., "A method for normalizing histology slides for quantitative analysis", ISBI 2009. Optical density is
the natural logarithm of white over grey value. A stain is the direction in which it raises the density of R, G and B.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from tiling.errors import UsageError

# Macenko's own: transmitted light, least density of tissue, percentile of angles and of concentrations.
_WHITE, _LEAST_DENSITY, _ANGLE_PERCENTILE, _CONCENTRATION_PERCENTILE = 240.0, 0.15, 1.0, 99.0
_SAMPLE_STEP = 13  # no multiple of it but 104 is one of JPEG's blocks: every phase of a block is met
_MOST_PIXELS, _LEAST_PIXELS = 50_000, 1_000
# Below that two stains are one, and their concentrations noise.
_LEAST_ANGLE = np.deg2rad(3)

_DENSITY = -np.log((np.arange(256, dtype=np.float32) + 1) / np.float32(_WHITE))
_BRIGHTEST = int(np.flatnonzero(_DENSITY > _LEAST_DENSITY)[-1])


@dataclass(frozen=True)
class Stains:
    """Two stains and how much of them there is.

    Args:
        haematoxylin: Optical density in R, G, B of one unit; its length is 1.
        eosin: The same.
        concentrations: 99th percentile of the concentration of each.
    """

    haematoxylin: tuple[float, float, float]
    eosin: tuple[float, float, float]
    concentrations: tuple[float, float]


# HERef and maxCRef of the authors' reference implementation, in wide use.
REFERENCE = Stains((0.5626, 0.7201, 0.4062), (0.2159, 0.8012, 0.5581), (1.9705, 1.0308))


@dataclass(frozen=True)
class SlideColour:
    """Colour of a slide's tissue.

    Args:
        mean: Mean of R, G and B.
        std: Standard deviation of R, G and B.
        stains: Its two stains.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    stains: Stains

    def to_json(self) -> dict[str, list[float]]:
        """As plain JSON values, rounded to what the estimate is worth."""
        values = {"mean": self.mean, "std": self.std, **vars(self.stains)}
        return {name: [round(value, 5) for value in numbers] for name, numbers in values.items()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "SlideColour":
        """The reverse of ``to_json``.

        Raises:
            KeyError, TypeError, ValueError: It is something else.
        """

        def numbers(name: str, count: int) -> tuple[Any, ...]:
            found = tuple(float(number) for number in value[name])
            if len(found) != count or not np.isfinite(found).all():
                raise ValueError(f"{name} must be {count} numbers")
            return found

        stains = Stains(numbers("haematoxylin", 3), numbers("eosin", 3), numbers("concentrations", 2))
        return cls(numbers("mean", 3), numbers("std", 3), stains)


def tile_sample(tile: np.ndarray) -> np.ndarray:
    """Some pixels of a tile, evenly spread: uint8 (px, px, 3) -> uint8 (k, 3), 324 of a tile of 224 px."""
    return tile[::_SAMPLE_STEP, ::_SAMPLE_STEP].reshape(-1, 3)


def slide_stains(pixels: np.ndarray) -> SlideColour | None:
    """Colour statistics and stains of a brightfield slide, from a sample of its pixels; the same for the same sample.

    The two directions are the robust extremes of the angle inside the plane of the two largest eigenvectors of the
    densities' 3 x 3 covariance; of these, haematoxylin is the one that takes more red. Percentiles of concentrations
    are those of tissue, not of the whole picture as in the authors' code: how much glass there is must not count.

    Args:
        pixels: uint8, shape (n, 3), RGB; of many more than 50,000 evenly spread ones are used.

    Returns:
        None where there is too little tissue, or no two stains can be told apart.
    """
    planes = np.ascontiguousarray(pixels[:: max(1, len(pixels) // _MOST_PIXELS)].T)
    tissue = planes.compress((planes <= _BRIGHTEST).all(axis=0), axis=1)
    if tissue.shape[1] < _LEAST_PIXELS:
        return None
    density = _DENSITY.take(tissue).astype(np.float64)
    _, vectors = np.linalg.eigh(np.cov(density))
    plane = vectors[:, 2:0:-1]
    plane = plane * np.where(plane.sum(axis=0) < 0, -1, 1)  # the first points to where density grows
    first, second = plane.T @ density
    angles = np.arctan2(second, first)
    low, high = np.percentile(angles, (_ANGLE_PERCENTILE, 100 - _ANGLE_PERCENTILE))
    if high - low < _LEAST_ANGLE:
        return None
    ends = np.stack([plane @ (np.cos(angle), np.sin(angle)) for angle in (low, high)], axis=1)
    stains = ends[:, np.argsort(-ends[0])]
    concentrations = np.percentile(np.linalg.pinv(stains) @ density, _CONCENTRATION_PERCENTILE, axis=1)
    if (concentrations <= 0).any():
        return None
    return SlideColour(
        tuple(tissue.mean(axis=1).tolist()),
        tuple(tissue.std(axis=1).tolist()),
        Stains(tuple(stains[:, 0].tolist()), tuple(stains[:, 1].tolist()), tuple(concentrations.tolist())),
    )


def _basis(stains: Stains) -> np.ndarray:
    """Columns: 99 % of haematoxylin, of eosin, and what neither can give, at right angles to both."""
    both = np.array([stains.haematoxylin, stains.eosin]).T
    rest = np.cross(both[:, 0], both[:, 1])
    return np.column_stack([both * stains.concentrations, rest / np.linalg.norm(rest)])


def normaliser(source: Stains, target: Stains) -> Callable[[np.ndarray], np.ndarray]:
    """A function that gives tiles of one slide the stains of another.

    A matrix on optical densities: concentrations are scaled as in Macenko's method. What lies outside of the stains'
    plane, which that method drops, stays as it is: pigment keeps its colour, and a slide's own stains change nothing.

    Returns:
        uint8 (..., px, px, 3) -> the same shape, a new array.
    """
    matrix = (_basis(target) @ np.linalg.inv(_basis(source))).astype(np.float32)
    # Of v + 1 = white * exp(-matrix @ density), with the logarithm of white taken into the product.
    affine = np.column_stack([-matrix, np.full(3, np.log(_WHITE), np.float32)]).astype(np.float32)

    def normalise(tiles: np.ndarray) -> np.ndarray:
        flat = tiles.reshape(-1, tiles.shape[-2], 3)
        brightness = cv2.exp(cv2.transform(cv2.LUT(flat, _DENSITY), affine))
        return cv2.convertScaleAbs(brightness, alpha=1, beta=-1).reshape(tiles.shape)

    return normalise


def read_target(target: str | Path) -> Stains:
    """Stains to normalise to: "reference" for Macenko's published ones, or a JSON file of a ``SlideColour``.

    Raises:
        UsageError: The file is missing or holds something else.
    """
    if target == "reference":
        return REFERENCE
    try:
        return SlideColour.from_json(json.loads(Path(target).read_bytes())).stains
    except (OSError, KeyError, TypeError, ValueError) as error:
        what = f"cannot be read as a slide's colour ({type(error).__name__}: {error})"
        raise UsageError(what, target, 'give "reference" or a JSON file of haematoxylin, eosin and so on') from error
