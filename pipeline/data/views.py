"""Which views there are, and what is random in them: a few numbers per sample, drawn on the host and without state.

A `ViewSpec` says what kind of view is wanted, a `ColourSpec` what all views share; `draw` makes them `ViewParameters`.
A sample gets the same view in any batch, on any rank, after any resume. ``augment.py`` makes the pixels.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.randomness import uniforms
from tiling.errors import UsageError

MAX_SIGMA = 2.0  # widest blur, pixels of the view
BLUR_RADIUS = 6  # three of these standard deviations
LOCAL_STREAM = 1 << 16  # globals have the streams below: one view more leaves the others as they are
METHOD_STREAM = 1 << 17  # from here on streams are the methods' own, for masks and the like


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
    stain: float = 0.0  # the amount of each stain is multiplied by a factor in [1 - this, 1 + this]
    stain_shift: float = 0.0  # and changed by at most this either way: natural optical density

    def __post_init__(self) -> None:
        low, high = self.blur_sigma
        if not 0 < low <= high <= MAX_SIGMA:
            raise UsageError(f"blur_sigma is {self.blur_sigma}, must rise within 0 to {MAX_SIGMA:g} px")
        if not 0 <= self.hue <= 0.5:
            raise UsageError(f"hue is {self.hue}, must lie in 0 to 0.5 turns")
        _check_shares(self, ("brightness", "contrast", "saturation", "jitter", "greyscale", "stain", "stain_shift"))


# "histology" is our choice, in the spirit of Kang et al. 2023 ("Benchmarking self-supervised learning on diverse
# pathology datasets", CVPR): tissue has no upright; hue and fine texture carry the diagnosis. So all eight
# orientations; half the jitter, a fifth of the hue; half the blur, at most 1 px; little greyscale; no solarisation.
# Stains: factors of Tellez et al.'s "HED-strong" (2019, "Quantifying the effects of data augmentation and stain color
# normalization", Medical Image Analysis), less than slides differ: over 59 slides of panda_gleason_tiles the strongest
# haematoxylin has a standard deviation of 19 %, eosin of 44 %. Shifts of their "HED-light": they tint glass as well,
# here by up to 5 %; those of "HED-strong" would make it pink or blue.
COLOURS = {
    "original": ColourSpec(0.4, 0.4, 0.2, 0.1, jitter=0.8, greyscale=0.2, rot90=False, vertical_flip=False),
    "histology": ColourSpec(
        0.2, 0.2, 0.1, 0.02, jitter=0.8, greyscale=0.05, rot90=True, vertical_flip=True, blur_sigma=(0.1, 1.0),
        stain=0.2, stain_shift=0.05,
    ),
}  # fmt: skip
# Blur, then solarisation: their probabilities for the first global view, other globals, locals.
CHANCES = {"original": ((1.0, 0.1, 0.5), (0.0, 0.2, 0.0)), "histology": ((0.5, 0.1, 0.25), (0.0, 0.0, 0.0))}


@dataclass(frozen=True, eq=False)
class ViewParameters:
    """All that is random in one view of a batch: small arrays on the host, shape (B,) unless said."""

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
    stain_scale: np.ndarray  # (B, 3) float64: factors on haematoxylin, eosin and the residual
    stain_shift: np.ndarray  # (B, 3) float64, natural optical density: added to them

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


def _require_preset(name: str) -> None:
    if name not in COLOURS:
        raise UsageError(f"augmentation preset {name!r} is not one of {', '.join(COLOURS)}")


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
    u = uniforms(seed, epochs, ids, spec.stream, 22).T  # (22, B)
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
        stain_scale=1 + colour.stain * swing[16:19].T,
        stain_shift=colour.stain_shift * swing[19:22].T,
    )
