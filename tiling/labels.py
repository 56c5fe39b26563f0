"""From a mask under a tile to coverage per class and one label.

The two PANDA providers grade differently: only Radboud's masks hold Gleason patterns; Karolinska's say benign or
cancer and never enter the report's five classes. Value 0 means background *or unknown* in both.
"""

from dataclasses import dataclass

import numpy as np

from tiling.errors import MaskError

UNLABELLED = -1
GLEASON_CLASSES = ("background", "healthy", "gleason3", "gleason4", "gleason5")


@dataclass(frozen=True)
class Scheme:
    """What a provider's mask values mean.

    Args:
        values: Name of each mask value, by value.
        classes: Class of each mask value in ``GLEASON_CLASSES``; None when the provider does not grade.
    """

    values: tuple[str, ...]
    classes: tuple[int, ...] | None


SCHEMES = {
    "radboud": Scheme(("background", "stroma", "benign", "gleason3", "gleason4", "gleason5"), (0, 1, 1, 2, 3, 4)),
    "karolinska": Scheme(("background", "benign", "cancer"), None),
}


def coverage(mask: np.ndarray, scheme: Scheme) -> np.ndarray:
    """Share of a mask tile that each value covers.

    Args:
        mask: Mask values, uint8, shape (H, W).
        scheme: The provider's values.

    Returns:
        Shares that sum to 1, float32, shape (len(scheme.values),).

    Raises:
        MaskError: The mask holds a value that the provider does not use.
    """
    counts = np.bincount(mask.ravel(), minlength=len(scheme.values))
    if len(counts) > len(scheme.values):
        raise MaskError(
            f"mask holds value {len(counts) - 1}, known are 0 to {len(scheme.values) - 1} ({', '.join(scheme.values)})",
            do="check data_provider in train.csv",
        )
    return (counts / mask.size).astype(np.float32)


def label(shares: np.ndarray, scheme: Scheme, min_share: float) -> int:
    """Highest class that covers at least ``min_share`` of the tile, or UNLABELLED.

    Args:
        shares: Coverage per mask value, shape (len(scheme.values),).
        scheme: The provider's values.
        min_share: Least share of the tile; 0 lets a single pixel decide, as the report did.

    Returns:
        Class index, or UNLABELLED when nothing but background or unknown is under the tile, or when the provider
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
