"""TIFF-family pyramids (PANDA, SVS, NDPI, OME-TIFF, generic): exactly the compressed segments, decoded by imagecodecs.

tifffile reads the header once, at opening; from there on a segment is one ``pread`` and one decode. Label and macro
images are pages that no level names: their bytes are never read.
"""

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from tiling.codec import JpegSettings
from tiling.errors import BonyError, DamageError, SlideError
from tiling.limits import DEFAULT_LIMITS, Limits
from tiling.pyramid import BACKGROUND, COPY_AGAIN, Slide, make_levels, overview_shrink, to_rgb
from tiling.segments import SegmentGrid, shrink
from tiling.tiff_codec import EIGHTH, Codec, JpegCodec, LayoutError, make_codec

_RESOLUTION_UM = {2: 25400.0, 3: 10000.0}
_APERIO_MPP = re.compile(r"\bMPP\s*=\s*(\d+(?:\.\d+)?)")
_OME_PIXELS = re.compile(r"<(?:\w+:)?Pixels\b[^>]*>")
_OME_LENGTH = r'\bPhysicalSize{axis}\s*=\s*"([^"]*)"'
_OME_UNIT = r'\bPhysicalSize{axis}Unit\s*=\s*"([^"]*)"'
_UNIT_UM = {"nm": 1e-3, "\u00b5m": 1.0, "\u03bcm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6, "in": 25400.0}

# tifffile logs what is odd in a header, and quotes it. What matters is checked here, and told as one line that quotes
# nothing: a header may name a patient.
logging.getLogger("tifffile").disabled = True


@dataclass(frozen=True)
class _Segments:
    """Where the segments of one level lie: bytes of the file, int64 (planes, segments), and how they become pixels."""

    grid: SegmentGrid
    offsets: np.ndarray
    sizes: np.ndarray
    codec: Codec


class TiffSlide(Slide):
    """A TIFF-family pyramid.

    Args:
        path: The file; ``tiff_pages.check_pages`` has walked it.
        limits: What its header may claim.

    Raises:
        LayoutError: It is laid out in a way that is not read here.
        SlideError: It is damaged, cut, over a limit, or no TIFF.
    """

    def __init__(self, path: Path, limits: Limits = DEFAULT_LIMITS) -> None:
        self.path = path
        try:
            with tifffile.TiffFile(path) as tiff:
                self._read_header(tiff, limits)
        except BonyError as error:
            kind = LayoutError if isinstance(error, LayoutError) else SlideError
            raise kind(error.what, path, error.do) from None
        except Exception as error:
            # tifffile parses what a hostile or cut header gives it; whatever it trips over, the slide is unreadable.
            raise SlideError(f"TIFF header cannot be read ({type(error).__name__})", path, COPY_AGAIN) from None
        self._file = os.open(path, os.O_RDONLY)

    def _read_header(self, tiff: tifffile.TiffFile, limits: Limits) -> None:
        pages = _level_pages(tiff)
        self.levels = make_levels([(page.imagewidth, page.imagelength) for page in pages], limits, self.path)
        self._segments = [self._segments_of(page, limits) for page in pages]
        there = tiff.filehandle.size
        needed = max(int((level.offsets + level.sizes).max()) for level in self._segments)
        if needed > there:
            raise SlideError(f"file is cut: its segments reach to byte {needed}, it has {there}", self.path, COPY_AGAIN)
        pixels = sum(
            int(np.count_nonzero(level.sizes[0])) * level.grid.segment_width * level.grid.segment_height
            for level in self._segments
        )
        limits.check_ratio(pixels, there, self.path)
        self.stated_mpp = _stated_mpp(tiff, pages[0])

    def _segments_of(self, page: Any, limits: Limits) -> _Segments:
        height, width = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
        height = min(height, page.imagelength) if not page.is_tiled else height
        limits.check_segment(width, height, self.path)
        grid = SegmentGrid(page.imagewidth, page.imagelength, width, height)
        planes = page.samplesperpixel if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE else 1
        count = grid.rows * grid.columns
        limits.check_segments(count * planes, self.path)
        there = min(len(page.dataoffsets), len(page.databytecounts))
        if there < count * planes:
            raise SlideError(f"{there} segments, {count * planes} are needed", self.path, COPY_AGAIN)
        offsets, sizes = (
            np.array(values[: count * planes], np.int64).reshape(planes, count)
            for values in (page.dataoffsets, page.databytecounts)
        )
        return _Segments(grid, offsets, sizes, make_codec(page, (height, width)))

    def segment_grid(self, level: int) -> SegmentGrid:
        """How a level is divided into segments."""
        return self._segments[level].grid

    def compressed_sizes(self, level: int) -> np.ndarray:
        """Bytes of each segment in the file, int64 (segments,), 0 where it is left out."""
        return np.asarray(self._segments[level].sizes.sum(axis=0))

    def _raw(self, level: int, number: int, plane: int = 0) -> bytes:
        segments = self._segments[level]
        size = int(segments.sizes[plane, number])
        data = os.pread(self._file, size, int(segments.offsets[plane, number]))
        if len(data) != size:
            raise DamageError(f"{len(data)} of its {size} bytes are there")
        return data

    def read_segment(self, level: int, number: int) -> np.ndarray:
        """Pixels of one segment, uint8, (h, w, 3); a segment the file leaves out is background."""
        segments = self._segments[level]
        grid, planes = segments.grid, range(len(segments.sizes))
        if not segments.sizes[:, number].all():
            return np.full((grid.segment_height, grid.segment_width, 3), BACKGROUND, np.uint8)
        try:
            parts = [segments.codec(self._raw(level, number, plane), number) for plane in planes]
            return to_rgb(parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2))
        except Exception as error:
            raise self._damaged(level, number, error) from None

    def _damaged(self, level: int, number: int, error: Exception) -> SlideError:
        """Each codec raises its own type, and may quote the stream; a damaged segment is lost, whatever the type."""
        what = f"does not decode ({type(error).__name__})"
        if isinstance(error, DamageError):
            what = f"is damaged: {error.what}"
        return SlideError(f"segment {number} of level {level} {what}", self.path)

    def jpeg(self, level: int) -> JpegSettings | None:
        """Settings of the source's JPEG, from the level's first segment that is there."""
        segments = self._segments[level]
        there = np.flatnonzero(segments.sizes[0])
        if not isinstance(segments.codec, JpegCodec) or len(segments.sizes) > 1 or not len(there):
            return None
        return segments.codec.settings(self._raw(level, int(there[0])))

    def overview(self) -> tuple[np.ndarray, np.ndarray]:
        """The lowest level, reduced; where JPEG has to shrink by 8 or more, only the mean of each block is decoded."""
        level, segments = self.levels[-1], self._segments[-1]
        grid, codec = segments.grid, segments.codec
        large = len(self.levels) == 1 or overview_shrink(level, 1) >= EIGHTH
        if not (large and isinstance(codec, JpegCodec) and len(segments.sizes) == 1 and _in_eighths(grid)):
            return super().overview()
        sides = (grid.width, grid.height, grid.segment_width, grid.segment_height)
        eighths = SegmentGrid(*(-(-side // EIGHTH) for side in sides))
        background = np.full((eighths.segment_height, eighths.segment_width, 3), BACKGROUND, np.uint8)

        def decode(number: int) -> np.ndarray:
            """An eighth of a segment."""
            if not segments.sizes[0, number]:
                return background
            try:
                return codec.eighth(self._raw(level.index, number))
            except Exception as error:
                raise self._damaged(level.index, number, error) from None

        return shrink(eighths, decode, overview_shrink(level, EIGHTH) // EIGHTH)

    def close(self) -> None:
        """Release the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _in_eighths(grid: SegmentGrid) -> bool:
    """Whether every segment begins at a whole pixel of the level at an eighth."""
    across = grid.columns == 1 or grid.segment_width % EIGHTH == 0
    return across and (grid.rows == 1 or grid.segment_height % EIGHTH == 0)


def _level_pages(tiff: tifffile.TiffFile) -> list[Any]:
    """The page of each level, finest first; lower levels of other pixels than RGB, RGBA or grey are left out."""
    series = tiff.series[0]
    finest = series.levels[0].keyframe
    if not _is_read(finest):
        raise SlideError(f"pixels are {finest.dtype} x {finest.samplesperpixel}, 8-bit grey, RGB or RGBA is read")
    if len(series.levels[0].pages) != 1 or finest.parent is not tiff or finest.imagedepth != 1:
        # Of an NDPI OpenSlide reads the plane in focus; of other kinds it would read the first channel alone.
        raise (LayoutError if tiff.is_ndpi else SlideError)(
            "its pixels lie on several planes or in several files; one plane of one file is read"
        )
    return [level.keyframe for level in series.levels if _is_read(level.keyframe)]


def _is_read(page: Any) -> bool:
    return page.dtype == np.uint8 and page.bitspersample == 8 and page.samplesperpixel in (1, 3, 4)


def _stated_mpp(tiff: tifffile.TiffFile, page: Any) -> tuple[float, float] | None:
    """um per pixel along x and y: as Aperio's description, OME's Pixels or TIFF's resolution says."""
    if tiff.is_svs and (stated := _APERIO_MPP.search(page.description)):
        return float(stated[1]), float(stated[1])
    if tiff.is_ome and (stated := _OME_PIXELS.search(page.description)):
        return _ome_mpp(stated[0])
    unit = _RESOLUTION_UM.get(int(page.resolutionunit))
    along_x, along_y = page.resolution
    # 1 x 1 is what writers put who know of no scale.
    if unit is None or along_x <= 1 or along_y <= 1:
        return None
    return unit / along_x, unit / along_y


def _ome_mpp(pixels: str) -> tuple[float, float] | None:
    """PhysicalSizeX and Y of OME-XML's first Pixels element, um unless its unit says otherwise."""
    lengths = []
    for axis in "XY":
        length = re.search(_OME_LENGTH.format(axis=axis), pixels)
        unit = re.search(_OME_UNIT.format(axis=axis), pixels)
        scale = _UNIT_UM.get(unit[1] if unit else "um")
        try:
            lengths.append(float(length[1]) * scale if length and scale else 0.0)
        except ValueError:
            return None
    return (lengths[0], lengths[1]) if all(lengths) else None
