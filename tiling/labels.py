"""From a mask under a tile to coverage per class and one label.

Masks come with values, annotations with class names; a *scheme* says what both mean. PANDA's two providers grade
differently: only Radboud's masks hold Gleason patterns; Karolinska's say benign or cancer and never enter the report's
five classes. Value 0 means background *or unknown* in both, and class 0 does everywhere: it is no label.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

from tiling.errors import MaskError, UsageError

UNLABELLED = -1
GLEASON_CLASSES = ("background", "healthy", "gleason3", "gleason4", "gleason5")
# Marks a value that a scheme does not know in its table; so 255 classes are the most that a mask can hold.
_UNKNOWN = 255
_SEPARATORS = re.compile(r"[\s_-]+")


@dataclass(frozen=True)
class Scheme:
    """What mask values and annotation classes mean.

    A *stored value* is what ``masks.zarr`` holds: 0, 1, 2, ... in the order of ``values``.

    Args:
        values: Name of each stored value.
        classes: Class of each stored value in ``class_names``; None when the source does not grade.
        class_names: The classes; the first is background or unknown.
        pixels: Mask value -> stored value.
        names: Annotation class, as ``plain`` writes it -> stored value; None leaves its annotations out.
        advice: What the reader can do about a value or class that is not known.
    """

    values: tuple[str, ...]
    classes: tuple[int, ...] | None
    class_names: tuple[str, ...] = GLEASON_CLASSES
    pixels: Mapping[int, int] = field(default_factory=dict, hash=False)
    names: Mapping[str, int | None] = field(default_factory=dict, hash=False)
    advice: str = "add it to the file of --class-map"

    def stored(self, mask: np.ndarray, lossy: bool = False) -> np.ndarray:
        """Stored values of a mask.

        Args:
            mask: The mask's own values, uint8, shape (H, W).
            lossy: The mask was compressed lossily: each pixel counts as the nearest known value.

        Returns:
            uint8, shape (H, W).

        Raises:
            MaskError: The mask holds a value that is not known.
        """
        stored = np.asarray(cv2.LUT(mask, self._tables[lossy]))
        unknown = stored == _UNKNOWN
        if unknown.any():
            raise MaskError(f"mask holds value {mask[unknown].max()}, known are {self._known()}", do=self.advice)
        return stored

    def to_json(self) -> dict[str, str | None]:
        """Mask values and annotation classes -> what they mean, as plain JSON values."""
        of_names = {name: None if stored is None else self.values[stored] for name, stored in self.names.items()}
        return {**{str(value): self.values[stored] for value, stored in self.pixels.items()}, **of_names}

    @cached_property
    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Stored value of each mask value, and of the known value nearest to it; uint8 (256,)."""
        table = np.full(256, _UNKNOWN, np.uint8)
        known = np.array(sorted(self.pixels), np.int64)
        if not len(known):
            return table, table
        table[known] = [self.pixels[value] for value in known.tolist()]
        return table, table[known[np.abs(np.arange(256)[:, None] - known).argmin(axis=1)]]

    def _known(self) -> str:
        """The known mask values with their names, as a message says them."""
        found = sorted(self.pixels)
        if not found:
            return "none"
        names = ", ".join(self.values[self.pixels[value]] for value in found)
        text = f"{found[0]} to {found[-1]}" if found == list(range(len(found))) else ", ".join(map(str, found))
        return f"{text} ({names})"

    def stored_of_class(self, names: Sequence[str]) -> int | None:
        """Stored value of an annotation.

        Args:
            names: Its class, then the more general ones that it belongs to; the first that is known counts.

        Returns:
            The stored value, or None when such annotations are left out, or when it has no class at all.

        Raises:
            MaskError: None of the names is known.
        """
        for name in names:
            if plain(name) in self.names:
                return self.names[plain(name)]
        if not names:
            return None
        raise MaskError(f"annotation class {names[0]!r}, known are {', '.join(sorted(self.names))}", do=self.advice)


def plain(name: str) -> str:
    """An annotation class name without case and separators, so that spellings of one class meet.

    >>> plain("Gleason_3") == plain("gleason 3")
    True
    """
    return _SEPARATORS.sub("", name.casefold())


def _provider(values: tuple[str, ...], classes: tuple[int, ...] | None) -> Scheme:
    """A PANDA provider's scheme: its masks hold the stored values themselves."""
    pixels = {value: value for value in range(len(values))}
    return Scheme(values, classes, pixels=pixels, advice="check data_provider in train.csv")


SCHEMES = {
    "radboud": _provider(("background", "stroma", "benign", "gleason3", "gleason4", "gleason5"), (0, 1, 1, 2, 3, 4)),
    "karolinska": _provider(("background", "benign", "cancer"), None),
}

_GLEASON_NAMES = {
    0: ("background", "glass", "exclude", "exclusion"),
    1: ("healthy", "benign", "normal", "stroma", "non-cancerous", "NC"),
    **{n - 1: (f"gleason {n}", f"gleason pattern {n}", f"gleason grade {n}", f"GP {n}", f"G {n}") for n in (3, 4, 5)},
}
# What annotation classes mean where no class map is given; mask values mean nothing without one.
GLEASON_ANNOTATIONS = Scheme(
    GLEASON_CLASSES,
    tuple(range(len(GLEASON_CLASSES))),
    names={plain(name): number for number, names in _GLEASON_NAMES.items() for name in names},
    advice="map it with --class-map",
)


def read_class_map(path: Path) -> Scheme:
    """A class map: JSON or YAML with ``classes`` (names; the first is background or unknown) and ``values`` (mask
    value or annotation class -> class name; null is background in a mask, and leaves annotations out).

    Raises:
        UsageError: The file is missing or malformed, names a class that is not listed, or a value out of 0 to 255.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"class map cannot be read ({' '.join(str(error).split())})", path) from error
    shape = "it holds {classes: [name, ...], values: {mask value or annotation class: name, ...}}"
    if not isinstance(content, dict) or set(content) != {"classes", "values"}:
        raise UsageError("not a class map", path, shape)
    names, values = content["classes"], content["values"]
    if not isinstance(names, list) or not isinstance(values, dict) or not values:
        raise UsageError("not a class map", path, shape)
    if not all(isinstance(name, str) and name for name in names) or len(set(names)) != len(names):
        raise UsageError("classes must be names, none of them twice", path)
    if not 2 <= len(names) < _UNKNOWN:
        raise UsageError(f"{len(names)} classes, 2 to {_UNKNOWN - 1} are possible (the first is background)", path)
    numbers = {name: number for number, name in enumerate(names)}
    meaning = {str(key): _number(str(key), name, numbers, path) for key, name in values.items()}
    pixels = {int(key): number or 0 for key, number in meaning.items() if key.isascii() and key.isdigit()}
    if pixels and max(pixels) > 255:
        raise UsageError(f"mask value {max(pixels)}, must lie in 0 to 255", path)
    by_name = {plain(key): number for key, number in meaning.items()}
    if len(by_name) != len(meaning):
        raise UsageError("two annotation classes differ only in case or separators", path)
    return Scheme(tuple(names), tuple(range(len(names))), tuple(names), pixels, by_name)


def _number(key: str, name: Any, numbers: dict[str, int], path: Path) -> int | None:
    """Class number of a name in a class map."""
    if name is None:
        return None
    if not isinstance(name, str) or name not in numbers:
        raise UsageError(f"{key!r} stands for class {name!r}, classes are {', '.join(numbers)}", path)
    return numbers[name]


def coverage(stored: np.ndarray, scheme: Scheme) -> np.ndarray:
    """Share of a mask tile that each stored value covers.

    Args:
        stored: Stored values, uint8, shape (H, W).
        scheme: Their scheme.

    Returns:
        Shares that sum to 1, float32, shape (len(scheme.values),).
    """
    counts = cv2.calcHist([np.ascontiguousarray(stored)], [0], None, [len(scheme.values)], [0, len(scheme.values)])
    return np.asarray(counts.ravel() / stored.size, np.float32)


def label(shares: np.ndarray, scheme: Scheme, min_share: float) -> int:
    """Highest class that covers at least ``min_share`` of the tile, or UNLABELLED.

    Args:
        shares: Coverage per stored value, shape (len(scheme.values),).
        scheme: Their scheme.
        min_share: Least share of the tile; 0 lets a single pixel decide, as the report did.

    Returns:
        Class index, or UNLABELLED when nothing but background or unknown is under the tile, or when the source
        does not grade.

    >>> radboud = SCHEMES["radboud"]
    >>> label(np.array([0.2, 0.5, 0.2, 0.08, 0.02, 0.0]), radboud, 0.05)
    2
    >>> label(np.array([1.0, 0, 0, 0, 0, 0]), radboud, 0.05)
    -1
    """
    if scheme.classes is None:
        return UNLABELLED
    of_class = np.zeros(max(scheme.classes) + 1)
    np.add.at(of_class, list(scheme.classes), shares)
    enough = np.flatnonzero((of_class >= min_share) & (of_class > 0))
    return int(enough[-1]) if len(enough) and enough[-1] > 0 else UNLABELLED
