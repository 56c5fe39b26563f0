"""Made prostate biopsies with glands and masks, in PANDA's layout: for the demo and the tests, no evidence.

First outlines: cores on glass, a tumour field, glands in both. Then zones: what every pixel is made of. Last the
stain: haematoxylin and eosin of zones and nuclei, turned into colour by optical density. Labels come from the
outlines too, so mask and picture agree by construction.

Lengths are level-0 pixels of 0.5 um. A point is the complex number x + iy, y downwards.
"""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile

from tiling.atomic import write_bytes
from tiling.errors import UsageError

MPP, TILE_PX, JPEG_QUALITY, DOWNSAMPLES = 0.5, 512, 88, (1, 4, 16)
# Grade -> label of its glands in a Radboud mask, ISUP grade, Gleason score.
GRADES = {"benign": (2, 0, "negative"), "3": (3, 1, "3+3"), "4": (4, 4, "4+4"), "5": (5, 5, "5+5")}
PROVIDERS = ("radboud", "karolinska")

_FIELD = 8  # smooth fields are made at 1/8 of level 0
_STROMA, _LUMEN, _APICAL, _SECRETION = 1, 6, 7, 8  # zones beside glass, 0, and the gland labels 2 to 5
_STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11))  # H, E in R, G, B: Ruifrok & Johnston 2001

Array = np.ndarray[Any, Any]
Rng = np.random.Generator
Range = tuple[float, float]
Size = tuple[int, int]


@dataclass(frozen=True)
class PhantomSlide:
    """One made slide, in memory.

    Attributes:
        image_id, provider, isup_grade: As in PANDA.
        gleason_score: In the provider's spelling ("negative" or "0+0" where benign).
        image: RGB, uint8, shape (H, W, 3).
        mask: The provider's own labels, uint8, shape (H, W). Radboud: 0 background, 1 stroma, 2 benign
            epithelium, 3, 4, 5 Gleason grade. Karolinska: 0 background, 1 benign tissue, 2 cancerous tissue.
        tissue: True inside the cores, lumina and clefts included, bool, shape (H, W).
    """

    image_id: str
    provider: str
    isup_grade: int
    gleason_score: str
    image: Array
    mask: Array
    tissue: Array


@dataclass(frozen=True)
class _Pattern:
    """How one kind of gland looks; stain in 1/100 of optical density."""

    radius: Range
    lobes: float  # how far the outline leaves the circle, as a fraction of the radius
    frequency: int  # highest number of lobes round the outline
    spacing: Range  # of centres: factor on both radii, and a gap; below 1 neighbours fuse
    rounding: float  # of corners
    wall: float  # epithelium from basement membrane to lumen; infinite: no central lumen
    rows: tuple[tuple[float, float, float, float], ...]  # nuclei along the wall: depth, step, long radius, ratio
    pitch: float  # nuclei all over a sheet: mean distance; infinite: none
    nucleus: Range  # long radius in a sheet
    cytoplasm: tuple[int, int]  # haematoxylin, eosin


_ROWS_2 = ((4, 11, 4.6, 0.48), (12, 10, 5.2, 0.73))  # basal cells lie along the wall, luminal cells across it
_PATTERNS = {
    2: _Pattern((70, 145), 0.24, 6, (1.0, 26), 6, 27, _ROWS_2, np.inf, (0, 0), (13, 20)),
    3: _Pattern((22, 44), 0.12, 3, (1.0, 7), 4, 19, ((7, 11, 5.0, 0.84),), np.inf, (0, 0), (19, 22)),
    4: _Pattern((60, 150), 0.22, 7, (0.8, 4), 9, np.inf, ((6, 10, 5.2, 0.8),), 12.5, (4.0, 5.6), (24, 22)),
    5: _Pattern((40, 110), 0.34, 9, (0.85, 6), 4, np.inf, (), 17, (3.4, 7.4), (18, 27)),
}


def make_slide(seed: int, grade: str, provider: str = "radboud", size: Size = (2688, 3584)) -> PhantomSlide:
    """Draw one slide; a pure function of its arguments.

    Args:
        seed: Non-negative; another seed is another patient.
        grade: "benign", "3", "4" or "5". A tumour has 55 to 68 % of the tissue, the rest is benign.
        provider: "radboud" or "karolinska": decides labels, spelling and background.
        size: Height and width in level-0 pixels, multiples of 16, at least 512.

    Raises:
        UsageError: An argument is outside these limits.
    """
    valid = grade in GRADES and provider in PROVIDERS and seed >= 0 and min(size) >= 512
    if not valid or size[0] % 16 or size[1] % 16:
        limits = f"{'|'.join(GRADES)}; {'|'.join(PROVIDERS)}; seed >= 0; sides >= 512, multiples of 16"
        raise UsageError(f"cannot draw {grade!r}, {provider!r}, seed {seed}, size {size}; limits: {limits}")
    label, isup, score = GRADES[grade]
    rng = np.random.default_rng([seed, label, PROVIDERS.index(provider), *size])
    tissue = _cores(rng, size)
    inside = tissue[::_FIELD, ::_FIELD]
    relief = _noise(rng, inside.shape, 90) + 0.25 * _noise(rng, inside.shape, 20)
    quantile = np.quantile(relief[inside], rng.uniform(0.32, 0.45))
    tumour = inside & (relief > quantile) & (label > 2)
    sheet = _lattice(rng, size, _PATTERNS[label].pitch)
    glands = _draw_glands(rng, inside, tumour, label, sheet)
    depth = cv2.distanceTransform((glands > 0).view(np.uint8), cv2.DIST_L2, 3)
    lumen, rings = _lumina(rng, glands, depth)
    fibres = _fibres(rng, glands)
    nuclei = [*rings, *_nuclei(rng, glands, depth, lumen, fibres, sheet)]
    zones = np.where(glands > 0, glands, _STROMA).astype(np.uint8)
    zones[(glands == 2) & (depth > 17)] = _APICAL
    zones[lumen] = _LUMEN
    zones[lumen & (depth > 31) & (_noise(rng, size, 60) > 1.5)] = _SECRETION
    zones *= tissue
    image = _develop(rng, provider, tissue, _stain(rng, zones, fibres, np.concatenate(nuclei)))
    mask = np.where(glands > 0, glands, _STROMA) * tissue
    if provider == "karolinska":  # labels whole regions, not epithelium
        field = cv2.resize(tumour.astype(np.float32), size[::-1], interpolation=cv2.INTER_LINEAR) > 0.5
        mask = np.where(glands > 0, 1 + (glands > 2), 1 + field) * tissue
        score = "0+0" if grade == "benign" else score
    name = hashlib.sha256(f"phantom {seed} {grade} {provider} {tissue.shape}".encode()).hexdigest()
    return PhantomSlide(name[:32], provider, isup, score, image, mask.astype(np.uint8), tissue)


def write_slide(slide: PhantomSlide, root: Path) -> None:
    """Write a slide and its mask as pyramids of 3 levels, 512 px tiles, each file whole or not at all.

    Args:
        slide: Becomes JPEG YCbCr 4:2:0; its mask the red channel of a deflated RGB image, by nearest label.
        root: Gets ``train_images/ID.tiff`` and ``train_label_masks/ID_mask.tiff``.
    """
    shapes = [(slide.mask.shape[1] // ratio, slide.mask.shape[0] // ratio) for ratio in DOWNSAMPLES]
    levels = [cv2.resize(slide.image, shape, interpolation=cv2.INTER_AREA) for shape in shapes]
    # "rgb" is what goes in; tifffile stores it as YCbCr. Told "ycbcr" it would not convert.
    jpeg = {"compression": "jpeg", "compressionargs": {"level": JPEG_QUALITY}, "subsampling": (2, 2)}
    _write_pyramid(root / "train_images" / f"{slide.image_id}.tiff", levels, photometric="rgb", **jpeg)
    red = cv2.merge([slide.mask, np.zeros_like(slide.mask), np.zeros_like(slide.mask)])
    levels = [red[::ratio, ::ratio] for ratio in DOWNSAMPLES]
    path = root / "train_label_masks" / f"{slide.image_id}_mask.tiff"
    _write_pyramid(path, levels, photometric="rgb", compression="deflate", compressionargs={"level": 4})


def make_cohort(
    root: Path,
    slides_per_grade: int = 4,
    seed: int = 0,
    size: Size = (2688, 3584),
    karolinska: int = 1,
    on_slide: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Write a cohort in PANDA's layout; the same arguments give the same bytes.

    Args:
        root: Gets ``train_images/``, ``train_label_masks/`` and, last, ``train.csv``.
        slides_per_grade: Radboud slides of each of benign, Gleason 3, 4 and 5.
        seed: Another seed is another cohort.
        size: Height and width of every slide in level-0 pixels; make_slide states the limits.
        karolinska: Karolinska slides beside those, in all: Gleason 3, 4, 5, benign, and round again.
        on_slide: Called after each slide with the number done and the number in all.

    Returns:
        The image ids, in the order of ``train.csv``.
    """
    plan = [(grade, "radboud") for _ in range(slides_per_grade) for grade in GRADES]
    plan += [(list(GRADES)[(number + 1) % len(GRADES)], "karolinska") for number in range(karolinska)]
    rows, ids = ["image_id,data_provider,isup_grade,gleason_score"], []
    for number, (grade, provider) in enumerate(plan):
        slide_seed = int(hashlib.sha256(f"cohort {seed} slide {number}".encode()).hexdigest()[:8], 16)
        slide = make_slide(slide_seed, grade, provider, size)
        write_slide(slide, root)
        ids.append(slide.image_id)
        rows.append(f"{slide.image_id},{provider},{slide.isup_grade},{slide.gleason_score}")
        if on_slide is not None:
            on_slide(number + 1, len(plan))
    write_bytes(root / "train.csv", ("\n".join(rows) + "\n").encode())
    return ids


def _write_pyramid(path: Path, levels: list[Array], **options: Any) -> None:
    """Write a tiled TIFF of plain pages, one for each level, as PANDA's."""
    options |= {"tile": (TILE_PX, TILE_PX), "resolutionunit": "CENTIMETER", "metadata": None}
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as tiff:
        for level, ratio in zip(levels, DOWNSAMPLES, strict=True):
            tiff.write(level, resolution=(10_000 / MPP / ratio,) * 2, subfiletype=int(ratio > 1), **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, file.getvalue())


def _pixels(points: Array, shift: int = 0) -> Array:
    """Points (...) for OpenCV: int32 (..., 2) in 1/2**shift pixels."""
    return np.asarray((np.stack([points.real, points.imag], -1) * 2**shift).round().astype(np.int32))


def _at(plane: Array, points: Array) -> Array:
    """Values of a plane under points (N)."""
    y = points.imag.clip(0, plane.shape[0] - 1).astype(np.int32)
    x = points.real.clip(0, plane.shape[1] - 1).astype(np.int32)
    return np.asarray(plane[y, x])


def _noise(rng: Rng, shape: Size, grain: float) -> Array:
    """Smooth noise, mean 0, deviation about 1, bumps of ``grain`` pixels, float32 of that shape."""
    coarse = rng.normal(0, 1.2, (int(shape[0] / grain) + 3, int(shape[1] / grain) + 3)).astype(np.float32)
    return cv2.resize(coarse, shape[::-1], interpolation=cv2.INTER_CUBIC)


def _cores(rng: Rng, size: Size) -> Array:
    """Needle cores side by side along the longer side, bool (H, W)."""
    across, along = min(size), max(size)
    number = max(1, min(int(rng.integers(2, 5)), across // 700))
    band, length = across / number, 0.93 * along
    half = 0.5j * rng.uniform(0.46, 0.56) * band * along / length
    canvas, t = np.zeros((across, along), np.uint8), np.linspace(0, 1, 400)
    for core in range(number):
        x = along / 2 + length * rng.uniform(0.93, 1) * (t - 0.5)
        bend = 0.06 * np.sin(np.pi * (t * rng.uniform(0.8, 2.2) + rng.uniform(0, 2)))
        middle = x + 1j * band * (core + 0.5 + bend + rng.uniform(-0.06, 0.06) * (t - 0.5))
        rough = [0.08 * _noise(rng, (2, 400), 44) + 0.025 * _noise(rng, (2, 400), 6) for _ in range(2)]
        upper, lower = (half * (1 - abs(2 * t - 1) ** 24) ** 0.5 * (1 + side[0]) for side in rough)
        cv2.fillPoly(canvas, [_pixels(np.r_[middle - upper, (middle + lower)[::-1]])], 1)
    return (canvas if size[0] <= size[1] else np.ascontiguousarray(canvas.T)) > 0


def _darts(rng: Rng, room: Array, radius: Range, spacing: Range, taken: list[Array]) -> list[Array]:
    """Throw discs, centre and radius as complex (2,), large ones first, apart from each other and those taken.

    ``room``: distance to the border, float32 at 1/8, 0 where no centre may be; little room makes radii small.
    """
    rows, columns = np.nonzero(room > 0)
    high = min(radius[1], 1.2 * float(room.max()))
    low = min(radius[0], 0.7 * high)
    tries = 40 + int(16 * rows.size * _FIELD**2 / (low + high) ** 2) if rows.size else 0
    picks = rng.integers(0, max(rows.size, 1), tries)
    centres = _FIELD * (columns[picks] + rng.random(tries) + 1j * (rows[picks] + rng.random(tries)))
    radii = np.sort(rng.uniform(low, high, tries))[::-1]
    discs = np.array([*taken, *np.zeros((tries, 2))], complex).reshape(-1, 2)
    count = len(taken)
    for number in np.flatnonzero(room[rows[picks], columns[picks]] > 0.75 * radii):
        apart = np.abs(discs[:count, 0] - centres[number])
        if np.all(apart > spacing[0] * (discs[:count, 1].real + radii[number]) + spacing[1]):
            discs[count] = centres[number], radii[number]
            count += 1
    return list(discs[len(taken) : count])


def _outline(rng: Rng, disc: Array, lobes: float, frequency: int) -> Array:
    """A closed wavy outline round a disc, int32 (64, 2)."""
    angle = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    waves = np.arange(2, frequency + 1)[:, None]
    weight = rng.standard_normal(waves.shape) / waves
    shape = (weight * np.cos(waves * angle + rng.uniform(0, 2 * np.pi, waves.shape))).sum(0)
    shape *= lobes * rng.uniform(0.3, 1.2) / np.sqrt((weight**2).sum() / 2)
    return _pixels(disc[0] + disc[1] * (1 + shape.clip(-0.45, 0.45)) * np.exp(1j * angle))


def _draw_glands(rng: Rng, inside: Array, tumour: Array, label: int, sheet: Array) -> Array:
    """Draw all glands, benign ones outside the tumour field, both bool at 1/8: labels 2 to 5, uint8 (H, W)."""
    glands = np.zeros((inside.shape[0] * _FIELD, inside.shape[1] * _FIELD), np.uint8)
    discs: list[Array] = []
    for kind, within, centre in ((2, inside & ~tumour, inside), (label, inside, tumour)):
        look = _PATTERNS[kind]
        room = _FIELD * cv2.distanceTransform(within.view(np.uint8), cv2.DIST_L2, 3) * centre
        # Tumour glands may fuse with each other, not with benign ones.
        discs = _darts(rng, room, look.radius, look.spacing, [disc * [1, 1.3] for disc in discs])
        canvas = np.zeros_like(glands)
        for disc in discs:
            cv2.fillPoly(canvas, [_outline(rng, disc, look.lobes, look.frequency)], 255)
        if kind == 5:  # single cells and files of cells beside the sheets
            clumped = tumour & (_noise(rng, tumour.shape, 5) > 0.3)
            for cell in _pixels(sheet[_at(clumped, sheet / _FIELD) & (_at(glands, sheet) == 0)]).tolist():
                cv2.circle(canvas, cell, 10, 255, -1)
        glands[(cv2.GaussianBlur(canvas, (0, 0), look.rounding) > 127) & (glands == 0)] = kind
    return glands


def _lumina(rng: Rng, glands: Array, depth: Array) -> tuple[Array, list[Array]]:
    """Lumina, bool (H, W): the middle of a gland, in Gleason 4 holes in a sheet; and the nuclei round holes."""
    wall = np.array([np.inf] * 2 + [_PATTERNS[kind].wall for kind in (2, 3, 4, 5)], np.float32)[glands]
    lumen = depth > wall * (1 + 0.12 * _noise(rng, glands.shape, 11))
    room = depth[::_FIELD, ::_FIELD] * (glands[::_FIELD, ::_FIELD] == 4)
    rings = []
    for hole in _darts(rng, room * (room > 24), (7, 21), (1, 22), []):
        cv2.fillPoly(lumen.view(np.uint8), [_outline(rng, hole, 0.12, 3)], 1)
        reach = hole[1].real + 8
        angle = np.arange(0, 2 * np.pi - 5 / reach, 10.5 / reach) + rng.uniform(0, 1)
        rings.append(_cells(rng, hole[0] + reach * np.exp(1j * angle), (4.2, 5.4), (0.7, 0.9), angle))
    return lumen, rings


def _cells(rng: Rng, centres: Array, long: Range, ratio: Range, angle: Array) -> Array:
    """Outlines of nuclei, complex (N, 12), of that long radius, short / long radius and direction."""
    turn = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    size, flat, shake, way, lean = rng.random((5, len(centres), 1))
    egg = np.cos(turn) + 1j * (ratio[0] + (ratio[1] - ratio[0]) * flat) * np.sin(turn)
    egg = (long[0] + (long[1] - long[0]) * size) * egg * np.exp(1j * (angle[:, None] + 0.7 * lean - 0.35))
    return np.asarray(centres[:, None] + 2 * shake * np.exp(2j * np.pi * way) + egg)


def _lattice(rng: Rng, shape: Size, pitch: float) -> Array:
    """A shaken triangular lattice of points over the slide, complex (N,)."""
    rows, columns = np.mgrid[0 : shape[0] / pitch / 0.87, 0 : shape[1] / pitch].reshape(2, -1)
    shake = rng.uniform(-0.3, 0.3, (2, rows.size))
    return np.asarray(pitch * (columns + 0.5 * (rows % 2) + shake[0] + 1j * (0.87 * rows + shake[1])))


def _nuclei(rng: Rng, glands: Array, depth: Array, lumen: Array, fibres: Array, sheet: Array) -> list[Array]:
    """Nuclei of stroma, of sheets, and in rows that follow the walls of glands."""
    down, right = np.gradient(fibres.imag)
    points = _lattice(rng, glands.shape, 27)
    points = points[(_at(glands, points) == 0) & (rng.random(len(points)) < 0.6)]
    found = [_cells(rng, points, (5, 9), (0.25, 0.4), _at(np.angle(down - 1j * right), points / _FIELD))]
    look = _PATTERNS[label := int(glands.max())]
    solid = depth * (cv2.dilate(lumen.view(np.uint8), np.ones((25, 25), np.uint8)) == 0)
    sheet = sheet[(_at(glands, sheet) == label) & (_at(solid, sheet) > (12 if look.rows else 4))]
    found.append(_cells(rng, sheet, look.nucleus, (0.65, 0.95), rng.uniform(0, np.pi, len(sheet))))
    outlines, _ = cv2.findContours((glands > 0).view(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    for outline in outlines:
        ring = outline[:, 0, 0] + 1j * outline[:, 0, 1]
        for below, step, long, ratio in _PATTERNS[int(_at(glands, ring[:1])[0])].rows:
            pick = np.arange(rng.uniform(0, 5), len(ring), step / 1.15).astype(int)
            along = np.angle(np.roll(ring, -5) - np.roll(ring, 5))[pick]
            # OpenCV goes anticlockwise round a gland, clockwise round a hole in it: inwards is to the left.
            centres = ring[pick] + below * np.exp(1j * (along - np.pi / 2))
            lean = along if ratio < 0.5 else along - np.pi / 2
            row = _cells(rng, centres, (0.85 * long, 1.15 * long), (0.9 * ratio, 1.1 * ratio), lean)
            found.append(row[np.abs(_at(depth, centres) - below) < 2.5])
    return found


def _fibres(rng: Rng, glands: Array) -> Array:
    """Coordinates along (real) and across (imaginary) the stroma's fibres, complex at 1/8; they wrap glands."""
    solid = (glands[::_FIELD, ::_FIELD] > 0).astype(np.float32)
    y, x = np.mgrid[: solid.shape[0], : solid.shape[1]] * _FIELD
    tilt = rng.uniform(-0.3, 0.3) + (np.pi / 2 if len(y) > len(y[0]) else 0)
    along, broad, fine = (_noise(rng, solid.shape, grain) for grain in (20, 34, 10))
    bend = 40 * along + 1j * (60 * broad + 16 * fine + 70 * cv2.GaussianBlur(solid, (0, 0), 4))
    return np.asarray((x + 1j * y) * np.exp(-1j * tilt) + bend)


def _texture(rng: Rng, long: float, short: float) -> Array:
    """A seamless patch of grain stretched along x, uint8 (1024, 1024), mean 128, deviation 40."""
    noise: Array = np.pad(rng.standard_normal((1024, 1024), np.float32), 150, mode="wrap")
    noise = cv2.GaussianBlur(noise, (0, 0), long, sigmaY=short)[150:-150, 150:-150]
    return np.asarray((128 + 40 * (noise - noise.mean()) / noise.std()).clip(0, 255).astype(np.uint8))


def _woven(rng: Rng, zones: Array, fibres: Array) -> Array:
    """Texture of the slide, uint8 (H, W), 128 on average: fibres in the stroma, fine grain in the cells."""
    height, width = zones.shape
    weave = cv2.addWeighted(_texture(rng, 10, 1.2), 0.75, _texture(rng, 32, 4), 0.65, -51)
    maps = [cv2.resize(part.astype(np.float32), (width, height)) for part in (fibres.real, fibres.imag)]
    woven = cv2.remap(weave, maps[0], maps[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    grain = np.tile(_texture(rng, 1.6, 1.6), (height // 1024 + 1, width // 1024 + 1))[:height, :width]
    woven = cv2.addWeighted(woven, 0.85, grain, 0.45, -38)
    return cv2.copyTo(grain, (zones > _STROMA).view(np.uint8), woven)


def _stain(rng: Rng, zones: Array, fibres: Array, nuclei: Array) -> list[Array]:
    """Haematoxylin and eosin of every pixel, in 1/100 of optical density, uint8 (H, W) each."""
    amount = np.zeros((2, 256), np.uint8)
    amount[:, [_STROMA, _APICAL, _SECRETION]] = (7, 9, 4), (27, 15, 32)
    for kind, look in _PATTERNS.items():
        amount[:, kind] = look.cytoplasm
    woven = _woven(rng, zones, fibres)
    level = np.arange(256)  # the weave tears where it is thinnest: clefts between the fibres
    torn = cv2.LUT(woven, (((level - 35) / 30).clip(0, 1) * (70 + 0.45 * level)).astype(np.uint8))
    blue, pink = (cv2.multiply(cv2.LUT(zones, row), torn, scale=1 / 128) for row in amount)
    middle = nuclei.mean(1, keepdims=True)
    darkness = rng.uniform(50, 98, len(nuclei)).tolist()
    for share, tone in ((1, 1), (0.62, 0.84), (0.24, 1.1)):  # rim, pale chromatin, nucleolus
        for shell, dark in zip(_pixels(middle + share * (nuclei - middle), 4), darkness, strict=True):
            cv2.fillConvexPoly(blue, shell, tone * dark, cv2.LINE_AA, 4)
    blue[(zones == _LUMEN) | (zones == 0)] = 0
    return [cv2.multiply(blue, cv2.LUT(woven, (90 + 0.3 * level).astype(np.uint8)), scale=1 / 128), pink]


def _develop(rng: Rng, provider: str, tissue: Array, planes: list[Array]) -> Array:
    """Stain -> RGB uint8 (H, W, 3) by Beer-Lambert, with this slide's own stains and this scanner's glass."""
    vectors = np.array(_STAINS) + rng.normal(0, 0.03, (2, 3)) + [[0, 0, 0], [0, 0, rng.uniform(0.1, 0.3)]]
    vectors = vectors.clip(0.01, 1) * rng.uniform([[0.85], [0.8]], [[1.15], [1.2]])
    glass = np.array([[255] * 3, [246, 245, 247] if provider == "radboud" else [242, 241, 243]])
    tables = (glass * 10 ** (-np.arange(256)[:, None, None] / 100 * vectors)).round().astype(np.uint8)
    stains = [cv2.GaussianBlur(plane, (0, 0), 0.7) for plane in planes]
    noise = rng.integers(0, 7, tissue.shape, np.uint8)
    colours = []
    for colour in tables.T:  # (stain, level)
        light = [cv2.LUT(stain, table) for stain, table in zip(stains, colour, strict=True)]
        colours.append(cv2.subtract(cv2.multiply(light[0], light[1], scale=1 / 255), noise))
    image = cv2.merge(colours)
    if provider == "radboud":  # white where no tissue is near; Karolinska shows the glass everywhere
        near = cv2.resize(cv2.blur(tissue[::_FIELD, ::_FIELD].astype(np.float32), (11, 11)), tissue.shape[::-1])
        image[near < 0.02] = 255
    return image
