"""Changes of colour, in place, of batches (n, 3, h, w) in [0, 1]; every sample has its own numbers, (n, 1, 1, 1)."""

import numpy as np
import torch

# Optical densities of R, G and B by one unit of haematoxylin, eosin and, for what these two leave, DAB (rows).
# Ruifrok and Johnston, "Quantification of histochemical staining by color deconvolution", 2001.
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
UNMIX = np.linalg.inv(STAINS)
# Added before the logarithm, one grey level: black has a density of 5.5, and noise there is raised 255-fold at most.
GREY_LEVEL = 1 / 255


def stain_mix(scale: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scaling and shifting stains as one affine map of a pixel's logarithms, for `stain`.

    The optical density of a pixel p is d = -ln((p + g) / (1 + g)) with g one grey level: none for white. Amounts of
    stain are c = d ``UNMIX``; they become c * scale + shift, and back.

    Args:
        scale: Factors on each stain, float64, shape (n, 3).
        shift: Added to each, natural optical density, float64, shape (n, 3).

    Returns:
        A of (n, 3, 3) and b of (n, 3), such that the pixel becomes b * 2 ** (ln(p + g) @ A) - g.
    """
    mix = UNMIX * scale[:, None, :] @ STAINS  # (n, 3, 3): densities before, densities after
    offset = np.log(1 + GREY_LEVEL) * (1 - mix.sum(axis=1)) - shift @ STAINS
    return mix / np.log(2), np.exp(offset)


def stain(x: torch.Tensor, mix: torch.Tensor, gain: torch.Tensor) -> None:
    """Change amounts of stain by the A, (n, 3, 3, 1, 1), and b, (n, 3, 1, 1), of `stain_mix`.

    Tellez et al., "Whole-slide mitosis detection in H&E breast histology using PHH3 as a reference to train distilled
    stain-invariant convolutional networks", IEEE TMI 2018. Powers of two, since ``exp`` takes a CPU twice as long;
    products of planes, since a matrix product may be rounded to TF32 on a GPU.
    """
    red, green, blue = x.add(GREY_LEVEL).log_().chunk(3, dim=1)
    for channel, weights in zip(x.chunk(3, dim=1), mix.unbind(dim=2), strict=True):
        by_red, by_green, by_blue = weights.chunk(3, dim=1)
        torch.mul(red, by_red, out=channel).addcmul_(green, by_green).addcmul_(blue, by_blue)
    x.exp2_().mul_(gain).sub_(GREY_LEVEL).clamp_(0, 1)


def jitter(
    x: torch.Tensor, brightness: torch.Tensor, contrast: torch.Tensor, saturation: torch.Tensor, hue: torch.Tensor
) -> None:
    """Brightness, contrast, saturation, hue as torchvision defines them."""
    x.mul_(brightness).clamp_(0, 1)
    mean = grey(x.mean(dim=(2, 3), keepdim=True))  # (n, 1, 1, 1)
    x.mul_(contrast).add_(mean * (1 - contrast)).clamp_(0, 1)
    torch.lerp(grey(x), x, saturation, out=x).clamp_(0, 1)
    shift_hue(x, hue)


def shift_hue(x: torch.Tensor, turns: torch.Tensor) -> None:
    """Shift the hue of HSV, keeping value and saturation.

    Without branches, which cost more than all else here. Let p' = (p - min) / (max - min). Then g' + b' - r' + 1 is
    the hue's distance from red in sixths of a turn, towards green if g >= b, else towards blue. And back, for a hue
    h in sixths, 0 to 6: r' = clamp(|h - 3|, 1, 2) - 1, g' = 2 - clamp(|h - 2|, 1, 2), b' = 2 - clamp(|h - 4|, 1, 2).
    """
    red, green, blue = x.chunk(3, dim=1)  # views of x, (n, 1, h, w)
    low, high = x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)
    chroma = high.sub_(low).clamp_min_(1e-12)  # far below a grey level: greys stay grey
    hue = (green + blue).sub_(red).sub_(low).div_(chroma).add_(1).mul_(1 / 6)
    hue.copysign_(green - blue).add_(turns + 1).frac_()  # in turns
    falling = torch.add(low, chroma, alpha=2)
    for channel, centre, base, sign in ((green, 2, falling, -1), (blue, 4, falling, -1), (red, 3, low.sub_(chroma), 1)):
        ramp = (hue - centre / 6).abs_().clamp_(1 / 6, 2 / 6)
        torch.addcmul(base, chroma, ramp, value=6 * sign, out=channel)


def grey(x: torch.Tensor) -> torch.Tensor:
    """ITU-R 601 luma, as torchvision rounds it: (n, 3, h, w) -> (n, 1, h, w)."""
    red, green, blue = x.chunk(3, dim=1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)
