"""Plain JPEG and PNG: one level, one segment, no mpp."""

import mmap
import struct
from pathlib import Path

import cv2
import imagecodecs
import numpy as np

from tiling.codec import JpegSettings, jpeg_frame, jpeg_settings, jpeg_unsound
from tiling.errors import SlideError
from tiling.limits import DEFAULT_LIMITS, Limits
from tiling.pyramid import COPY_AGAIN, OVERVIEW_SIDE, Slide, make_levels, to_rgb
from tiling.segments import SegmentGrid

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_JPEG_COLOURS = (1, 3)
# Bytes 8 to 26 of a PNG: IHDR's length and name, width, height, bit depth and colour type (RFC 2083, 11.2.2).
_IHDR = struct.Struct(">4x4sIIBB")


class ImageSlide(Slide):
    """A plain image, told by its first bytes and not by its name.

    Args:
        path: The file.
        limits: What its header may claim.

    Raises:
        SlideError: It is neither JPEG nor PNG, not 8-bit grey, RGB or RGBA, or over a limit.
    """

    def __init__(self, path: Path, limits: Limits = DEFAULT_LIMITS) -> None:
        self.path = path
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            self._is_jpeg = data[:3] == _JPEG
            self._bytes = len(data)
            self._jpeg = jpeg_settings(data) if self._is_jpeg else None
            if self._is_jpeg:
                width, height = _jpeg_size(data, path)
            elif data[:8] == _PNG:
                width, height = _png_size(data[8 : 8 + _IHDR.size], path)
            else:
                raise SlideError("not a readable image: it begins like neither JPEG nor PNG", path)
        self.levels = make_levels([(width, height)], limits, path)
        limits.check_segment(width, height, path)
        limits.check_ratio(width * height, self._bytes, path)
        self._pixels: np.ndarray | None = None

    def segment_grid(self, level: int) -> SegmentGrid:
        """One segment."""
        only = self.levels[level]
        return SegmentGrid(only.width, only.height, only.width, only.height)

    def compressed_sizes(self, level: int) -> np.ndarray:
        """The file's size, int64 (1,)."""
        del level
        return np.array([self._bytes], np.int64)

    def read_segment(self, level: int, number: int) -> np.ndarray:
        """The whole image, decoded once and kept."""
        del level, number
        if self._pixels is None:
            self._pixels = self._decoded()
        return self._pixels

    def _decoded(self) -> np.ndarray:
        data = self.path.read_bytes()
        if self._is_jpeg and (unsound := jpeg_unsound(data)):
            raise SlideError(f"image is damaged: {unsound}", self.path, COPY_AGAIN)
        try:
            pixels = imagecodecs.jpeg8_decode(data) if self._is_jpeg else imagecodecs.png_decode(data)
        except (RuntimeError, ValueError) as error:
            # The codec's words may quote the file's.
            raise SlideError(f"image does not decode ({type(error).__name__})", self.path, COPY_AGAIN) from None
        return to_rgb(np.asarray(pixels))

    def overview(self) -> tuple[np.ndarray, np.ndarray]:
        """The image reduced to OVERVIEW_SIDE, from the one decode that its tiles need as well.

        Raises:
            SlideError: The image is damaged.
        """
        pixels = self.read_segment(0, 0)
        factor = max(4, -(-max(pixels.shape[:2]) // OVERVIEW_SIDE))
        size = max(1, pixels.shape[1] // factor), max(1, pixels.shape[0] // factor)
        return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)), np.zeros(size[::-1], bool)

    def jpeg(self, level: int) -> JpegSettings | None:
        """Settings of the file's own JPEG."""
        del level
        return self._jpeg

    def close(self) -> None:
        """Drop the pixels."""
        self._pixels = None


def _jpeg_size(data: mmap.mmap, path: Path) -> tuple[int, int]:
    """Width and height of a JPEG, from its frame header."""
    frame = jpeg_frame(data)
    if frame is None:
        raise SlideError("not a readable image: no baseline or progressive JPEG frame in it", path)
    if frame.precision != 8 or len(frame.components) not in _JPEG_COLOURS:
        raise SlideError(
            f"image has {len(frame.components)} components of {frame.precision} bits; 8-bit grey or RGB JPEG is read",
            path,
            "save it as 8-bit RGB",
        )
    return frame.width, frame.height


def _png_size(header: bytes, path: Path) -> tuple[int, int]:
    """Width and height of a PNG, from its IHDR."""
    if len(header) != _IHDR.size or header[4:8] != b"IHDR":
        raise SlideError("not a readable image: its PNG header is cut or damaged", path, COPY_AGAIN)
    _, width, height, depth, _ = _IHDR.unpack(header)
    if depth != 8:
        raise SlideError(f"image has {depth} bits per sample, 8 are read", path, "save it with 8 bits")
    return int(width), int(height)
