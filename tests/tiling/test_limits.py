"""Bombs, made for real: each is refused from its header, fast and without memory, by the limit that it breaks."""

import struct
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st

from tiling.errors import SlideError
from tiling.limits import DEFAULT_LIMITS, Limits
from tiling.slide import open_slide

REFUSED_WITHIN_S = 1.0


def refused(path: Path, limits: Limits = DEFAULT_LIMITS) -> str:
    """The one line with which a file is refused; it must not take time."""
    start = time.process_time()
    with pytest.raises(SlideError) as raised:
        open_slide(path, limits=limits)
    assert time.process_time() - start < REFUSED_WITHIN_S
    assert "\n" not in str(raised.value)
    return str(raised.value)


def page(at: int, tags: dict[int, tuple[int, int, int]], following: int) -> bytes:
    """An IFD of a classic little-endian TIFF; tags are code -> (type, count, value or offset)."""
    rows = b"".join(struct.pack("<HHII", code, *row) for code, row in sorted(tags.items()))
    del at
    return struct.pack("<H", len(tags)) + rows + struct.pack("<I", following)


def image_tags(width: int, height: int, tile: int, count: int, table: int) -> dict[int, tuple[int, int, int]]:
    """Tags of an 8-bit grey deflate page whose offsets and byte counts lie at ``table``."""
    return {
        256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, 8), 259: (3, 1, 8), 262: (3, 1, 1), 277: (3, 1, 1),
        322: (4, 1, tile), 323: (4, 1, tile), 324: (4, count, table), 325: (4, count, table + 4 * count),
    }  # fmt: skip


def deflate_bomb(path: Path, width: int, tile: int, samples: int = 3) -> None:
    """A tiled TIFF whose tiles are all the same few bytes: zeros, deflated as hard as may be."""
    data = zlib.compress(bytes(tile * tile * samples), 9)
    tiles = (-(-width // tile)) ** 2
    tifffile.imwrite(
        path, iter([data] * tiles), shape=(width, width, samples), dtype=np.uint8, photometric="rgb",
        tile=(tile, tile), compression="deflate", metadata=None,
    )  # fmt: skip


def test_five_megabytes_that_claim_five_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "bomb.tiff"
    deflate_bomb(path, 41_000, 512)
    assert path.stat().st_size < 6e6
    said = refused(path)
    assert "decoded bytes" in said
    assert "limit is 512 times beyond 1,073,741,824; raise it with --max-ratio" in said
    # A mask's few values compress without bound: who knows what the file is may say so.
    with open_slide(path, limits=replace(DEFAULT_LIMITS, ratio=2000)) as slide:
        assert not slide.read_segment(0, 7).any()


def test_a_white_jpeg_slide_of_60000_px_is_no_bomb(tmp_path: Path) -> None:
    path = tmp_path / "white.tiff"
    white = imagecodecs.jpeg8_encode(np.full((512, 512, 3), 255, np.uint8), level=80, subsampling="420")
    tiles = 118 * 118
    tifffile.imwrite(
        path, iter([bytes(white)] * tiles), shape=(60_000, 60_000, 3), dtype=np.uint8, photometric="ycbcr",
        subsampling=(2, 2), tile=(512, 512), compression="jpeg", metadata=None,
    )  # fmt: skip
    with open_slide(path) as slide:
        assert slide.read_segment(0, 13_000).min() >= 250


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("pages", 2, "claims 3 pages, limit is 2; raise it with --max-pages"),
        ("segments", 11, "claims 12 segments on a level, limit is 11; raise it with --max-segments"),
        ("level_pixels", 200 * 150 - 1, r"claims 30,000 px on a level (200 x 150), limit is 29,999; raise it with"),
        ("segment_pixels", 64 * 64 - 1, r"claims 4,096 px in a segment (64 x 64), limit is 4,095; raise it with"),
        ("total_bytes", 39_374 * 3, "claims 118,125 decoded bytes, limit is 118,122; raise it with --max-total-bytes"),
    ],
)
def test_each_limit_is_what_it_says(field: str, value: int, said: str, tmp_path: Path) -> None:
    path, pixels = tmp_path / "slide.tiff", np.random.default_rng(0).integers(0, 256, (150, 200, 3), np.uint8)
    with tifffile.TiffWriter(path) as tiff:
        for step in (1, 2, 4):
            tiff.write(pixels[::step, ::step], photometric="rgb", tile=(64, 64), compression="zlib", metadata=None)
    exact = replace(DEFAULT_LIMITS, **{field: value + 1})
    if field == "total_bytes":
        exact = replace(DEFAULT_LIMITS, total_bytes=118_125 + 3 * 38 * 50)
    with open_slide(path, limits=exact) as slide:
        assert len(slide.levels) == 3
    text = refused(path, replace(DEFAULT_LIMITS, **{field: value}))
    if field != "total_bytes":
        assert said in text
    assert "decoded bytes" in text or field != "total_bytes"


@pytest.mark.parametrize("name", ["circle.tiff", "circle.ndpi"])
def test_pages_in_a_circle(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    tags = image_tags(16, 16, 16, 1, 8)
    if name.endswith(".ndpi"):
        path.write_bytes(b"II*\0" + struct.pack("<Q", 12) + struct.pack("<HQ", 0, 12))
    else:
        path.write_bytes(b"II*\0" + struct.pack("<I", 8) + page(8, tags, 8))
    assert "list of pages runs in a circle: it comes back to byte" in refused(path)


def test_subpages_in_a_circle(tmp_path: Path) -> None:
    path = tmp_path / "circle.tiff"
    path.write_bytes(b"II*\0" + struct.pack("<I", 8) + page(8, image_tags(16, 16, 16, 1, 8) | {330: (4, 1, 8)}, 0))
    assert "list of pages runs in a circle: it comes back to byte 8" in refused(path)


def test_too_many_pages(tmp_path: Path) -> None:
    path = tmp_path / "pages.tiff"
    one = len(page(0, {}, 0))
    path.write_bytes(b"II*\0" + struct.pack("<I", 8) + b"".join(page(0, {}, 8 + (n + 1) * one) for n in range(100_000)))
    assert "claims 1,025 pages, limit is 1,024; raise it with --max-pages" in refused(path)


def test_tiles_of_one_pixel(tmp_path: Path) -> None:
    path, count = tmp_path / "tiny.tiff", 3000 * 3000
    tags = image_tags(3000, 3000, 1, count, 8)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8) + page(8, tags, 0) + bytes(1000))
    assert "claims 9,000,000 segments on a level, limit is 4,194,304" in refused(path)
    # The tags lie about the count: what the level needs counts as well.
    tags |= {324: (4, 1, 8), 325: (4, 1, 8)}
    path.write_bytes(b"II*\0" + struct.pack("<I", 8) + page(8, tags, 0) + bytes(1000))
    assert "claims 9,000,000 segments on a level, limit is 4,194,304" in refused(path)


@pytest.mark.parametrize(
    ("width", "tile", "said"), [(1 << 20, 1 << 14, "px on a level"), (1 << 17, 1 << 15, "px in a segment")]
)
def test_claims_of_size(width: int, tile: int, said: str, tmp_path: Path) -> None:
    path = tmp_path / "large.tiff"
    path.write_bytes(b"II*\0" + struct.pack("<I", 8) + page(8, image_tags(width, width, tile, 1, 8), 0) + bytes(99))
    assert said in refused(path)


def test_a_png_that_claims_too_much(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + bytes(99)
    )
    assert "claims 3,600,000,000 px in a segment (60000 x 60000), limit is 536,870,912" in refused(path)
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + bytes(99)
    )
    assert "times the file's" in refused(path)


def bombs(tile: int) -> dict[str, tuple[object, bytes]]:
    """Segments that hold 4,096 times what their page says, by compression."""
    large = np.zeros((tile * 64, tile * 64, 3), np.uint8)
    return {
        "deflate": ("deflate", zlib.compress(large.tobytes(), 9)),
        "lzw": ("lzw", bytes(imagecodecs.lzw_encode(large.tobytes()))),
        "zstd": ("zstd", bytes(imagecodecs.zstd_encode(large.tobytes()))),
        "jpeg": ("jpeg", bytes(imagecodecs.jpeg8_encode(large, level=50))),
        "jpeg2000": (33005, bytes(imagecodecs.jpeg2k_encode(large[: tile * 8, : tile * 8], codecformat="j2k"))),
    }


PEAK = """
import resource, sys
from pathlib import Path
from tiling.errors import SlideError
from tiling.slide import open_slide
with open_slide(Path(sys.argv[1])) as slide:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        shape = slide.read_segment(0, 0).shape
    except SlideError as error:
        shape = str(error)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, shape)
"""


@pytest.mark.parametrize("kind", ["deflate", "lzw", "zstd", "jpeg", "jpeg2000"])
def test_a_segment_never_decodes_to_more_than_its_page_says(kind: str, tmp_path: Path) -> None:
    path, tile = tmp_path / "bomb.tiff", 64
    compression, data = bombs(tile)[kind]
    tifffile.imwrite(
        path, iter([data]), shape=(tile, tile, 3), dtype=np.uint8, photometric="rgb", tile=(tile, tile),
        compression=compression, metadata=None,
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", PEAK, path], capture_output=True, text=True, check=True)
    grown, said = done.stdout.split(maxsplit=1)
    assert int(grown) < 20_000  # KiB; the whole is 49,152
    assert "(64, 64, 3)" in said if kind == "lzw" else "segment 0 of level 0" in said


@given(st.binary(max_size=400), st.booleans())
def test_any_bytes_after_the_magic_are_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes, big: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "junk.tiff"
    path.write_bytes((b"II+\0\x08\0\0\0" if big else b"II*\0") + junk)
    with pytest.raises(SlideError):
        open_slide(path)
