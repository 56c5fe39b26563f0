"""Open any slide: levels, mpp, compressed segments. Label and macro images are never touched.

TIFF-family slides (PANDA TIFF, SVS, NDPI, generic pyramids) are read through tifffile and imagecodecs, segment by
segment; formats that tifffile cannot segment through OpenSlide; plain images whole. Headers are checked against limits
before anything is decoded.
"""

import logging
import re
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import openslide
import tifffile
from PIL import Image

from tiling.codec import JpegSettings, jpeg_settings, jpeg_unsound
from tiling.errors import SlideError
from tiling.grid import Level
from tiling.segments import MAX_SHRINK, SegmentGrid, shrink

TIFF_SUFFIXES = frozenset({".tif", ".tiff", ".svs", ".ndpi"})
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})
OPENSLIDE_SUFFIXES = frozenset({".mrxs", ".scn", ".bif", ".vms", ".vmu", ".dcm"})
SLIDE_SUFFIXES = TIFF_SUFFIXES | IMAGE_SUFFIXES | OPENSLIDE_SUFFIXES

MAX_SEGMENT_PIXELS = 1 << 28
MAX_LEVEL_PIXELS = 1 << 38
MAX_LEVELS = 64
OVERVIEW_SIDE = 2048
OPENSLIDE_BLOCK = 512
_RESOLUTION_UM = {2: 25400.0, 3: 10000.0}
_APERIO_MPP = re.compile(r"\bMPP\s*=\s*(\d+(?:\.\d+)?)")
_BACKGROUND = 255
_COPY = "copy it again from its source"

# tifffile logs what is odd in a header. What matters of it is checked here, and told as one line.
logging.getLogger("tifffile").addHandler(logging.NullHandler())


class Slide(ABC):
    """A pyramid of levels made of compressed segments.

    Attributes:
        path: The file.
        levels: Finest first; sizes in each level's own pixels.
        mpp: um per level-0 pixel, or None when the file does not say.
    """

    path: Path
    levels: tuple[Level, ...]
    mpp: float | None

    @abstractmethod
    def segment_grid(self, level: int) -> SegmentGrid:
        """How a level is divided into segments."""

    @abstractmethod
    def read_segment(self, level: int, number: int) -> np.ndarray:
        """Pixels of one segment, uint8, (h, w, 3).

        Raises:
            SlideError: The segment is damaged.
        """

    def jpeg(self, level: int) -> JpegSettings | None:
        """Settings of the source's own JPEG compression at a level, None where it is something else."""
        del level
        return None

    def overview(self) -> tuple[np.ndarray, np.ndarray]:
        """The lowest level, reduced by a power of two where it is still large (over OVERVIEW_SIDE).

        Returns:
            Pixels, uint8 (H, W, 3), and where they are unknown because a segment is damaged, bool (H, W).
        """
        level = self.levels[-1]
        factor = 4 if len(self.levels) == 1 else 1
        while max(level.width, level.height) > factor * OVERVIEW_SIDE and factor < MAX_SHRINK:
            factor *= 2
        grid = self.segment_grid(level.index)
        return shrink(grid, lambda number: self.read_segment(level.index, number), factor)

    @abstractmethod
    def close(self) -> None:
        """Release the file."""

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_slide(path: Path, mpp: float | None = None) -> Slide:
    """Open a slide by its suffix.

    Args:
        path: A file with one of ``SLIDE_SUFFIXES``.
        mpp: um per level-0 pixel, overriding what the file says.

    Raises:
        SlideError: The file is missing, empty, not what its suffix says, or over a limit.
    """
    suffix = path.suffix.lower()
    if not path.is_file():
        raise SlideError("no such file", path)
    if path.stat().st_size == 0:
        raise SlideError("file is empty (0 bytes)", path, _COPY)
    slide: Slide
    if suffix in TIFF_SUFFIXES:
        slide = TiffSlide(path)
    elif suffix in IMAGE_SUFFIXES:
        slide = ImageSlide(path)
    else:
        slide = OpenSlideSlide(path)
    if mpp is not None:
        slide.mpp = mpp
    return slide


def _levels(sizes: list[tuple[int, int]], path: Path) -> tuple[Level, ...]:
    """Levels from (width, height) pairs, checked against the limits."""
    if not 0 < len(sizes) <= MAX_LEVELS:
        raise SlideError(f"{len(sizes)} levels, 1 to {MAX_LEVELS} are read", path)
    width, height = sizes[0]
    for w, h in sizes:
        if w < 1 or h < 1 or w * h > MAX_LEVEL_PIXELS:
            raise SlideError(f"a level claims {w} x {h} px, limit is {MAX_LEVEL_PIXELS:,} px", path)
    return tuple(Level(n, w, h, (width / w + height / h) / 2) for n, (w, h) in enumerate(sizes))


class TiffSlide(Slide):
    """A TIFF-family pyramid, through tifffile: exactly the compressed segments, decoded by imagecodecs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._tiff = tifffile.TiffFile(path)
        except Exception as error:
            # tifffile parses what a hostile or cut header gives it; whatever it trips over, the slide is unreadable.
            raise SlideError(f"not a readable TIFF ({error})", path) from error
        try:
            self._read_header()
        except SlideError:
            self._tiff.close()
            raise
        except Exception as error:
            self._tiff.close()
            raise SlideError(f"TIFF header cannot be read ({type(error).__name__}: {error})", path) from error

    def _read_header(self) -> None:
        series = self._tiff.series[0]
        pages: list[Any] = [level.keyframe for level in series.levels]
        self._pages = [page for page in pages if page.dtype == np.uint8 and page.samplesperpixel in (1, 3, 4)]
        if not self._pages or self._pages[0] is not pages[0]:
            page = pages[0]
            raise SlideError(
                f"pixels are {page.dtype} x {page.samplesperpixel}, 8-bit grey, RGB or RGBA is read",
                self.path,
            )
        self.levels = _levels([(page.imagewidth, page.imagelength) for page in self._pages], self.path)
        self._require_whole()
        for page in self._pages:
            grid = self._grid(page)
            if grid.segment_width * grid.segment_height > MAX_SEGMENT_PIXELS:
                raise SlideError(
                    f"a segment claims {grid.segment_width} x {grid.segment_height} px, "
                    f"limit is {MAX_SEGMENT_PIXELS:,} px",
                    self.path,
                )
            if len(page.dataoffsets) < grid.rows * grid.columns:
                raise SlideError(f"{len(page.dataoffsets)} segments, {grid.rows * grid.columns} are needed", self.path)
        self.mpp = self._stated_mpp()

    def _require_whole(self) -> None:
        """Refuse a file that was cut: tifffile would give the levels and segments that are left."""
        there = self._tiff.filehandle.size
        needed = max(
            offset + size
            for page in self._pages
            for offset, size in zip(page.dataoffsets, page.databytecounts, strict=True)
        )
        layout, last = self._tiff.tiff, self._tiff.pages[-1].offset
        count = self._integer(last, layout.tagnosize)
        following = self._integer(last + layout.tagnosize + count * layout.tagsize, layout.offsetsize)
        if following:
            raise SlideError(f"list of pages does not end: it goes on at byte {following} of {there}", self.path, _COPY)
        if needed > there:
            raise SlideError(f"file is cut: its segments reach to byte {needed}, it has {there}", self.path, _COPY)

    def _integer(self, offset: int, size: int) -> int:
        """An unsigned integer of the file."""
        self._tiff.filehandle.seek(offset)
        return int.from_bytes(self._tiff.filehandle.read(size), "little" if self._tiff.byteorder == "<" else "big")

    def _stated_mpp(self) -> float | None:
        page = self._pages[0]
        if self._tiff.is_svs:
            stated = _APERIO_MPP.search(page.description)
            if stated:
                return float(stated[1])
        unit = _RESOLUTION_UM.get(int(page.resolutionunit))
        along_x, along_y = page.resolution
        if unit is None or along_x <= 1 or along_y <= 1:
            return None
        if abs(along_x / along_y - 1) > 0.01:
            raise SlideError(f"pixels are not square: {unit / along_x:.4g} x {unit / along_y:.4g} um", self.path)
        return float(unit / along_x)

    @staticmethod
    def _grid(page: Any) -> SegmentGrid:
        height, width = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
        return SegmentGrid(page.imagewidth, page.imagelength, width, min(height, page.imagelength))

    def segment_grid(self, level: int) -> SegmentGrid:
        """How a level is divided into segments."""
        return self._grid(self._pages[level])

    def _raw(self, level: int, number: int) -> bytes:
        page = self._pages[level]
        handle = self._tiff.filehandle
        handle.seek(page.dataoffsets[number])
        data = handle.read(page.databytecounts[number])
        if len(data) != page.databytecounts[number]:
            raise SlideError(
                f"file ends inside segment {number} of level {level}: {len(data)} of "
                f"{page.databytecounts[number]} bytes",
                self.path,
            )
        return bytes(data)

    def read_segment(self, level: int, number: int) -> np.ndarray:
        """Pixels of one segment, uint8, (h, w, 3); a segment the file leaves out is background."""
        page = self._pages[level]
        grid = self._grid(page)
        if page.databytecounts[number] == 0:
            return np.full((grid.segment_height, grid.segment_width, 3), _BACKGROUND, np.uint8)
        # page.decode takes the tables under a name that depends on how the page was made (NDPI has whole headers).
        tables = {"jpegheader": page.jpegheader} if page.jpegheader is not None else {"jpegtables": page.jpegtables}
        raw = self._raw(level, number)
        if page.compression == tifffile.COMPRESSION.JPEG and (unsound := jpeg_unsound(raw, page.jpegheader)):
            raise SlideError(f"segment {number} of level {level} is damaged: {unsound}", self.path)
        try:
            pixels, _, _ = page.decode(raw, number, **tables)
        except Exception as error:
            # Each codec raises its own type; a damaged segment is lost, whatever the type.
            raise SlideError(f"segment {number} of level {level} does not decode ({error})", self.path) from error
        if pixels is None:
            raise SlideError(f"segment {number} of level {level} decodes to nothing", self.path)
        return _to_rgb(pixels[0])

    def jpeg(self, level: int) -> JpegSettings | None:
        """Settings of the source's JPEG, from the level's first segment that is there."""
        page = self._pages[level]
        if page.compression != tifffile.COMPRESSION.JPEG:
            return None
        number = next((n for n, size in enumerate(page.databytecounts) if size), None)
        if number is None:
            return None
        header = page.jpegheader if page.jpegheader is not None else self._raw(level, number)
        rgb = page.photometric == tifffile.PHOTOMETRIC.RGB
        return jpeg_settings(header, page.jpegtables, declared_rgb=rgb)

    def close(self) -> None:
        """Release the file."""
        self._tiff.close()


class ImageSlide(Slide):
    """A plain JPEG or PNG: one level, one segment, no mpp."""

    def __init__(self, path: Path) -> None:
        self.path, self.mpp = path, None
        try:
            with Image.open(path) as image:
                width, height = image.size
                self._format = image.format
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise SlideError(f"not a readable image ({error})", path) from error
        if width * height > MAX_SEGMENT_PIXELS:
            raise SlideError(f"image claims {width} x {height} px, limit is {MAX_SEGMENT_PIXELS:,} px", path)
        self.levels = _levels([(width, height)], path)
        self._pixels: np.ndarray | None = None

    def segment_grid(self, level: int) -> SegmentGrid:
        """One segment."""
        only = self.levels[level]
        return SegmentGrid(only.width, only.height, only.width, only.height)

    def read_segment(self, level: int, number: int) -> np.ndarray:
        """The whole image, decoded once and kept."""
        del level, number
        if self._pixels is None:
            unsound = jpeg_unsound(self.path.read_bytes()) if self._format == "JPEG" else ""
            if unsound:
                raise SlideError(f"image is damaged: {unsound}", self.path, _COPY)
            try:
                self._pixels = _to_rgb(imagecodecs.imread(self.path))
            except Exception as error:
                # imread tries one codec after the other; their errors have no common type.
                raise SlideError(f"image does not decode ({error})", self.path) from error
        return self._pixels

    def overview(self) -> tuple[np.ndarray, np.ndarray]:
        """The image reduced to OVERVIEW_SIDE; an image that is damaged raises."""
        pixels = self.read_segment(0, 0)
        factor = max(4, -(-max(pixels.shape[:2]) // OVERVIEW_SIDE))
        size = max(1, pixels.shape[1] // factor), max(1, pixels.shape[0] // factor)
        return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)), np.zeros(size[::-1], bool)

    def jpeg(self, level: int) -> JpegSettings | None:
        """Settings of the file's own JPEG."""
        del level
        return jpeg_settings(self.path.read_bytes()) if self._format == "JPEG" else None

    def close(self) -> None:
        """Drop the pixels."""
        self._pixels = None


class OpenSlideSlide(Slide):
    """A slide that only OpenSlide reads, in blocks; reopened after an error, because it latches the first one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = self._open()
        self.levels = _levels(list(self._handle.level_dimensions), path)
        self.levels = tuple(
            replace(level, downsample=float(self._handle.level_downsamples[level.index])) for level in self.levels
        )
        stated = self._handle.properties.get(openslide.PROPERTY_NAME_MPP_X)
        self.mpp = float(stated) if stated else None

    def _open(self) -> Any:
        try:
            return openslide.OpenSlide(self.path)
        except openslide.OpenSlideError as error:
            raise SlideError(f"OpenSlide cannot open it ({error})", self.path) from error

    def segment_grid(self, level: int) -> SegmentGrid:
        """Square blocks of OPENSLIDE_BLOCK px."""
        chosen = self.levels[level]
        return SegmentGrid(chosen.width, chosen.height, OPENSLIDE_BLOCK, OPENSLIDE_BLOCK)

    def read_segment(self, level: int, number: int) -> np.ndarray:
        """Pixels of one block, composed over white where the slide has none."""
        grid, chosen = self.segment_grid(level), self.levels[level]
        x, y = grid.corner(number)
        size = min(OPENSLIDE_BLOCK, chosen.width - x), min(OPENSLIDE_BLOCK, chosen.height - y)
        corner = round(x * chosen.downsample), round(y * chosen.downsample)
        try:
            rgba = np.asarray(self._handle.read_region(corner, level, size))
        except openslide.OpenSlideError as error:
            self._handle.close()
            self._handle = self._open()
            raise SlideError(f"block {number} of level {level} does not decode ({error})", self.path) from error
        return _to_rgb(rgba)

    def close(self) -> None:
        """Release the file."""
        self._handle.close()


def _to_rgb(pixels: np.ndarray) -> np.ndarray:
    """Grey (H, W) or (H, W, 1), RGB or RGBA to RGB (H, W, 3); what is transparent is background."""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.shape[2] == 1:
        return np.repeat(pixels, 3, axis=2)
    if pixels.shape[2] == 4:
        rgb = pixels[..., :3].copy()
        rgb[pixels[..., 3] == 0] = _BACKGROUND
        return rgb
    return pixels
