"""What a network is fed: a view or a tile itself, or the approximation of its Haar wavelet transform."""

import torch
from torch.nn import functional

from tiling.errors import UsageError

Triple = tuple[float, float, float]

GAIN = 2  # of the approximation, over the image it is made of


def approximation(images: torch.Tensor) -> torch.Tensor:
    """LL band of the one-level orthonormal Haar transform, PyWavelets' ``dwt2(x, "haar")[0]``.

    Every 2 x 2 pixels a, b, c, d give (a + b + c + d) / 2, so that a constant image gives its double.

    Args:
        images: (B, C, H, W).

    Returns:
        (B, C, H / 2, W / 2).

    Raises:
        UsageError: H or W is odd.
    """
    for side in images.shape[2:]:
        input_side(side, "haar")
    return functional.avg_pool2d(images, 2).mul_(GAIN)


def input_side(side: int, kind: str) -> int:
    """Side in pixels of what a network is fed, where that of the image is ``side`` and ``kind`` rgb or haar.

    Raises:
        UsageError: The kind is not known; the side of an image to be transformed is odd.
    """
    if kind == "rgb":
        return side
    if kind != "haar":
        raise UsageError(f"input is {kind!r}, must be rgb or haar")
    if side % 2:
        raise UsageError(f"side is {side} px, must be even for the Haar transform")
    return side // 2


def network_input(images: torch.Tensor, kind: str, mean: Triple, std: Triple) -> torch.Tensor:
    """Normalised input of a network.

    The approximation is normalised with twice the mean and the standard deviation: it has the statistics of the
    image, and a network trained on images meets what it knows.

    Args:
        images: (B, 3, H, W) in [0, 1]; they may be changed in place.
        kind: rgb, or haar for the approximation.
        mean: Channel means of images.
        std: Channel standard deviations of images.

    Returns:
        (B, 3, H, W) or (B, 3, H / 2, W / 2).

    Raises:
        UsageError: As in `input_side`.
    """
    gain = images.shape[3] // input_side(images.shape[3], kind)
    x = images if gain == 1 else approximation(images)
    for channel in range(3):
        x[:, channel].sub_(gain * mean[channel]).div_(gain * std[channel])
    return x
