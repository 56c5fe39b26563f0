"""Compressed segments of one TIFF page to pixels, by imagecodecs; never more pixels than the page gives a segment.

JPEG is decoded directly, as tifffile would: its own way costs as much as a tenth of the decoding. What is read of a
stream before it is decoded is its size, since a stream of 512 bytes may claim 65,535 x 65,535 pixels.
"""

from collections.abc import Callable
from typing import Any

import cv2
import imagecodecs
import numpy as np
from tifffile import COMPRESSION, PHOTOMETRIC, PLANARCONFIG

from tiling.codec import JpegSettings, jpeg_frame, jpeg_settings, jpeg_unsound
from tiling.errors import DamageError, SlideError

EIGHTH = 8
_PLAIN = {
    COMPRESSION.NONE,
    COMPRESSION.LZW,
    COMPRESSION.ADOBE_DEFLATE,
    COMPRESSION.DEFLATE,
    COMPRESSION.PACKBITS,
    COMPRESSION.LZMA,
    COMPRESSION.ZSTD,
    COMPRESSION.ZSTD_DEPRECATED,
}
_JPEG2000 = {COMPRESSION.APERIO_JP2000_RGB, COMPRESSION.JPEG2000}
_COLOURS = {PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.RGB, PHOTOMETRIC.YCBCR}
_CODESTREAM = b"\xff\x4f\xff\x51"
_SOI, _SOS, _EOI = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
# Components are RGB: libjpeg goes by this marker where it has no other.
_ADOBE_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"


class LayoutError(SlideError):
    """A TIFF laid out in a way that is not read here; OpenSlide may."""


class Codec:
    """Decodes the segments of a page that are compressed by anything but JPEG.

    Args:
        page: tifffile's page.
        decode: Compressed bytes and number to pixels, (h, w, samples).
    """

    def __init__(self, page: Any, decode: Callable[[bytes, int], np.ndarray]) -> None:
        self._decode = decode
        self._inverted = page.photometric == PHOTOMETRIC.MINISWHITE

    def __call__(self, raw: bytes, number: int) -> np.ndarray:
        """Pixels of a segment, uint8, (h, w, samples).

        Raises:
            DamageError: It is damaged.
            Exception: Of the codec's own type, likewise.
        """
        pixels = self._decode(raw, number)
        return ~pixels if self._inverted else pixels


class JpegCodec(Codec):
    """Decodes the JPEG segments of a page, wholly or at an eighth.

    Args:
        page: tifffile's page.
        shape: Height and width that the page gives a segment.
    """

    def __init__(self, page: Any, shape: tuple[int, int]) -> None:
        super().__init__(page, self._whole)
        self._header: bytes | None = page.jpegheader
        self._tables: bytes | None = page.jpegtables
        self._photometric, self._shape, self._samples = page.photometric, shape, page.samplesperpixel
        # libjpeg goes by a stream's own markers where it is not told: Aperio's components are R, G, B without any.
        self._from: int | None = None
        self._to: int | None = None
        if page.planarconfig == PLANARCONFIG.SEPARATE:
            self._samples, self._to = 1, PHOTOMETRIC.MINISBLACK
        elif self._samples == 3:
            self._to = PHOTOMETRIC.RGB
            if page.photometric == PHOTOMETRIC.RGB and not page.is_jfif:
                self._from = PHOTOMETRIC.RGB
        self._sized = b""  # the header that was checked last: most segments of a page have the same
        if self._header is not None:
            self._check_size(self._header)

    def settings(self, raw: bytes) -> JpegSettings | None:
        """What decides the fidelity of a segment."""
        stream = self._header if self._header is not None else raw
        return jpeg_settings(stream, self._tables, declared_rgb=self._photometric == PHOTOMETRIC.RGB)

    def eighth(self, raw: bytes) -> np.ndarray:
        """A segment at an eighth of its size, uint8, (ceil(h / 8), ceil(w / 8), 3): only a block's mean is decoded."""
        stream = self._complete(raw)
        if self._tables is not None:
            stream = _SOI + self._tables[2:-2] + stream[2:]
        if self._from == PHOTOMETRIC.RGB:
            stream = _SOI + _ADOBE_RGB + stream[2:]
        flags = cv2.IMREAD_REDUCED_COLOR_8 | cv2.IMREAD_IGNORE_ORIENTATION
        pixels = cv2.imdecode(np.frombuffer(stream, np.uint8), flags)
        if pixels is None:
            raise DamageError("it does not decode")
        rgb = np.asarray(pixels, np.uint8)[..., ::-1]
        return ~rgb if self._inverted else rgb

    def _whole(self, raw: bytes, number: int) -> np.ndarray:
        del number
        stream = self._complete(raw)
        return imagecodecs.jpeg8_decode(stream, tables=self._tables, colorspace=self._from, outcolorspace=self._to)

    def _complete(self, raw: bytes) -> bytes:
        """The stream of a segment, sound and of the right size; its tables may still lie elsewhere."""
        if unsound := jpeg_unsound(raw, self._header):
            raise DamageError(unsound)
        if self._header is not None:
            return self._header + raw + _EOI
        self._check_size(raw)
        return raw

    def _check_size(self, stream: bytes) -> None:
        if self._sized and stream.startswith(self._sized):
            return
        frame = jpeg_frame(stream)
        if frame is None:
            raise DamageError("no frame header in it that is read")
        _check_claim((frame.height, frame.width, len(frame.components)), (*self._shape, self._samples))
        self._sized = stream[: max(0, stream.find(_SOS))]


def make_codec(page: Any, shape: tuple[int, int]) -> Codec:
    """The codec of a page.

    Args:
        page: tifffile's page.
        shape: Height and width that the page gives a segment.

    Raises:
        LayoutError: Its compression or colours are not read here.
    """
    if page.photometric not in _COLOURS:
        # OpenSlide converts CMYK; a palette it opens, and then fails on each region.
        raise (SlideError if page.photometric == PHOTOMETRIC.PALETTE else LayoutError)(
            f"colours are {_named(PHOTOMETRIC, page.photometric)}; grey, RGB and YCbCr are read"
        )
    if page.compression == COMPRESSION.JPEG:
        return JpegCodec(page, shape)
    if page.photometric == PHOTOMETRIC.YCBCR:
        raise LayoutError(f"YCbCr colours compressed by {_named(COMPRESSION, page.compression)}; by JPEG they are read")
    if page.compression in _PLAIN:
        decode = page.decode
        return Codec(page, lambda raw, number: decode(raw, number)[0][0])
    if page.compression in _JPEG2000:
        return Codec(page, lambda raw, _: _jpeg2000(raw, (*shape, page.samplesperpixel)))
    raise LayoutError(f"compression {_named(COMPRESSION, page.compression)} is not read")


def _named(kind: Any, value: int) -> str:
    """A tag's value in TIFF's words, where it has any."""
    return str(kind(value).name) if value in list(kind) else f"number {int(value)}"


def _jpeg2000(raw: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """A JPEG 2000 codestream, bare or boxed (ITU T.800, A.5.1: its size stands at a fixed place)."""
    at = raw.find(_CODESTREAM)
    siz = raw[at + 4 : at + 42]
    if at < 0 or len(siz) < 38:
        raise DamageError("no JPEG 2000 codestream in it")
    right, bottom, left, top = (int.from_bytes(siz[n : n + 4]) for n in (4, 8, 12, 16))
    samples = int.from_bytes(siz[36:38])
    _check_claim((bottom - top, right - left, samples), shape)
    return np.asarray(imagecodecs.jpeg2k_decode(raw))


def _check_claim(claimed: tuple[int, int, int], given: tuple[int, int, int]) -> None:
    """Raise DamageError where a stream claims more (height, width, samples) than its page gives a segment."""
    if not all(0 < ours <= theirs for ours, theirs in zip(claimed, given, strict=True)):
        height, width, samples = claimed
        raise DamageError(
            f"it claims {width} x {height} px x {samples}, its page {given[1]} x {given[0]} px x {given[2]}"
        )
