"""Every kind of file that can be made or had: its pixels, its scale, and what is refused."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from tiling.errors import SlideError
from tiling.phantom import make_slide
from tiling.slide import Slide, open_slide
from tiling.slide_image import ImageSlide
from tiling.slide_openslide import OpenSlideSlide
from tiling.slide_tiff import TiffSlide

Pixels = Callable[[Slide, int], np.ndarray]
SVS, NDPI = "wsi/CMU-1-Small-Region.svs", "wsi/test3-DAPI-2-387.ndpi"
RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (300, 410, 3), np.uint8)
APERIO = "Aperio Image Library v1\n410x300 [0,0 410x300] (256x256)|AppMag = 20|MPP = {mpp}|Patient = Doe^Jane"


@pytest.fixture(scope="module")
def tissue() -> np.ndarray:
    """Smooth pixels, which lossy codecs keep."""
    return make_slide(1, "3", size=(512, 768)).image


def through_openslide(path: Path, level: int) -> np.ndarray:
    with openslide.OpenSlide(path) as slide:
        return np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]))[..., :3]


def through_tifffile(path: Path, level: int) -> np.ndarray:
    with tifffile.TiffFile(path) as tiff:
        return np.asarray(tiff.series[0].levels[level].asarray())


@pytest.mark.slow
def test_every_level_of_all_real_slides_equals_openslide(shared_data: Path, level_pixels: Pixels) -> None:
    stitched = shared_data / "panda_stitched"
    files = [*sorted(stitched.rglob("*.tiff")), shared_data / SVS, shared_data / NDPI]
    assert len(files) == 26
    for path in files:
        with open_slide(path) as slide:
            assert isinstance(slide, TiffSlide)
            for level in slide.levels:
                assert np.array_equal(level_pixels(slide, level.index), through_openslide(path, level.index)), path


@pytest.mark.parametrize(
    ("compression", "predictor"),
    [(name, False) for name in (None, "lzw", "deflate", "zstd", "packbits")]
    + [(name, True) for name in ("lzw", "deflate", "zstd")],  # what has no dictionary has no predictor
)
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("layout", [{"tile": (128, 128)}, {"rowsperstrip": 25}])
def test_lossless_tiffs(
    compression: str | None,
    predictor: bool,
    planar: str,
    layout: dict[str, object],
    tmp_path: Path,
    level_pixels: Pixels,
) -> None:
    path = tmp_path / "made.tif"
    pixels = NOISE if planar == "contig" else np.ascontiguousarray(NOISE.transpose(2, 0, 1))
    options = {"photometric": "rgb", "planarconfig": planar, "compression": compression, "predictor": predictor}
    tifffile.imwrite(path, pixels, **options, **layout, resolution=(20000, 20000), resolutionunit="CENTIMETER")
    with open_slide(path) as slide:
        assert isinstance(slide, TiffSlide)
        assert slide.mpp == pytest.approx(0.5)
        assert np.array_equal(level_pixels(slide, 0), NOISE)
        sizes = slide.compressed_sizes(0)
    with tifffile.TiffFile(path) as tiff:
        assert sizes.dtype == np.int64
        assert sizes.sum() == sum(tiff.pages[0].databytecounts)


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("subifds", [False, True])
def test_pyramids(big: bool, order: str, subifds: bool, tmp_path: Path, level_pixels: Pixels) -> None:
    path, options = tmp_path / "made.tif", {"photometric": "rgb", "tile": (64, 64), "compression": "zlib"}
    reduced = [NOISE[::2, ::2], NOISE[::4, ::4]]
    with tifffile.TiffWriter(path, bigtiff=big, byteorder=order) as tiff:
        tiff.write(NOISE, **options, subifds=2 if subifds else None, metadata=None)
        for pixels in reduced:
            tiff.write(pixels, **options, subfiletype=1, metadata=None)
    with open_slide(path) as slide:
        assert [(level.width, level.height) for level in slide.levels] == [(410, 300), (205, 150), (103, 75)]
        for level, pixels in enumerate([NOISE, *reduced]):
            assert np.array_equal(level_pixels(slide, level), pixels)


@pytest.mark.parametrize(("unit", "factor"), [("µm", 1.0), ("nm", 1000.0), ("mm", 0.001), (None, 1.0)])
def test_ome_pyramid_and_its_scale(unit: str | None, factor: float, tmp_path: Path, level_pixels: Pixels) -> None:
    path = tmp_path / "made.ome.tif"
    metadata: dict[str, object] = {"axes": "YXS", "PhysicalSizeX": 0.25 * factor, "PhysicalSizeY": 0.2501 * factor}
    if unit:
        metadata |= {"PhysicalSizeXUnit": unit, "PhysicalSizeYUnit": unit}
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(NOISE, photometric="rgb", tile=(64, 64), subifds=1, metadata=metadata)
        tiff.write(NOISE[::2, ::2], photometric="rgb", tile=(64, 64), subfiletype=1)
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx(0.25005)
        assert slide.stated_mpp == pytest.approx((0.25, 0.2501))
        assert len(slide.levels) == 2
        assert np.array_equal(level_pixels(slide, 1), NOISE[::2, ::2])


@pytest.mark.parametrize(
    ("subsampling", "colours"), [("444", "rgb"), ("444", "ycbcr"), ("422", "ycbcr"), ("420", "ycbcr")]
)
def test_jpeg_tiffs(subsampling: str, colours: str, tissue: np.ndarray, tmp_path: Path, level_pixels: Pixels) -> None:
    path = tmp_path / "made.tif"
    sampling = (1 + (subsampling != "444"), 1 + (subsampling == "420"))
    tifffile.imwrite(
        path, tissue, photometric="rgb", tile=(256, 256), compression="jpeg", subsampling=sampling,
        compressionargs={"level": 90} | ({"outcolorspace": "rgb"} if colours == "rgb" else {}),
    )  # fmt: skip
    with open_slide(path) as slide:
        pixels = level_pixels(slide, 0)
    assert np.array_equal(pixels, through_tifffile(path, 0))
    assert np.array_equal(pixels, through_openslide(path, 0))
    assert np.abs(pixels.astype(int) - tissue).mean() < 3


@pytest.mark.parametrize("compression", [33003, 33005])
def test_svs_with_jpeg_2000(compression: int, tissue: np.ndarray, tmp_path: Path, level_pixels: Pixels) -> None:
    path = tmp_path / "made.svs"
    grid = [tissue[y : y + 256, x : x + 256] for y in (0, 256) for x in (0, 256, 512)]
    # Aperio's 33003 holds Y, Cb, Cr without a transform that its stream knows of.
    tiles = [np.asarray(Image.fromarray(tile).convert("YCbCr")) if compression == 33003 else tile for tile in grid]
    streams = [imagecodecs.jpeg2k_encode(tile, level=40, codecformat="j2k", mct=compression == 33005) for tile in tiles]
    tifffile.imwrite(
        path,
        iter(streams),
        shape=tissue.shape, dtype=np.uint8, photometric="rgb", tile=(256, 256), compression=compression,
        description=APERIO.format(mpp=0.25), metadata=None,
    )  # fmt: skip
    with open_slide(path) as slide:
        assert isinstance(slide, OpenSlideSlide if compression == 33003 else TiffSlide)
        assert slide.mpp == 0.25
        pixels = level_pixels(slide, 0)
    assert np.array_equal(pixels, through_openslide(path, 0))
    assert np.abs(pixels.astype(int) - tissue).mean() < 3


def test_grey_and_transparent_pixels_become_rgb(tmp_path: Path, level_pixels: Pixels) -> None:
    grey = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)
    for photometric, want in (("minisblack", grey), ("miniswhite", 255 - grey)):
        tifffile.imwrite(tmp_path / "grey.tiff", grey, tile=(32, 32), photometric=photometric)
        with open_slide(tmp_path / "grey.tiff") as slide:
            assert np.array_equal(level_pixels(slide, 0), np.repeat(want[..., None], 3, 2))
    rgba = RNG.integers(0, 200, (48, 64, 4), np.uint8)
    rgba[:20, :, 3], rgba[20:, :, 3] = 0, 255
    Image.fromarray(rgba).save(tmp_path / "clear.png")
    tifffile.imwrite(tmp_path / "clear.tiff", rgba, tile=(16, 16), photometric="rgb", extrasamples=["unassalpha"])
    Image.fromarray(rgba[..., [0, 3]]).save(tmp_path / "grey_alpha.png")
    for name in ("clear.png", "clear.tiff", "grey_alpha.png"):
        with open_slide(tmp_path / name) as slide:
            pixels = level_pixels(slide, 0)
        assert (pixels[:20] == 255).all()
        want = rgba[20:, :, :3] if name != "grey_alpha.png" else rgba[20:, :, [0, 0, 0]]
        assert np.array_equal(pixels[20:], want)


@pytest.mark.parametrize(
    ("array", "options", "complaint"),
    [
        (np.zeros((64, 64, 3), np.uint16), {"photometric": "rgb"}, "pixels are uint16 x 3, 8-bit grey, RGB or RGBA"),
        (np.zeros((64, 64), np.float32), {}, "pixels are float32 x 1"),
        (np.zeros((64, 64), bool), {}, "pixels are bool x 1"),
        (np.zeros((5, 64, 64), np.uint8), {"photometric": "minisblack"}, "several planes"),
        (np.zeros((64, 64, 3), np.uint8), {"photometric": "rgb", "compression": "webp"}, "compression WEBP is not"),
    ],
)  # fmt: skip
def test_what_is_refused(array: np.ndarray, options: dict[str, str], complaint: str, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "odd.tiff", array, tile=(16, 16), **options)
    with pytest.raises(SlideError, match=complaint):
        open_slide(tmp_path / "odd.tiff")


def test_colours_that_are_not_rgb(tmp_path: Path) -> None:
    """CMYK is read through OpenSlide where that can, in tiles; a palette is never taken for grey."""
    path, inks = tmp_path / "odd.tiff", np.full((64, 64, 4), 7, np.uint8)
    tifffile.imwrite(path, inks, tile=(16, 16), photometric="separated")
    with open_slide(path) as slide:
        assert isinstance(slide, OpenSlideSlide)
        assert (slide.read_segment(0, 0) == 241).all()
    tifffile.imwrite(path, inks, photometric="separated")
    with pytest.raises(SlideError, match=r"odd\.tiff: colours are SEPARATED; grey, RGB and YCbCr are read"):
        open_slide(path)
    colours = np.full((3, 256), 40 << 8, np.uint16)
    tifffile.imwrite(path, inks[..., 0], tile=(16, 16), photometric="palette", colormap=colours)
    with pytest.raises(SlideError, match=r"odd\.tiff: colours are PALETTE"):
        open_slide(path)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_plain_jpeg(progressive: bool, tissue: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    Image.fromarray(tissue).save(path, quality=90, progressive=progressive, comment="by hand")
    with open_slide(path) as slide, Image.open(path) as image:
        assert isinstance(slide, ImageSlide)
        assert slide.mpp is None
        assert slide.compressed_sizes(0).tolist() == [path.stat().st_size]
        pixels = slide.read_segment(0, 0)
        assert np.array_equal(pixels, np.asarray(image))
        slide.overview()
        assert slide.read_segment(0, 0) is pixels  # decoded once
    whole = path.read_bytes()
    for share in (0.5, 0.9, 0.99):
        path.write_bytes(whole[: int(len(whole) * share)])
        with open_slide(path) as slide, pytest.raises(SlideError, match="image is damaged: it ends before its end"):
            slide.read_segment(0, 0)
    path.write_bytes(whole[: len(whole) // 2] + np.random.default_rng(0).bytes(1024) + whole[len(whole) // 2 + 1024 :])
    with open_slide(path) as slide, pytest.raises(SlideError, match="image "):
        slide.read_segment(0, 0)


def test_plain_images_that_are_refused(tmp_path: Path) -> None:
    Image.new("CMYK", (32, 32)).save(tmp_path / "cmyk.jpg")
    with pytest.raises(SlideError, match="image has 4 components of 8 bits; 8-bit grey or RGB JPEG is read"):
        open_slide(tmp_path / "cmyk.jpg")
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(SlideError, match="image has 16 bits per sample, 8 are read; save it with 8 bits"):
        open_slide(tmp_path / "deep.png")
    Image.fromarray(NOISE[:64, :64]).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:6000])
    with open_slide(tmp_path / "cut.png") as slide, pytest.raises(SlideError, match=r"cut\.png: image does not decode"):
        slide.read_segment(0, 0)
    # Named by its bytes, not by its suffix.
    Image.fromarray(NOISE).save(tmp_path / "named.jpg", "PNG")
    with open_slide(tmp_path / "named.jpg") as slide:
        assert np.array_equal(slide.read_segment(0, 0), NOISE)


def test_a_segment_that_is_left_out_is_background(tissue: np.ndarray, tmp_path: Path, level_pixels: Pixels) -> None:
    path = tmp_path / "sparse.tif"
    tiles = [tissue[:256, :256], None, tissue[:256, 512:], None, None, None]
    jpegs = [b"" if tile is None else bytes(imagecodecs.jpeg8_encode(tile, level=95)) for tile in tiles]
    tifffile.imwrite(
        path, iter(jpegs), shape=tissue.shape, dtype=np.uint8, photometric="ycbcr", subsampling=(2, 2),
        tile=(256, 256), compression="jpeg",
    )  # fmt: skip
    with open_slide(path) as slide:
        assert (slide.compressed_sizes(0) == 0).tolist() == [tile is None for tile in tiles]
        pixels, (overview, unknown) = level_pixels(slide, 0), slide.overview()
    assert np.abs(pixels[:256, 512:].astype(int) - tissue[:256, 512:]).mean() < 3
    assert (pixels[256:] == 255).all()
    assert overview.shape == (64, 96, 3)
    assert (overview[32:] == 255).all()
    assert (overview[:32, :32] != 255).any()
    assert not unknown.any()


def test_an_unknown_suffix_is_asked_of_openslide(shared_data: Path, tmp_path: Path) -> None:
    path = shutil.copyfile(shared_data / SVS, tmp_path / "slide.dat")
    with open_slide(path) as slide:
        assert isinstance(slide, TiffSlide)
        assert slide.mpp == 0.499
    (tmp_path / "text.dat").write_text("no slide at all\n" * 99)
    with pytest.raises(SlideError, match=r"not a slide: OpenSlide knows no format like it; slides end in \.bif"):
        open_slide(tmp_path / "text.dat")


def ranges_of(path: Path, others: slice) -> list[tuple[int, int]]:
    """First and last byte of the images of a file that are no levels."""
    with tifffile.TiffFile(path) as tiff:
        pages = [page for series in tiff.series[others] for page in series.pages]
        return [
            (at, at + size) for page in pages for at, size in zip(page.dataoffsets, page.databytecounts, strict=True)
        ]


@pytest.mark.parametrize("name", [SVS, NDPI])
def test_label_and_macro_are_never_read(
    name: str, shared_data: Path, tmp_path: Path, level_pixels: Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shutil.copyfile(shared_data / name, tmp_path / Path(name).name)
    data, private = bytearray(path.read_bytes()), ranges_of(path, slice(1, None))
    assert private
    for first, last in private:
        data[first:last] = np.random.default_rng(first).bytes(last - first)
    path.write_bytes(data)
    read: list[tuple[int, int]] = []
    pread, file_read = os.pread, tifffile.FileHandle.read

    def traced_pread(file: int, size: int, at: int) -> bytes:
        read.append((at, at + size))
        return bytes(pread(file, size, at))

    def traced_read(self: tifffile.FileHandle, size: int = -1, /) -> bytes:
        read.append((self.tell(), self.tell() + size))
        return bytes(file_read(self, size))

    monkeypatch.setattr("os.pread", traced_pread)
    monkeypatch.setattr(tifffile.FileHandle, "read", traced_read)
    with open_slide(path) as slide, open_slide(shared_data / name) as sound:
        assert slide.levels == sound.levels
        for level in slide.levels:
            assert np.array_equal(level_pixels(slide, level.index), level_pixels(sound, level.index))
        assert np.array_equal(slide.overview()[0], sound.overview()[0])
        assert slide.jpeg(0) == sound.jpeg(0)
    assert len(read) > 100
    assert not [(a, b) for a, b in read for first, last in private if a < last and first < b]


def test_nothing_of_the_header_is_quoted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A description may name a patient: no error and no log says a word of it, whatever is broken."""
    path = tmp_path / "made.svs"
    tifffile.imwrite(
        path, NOISE, photometric="rgb", tile=(256, 256), compression="jpeg", description=APERIO.format(mpp=0.25),
        metadata=None, software="Doe^Jane", extratags=[(65000, 2, 0, "Doe^Jane", True)],
    )  # fmt: skip
    whole, said = path.read_bytes(), []
    rng = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole)
        for at in rng.integers(0, min(len(data), 1500), 4):
            data[at] = rng.integers(256)
        path.write_bytes(data)
        try:
            with open_slide(path) as slide:
                slide.overview()
                assert slide.mpp is None or slide.mpp
                for number in range(slide.segment_grid(0).rows):
                    slide.read_segment(0, number)
        except SlideError as error:
            said.append(str(error))
    assert len(said) > 30
    assert not [text for text in [*said, caplog.text] if "Doe" in text or "Jane" in text or "Aperio" in text]


def test_the_overview_of_one_level_is_an_eighth(shared_data: Path, level_pixels: Pixels) -> None:
    """A block's mean is what its area mean is, in the colours of the whole decode."""
    with open_slide(shared_data / SVS) as slide:
        small, unknown = slide.overview()
        whole, _ = Slide.overview(slide)
        assert small.shape == (371, 278, 3)
    assert not unknown.any()
    assert np.abs(small[:370, :277].mean((0, 1)) - whole[:740, :554].mean((0, 1))).max() < 1
    close = small[:370, :277].astype(int) - whole[:740, :554].reshape(370, 2, 277, 2, 3).mean((1, 3))
    assert np.abs(close).mean() < 6
