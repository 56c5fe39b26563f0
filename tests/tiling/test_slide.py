import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile

from tiling.cut import cut_slide, plan_slide
from tiling.errors import SlideError
from tiling.grid import to_level0
from tiling.settings import TileSettings
from tiling.slide import Slide, open_slide
from tiling.slide_openslide import OpenSlideSlide
from tiling.slide_tiff import TiffSlide

Pixels = Callable[[Slide, int], np.ndarray]
Spoil = Callable[..., tuple[int, int, int, int]]
SVS, NDPI = "wsi/CMU-1-Small-Region.svs", "wsi/test3-DAPI-2-387.ndpi"


def of_openslide(path: Path, size: tuple[int, int]) -> np.ndarray:
    """The level of that size, as OpenSlide reads it."""
    with openslide.OpenSlide(path) as slide:
        level = slide.level_dimensions.index(size)
        return np.asarray(slide.read_region((0, 0), level, size))[..., :3]


def image_of(cohort: Path) -> Path:
    return sorted((cohort / "train_images").iterdir())[0]


def slide_paths(data: Path) -> list[Path]:
    stitched = data / "panda_stitched"
    images = sorted((stitched / "train_images").iterdir(), key=lambda path: path.stat().st_size)[:4]
    masks = sorted((stitched / "train_label_masks").iterdir())[:2]
    return [*images, *masks, data / SVS, data / NDPI]


def test_made_slides_equal_openslide(cohort: Path, level_pixels: Pixels) -> None:
    for path in sorted((cohort / "train_images").iterdir()):
        with open_slide(path) as slide:
            assert slide.mpp == pytest.approx(0.5)
            assert [(level.width, level.height) for level in slide.levels] == [(1536, 1024), (384, 256), (96, 64)]
            for level in slide.levels:
                theirs = of_openslide(path, (level.width, level.height))
                assert np.array_equal(level_pixels(slide, level.index), theirs)


def test_what_the_real_slides_say(shared_data: Path) -> None:
    with open_slide(shared_data / SVS) as slide:
        assert slide.mpp == 0.499
        jpeg = slide.jpeg(0)
        assert jpeg is not None
        assert (jpeg.subsampling, jpeg.rgb) == ("4:4:4", True)
    with open_slide(shared_data / NDPI) as slide:
        assert slide.mpp == pytest.approx(0.22817, abs=1e-4)
        assert [level.downsample for level in slide.levels] == [1, 2, 4, 8]
    with open_slide(slide_paths(shared_data)[0]) as slide:
        assert slide.mpp == pytest.approx(0.5)
        assert [level.downsample for level in slide.levels] == [1, 4, 16]
        assert slide.jpeg(0).subsampling == "4:2:0"


def test_openslide_gives_the_same_pixels(shared_data: Path, level_pixels: Pixels) -> None:
    with TiffSlide(shared_data / SVS) as ours, OpenSlideSlide(shared_data / SVS) as theirs:
        assert ours.levels == theirs.levels
        assert ours.mpp == theirs.mpp
        assert np.array_equal(level_pixels(ours, 0), level_pixels(theirs, 0))
        overview, unknown = theirs.overview()
        assert not unknown.any()
        assert overview.shape == (742, 555, 3)
        assert theirs.jpeg(0) is None


def test_openslide_goes_on_after_a_broken_block(shared_data: Path, tmp_path: Path, spoil: Spoil) -> None:
    path = shutil.copyfile(shared_data / SVS, tmp_path / "broken.svs")
    x0, y0, _, _ = spoil(path, 57)
    with OpenSlideSlide(path) as slide, OpenSlideSlide(shared_data / SVS) as sound:
        grid = slide.segment_grid(0)
        broken, said = [], []
        for number in range(grid.rows * grid.columns):
            try:
                assert np.array_equal(slide.read_segment(0, number), sound.read_segment(0, number))
            except SlideError as error:
                broken.append(number)
                said.append(str(error))
    assert broken
    for number, text in zip(broken, said, strict=True):
        assert f"broken.svs: block {number} of level 0 does not decode" in text
    assert set(broken) <= set(grid.under(x0, y0, 240))


def test_slide_mpp_overrides_the_file(cohort: Path) -> None:
    with open_slide(image_of(cohort), 0.25) as slide:
        assert slide.mpp == 0.25


def with_resolution(path: Path, along_x: float, along_y: float, unit: str = "CENTIMETER", **options: object) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    tifffile.imwrite(
        path, pixels, photometric="rgb", tile=(32, 32), resolution=(along_x, along_y), resolutionunit=unit, **options
    )
    return path


@pytest.mark.parametrize(
    ("along_x", "along_y", "unit", "said"),
    [
        (20000, 25000, "CENTIMETER", r"pixels are not square: 0\.5 x 0\.4 um"),
        (72, 72, "INCH", r"its header says 352\.8 x 352\.8 um/px, 0\.05 to 10 is believed"),
        (1e9, 1e9, "CENTIMETER", r"its header says 1e-05 x 1e-05 um/px"),
    ],
)
def test_a_scale_that_is_not_believed(along_x: float, along_y: float, unit: str, said: str, tmp_path: Path) -> None:
    path = with_resolution(tmp_path / "odd.tiff", along_x, along_y, unit)
    with open_slide(path) as slide:  # a mask's scale does not matter
        assert slide.stated_mpp is not None
        with pytest.raises(SlideError, match=rf"odd\.tiff: {said}.*; give the true scale with --slide-mpp"):
            _ = slide.mpp
        with pytest.raises(SlideError, match="--slide-mpp"):
            plan_slide(slide, TileSettings(tile_px=32))
    with open_slide(path, 0.5) as slide:
        assert slide.mpp == 0.5


@pytest.mark.parametrize("stated", ["nonsense", "", "0,25", "nan"])
def test_a_scale_that_is_no_number(stated: str, tmp_path: Path) -> None:
    description = f"Aperio Image Library v1\n64x64|MPP = {stated}|AppMag = 20"
    path = with_resolution(tmp_path / "odd.svs", 1, 1, "NONE", description=description, metadata=None)
    with open_slide(path, 0.25) as slide:
        assert slide.mpp == 0.25
    if stated != "0,25":
        with open_slide(path) as slide:
            assert slide.mpp is None


def test_nearly_square_pixels_have_the_mean(tmp_path: Path) -> None:
    with open_slide(with_resolution(tmp_path / "near.tiff", 20000, 20100)) as slide:
        assert slide.mpp == pytest.approx((0.5 + 1e4 / 20100) / 2)


def test_a_crooked_pyramid_keeps_its_axes_apart(tmp_path: Path) -> None:
    """Writers round the size of a level; what is left over differs along x and y."""
    path, options = tmp_path / "crooked.tiff", {"photometric": "rgb", "tile": (64, 64), "metadata": None}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(np.zeros((203, 1601, 3), np.uint8), **options)
        tiff.write(np.zeros((50, 400, 3), np.uint8), subfiletype=1, **options)
    with open_slide(path) as slide, openslide.OpenSlide(path) as theirs:
        level = slide.levels[1]
        assert level.downsample == pytest.approx(theirs.level_downsamples[1])
        assert level.downsample_xy == (1601 / 400, 203 / 50)
        assert to_level0(np.array([[400, 50]]), level).tolist() == [[1601, 203]]


@pytest.mark.parametrize("suffix", [".tiff", ".svs", ".ndpi", ".jpg", ".png", ".mrxs"])
@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"", "file is empty (0 bytes); copy it again"), (b"image_id,isup_grade\n" * 40, ""), (b"II*\0", "")],
)
def test_no_slide_at_all(suffix: str, content: bytes, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / f"some slide{suffix}"
    path.write_bytes(content)
    with pytest.raises(SlideError) as raised:
        open_slide(path)
    assert str(raised.value).startswith(f"{path}: {complaint}")
    assert "\n" not in str(raised.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SlideError, match=r"gone\.svs: no such file$"):
        open_slide(tmp_path / "gone.svs")


@pytest.mark.parametrize("name", ["panda_stitched/train_images/296c0eebe031a2dfa58e2921f74354dd.tiff", SVS, NDPI])
def test_cut_short(name: str, shared_data: Path, tmp_path: Path) -> None:
    """Wherever a file is cut: refused with its path, or nothing is lost (label and macro may lie at the end)."""
    whole = (shared_data / name).read_bytes()
    path = tmp_path / f"cut{Path(name).suffix}"
    with open_slide(shared_data / name) as slide:
        levels = slide.levels
    with tifffile.TiffFile(shared_data / name) as tiff:
        pages = [level.keyframe for level in tiff.series[0].levels]
        ends = [at + size for page in pages for at, size in zip(page.dataoffsets, page.databytecounts, strict=True)]
    said = []
    for length in [*range(1, len(whole), len(whole) // 61), max(ends) - 1, len(whole) - 1]:
        path.write_bytes(whole[:length])
        try:
            with open_slide(path) as slide:
                assert slide.levels == levels
                assert length >= max(ends)
        except SlideError as error:
            said.append(str(error))
    assert len(said) >= 40
    assert all(text.startswith(f"{path}: ") and "\n" not in text for text in said)


def test_cut_short_says_so(cohort: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = image_of(cohort).read_bytes()
    path = tmp_path / "cut.tiff"
    path.write_bytes(data[:-100])
    with pytest.raises(SlideError) as raised:
        open_slide(path)
    size = len(data) - 100
    assert str(raised.value) == (
        f"{path}: file is cut: its segments reach to byte {len(data)}, it has {size}; copy it again from its source"
    )
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(SlideError, match=rf"list of pages does not end: it goes on at byte \d+ of {len(data) // 2}; "):
        open_slide(path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("count", [None, 1024])
def test_a_broken_segment_raises(count: int | None, own_cohort: Path, spoil: Spoil, level_pixels: Pixels) -> None:
    path = image_of(own_cohort)
    with open_slide(path) as slide:
        sound = level_pixels(slide, 0)
    x0, y0, x1, y1 = spoil(path, 4, count=count)
    with open_slide(path) as slide:
        with pytest.raises(SlideError, match="segment 4 of level 0"):
            slide.read_segment(0, 4)
        others = [number for number in range(6) if number != 4]
        for number in others:
            left, top = slide.segment_grid(0).corner(number)
            assert np.array_equal(slide.read_segment(0, number), sound[top : top + 512, left : left + 512])
    assert (x0, y0, x1, y1) == (512, 512, 1024, 1024)


def test_tissue_on_a_broken_segment_of_the_only_level_is_listed(
    shared_data: Path, tmp_path: Path, spoil: Spoil
) -> None:
    """What the overview cannot show is not taken for glass."""
    settings = TileSettings()
    with open_slide(shared_data / SVS) as slide:
        sound = {(c.x, c.y): c for c in cut_slide(slide, plan_slide(slide, settings), settings)}
    path = shutil.copyfile(shared_data / SVS, tmp_path / "broken.svs")
    kept = [place for place, candidate in sound.items() if not candidate.reason]
    with open_slide(path) as slide:
        grid = slide.segment_grid(0)
        broken = {grid.under(*place, 224)[0] for place in kept[:20:9]}
    boxes = [spoil(path, number) for number in sorted(broken)]
    with open_slide(path) as slide:
        plan = plan_slide(slide, settings)
        spoiled = {(c.x, c.y): c for c in cut_slide(slide, plan, settings)}
    assert plan.unknown == pytest.approx(len(broken) * 240 * 240 / (2220 * 2967), rel=0.05)
    touched = {
        (x, y) for x, y in sound if any(x < x1 and x + 224 > x0 and y < y1 and y + 224 > y0 for x0, y0, x1, y1 in boxes)
    }
    lost = {place for place in touched if sound[place].reason == ""}
    assert lost
    assert {spoiled[place].reason for place in lost} == {"damaged"}
    for place in set(sound) - touched:
        assert spoiled[place].reason == sound[place].reason
        assert sound[place].tile is None or np.array_equal(spoiled[place].tile, sound[place].tile)
