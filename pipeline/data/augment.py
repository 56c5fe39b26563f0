"""Multi-crop views as batched tensor operations on the device, from uint8 tiles.

What is random in a view is drawn in ``views.py``; `render` makes the pixels. What happens to which sample is known on
the host, so the device is never waited for.

As in the original DINO (facebookresearch/dino, ``main_dino.py``, ``DataAugmentationDINO``): the order crop, flip,
jitter, greyscale, blur, solarise, normalise; with preset ``original`` also every probability and strength. Not as
there: resampling is bilinear, not bicubic; nothing is rounded to uint8 in between; the four jitters keep one order
(torchvision shuffles them); the blur is a true Gaussian (PIL's is three boxes); crops as told in `draw`.

Stains, which the original does not change, come right after the crop: densities are those of light that went through
the tissue, as the tile has it; jitter, which stands for the camera, bends and clips that light.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from pipeline.data import colour as pixels
from pipeline.data.haar import Triple, input_side, network_input
from pipeline.data.views import ColourSpec, ViewParameters, ViewSpec, draw

Drawn = tuple[int, ViewParameters]  # a view's side in pixels, and what was drawn for it

CPU_VALUES = 6 * 3 * 224 * 224  # a CPU works on about this many values at a time, so that they stay in its cache


def make_views(
    tiles: torch.Tensor,
    ids: np.ndarray,
    epochs: np.ndarray,
    specs: Sequence[ViewSpec],
    colour: ColourSpec,
    seed: int,
    mean: Triple,
    std: Triple,
    dtype: torch.dtype = torch.float32,
    input: str = "rgb",
) -> list[torch.Tensor]:
    """All views of a batch, in the order of ``specs``, each (B, 3, size, size); see `draw` and `render`."""
    drawn = [(spec.size, draw(spec, colour, seed, epochs, ids, tiles.shape[1])) for spec in specs]
    return _render_all(tiles, drawn, mean, std, dtype, input)


def render(
    tiles: torch.Tensor,
    params: ViewParameters,
    spec: ViewSpec,
    mean: Triple,
    std: Triple,
    dtype: torch.dtype = torch.float32,
    input: str = "rgb",
) -> torch.Tensor:
    """Pixels of one view.

    Computed in float32 (float64 for that dtype) and cast at the end; no operation here is one that autocast or TF32
    would round.

    Args:
        tiles: Tiles, uint8, shape (B, px, px, 3), on any device.
        params: Parameters of these samples, in this order.
        spec: The view.
        mean: Channel means to subtract from pixels in [0, 1].
        std: Channel standard deviations to divide by.
        dtype: Of the result.
        input: What the network is fed: rgb, or haar for the approximation of the view's Haar transform.

    Returns:
        Shape (B, 3, size, size), half as wide and high for haar, on the tiles' device.

    Raises:
        UsageError: The input is not known, or haar and the size odd.
    """
    return _render_all(tiles, [(spec.size, params)], mean, std, dtype, input)[0]


@torch.no_grad()
def _render_all(
    tiles: torch.Tensor, drawn: Sequence[Drawn], mean: Triple, std: Triple, dtype: torch.dtype, input: str
) -> list[torch.Tensor]:
    """Views of a batch: those of one size together; on a CPU, some tiles at a time, elsewhere all at once."""
    batch, px = tiles.shape[:2]
    if tiles.dtype != torch.uint8 or tiles.shape != (batch, px, px, 3):
        raise ValueError(f"tiles are {tiles.dtype} of {tuple(tiles.shape)}, must be uint8 of (B, px, px, 3)")
    if any(len(params.box) != batch for _, params in drawn):
        raise ValueError(f"{batch} tiles but parameters of {[len(params.box) for _, params in drawn]} samples")
    work = torch.float64 if dtype == torch.float64 else torch.float32
    sides = [input_side(size, input) for size, _ in drawn]
    views = [torch.empty(batch, 3, side, side, dtype=dtype, device=tiles.device) for side in sides]
    groups = {size: [i for i, (other, _) in enumerate(drawn) if other == size] for size, _ in drawn}
    most = 3 * max(px**2, *(len(members) * size**2 for size, members in groups.items()))  # values per tile
    step = max(1, CPU_VALUES // most if tiles.device.type == "cpu" else batch)
    for start in range(0, batch, step):
        rows = slice(start, start + step)
        planes = tiles[rows].to(work).mul_(1 / 255).permute(0, 3, 1, 2)  # (b, 3, px, px), channels last in memory
        for size, members in groups.items():
            params = ViewParameters.join([drawn[i][1].take(rows) for i in members])
            order = _work_order(params)
            there, back = (_send(indices, tiles.device, torch.int64) for indices in (order, np.argsort(order)))
            x = _crop(planes, params, size).index_select(0, there)
            _recolour(x, params.take(order))
            x = network_input(x, input, mean, std).to(dtype)
            for i, places in zip(members, back.chunk(len(members)), strict=True):
                torch.index_select(x, 0, places, out=views[i][rows])
    return views


def _work_order(params: ViewParameters) -> np.ndarray:
    """Samples sorted so that those of one step lie in few runs, to be changed in place, not gathered and scattered."""
    return np.lexsort((params.solarise, params.greyscale, _reach(params), params.jitter))


def _stained(params: ViewParameters) -> np.ndarray:
    """Bool, shape (B,): whether stains are changed."""
    changed: np.ndarray = (params.stain_scale != 1).any(axis=1) | (params.stain_shift != 0).any(axis=1)
    return changed


def _reach(params: ViewParameters) -> np.ndarray:
    """How far a blur reaches, pixels, shape (B,): 0, or the even number next above three sigma."""
    return 2 * np.ceil(1.5 * params.blur_sigma)


def _crop(planes: torch.Tensor, params: ViewParameters, size: int) -> torch.Tensor:
    """Crop, flips, turn and resize in one bilinear sampling: (b, 3, px, px) -> (views * b, 3, size, size).

    Sampling points are clamped to the centres of the box's outer pixels, which is what cropping first and repeating
    the edge would give: no pixel outside the box is mixed in. The points form a lattice parallel to the axes, so
    coordinates are made line by line; a matrix product per pixel would be slower and lose digits under TF32.
    """
    first, step, low, high = _send(_lattice(params, size, planes.shape[2]), planes.device, planes.dtype)[..., None]
    index = torch.arange(size, device=planes.device, dtype=planes.dtype)
    along_rows, along_columns = torch.clamp(first + step * index, low, high)  # (views * b, 2, size) each
    grid = (along_rows[..., :, None] + along_columns[..., None, :]).permute(0, 2, 3, 1)  # x, y last
    parts = grid.chunk(len(grid) // len(planes))
    return torch.cat([functional.grid_sample(planes, g, padding_mode="border", align_corners=False) for g in parts])


def _lattice(params: ViewParameters, size: int, px: int) -> np.ndarray:
    """Where views are sampled: four numbers of clamp(first + step * index, low, high), in units of grid_sample.

    The shape is (4, 2, B, 2): these four, by row and by column index of the view, for x and y of the tile. Either
    coordinate follows one of the two indices and has zeros for the other.
    """
    turns = params.quarter_turns
    out = np.zeros((4, 2, len(turns), 2))
    # A view is rot90(flip(crop), turns): odd turns swap the axes, and x or y may run backwards.
    backwards_x = params.flip_h ^ ((turns == 1) | (turns == 2))
    backwards_y = params.flip_v ^ ((turns == 2) | (turns == 3))
    for axis, backwards, index in ((0, backwards_x, 1 - turns % 2), (1, backwards_y, turns % 2)):
        start, length = params.box[:, 1 - axis], params.box[:, 3 - axis]  # tile pixels
        step = np.where(backwards, -length, length) / size
        first = np.where(backwards, start + length, start) + step / 2  # in from the edge; pixel centres end in .5
        numbers = np.stack([first, step, start + 0.5, start + length - 0.5]) * 2 / px
        numbers[[0, 2, 3]] -= 1
        out[:, index, np.arange(len(turns)), axis] = numbers
    return out


def _recolour(x: torch.Tensor, params: ViewParameters) -> None:
    """Stains, jitter, greyscale, blur, solarise of samples in `_work_order`, in place: (B, 3, h, w) in [0, 1]."""
    for run in _runs(_stained(params)):
        mix, gain = pixels.stain_mix(params.stain_scale[run], params.stain_shift[run])
        pixels.stain(x[run], *(_send(numbers, x.device, x.dtype)[..., None, None] for numbers in (mix, gain)))
    for run in _runs(params.jitter):
        factors = np.stack([params.brightness, params.contrast, params.saturation, params.hue])[:, run]
        pixels.jitter(x[run], *_send(factors, x.device, x.dtype)[..., None, None, None])
    for run in _runs(params.greyscale):
        x[run] = pixels.grey(x[run])
    reach = _reach(params)
    for run in _runs(reach):
        _blur(x[run], params.blur_sigma[run], int(reach[run.start]))
    for run in _runs(params.solarise):
        x[run] = torch.minimum(x[run], 1 - x[run])  # 1 - x from 0.5 up
    x.clamp_(0, 1)


def _blur(x: torch.Tensor, sigma: np.ndarray, reach: int) -> None:
    """Gaussian blur over 2 reach + 1 pixels, edges reflected, one sigma per sample, in place: (n, 3, h, w).

    A sum of shifted copies: a grouped convolution is no faster on a CPU, and may be rounded to TF32 on a GPU.
    """
    height, width = x.shape[2:]
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1)[:, None] / sigma) ** 2)
    taps = _send(weights / weights.sum(axis=0), x.device, x.dtype)[..., None, None, None]  # (taps, n, 1, 1, 1)
    padded = functional.pad(x, (reach,) * 4, mode="reflect")
    across = padded[..., :width] * taps[0]
    for k in range(1, len(taps)):
        across.addcmul_(padded[..., k : k + width], taps[k])
    torch.mul(across[..., :height, :], taps[0], out=x)
    for k in range(1, len(taps)):
        x.addcmul_(across[..., k : k + height, :], taps[k])


def _runs(values: np.ndarray) -> list[slice]:
    """Where equal values stand next to each other, zeros left out."""
    starts = np.flatnonzero(np.concatenate([values[:1] == values[:1], values[1:] != values[:-1]]))
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(values)], strict=True) if values[a]]


def _send(array: np.ndarray, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Host numbers to the device without waiting for it: only a copy from pinned memory is asynchronous."""
    tensor = torch.from_numpy(array).to(dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
