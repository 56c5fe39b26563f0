"""Multi-crop views as batched tensor operations on the device, from uint8 tiles.

Three steps. A :class:`ViewSpec` says what kind of view is wanted. :func:`draw` turns it into
:class:`ViewParameters`, a few numbers per sample, on the host and without state (:mod:`pipeline.data.randomness`):
a sample gets the same view in whatever batch, on whatever rank, after whatever resume. :func:`render` makes the
pixels. Which samples are blurred, jittered and so on is known on the host, so the device is never waited for.

What is as in the original DINO (facebookresearch/dino, ``main_dino.py``, ``DataAugmentationDINO``): order crop,
flip, jitter, greyscale, blur, solarise, normalise; probabilities and strengths under preset ``original``.
What is not: resampling is bilinear, not bicubic; nothing is rounded to uint8 between steps; the four jitters have
one fixed order (torchvision shuffles them); crops that would not fit are not retried (see :func:`draw`).
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch.nn import functional

from pipeline.data.randomness import uniforms
from tiling.errors import UsageError

Triple = tuple[float, float, float]

GREY = (0.2989, 0.587, 0.114)  # ITU-R 601 luma, as torchvision rounds it
RATIO = 4 / 3  # crops are at most this much wider than high, or higher than wide
BLUR_RADIUS = 6  # three standard deviations of the widest blur
MAX_SIGMA = BLUR_RADIUS / 3
LOCAL_STREAM = 1 << 16  # global views have the streams below: adding one leaves the others as they are
CPU_VALUES = 3 * 3 * 224 * 224  # values a CPU core works on at a time: a few buffers of them fit its cache
_COLUMNS = 16  # uniform numbers per sample and view


def _check_shares(spec: object, names: Sequence[str]) -> None:
    for name in names:
        if not 0 <= getattr(spec, name) <= 1:
            raise UsageError(f"{name} is {getattr(spec, name)}, must lie in 0 to 1")


@dataclass(frozen=True)
class ViewSpec:
    """One kind of view.

    Attributes:
        name: For logs and errors, such as ``global0``.
        stream: The view's identity: its random stream, unique among a sample's views.
        size: Side of the view, pixels.
        scale: Least and largest share of the tile's area that a crop covers.
        blur: Probability of Gaussian blur.
        solarise: Probability of solarisation.
        is_global: Whether this is a global crop, fit for the teacher.
    """

    name: str
    stream: int
    size: int
    scale: tuple[float, float]
    blur: float
    solarise: float
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
    """What all views share: strengths and probabilities.

    Attributes:
        brightness: Factors lie in [1 - this, 1 + this]; so for contrast and saturation.
        contrast: See brightness.
        saturation: See brightness.
        hue: Shift of the hue, at most this many turns either way.
        jitter: Probability of these four together.
        greyscale: Probability of greyscale.
        rot90: Whether views are turned by a random multiple of 90 degrees.
        vertical_flip: Whether views are flipped upside down half of the time (mirrored they always are).
        blur_sigma: Least and largest standard deviation of the blur, pixels of the view.
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float
    jitter: float
    greyscale: float
    rot90: bool
    vertical_flip: bool
    blur_sigma: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self) -> None:
        low, high = self.blur_sigma
        if not 0 < low <= high <= MAX_SIGMA:
            raise UsageError(f"blur_sigma is {self.blur_sigma}, must rise within 0 to {MAX_SIGMA:g} px")
        if not 0 <= self.hue <= 0.5:
            raise UsageError(f"hue is {self.hue}, must lie in 0 to 0.5 turns")
        _check_shares(self, ("brightness", "contrast", "saturation", "jitter", "greyscale"))


@dataclass(frozen=True)
class _Preset:
    """Colours, and probabilities by view: first global, other globals, locals."""

    colour: ColourSpec
    blur: Triple
    solarise: Triple


# "histology" is our choice, in the spirit of Kang et al. 2023 ("Benchmarking self-supervised learning on diverse
# pathology datasets", CVPR): tissue has no upright, and hue and fine texture carry the diagnosis. So all eight
# orientations; about half the jitter and a fifth of the hue; half the blur, at most 1 px; little greyscale; no
# solarisation, which gives colours that no stain has.
PRESETS = {
    "original": _Preset(
        ColourSpec(0.4, 0.4, 0.2, 0.1, jitter=0.8, greyscale=0.2, rot90=False, vertical_flip=False),
        blur=(1.0, 0.1, 0.5),
        solarise=(0.0, 0.2, 0.0),
    ),
    "histology": _Preset(
        ColourSpec(0.2, 0.2, 0.1, 0.02, 0.8, 0.05, rot90=True, vertical_flip=True, blur_sigma=(0.1, 1.0)),
        blur=(0.5, 0.1, 0.25),
        solarise=(0.0, 0.0, 0.0),
    ),
}


@dataclass(frozen=True, eq=False)
class ViewParameters:
    """Everything that is random in one view of a batch: small arrays on the host, one row per sample.

    Attributes:
        box: Crop as y0, x0, height, width, whole tile pixels, float64, shape (B, 4).
        flip_h: Mirrored left to right, bool, shape (B,), as all below.
        flip_v: Flipped upside down, bool.
        quarter_turns: Anticlockwise turns of 90 degrees after the flips, int64, 0 to 3.
        jitter: Whether the next four apply, bool.
        brightness: Factor, float64.
        contrast: Factor, float64.
        saturation: Factor, float64.
        hue: Shift in turns, float64.
        greyscale: Whether it is grey, bool.
        blur_sigma: Standard deviation, pixels of the view, float64; 0 is no blur.
        solarise: Whether it is solarised, bool.
    """

    box: np.ndarray
    flip_h: np.ndarray
    flip_v: np.ndarray
    quarter_turns: np.ndarray
    jitter: np.ndarray
    brightness: np.ndarray
    contrast: np.ndarray
    saturation: np.ndarray
    hue: np.ndarray
    greyscale: np.ndarray
    blur_sigma: np.ndarray
    solarise: np.ndarray

    def digest(self) -> str:
        """Sha256 over every field, for comparing what two ranks or two runs drew."""
        total = hashlib.sha256()
        for field in fields(self):
            array = getattr(self, field.name)
            little_endian = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
            total.update(f"{field.name} {array.dtype.name} {array.shape}".encode())
            total.update(little_endian.tobytes())
        return total.hexdigest()

    @staticmethod
    def join(parts: "Sequence[ViewParameters]") -> "ViewParameters":
        """Parameters of several batches, one after another."""
        names = [field.name for field in fields(ViewParameters)]
        return ViewParameters(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    def take(self, rows: slice | np.ndarray) -> "ViewParameters":
        """The parameters of some samples."""
        return ViewParameters(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def view_specs(
    global_crops: int,
    local_crops: int,
    global_size: int,
    local_size: int,
    global_scale: tuple[float, float],
    local_scale: tuple[float, float],
    preset: str,
) -> tuple[ViewSpec, ...]:
    """Specs of all views of a sample, globals first.

    Args:
        global_crops: Number of global views.
        local_crops: Number of local views.
        global_size: Side of a global view, pixels.
        local_size: Side of a local view, pixels.
        global_scale: Share of the tile's area in a global view, least and largest.
        local_scale: The same for local views.
        preset: A key of ``PRESETS``.

    Raises:
        UsageError: The preset is not known, or a number is out of range.
    """
    found = _preset(preset)
    if global_crops < 0 or local_crops < 0 or global_crops + local_crops == 0:
        raise UsageError(f"{global_crops} global and {local_crops} local crops, need at least one view")
    specs = []
    for index in range(global_crops):
        kind = min(index, 1)
        chances = (found.blur[kind], found.solarise[kind])
        specs.append(ViewSpec(f"global{index}", index, global_size, global_scale, *chances, is_global=True))
    for index in range(local_crops):
        stream, chances = LOCAL_STREAM + index, (found.blur[2], found.solarise[2])
        specs.append(ViewSpec(f"local{index}", stream, local_size, local_scale, *chances, is_global=False))
    return tuple(specs)


def colour_spec(preset: str) -> ColourSpec:
    """Colours of a preset.

    Raises:
        UsageError: The preset is not known.
    """
    return _preset(preset).colour


def draw(
    spec: ViewSpec, colour: ColourSpec, seed: int, epochs: np.ndarray, ids: np.ndarray, tile_px: int
) -> ViewParameters:
    """Random parameters of one view, a pure function of seed, view, epoch and sample.

    Crops follow torchvision's RandomResizedCrop: area uniform within ``spec.scale``, aspect ratio log-uniform in
    3/4 to 4/3, whole pixels. Where torchvision draws again if the box does not fit (10 times, then takes the
    middle), the ratio is drawn from those that fit: for a given area the same distribution without a retry, and
    areas stay uniform where retrying would favour small ones.

    Args:
        spec: The view.
        colour: Colours.
        seed: The run's seed.
        epochs: Pass over the data for each sample, int64, shape (B,).
        ids: Identity of each sample, int64, shape (B,).
        tile_px: Side of the tiles.
    """
    u = uniforms(seed, epochs, ids, spec.stream, _COLUMNS).T  # (16, B)
    # A column keeps its meaning for ever: a new use takes a new column, so that old runs can be repeated.
    share = _between(u[0], *spec.scale)
    log_limit = np.minimum(np.log(RATIO), -np.log(share))  # a box of this share fits up to ratio 1 / share
    root = np.exp(_between(u[1], -log_limit, log_limit) / 2)  # sqrt(width / height)
    side = tile_px * np.sqrt(share)
    height, width = (np.clip(np.round(length), 1, tile_px) for length in (side / root, side * root))
    y0, x0 = np.floor(u[2] * (tile_px - height + 1)), np.floor(u[3] * (tile_px - width + 1))
    quarter_turns = (u[6] * 4).astype(np.int64) if colour.rot90 else np.zeros(len(ids), dtype=np.int64)
    return ViewParameters(
        box=np.stack([y0, x0, height, width], axis=1),
        flip_h=u[4] < 0.5,
        flip_v=(u[5] < 0.5) & colour.vertical_flip,
        quarter_turns=quarter_turns,
        jitter=u[7] < colour.jitter,
        brightness=_between(u[8], 1 - colour.brightness, 1 + colour.brightness),
        contrast=_between(u[9], 1 - colour.contrast, 1 + colour.contrast),
        saturation=_between(u[10], 1 - colour.saturation, 1 + colour.saturation),
        hue=_between(u[11], -colour.hue, colour.hue),
        greyscale=u[12] < colour.greyscale,
        blur_sigma=np.where(u[13] < spec.blur, _between(u[14], *colour.blur_sigma), 0.0),
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
    """All views of a batch, each (B, 3, size, size), in the order of ``specs``; see `draw` and `render`."""
    drawn = [draw(spec, colour, seed, epochs, ids, tiles.shape[1]) for spec in specs]
    return _render_all(tiles, drawn, [spec.size for spec in specs], mean, std, dtype)


def render(
    tiles: torch.Tensor,
    params: ViewParameters,
    spec: ViewSpec,
    mean: Triple,
    std: Triple,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Pixels of one view."""
    return _render_all(tiles, [params], [spec.size], mean, std, dtype)[0]


@torch.no_grad()
def _render_all(
    tiles: torch.Tensor,
    drawn: Sequence[ViewParameters],
    sizes: Sequence[int],
    mean: Triple,
    std: Triple,
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """Views of a batch, those of one size together."""
    batch, px = tiles.shape[:2]
    work = torch.float64 if dtype == torch.float64 else torch.float32
    views = [torch.empty(batch, 3, size, size, dtype=dtype, device=tiles.device) for size in sizes]
    groups = {size: [i for i, other in enumerate(sizes) if other == size] for size in sizes}
    largest = max(px**2, *(len(members) * size**2 for size, members in groups.items()))
    step = max(1, CPU_VALUES // (3 * largest)) if tiles.device.type == "cpu" else batch
    with torch.autocast(tiles.device.type, enabled=False):
        for start in range(0, batch, step):
            rows = slice(start, start + step)
            planes = tiles[rows].to(work).permute(0, 3, 1, 2)  # (b, 3, px, px), channels last in memory
            for size, members in groups.items():
                params = [drawn[i].take(rows) for i in members]
                x = torch.cat([_crop(planes, one, size) for one in params])  # (views * b, 3, size, size)
                x = _colour(x, ViewParameters.join(params))
                for channel in range(3):
                    x[:, channel].sub_(mean[channel]).div_(std[channel])
                for i, part in zip(members, x.chunk(len(members)), strict=True):
                    views[i][rows] = part
    return views


def _colour(x: torch.Tensor, params: ViewParameters) -> torch.Tensor:
    """Jitter to solarisation, in place where it can be: (B, 3, h, w) in [0, 1]."""
    x = _where(params.jitter, x, lambda part, rows: _jitter(part, params.take(rows)))
    x = _where(params.greyscale, x, lambda part, _: part.copy_(_grey(part)))
    x = _where(params.blur_sigma > 0, x, lambda part, rows: _blur(part, params.blur_sigma[rows]))
    x = _where(params.solarise, x, lambda part, _: torch.minimum(part, 1 - part))  # threshold 0.5
    return x.clamp_(0, 1)


def _crop(planes: torch.Tensor, params: ViewParameters, size: int) -> torch.Tensor:
    """Crop, flips, turn and resize in one bilinear sampling: uint8 (B, px, px, 3) -> (B, 3, size, size).

    Sampling points are clamped to the centres of the box's outer pixels, which is what cropping first and repeating
    the edge would give: no pixel outside the box is mixed in. They form a lattice parallel to the axes, so each
    coordinate is made along one line of the view; a matrix product per pixel would lose digits under TF32.
    """
    px, device, dtype = planes.shape[2], planes.device, planes.dtype
    lines = torch.arange(size, device=device, dtype=dtype)
    first, step, low, high = _send(_lattice(params, size, px), device, dtype)[..., None]  # (2, B, 2, 1)
    along_rows, along_columns = torch.clamp(first + step * lines, low, high)  # (B, 2, size) each
    grid = along_rows[..., :, None] + along_columns[..., None, :]  # (B, 2, size, size) as x, y in [-1, 1]
    x = functional.grid_sample(
        planes, grid.permute(0, 2, 3, 1), mode="bilinear", padding_mode="border", align_corners=False
    )
    return x.mul_(1 / 255)


def _lattice(params: ViewParameters, size: int, px: int) -> np.ndarray:
    """Where views are sampled: coordinate = clamp(first + step * index, low, high), in grid_sample's units.

    Returns:
        float64, shape (4, 2, B, 2): the four numbers, for the view's row and column index, for x and y of the
        tile. The index that a coordinate does not follow has zeros.
    """
    turns = params.quarter_turns
    out = np.zeros((4, 2, len(turns), 2))
    # A view is rot90(flip(crop), turns): an odd turn swaps the axes; which way each then runs is worked out here.
    backwards_x = params.flip_h ^ ((turns == 1) | (turns == 2))
    backwards_y = params.flip_v ^ ((turns == 2) | (turns == 3))
    samples = np.arange(len(turns))
    for axis, backwards, index in ((0, backwards_x, 1 - turns % 2), (1, backwards_y, turns % 2)):
        start, length = params.box[:, 1 - axis], params.box[:, 3 - axis]  # tile pixels
        stride = length / size
        near, far = start + stride / 2 - 0.5, start + length - stride / 2 - 0.5
        out[0, index, samples, axis] = (2 * np.where(backwards, far, near) + 1) / px - 1
        out[1, index, samples, axis] = 2 * np.where(backwards, -stride, stride) / px
        out[2, index, samples, axis] = (2 * start + 1) / px - 1
        out[3, index, samples, axis] = (2 * (start + length) - 1) / px - 1
    return out


def _jitter(x: torch.Tensor, params: ViewParameters) -> torch.Tensor:
    """Brightness, contrast, saturation, hue as torchvision defines them, one factor per sample; in place."""
    factors = np.stack([params.brightness, params.contrast, params.saturation, params.hue])
    brightness, contrast, saturation, hue = _send(factors, x.device, x.dtype)[..., None, None, None]
    x.mul_(brightness).clamp_(0, 1)
    mean = _grey(x.mean(dim=(2, 3), keepdim=True))  # (n, 1, 1, 1)
    x.mul_(contrast).add_(mean * (1 - contrast)).clamp_(0, 1)
    grey = _grey(x).mul_(1 - saturation)
    x.mul_(saturation).add_(grey).clamp_(0, 1)
    return _shift_hue(x, hue)


def _shift_hue(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Shift the hue in HSV, value and saturation kept, in place: (n, 3, h, w) by (n, 1, 1, 1) turns.

    Without sectors or branches, which cost more than all else here. With p' = (p - min) / (max - min) for a channel
    p, u = g' + b' - r' + 1 is the hue in sixths of a turn away from red, on the green side where g >= b and on the
    blue side elsewhere. Back again, r' = clamp(|h - 3| - 1), g' = clamp(2 - |h - 2|), b' = clamp(2 - |h - 4|),
    all to [0, 1], for a hue h in [0, 6).
    """
    red, green, blue = (x[:, channel : channel + 1] for channel in range(3))  # (n, 1, h, w), views of x
    low, high = x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)
    chroma = high.sub_(low)
    hue = (green + blue).sub_(red).sub_(low)
    hue.div_(chroma.clamp_min(1e-12)).add_(1)
    side = (green - blue).mul_(1e30).add_(1).clamp_(-1, 1)  # 1 where g >= b, else -1
    hue.mul_(side).mul_(1 / 6).add_(turns + 2).frac_().mul_(6)
    for channel, centre, sign in ((red, 3, 1), (green, 2, -1), (blue, 4, -1)):
        ramp = (hue - centre).abs_().clamp_(1, 2)
        base = low - chroma if sign > 0 else low + 2 * chroma
        torch.addcmul(base, chroma, ramp, value=sign, out=channel)
    return x


def _grey(x: torch.Tensor) -> torch.Tensor:
    """Luma: (n, 3, h, w) -> (n, 1, h, w)."""
    red, green, blue = (x[:, channel : channel + 1] for channel in range(3))
    return (red * GREY[0]).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])


def _blur(x: torch.Tensor, sigma: np.ndarray) -> torch.Tensor:
    """Gaussian blur, edges reflected, one standard deviation per sample: (n, 3, h, w)."""
    height, width = x.shape[2:]
    reach = np.ceil(3 * sigma)  # of each sample by itself, whatever else is in the batch
    radius = int(reach.max())
    offsets = np.arange(-radius, radius + 1)[:, None]
    weights = np.exp(-0.5 * (offsets / sigma) ** 2) * (np.abs(offsets) <= reach)
    taps = _send(weights / weights.sum(axis=0), x.device, x.dtype)[..., None, None, None]  # (2 radius + 1, n, 1, 1, 1)
    padded = functional.pad(x, (radius,) * 4, mode="reflect")
    across = padded[..., :width] * taps[0]
    for k in range(1, len(taps)):
        across.addcmul_(padded[..., k : k + width], taps[k])
    down = across[..., :height, :] * taps[0]
    for k in range(1, len(taps)):
        down.addcmul_(across[..., k : k + height, :], taps[k])
    return down


def _where(
    chosen: np.ndarray, x: torch.Tensor, change: Callable[[torch.Tensor, np.ndarray], torch.Tensor]
) -> torch.Tensor:
    """Apply a change to the chosen samples only; `change` gets them and their rows in x."""
    rows = np.flatnonzero(chosen)
    if len(rows) == 0:
        return x
    if len(rows) == len(x):
        return change(x, rows)
    index = _send(rows, x.device, torch.int64)
    return x.index_copy_(0, index, change(x.index_select(0, index), rows))


def _send(array: np.ndarray, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Host numbers to the device without waiting for it: only a copy from pinned memory is asynchronous."""
    tensor = torch.from_numpy(array).to(dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _between(u: np.ndarray, low: float | np.ndarray, high: float | np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1) stretched to [low, high)."""
    return low + u * (high - low)


def _preset(name: str) -> _Preset:
    if name not in PRESETS:
        raise UsageError(f"augmentation preset {name!r} is not one of {', '.join(PRESETS)}")
    return PRESETS[name]
