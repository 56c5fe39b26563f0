"""Multi-crop views as batched tensor operations on the device, from uint8 tiles.

A `ViewSpec` says what kind of view is wanted. `draw` makes it `ViewParameters`, a few numbers per sample, on the host
and without state: a sample gets the same view in any batch, on any rank, after any resume. `render` makes the pixels;
what happens to which sample is known on the host, so the device is never waited for.

As in the original DINO (facebookresearch/dino, ``main_dino.py``, ``DataAugmentationDINO``): the order crop, flip,
jitter, greyscale, blur, solarise, normalise; with preset ``original`` also every probability and strength. Not as
there: resampling is bilinear, not bicubic; nothing is rounded to uint8 in between; the four jitters keep one order
(torchvision shuffles them); the blur is a true Gaussian (PIL's is three boxes); crops as told in `draw`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from pipeline.data.randomness import uniforms
from tiling.errors import UsageError

Triple = tuple[float, float, float]
Drawn = tuple[int, "ViewParameters"]  # a view's side in pixels, and what was drawn for it

MAX_SIGMA = 2.0  # widest blur, pixels of the view
BLUR_RADIUS = 6  # three of these standard deviations
LOCAL_STREAM = 1 << 16  # globals have the streams below: one view more leaves the others as they are
CPU_VALUES = 6 * 3 * 224 * 224  # a CPU works on about this many values at a time, so that they stay in its cache


def _check_shares(spec: object, names: Sequence[str]) -> None:
    for name in names:
        if not 0 <= getattr(spec, name) <= 1:
            raise UsageError(f"{name} is {getattr(spec, name)}, must lie in 0 to 1")


@dataclass(frozen=True)
class ViewSpec:
    """One kind of view."""

    name: str  # for logs and errors: global0, local3
    stream: int  # the view's identity: its random stream, unique among a sample's views
    size: int  # side of the view, pixels
    scale: tuple[float, float]  # share of the tile's area that a crop covers, least and largest
    blur: float  # probability
    solarise: float  # probability
    is_global: bool

    def __post_init__(self) -> None:
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise UsageError(f"scale is {self.scale}, must rise within 0 to 1", self.name)
        if self.size <= BLUR_RADIUS:
            raise UsageError(f"size is {self.size} px, must be over the blur's {BLUR_RADIUS}", self.name)
        _check_shares(self, ("blur", "solarise"))


@dataclass(frozen=True)
class ColourSpec:
    """What all views share: colours, orientations, width of the blur."""

    brightness: float  # factors lie in [1 - this, 1 + this]
    contrast: float  # the same
    saturation: float  # the same
    hue: float  # at most this many turns either way
    jitter: float  # probability of these four together
    greyscale: float  # probability
    rot90: bool  # turned by 0, 90, 180 or 270 degrees
    vertical_flip: bool  # half are flipped upside down; mirrored half always are
    blur_sigma: tuple[float, float] = (0.1, MAX_SIGMA)  # standard deviation, pixels of the view

    def __post_init__(self) -> None:
        low, high = self.blur_sigma
        if not 0 < low <= high <= MAX_SIGMA:
            raise UsageError(f"blur_sigma is {self.blur_sigma}, must rise within 0 to {MAX_SIGMA:g} px")
        if not 0 <= self.hue <= 0.5:
            raise UsageError(f"hue is {self.hue}, must lie in 0 to 0.5 turns")
        _check_shares(self, ("brightness", "contrast", "saturation", "jitter", "greyscale"))


# "histology" is our choice, in the spirit of Kang et al. 2023 ("Benchmarking self-supervised learning on diverse
# pathology datasets", CVPR): tissue has no upright; hue and fine texture carry the diagnosis. So all eight
# orientations; half the jitter, a fifth of the hue; half the blur, at most 1 px; little greyscale; no solarisation.
COLOURS = {
    "original": ColourSpec(0.4, 0.4, 0.2, 0.1, jitter=0.8, greyscale=0.2, rot90=False, vertical_flip=False),
    "histology": ColourSpec(0.2, 0.2, 0.1, 0.02, 0.8, 0.05, rot90=True, vertical_flip=True, blur_sigma=(0.1, 1.0)),
}
# Blur, then solarisation: their probabilities for the first global view, other globals, locals.
CHANCES = {"original": ((1.0, 0.1, 0.5), (0.0, 0.2, 0.0)), "histology": ((0.5, 0.1, 0.25), (0.0, 0.0, 0.0))}


@dataclass(frozen=True, eq=False)
class ViewParameters:
    """All that is random in one view of a batch: small arrays on the host, shape (B,)."""

    box: np.ndarray  # (B, 4) float64: y0, x0, height, width of the crop in whole tile pixels
    flip_h: np.ndarray  # bool: mirrored left to right
    flip_v: np.ndarray  # bool: flipped upside down
    quarter_turns: np.ndarray  # int64, 0 to 3: anticlockwise, after the flips
    jitter: np.ndarray  # bool: whether the next four apply
    brightness: np.ndarray  # float64, factor
    contrast: np.ndarray  # float64, factor
    saturation: np.ndarray  # float64, factor
    hue: np.ndarray  # float64, turns
    greyscale: np.ndarray  # bool
    blur_sigma: np.ndarray  # float64, pixels of the view; 0 is no blur
    solarise: np.ndarray  # bool

    def digest(self) -> str:
        """Sha256 over every field, to compare what two ranks or two runs drew."""
        total = hashlib.sha256()
        for name, array in vars(self).items():
            total.update(f"{name} {array.dtype.name} {array.shape}".encode())
            total.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
        return total.hexdigest()

    def take(self, rows: slice | np.ndarray) -> "ViewParameters":
        """The parameters of some samples."""
        return ViewParameters(**{name: array[rows] for name, array in vars(self).items()})

    @staticmethod
    def join(parts: "Sequence[ViewParameters]") -> "ViewParameters":
        """The parameters of several batches, one after another."""
        return ViewParameters(**{n: np.concatenate([vars(part)[n] for part in parts]) for n in vars(parts[0])})


def colour_spec(preset: str) -> ColourSpec:
    """Colours of a preset; UsageError if there is none of that name."""
    _require_preset(preset)
    return COLOURS[preset]


def view_specs(
    global_crops: int,
    local_crops: int,
    global_size: int,
    local_size: int,
    global_scale: tuple[float, float],
    local_scale: tuple[float, float],
    preset: str,
) -> tuple[ViewSpec, ...]:
    """All views of a sample, globals first: numbers of views, sides in pixels, least and largest shares of the area.

    Raises:
        UsageError: The preset is not known, or a number is out of range.
    """
    if global_crops < 0 or local_crops < 0 or global_crops + local_crops == 0:
        raise UsageError(f"{global_crops} global and {local_crops} local crops, need at least one view")
    _require_preset(preset)
    blur, solarise = CHANCES[preset]
    return tuple(
        ViewSpec(f"global{i}", i, global_size, global_scale, blur[i > 0], solarise[i > 0], is_global=True)
        for i in range(global_crops)
    ) + tuple(
        ViewSpec(f"local{i}", LOCAL_STREAM + i, local_size, local_scale, blur[2], solarise[2], is_global=False)
        for i in range(local_crops)
    )


def draw(
    spec: ViewSpec, colour: ColourSpec, seed: int, epochs: np.ndarray, ids: np.ndarray, tile_px: int
) -> ViewParameters:
    """Random parameters of one view: a pure function of seed, view, epoch and sample.

    Crops follow torchvision's RandomResizedCrop: area uniform within ``spec.scale``, aspect ratio log-uniform in
    3/4 to 4/3, whole pixels. Where torchvision draws again if the box does not fit (10 times, then takes the
    middle), the ratio is drawn from those that fit: for a given area the same distribution, without a retry, and
    areas stay uniform where retrying would favour small ones.

    Args:
        spec: The view.
        colour: Colours and orientations.
        seed: The run's seed.
        epochs: Pass over the data for each sample, int64, shape (B,).
        ids: Identity of each sample in the data set, int64, shape (B,).
        tile_px: Side of the tiles, pixels.
    """
    # A column keeps its meaning for ever: a new use takes a new column, so that old runs can be repeated.
    u = uniforms(seed, epochs, ids, spec.stream, 16).T  # (16, B)
    swing = 2 * u - 1  # the same numbers, in [-1, 1)
    share = np.interp(u[0], (0, 1), spec.scale)
    log_limit = np.minimum(np.log(4 / 3), -np.log(share))  # a box of this share fits up to ratio 1 / share
    root = np.exp(swing[1] * log_limit / 2)  # sqrt(width / height)
    lengths = tile_px * np.sqrt(share) * np.stack([1 / root, root])
    height, width = np.clip(np.round(lengths), 1, tile_px)
    y0, x0 = np.floor(u[2] * (tile_px - height + 1)), np.floor(u[3] * (tile_px - width + 1))
    return ViewParameters(
        box=np.stack([y0, x0, height, width], axis=1),
        flip_h=u[4] < 0.5,
        flip_v=(u[5] < 0.5) & colour.vertical_flip,
        quarter_turns=(u[6] * 4).astype(np.int64) * colour.rot90,
        jitter=u[7] < colour.jitter,
        brightness=1 + colour.brightness * swing[8],
        contrast=1 + colour.contrast * swing[9],
        saturation=1 + colour.saturation * swing[10],
        hue=colour.hue * swing[11],
        greyscale=u[12] < colour.greyscale,
        blur_sigma=np.where(u[13] < spec.blur, np.interp(u[14], (0, 1), colour.blur_sigma), 0.0),
        solarise=u[15] < spec.solarise,
    )


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
) -> list[torch.Tensor]:
    """All views of a batch, in the order of ``specs``, each (B, 3, size, size); see `draw` and `render`."""
    drawn = [(spec.size, draw(spec, colour, seed, epochs, ids, tiles.shape[1])) for spec in specs]
    return _render_all(tiles, drawn, mean, std, dtype)


def render(
    tiles: torch.Tensor,
    params: ViewParameters,
    spec: ViewSpec,
    mean: Triple,
    std: Triple,
    dtype: torch.dtype = torch.float32,
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

    Returns:
        Shape (B, 3, size, size), on the tiles' device.
    """
    return _render_all(tiles, [(spec.size, params)], mean, std, dtype)[0]


@torch.no_grad()
def _render_all(
    tiles: torch.Tensor, drawn: Sequence[Drawn], mean: Triple, std: Triple, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Views of a batch: those of one size together; on a CPU, some tiles at a time, elsewhere all at once."""
    batch, px = tiles.shape[:2]
    if tiles.dtype != torch.uint8 or tiles.shape != (batch, px, px, 3):
        raise ValueError(f"tiles are {tiles.dtype} of {tuple(tiles.shape)}, must be uint8 of (B, px, px, 3)")
    if any(len(params.box) != batch for _, params in drawn):
        raise ValueError(f"{batch} tiles but parameters of {[len(params.box) for _, params in drawn]} samples")
    work = torch.float64 if dtype == torch.float64 else torch.float32
    views = [torch.empty(batch, 3, size, size, dtype=dtype, device=tiles.device) for size, _ in drawn]
    groups = {size: [i for i, (other, _) in enumerate(drawn) if other == size] for size, _ in drawn}
    most = 3 * max(px**2, *(len(members) * size**2 for size, members in groups.items()))  # values per tile
    step = max(1, CPU_VALUES // most if tiles.device.type == "cpu" else batch)
    for start in range(0, batch, step):
        rows = slice(start, start + step)
        planes = tiles[rows].to(work).permute(0, 3, 1, 2)  # (b, 3, px, px), channels last in memory
        for size, members in groups.items():
            params = ViewParameters.join([drawn[i][1].take(rows) for i in members])
            x = _recolour(_crop(planes, params, size), params)  # (views * b, 3, size, size)
            for channel in range(3):
                x[:, channel].sub_(mean[channel]).div_(std[channel])
            for i, part in zip(members, x.chunk(len(members)), strict=True):
                views[i][rows] = part
    return views


def _crop(planes: torch.Tensor, params: ViewParameters, size: int) -> torch.Tensor:
    """Crop, flips, turn and resize in one bilinear sampling: (b, 3, px, px) of 0..255 -> (views * b, 3, size, size).

    Sampling points are clamped to the centres of the box's outer pixels, which is what cropping first and repeating
    the edge would give: no pixel outside the box is mixed in. The points form a lattice parallel to the axes, so
    coordinates are made line by line; a matrix product per pixel would be slower and lose digits under TF32.
    """
    first, step, low, high = _send(_lattice(params, size, planes.shape[2]), planes.device, planes.dtype)[..., None]
    index = torch.arange(size, device=planes.device, dtype=planes.dtype)
    along_rows, along_columns = torch.clamp(first + step * index, low, high)  # (views * b, 2, size) each
    grid = (along_rows[..., :, None] + along_columns[..., None, :]).permute(0, 2, 3, 1)  # x, y last
    parts = grid.chunk(len(grid) // len(planes))
    x = torch.cat([functional.grid_sample(planes, g, padding_mode="border", align_corners=False) for g in parts])
    return x.mul_(1 / 255)


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


def _recolour(x: torch.Tensor, params: ViewParameters) -> torch.Tensor:
    """Jitter, greyscale, blur, solarise: (B, 3, h, w) in [0, 1].

    Samples are sorted meanwhile: those of one step lie in few runs, changed in place, not gathered and scattered.
    """
    reach = 2 * np.ceil(1.5 * params.blur_sigma)  # 0, or the even number of pixels next above three sigma
    order = np.lexsort((params.solarise, params.greyscale, reach, params.jitter))
    x, params, reach = x.index_select(0, _send(order, x.device, torch.int64)), params.take(order), reach[order]
    for run in _runs(params.jitter):
        _jitter(x[run], params.take(run))
    for run in _runs(params.greyscale):
        x[run] = _grey(x[run])
    for run in _runs(reach):
        _blur(x[run], params.blur_sigma[run], int(reach[run.start]))
    for run in _runs(params.solarise):
        x[run] = torch.minimum(x[run], 1 - x[run])  # 1 - x from 0.5 up
    return x.index_select(0, _send(np.argsort(order), x.device, torch.int64)).clamp_(0, 1)


def _jitter(x: torch.Tensor, params: ViewParameters) -> None:
    """Brightness, contrast, saturation, hue as torchvision defines them, one factor per sample; in place."""
    factors = np.stack([params.brightness, params.contrast, params.saturation, params.hue])
    brightness, contrast, saturation, hue = _send(factors, x.device, x.dtype)[..., None, None, None]
    x.mul_(brightness).clamp_(0, 1)
    mean = _grey(x.mean(dim=(2, 3), keepdim=True))  # (n, 1, 1, 1)
    x.mul_(contrast).add_(mean * (1 - contrast)).clamp_(0, 1)
    grey = _grey(x).mul_(1 - saturation)
    x.mul_(saturation).add_(grey).clamp_(0, 1)
    _shift_hue(x, hue)


def _shift_hue(x: torch.Tensor, turns: torch.Tensor) -> None:
    """Shift the hue of HSV, keeping value and saturation, in place: (n, 3, h, w) by (n, 1, 1, 1) turns.

    Without branches, which cost more than all else here. Let p' = (p - min) / (max - min). Then g' + b' - r' + 1 is
    the hue's distance from red in sixths of a turn, towards green if g >= b, else towards blue. And back, for a hue
    h in [0, 6): r' = clamp(|h - 3|, 1, 2) - 1, g' = 2 - clamp(|h - 2|, 1, 2), b' = 2 - clamp(|h - 4|, 1, 2).
    """
    red, green, blue = x.chunk(3, dim=1)  # views of x, (n, 1, h, w)
    low, high = x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)
    chroma = high.sub_(low)
    hue = (green + blue).sub_(red).sub_(low).div_(chroma.clamp_min(1e-12)).add_(1)
    towards = (green - blue).mul_(1e30).add_(1).clamp_(-1, 1)  # 1 if g >= b, else -1
    hue.mul_(towards).mul_(1 / 6).add_(turns + 2).frac_().mul_(6)
    falling = torch.add(low, chroma, alpha=2)
    for channel, centre, base, sign in ((green, 2, falling, -1), (blue, 4, falling, -1), (red, 3, low.sub_(chroma), 1)):
        ramp = (hue - centre).abs_().clamp_(1, 2)
        torch.addcmul(base, chroma, ramp, value=sign, out=channel)


def _grey(x: torch.Tensor) -> torch.Tensor:
    """ITU-R 601 luma, as torchvision rounds it: (n, 3, h, w) -> (n, 1, h, w)."""
    red, green, blue = x.chunk(3, dim=1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


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


def _require_preset(name: str) -> None:
    if name not in COLOURS:
        raise UsageError(f"augmentation preset {name!r} is not one of {', '.join(COLOURS)}")
