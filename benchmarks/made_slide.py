"""Slides that the benchmarks need: pyramids of any size, 40 % tissue, in PANDA's layout, out of real PANDA pixels.

Fragments of tissue from ``../shared/data/panda_stitched`` are laid on white, turned and mirrored in turn, until they
cover the share wanted: the *pattern*. A slide repeats the pattern's compressed segments, so that one of 60,000 px
takes seconds. Where the shared data is absent, made slides (``tiling.phantom``) give the fragments.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import tifffile

from tiling.phantom import DOWNSAMPLES, MPP, TILE_PX, make_slide

SHARED_SLIDES = Path(__file__).resolve().parents[2] / "shared" / "data" / "panda_stitched" / "train_images"
PATTERN_SIDE, QUALITY, COVERED = 10_240, 85, 0.42
_COARSE = 16
_NOT_WHITE = 250
_GAP = 2  # coarse pixels round a fragment
# No multiple of 8: the pixels were compressed before, and on their old grid they would compress better than real ones.
_OFFSET = (13, 5)


def write_slide(path: Path, side: int, pattern: np.ndarray, levels: int = len(DOWNSAMPLES)) -> None:
    """Write a square slide: BigTIFF, 512 px JPEG tiles, YCbCr 4:2:0, quality 85, 0.5 um/px.

    Args:
        path: The file.
        side: Level-0 pixels.
        pattern: What is repeated, uint8, (P, P, 3), P a multiple of 512 times the second downsample.
        levels: How many of 1/1, 1/4 and 1/16 it has.
    """
    resolution = 10_000 / MPP
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for number, downsample in enumerate(DOWNSAMPLES[:levels]):
            size = side // downsample
            small = cv2.resize(pattern, None, fx=1 / downsample, fy=1 / downsample, interpolation=cv2.INTER_AREA)
            tiff.write(
                _segments(small, size),
                shape=(size, size, 3),
                dtype=np.uint8,
                tile=(TILE_PX, TILE_PX),
                photometric="ycbcr",
                subsampling=(2, 2),
                compression="jpeg",
                resolution=(resolution / downsample, resolution / downsample),
                resolutionunit="CENTIMETER",
                subfiletype=1 if number else 0,
                metadata=None,
            )


def _segments(pattern: np.ndarray, side: int) -> Iterator[bytes]:
    """Compressed tiles of a level of ``side`` px that repeats a pattern, row by row."""
    whole = -(-TILE_PX // pattern.shape[0])
    pattern = np.tile(pattern, (whole, whole, 1))
    period = pattern.shape[0] // np.gcd(pattern.shape[0], TILE_PX)
    known: dict[tuple[int, int], bytes] = {}
    for row in range(-(-side // TILE_PX)):
        for column in range(-(-side // TILE_PX)):
            place = row % period, column % period
            if place not in known:
                at = [np.arange(n * TILE_PX, (n + 1) * TILE_PX) % pattern.shape[0] for n in place]
                pixels = pattern[np.ix_(*at)]
                jpeg = imagecodecs.jpeg8_encode(pixels, level=QUALITY, subsampling="420", outcolorspace="YCBCR")
                known[place] = bytes(jpeg)
            yield known[place]


def make_pattern(side: int = PATTERN_SIDE, sources: Path = SHARED_SLIDES) -> np.ndarray:
    """Fragments on white, covering COVERED of it, uint8, (side, side, 3); the same for the same arguments.

    Args:
        side: Multiple of 2,048.
        sources: Folder of slides in PANDA's layout; phantoms where it is absent.
    """
    slides = [tifffile.imread(path, level=0) for path in sorted(sources.glob("*.tiff"))]
    slides = slides or [make_slide(1, grade).image for grade in ("benign", "3", "4", "5")]
    fragments = sorted((piece for slide in slides for piece in _fragments(slide)), key=lambda f: -f[1].sum())
    pattern = np.full((side, side, 3), 255, np.uint8)
    taken = np.zeros((side // _COARSE, side // _COARSE), bool)
    turn = missed = 0
    while taken.mean() < COVERED and missed < len(fragments):
        pixels, shape = fragments[turn % len(fragments)]
        pixels, shape = _turned(pixels, turn // len(fragments)), _turned(shape, turn // len(fragments))
        turn += 1
        place = _free_place(taken, shape)
        if place is None:
            missed += 1
            continue
        missed = 0
        _lay(pattern, taken, place, pixels, shape)
    return np.roll(pattern, _OFFSET, axis=(0, 1))


def _fragments(slide: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pixels (H, W, 3) and shape, bool (H / 16, W / 16), of each connected piece that is not white."""
    height, width = (length // _COARSE for length in slide.shape[:2])
    coarse = cv2.resize(slide[: height * _COARSE, : width * _COARSE], (width, height), interpolation=cv2.INTER_AREA)
    ink = cv2.dilate((coarse.min(axis=2) < _NOT_WHITE).astype(np.uint8), np.ones((3, 3), np.uint8))
    _, parts, stats, _ = cv2.connectedComponentsWithStats(ink)
    for number, (x, y, w, h, _) in enumerate(stats[1:], start=1):
        box = slide[y * _COARSE : (y + h) * _COARSE, x * _COARSE : (x + w) * _COARSE]
        yield box, parts[y : y + h, x : x + w] == number


def _turned(array: np.ndarray, turn: int) -> np.ndarray:
    """One of a square's eight symmetries."""
    return np.rot90(array if turn % 8 < 4 else array[::-1], turn % 4)


def _free_place(taken: np.ndarray, shape: np.ndarray) -> tuple[int, int] | None:
    """First row and column, from the top, where a shape and its gap meet nothing; None where there is none."""
    height, width = taken.shape[0] - shape.shape[0], taken.shape[1] - shape.shape[1]
    if height < 0 or width < 0:
        return None
    kernel = shape.astype(np.float32)
    grown = cv2.dilate(taken.astype(np.uint8), np.ones((2 * _GAP + 1, 2 * _GAP + 1), np.uint8)).astype(np.float32)
    met = cv2.filter2D(grown, cv2.CV_32F, kernel, anchor=(0, 0), borderType=cv2.BORDER_CONSTANT)
    free = np.argwhere(met[: height + 1, : width + 1] < 0.5)
    return (int(free[0][0]), int(free[0][1])) if len(free) else None


def _lay(pattern: np.ndarray, taken: np.ndarray, place: tuple[int, int], pixels: np.ndarray, shape: np.ndarray) -> None:
    """Put a fragment's own pixels on the pattern."""
    row, column = place
    height, width = shape.shape
    taken[row : row + height, column : column + width] |= shape
    fine = shape.repeat(_COARSE, axis=0).repeat(_COARSE, axis=1)
    under = pattern[row * _COARSE : (row + height) * _COARSE, column * _COARSE : (column + width) * _COARSE]
    under[fine] = pixels[fine]


def cached_slide(folder: Path, side: int, levels: int = len(DOWNSAMPLES)) -> Path:
    """A made slide, kept in ``folder`` under a name that says what it is and how it was made."""
    how = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    kind = "panda" if SHARED_SLIDES.is_dir() else "phantom"
    path = folder / f"{kind}-{side}-{levels}levels-{how}.tiff"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        written = path.with_suffix(".part")
        write_slide(written, side, make_pattern(min(side // 2048 * 2048, PATTERN_SIDE)), levels)
        written.rename(path)
    return path
