import io
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tiling import codec
from tiling.errors import DamageError, UsageError
from tiling.phantom import make_slide


@pytest.fixture(scope="module")
def tissue() -> np.ndarray:
    """A piece of a made slide, 448 px square, 16-px aligned."""
    image = make_slide(1, "3", size=(512, 768)).image
    return np.ascontiguousarray(image[32:480, 160:608])


def jpeg(pixels: np.ndarray, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", **options)
    return out.getvalue()


def decoded(data: bytes, name: str, shape: tuple[int, ...]) -> np.ndarray:
    out = np.zeros(shape, np.uint8)
    codec.decode_into(np.frombuffer(data, np.uint8), name, out)
    return out


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((one.astype(np.float64) - other) ** 2)))


def scan_of(stream: bytes) -> int:
    """Where the entropy-coded data begins."""
    at = stream.index(b"\xff\xda")
    return at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")


CASES = [
    ({"subsampling": "4:2:0", "quality": 88}, "4:2:0", False),
    ({"subsampling": "4:2:2", "quality": 75}, "4:2:2", False),
    ({"subsampling": "4:4:4", "quality": 95}, "4:4:4", False),
    ({"subsampling": "4:4:4", "quality": 90, "keep_rgb": True}, "4:4:4", True),
    ({"subsampling": "4:2:0", "quality": 30, "progressive": True}, "4:2:0", False),
    ({"subsampling": "4:2:0", "qtables": [[n + 1 for n in range(64)], [64 - n for n in range(64)]]}, "4:2:0", False),
]


@pytest.mark.parametrize(("options", "subsampling", "rgb"), CASES)
def test_settings_are_the_streams_own(
    options: dict[str, object], subsampling: str, rgb: bool, tissue: np.ndarray
) -> None:
    stream = jpeg(tissue, **options)
    settings = codec.jpeg_settings(stream)
    assert settings is not None
    assert (settings.subsampling, settings.rgb) == (subsampling, rgb)
    with Image.open(io.BytesIO(stream)) as image:
        tables = [tuple(image.quantization[number]) for number in sorted(image.quantization)]
    want = (tables[0],) * 3 if len(tables) == 1 else (tables[0], tables[1], tables[1])
    assert settings.tables == want


@pytest.mark.parametrize(("options", "subsampling", "rgb"), CASES)
def test_encoding_again_keeps_the_pixels(
    options: dict[str, object], subsampling: str, rgb: bool, tissue: np.ndarray
) -> None:
    stream = jpeg(tissue, **options)
    source = imagecodecs.jpeg8_decode(stream)
    tile = np.ascontiguousarray(source[112:336, 112:336])
    settings = codec.jpeg_settings(stream)
    again = decoded(codec.encode(tile, "jpeg", settings), "jpeg", tile.shape)
    assert psnr(again, tile) >= 45
    assert psnr(again, tile) >= psnr(decoded(codec.encode(tile, "jpeg", None), "jpeg", tile.shape), tile)
    repeated = codec.jpeg_settings(codec.encode(tile, "jpeg", settings))
    assert repeated == settings


def test_tables_kept_apart_from_the_streams(tissue: np.ndarray) -> None:
    """TIFF's JPEGTables: the tables in a stream of their own, here cut out of a whole one."""
    stream = jpeg(tissue, quality=80)
    tables, rest, at = b"\xff\xd8", b"\xff\xd8", 2
    while stream[at + 1] != 0xDA:
        size = 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        piece = stream[at : at + size]
        tables, rest = (tables + piece, rest) if stream[at + 1] in (0xDB, 0xC4) else (tables, rest + piece)
        at += size
    rest, tables = rest + stream[at:], tables + b"\xff\xd9"
    assert codec.jpeg_settings(rest) is None
    assert codec.jpeg_settings(rest, tables) == codec.jpeg_settings(stream)
    assert not codec.jpeg_unsound(rest)


def test_who_decides_on_the_colour_space(tissue: np.ndarray) -> None:
    plain = jpeg(tissue)  # has a JFIF marker
    assert codec.jpeg_settings(plain, declared_rgb=True).rgb is False
    bare = plain[:2] + plain[20:]
    assert plain[2:4] == b"\xff\xe0"
    assert codec.jpeg_settings(bare).rgb is False
    assert codec.jpeg_settings(bare, declared_rgb=True).rgb is True


def test_streams_that_cannot_be_repeated(tissue: np.ndarray) -> None:
    assert codec.jpeg_settings(b"") is None
    assert codec.jpeg_settings(b"no JPEG at all") is None
    assert codec.jpeg_settings(jpeg(tissue[..., 0])) is None
    odd = bytearray(jpeg(tissue, subsampling="4:2:0"))
    frame = odd.index(b"\xff\xc0")
    odd[frame + 11] = 0x41  # 4:1 across: Pillow cannot
    assert codec.jpeg_settings(bytes(odd)) is None


@given(st.binary(max_size=300), st.integers(0, 600))
def test_any_bytes_are_read_without_fuss(junk: bytes, at: int) -> None:
    stream = jpeg(np.zeros((16, 16, 3), np.uint8))
    for data in (junk, b"\xff\xd8" + junk, stream[:at] + junk, stream[:at] + junk + stream[at:]):
        codec.jpeg_settings(data)
        assert isinstance(codec.jpeg_unsound(data), str)


@pytest.mark.parametrize(("options", "subsampling", "rgb"), CASES)
def test_sound_streams(options: dict[str, object], subsampling: str, rgb: bool, tissue: np.ndarray) -> None:
    stream = jpeg(tissue, **options)
    assert codec.jpeg_unsound(stream) == ""
    assert codec.jpeg_unsound(stream + b"\0" * 100) == ""
    assert codec.jpeg_unsound(stream[scan_of(stream) :], header=stream[: scan_of(stream)]) == ""
    restarts = jpeg(tissue, **options, restart_marker_blocks=4)
    assert codec.jpeg_unsound(restarts) == ""


@pytest.mark.parametrize(("options", "subsampling", "rgb"), CASES)
def test_unsound_streams(options: dict[str, object], subsampling: str, rgb: bool, tissue: np.ndarray) -> None:
    """What libjpeg would fill with made-up pixels."""
    stream = jpeg(tissue, **options)
    first = scan_of(stream)
    for length in np.linspace(first, len(stream) - 1, 20).astype(int):
        assert codec.jpeg_unsound(stream[:length])
    rng = np.random.default_rng(0)
    for at in rng.integers(first, len(stream) - 2100, 20):
        assert codec.jpeg_unsound(stream[:at] + rng.bytes(2048) + stream[at + 2048 :])


@pytest.mark.parametrize("name", codec.CODECS)
def test_roundtrip(name: str, tissue: np.ndarray) -> None:
    tile = np.ascontiguousarray(tissue[:224, :224])
    again = decoded(codec.encode(tile, name, None), name, tile.shape)
    assert again.shape == tile.shape
    assert np.array_equal(again, tile) if name == "zstd" else psnr(again, tile) > 35


@pytest.mark.parametrize("name", codec.CODECS)
@pytest.mark.parametrize("data", [b"", b"nonsense", b"\xff\xd8\xff\xd9"])
def test_bytes_that_do_not_decode(name: str, data: bytes) -> None:
    with pytest.raises(DamageError, match=f"does not decode as {name}|decodes to 0 bytes"):
        decoded(data, name, (16, 16, 3))


@pytest.mark.parametrize("name", codec.CODECS)
def test_bytes_of_another_shape(name: str) -> None:
    data = codec.encode(np.zeros((16, 16, 3), np.uint8), name, None)
    with pytest.raises(DamageError, match=r"shape=\(16, 16, 3\)|decodes to 768 bytes, expected 3072"):
        decoded(data, name, (32, 32, 3))


def test_unknown_codec() -> None:
    with pytest.raises(UsageError, match="codec 'webp', known are jpeg, zstd"):
        codec.zarr_codecs("webp")


def test_real_source_jpegs(shared_data: Path) -> None:
    for path in sorted((shared_data / "panda_gleason_tiles" / "tiles").rglob("*.jpeg"))[::200]:
        stream = path.read_bytes()
        source = imagecodecs.jpeg8_decode(stream)
        assert codec.jpeg_unsound(stream) == ""
        tile = np.ascontiguousarray(source[:224, :224])
        data = codec.encode(tile, "jpeg", codec.jpeg_settings(stream))
        assert psnr(decoded(data, "jpeg", tile.shape), tile) >= 45
        assert len(data) < 1.15 * len(stream)
