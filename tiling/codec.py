"""One tile to bytes and back: JPEG with the source's own tables, or lossless zstd.

Re-encoding a decoded JPEG with the same quantisation tables, chroma subsampling and colour space, on the same
16-pixel MCU grid, costs almost nothing in fidelity (51 dB and more on slides of PANDA pixels; q95 with
other tables 42 dB) or in bytes.
"""

import io
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import imagecodecs
import numpy as np
from PIL import Image

from tiling.errors import DamageError, UsageError

CODECS = ("jpeg", "zstd")
FALLBACK_QUALITY = 95
ZSTD_LEVEL = 3

# Row-major position of each coefficient of a zigzag-ordered table (ITU T.81, figure A.6).
_ZIGZAG = sorted(range(64), key=lambda n: (n // 8 + n % 8, (n // 8 if (n // 8 + n % 8) % 2 else n % 8)))
_SUBSAMPLING = {(1, 1): "4:4:4", (2, 1): "4:2:2", (2, 2): "4:2:0"}
_FRAME_MARKERS = (0xC0, 0xC1, 0xC2)
# What may follow 0xFF in entropy-coded data without being a marker: a stuffed zero, a restart, a fill byte.
_NO_MARKER = (0x00, *range(0xD0, 0xD8), 0xFF)
# Tables and further scans may follow a scan.
_BETWEEN_SCANS = (0xC4, 0xDA, 0xDB, 0xDC, 0xDD, 0xFE)
_MARKER_WITHOUT_LENGTH = (0xD8, 0x01, *range(0xD0, 0xD8))


@dataclass(frozen=True)
class JpegSettings:
    """What decides a JPEG's fidelity.

    Args:
        tables: Quantisation table of each component, row-major, 64 values each.
        subsampling: Chroma subsampling in Pillow's words, "4:2:0" and so on.
        rgb: Whether the components are R, G, B rather than Y, Cb, Cr.
    """

    tables: tuple[tuple[int, ...], ...]
    subsampling: str
    rgb: bool

    @cached_property
    def quality(self) -> int | None:
        """The libjpeg quality whose tables these are, None where they are no scaled standard tables."""
        for quality in range(100, 0, -1):
            luma, chroma = _standard_tables(quality)
            if self.tables == (luma, *((luma, luma) if self.rgb else (chroma, chroma))):
                return quality
        return None


@dataclass(frozen=True)
class JpegFrame:
    """What a JPEG's frame header claims: size in pixels, bits per sample; (id, across, down, table) per component."""

    width: int
    height: int
    precision: int
    components: tuple[tuple[int, int, int, int], ...]


def _segments(stream: bytes | mmap.mmap) -> list[tuple[int, bytes]]:
    """(marker, payload) of each marker segment before the entropy-coded data."""
    found, at = [], 0
    while at + 4 <= len(stream):
        if stream[at] != 0xFF:
            break
        marker = stream[at + 1]
        if marker in _MARKER_WITHOUT_LENGTH or marker == 0xFF:
            at += 1 if marker == 0xFF else 2
            continue
        if marker in (0xDA, 0xD9):
            break
        length = int.from_bytes(stream[at + 2 : at + 4], "big")
        found.append((marker, stream[at + 4 : at + 2 + length]))
        at += 2 + length
    return found


def _frame(payload: bytes) -> JpegFrame:
    """A frame header (ITU T.81, B.2.2)."""
    rows = [payload[6 + 3 * n : 9 + 3 * n] for n in range(payload[5])]
    components = tuple((row[0], row[1] >> 4, row[1] & 15, row[2]) for row in rows)
    return JpegFrame(int.from_bytes(payload[3:5]), int.from_bytes(payload[1:3]), payload[0], components)


def jpeg_frame(stream: bytes | mmap.mmap) -> JpegFrame | None:
    """What a stream's header claims, read without decoding; None without a baseline or progressive frame header."""
    for marker, payload in _segments(stream):
        if marker in _FRAME_MARKERS:
            try:
                return _frame(payload)
            except IndexError:
                return None
    return None


def _tables(payload: bytes) -> dict[int, tuple[int, ...]]:
    """Quantisation tables of one DQT segment, row-major, by table number."""
    tables, at = {}, 0
    while at < len(payload):
        width = 2 if payload[at] >> 4 else 1
        number = payload[at] & 15
        raw = payload[at + 1 : at + 1 + 64 * width]
        zigzag = np.frombuffer(raw, ">u2" if width == 2 else "u1")
        row_major = np.empty(64, np.int64)
        row_major[_ZIGZAG] = zigzag
        tables[number] = tuple(int(value) for value in row_major)
        at += 1 + 64 * width
    return tables


def jpeg_settings(
    stream: bytes | mmap.mmap, shared_tables: bytes | None = None, declared_rgb: bool = False
) -> JpegSettings | None:
    """Settings of a JPEG stream, read from its own header.

    Args:
        stream: The stream, or at least its header.
        shared_tables: TIFF's JPEGTables, when tables are kept apart from the streams.
        declared_rgb: The container says that the components are RGB (TIFF photometric 2); it decides only where
            neither an Adobe marker nor the component ids do, as in libjpeg.

    Returns:
        The settings, or None for a stream whose settings Pillow cannot repeat (not three components, unusual sampling).
    """
    tables: dict[int, tuple[int, ...]] = {}
    components: tuple[tuple[int, int, int, int], ...] = ()
    adobe: int | None = None
    jfif = False
    try:
        for marker, payload in _segments(shared_tables or b"") + _segments(stream):
            if marker == 0xDB:
                tables |= _tables(payload)
            elif marker in _FRAME_MARKERS:
                components = _frame(payload).components
            elif marker == 0xEE and payload[:5] == b"Adobe":
                adobe = payload[11]
            elif marker == 0xE0 and payload[:4] == b"JFIF":
                jfif = True
    except (IndexError, ValueError):
        return None
    sampling = [(across, down) for _, across, down, _ in components]
    if len(components) != 3 or sampling[1:] != [(1, 1)] * 2 or sampling[0] not in _SUBSAMPLING:
        return None
    if any(number not in tables for *_, number in components):
        return None
    named_rgb = tuple(name for name, *_ in components) == (82, 71, 66)
    rgb = adobe == 0 if adobe is not None else (named_rgb or (declared_rgb and not jfif))
    return JpegSettings(tuple(tables[number] for *_, number in components), _SUBSAMPLING[sampling[0]], rgb)


def jpeg_unsound(stream: bytes, header: bytes | None = None) -> str:
    """What breaks a JPEG stream, or "" when nothing does.

    libjpeg only warns of a stream that ends early or holds a stray marker, and makes up the pixels that follow. As
    OpenSlide, which stops at such warnings, this finds a stream cut short and overwritten by other data; changed
    bits that are still valid codes are not to be found: JPEG has no checksum.

    Args:
        stream: A whole stream; with ``header`` entropy-coded data alone (a restart interval of an NDPI).
        header: The header that the stream lacks.
    """
    at = 0
    if header is None:
        at = stream.find(b"\xff\xda")
        if at < 0:
            return "no scan in it"
        at += 2 + int.from_bytes(stream[at + 2 : at + 4])
    for place in _markers(stream, at):
        if place < at:
            continue  # inside the tables between two scans
        marker = stream[place + 1]
        if marker == 0xD9:
            return ""
        if marker not in _BETWEEN_SCANS:
            return f"marker {marker:#04x} at byte {place} of its data"
        at = place + 2 + int.from_bytes(stream[place + 2 : place + 4])
    return "" if header is not None else "it ends before its end marker"


def _markers(stream: bytes, first: int) -> Iterator[int]:
    """Where markers that do not belong into entropy-coded data stand, from byte ``first`` on."""
    data = np.frombuffer(stream, np.uint8)[first:]
    # Nearly every 0xFF is followed by a stuffed zero: numpy leaves these out, five times as fast as looking at each.
    followed = (data[:-1] == 0xFF) & (data[1:] != 0)
    at = 0
    while at < len(followed) and followed[at := at + int(followed[at:].argmax())]:  # argmax is 0 where there is none
        if stream[first + at + 1] not in _NO_MARKER:
            yield first + at
        at += 1


@cache
def _standard_tables(quality: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Luma and chroma tables that libjpeg makes for a quality: ITU T.81's Annex K, scaled."""
    base = jpeg_settings(bytes(imagecodecs.jpeg8_encode(np.zeros((8, 8, 3), np.uint8), level=50)))
    if base is None:
        raise AssertionError("a JPEG of our own cannot be read")
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    luma, chroma = (tuple(min(max((v * scale + 50) // 100, 1), 255) for v in table) for table in base.tables[:2])
    return luma, chroma


def encode_jpeg(tile: np.ndarray, settings: JpegSettings | None) -> bytes:
    """One RGB tile (px, px, 3) as JPEG: with ``settings``, or at quality 95 without subsampling."""
    if settings is None:
        return bytes(imagecodecs.jpeg8_encode(tile, level=FALLBACK_QUALITY, subsampling="444"))
    if settings.quality is not None:  # takes two thirds of the other way's time, for the same pixels
        space = "RGB" if settings.rgb else "YCBCR"
        sampling = settings.subsampling.replace(":", "")
        return bytes(imagecodecs.jpeg8_encode(tile, level=settings.quality, subsampling=sampling, outcolorspace=space))
    out = io.BytesIO()
    Image.fromarray(tile).save(
        out,
        "JPEG",
        qtables=[list(table) for table in settings.tables],
        subsampling=settings.subsampling,
        keep_rgb=settings.rgb,
    )
    return out.getvalue()


def encode(tile: np.ndarray, codec: str, settings: JpegSettings | None) -> bytes:
    """One tile as bytes of the store's inner codec."""
    if codec == "jpeg":
        return encode_jpeg(tile, settings)
    return bytes(imagecodecs.zstd_encode(np.ascontiguousarray(tile), level=ZSTD_LEVEL))


def decode_into(data: np.ndarray, codec: str, out: np.ndarray) -> None:
    """Bytes of the store's inner codec back to a tile, in place: ``out`` is uint8 and contiguous.

    Raises:
        DamageError: The bytes do not decode to that shape.
    """
    try:
        if codec == "jpeg":
            imagecodecs.jpeg8_decode(data, out=out)
            return
        size = len(imagecodecs.zstd_decode(data, out=memoryview(out).cast("B")))
    except (RuntimeError, ValueError) as error:
        raise DamageError(f"does not decode as {codec} ({error})") from error
    if size != out.size:
        raise DamageError(f"decodes to {size} bytes, expected {out.size}")


def zarr_codecs(codec: str) -> list[dict[str, Any]]:
    """The same codec in Zarr v3's words: what goes into the shard's metadata, crc32c included."""
    if codec == "jpeg":
        inner: list[dict[str, Any]] = [{"name": "imagecodecs_jpeg"}]
    elif codec == "zstd":
        inner = [
            {"name": "bytes"},
            {"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}},
        ]
    else:
        raise UsageError(f"codec {codec!r}, known are {', '.join(CODECS)}")
    return [*inner, {"name": "crc32c"}]
