import csv
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
import tifffile

from tiling.errors import UsageError
from tiling.phantom import GRADES, PhantomSlide, make_cohort, make_slide, write_slide

SIZE = (512, 768)


def slide_path(root: Path, slide: PhantomSlide) -> Path:
    return root / "train_images" / f"{slide.image_id}.tiff"


def mask_path(root: Path, slide: PhantomSlide) -> Path:
    return root / "train_label_masks" / f"{slide.image_id}_mask.tiff"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PhantomSlide]:
    root = tmp_path_factory.mktemp("phantom")
    slide = make_slide(5, "3", size=(1024, 1536))
    write_slide(slide, root)
    return root, slide


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    threads = cv2.getNumThreads()
    ids = make_cohort(tmp_path / "a", 1, seed=3, size=SIZE, karolinska=1)
    try:
        cv2.setNumThreads(1)
        again = make_cohort(tmp_path / "b", 1, seed=3, size=SIZE, karolinska=1)
    finally:
        cv2.setNumThreads(threads)
    assert ids == again
    first, second = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    assert len(first) == 2 * 5 + 1
    assert first == second


def test_another_seed_is_another_cohort(tmp_path: Path) -> None:
    ids = [make_cohort(tmp_path / str(seed), 0, seed, SIZE, karolinska=1) for seed in (0, 1)]
    assert ids[0] != ids[1]
    images = [tifffile.imread(tmp_path / str(seed) / "train_images" / f"{ids[seed][0]}.tiff") for seed in (0, 1)]
    assert (images[0] != images[1]).mean() > 0.3


def test_train_csv(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    size = (512, 512)
    ids = make_cohort(
        tmp_path, 1, seed=1, size=size, karolinska=4, on_slide=lambda done, total: seen.append((done, total))
    )
    with (tmp_path / "train.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image_id", "data_provider", "isup_grade", "gleason_score"]
    assert [row["image_id"] for row in rows] == ids
    assert len(set(ids)) == 8
    assert all(len(name) == 32 and set(name) <= set("0123456789abcdef") for name in ids)
    labels = [(row["data_provider"], row["isup_grade"], row["gleason_score"]) for row in rows]
    assert labels[:4] == [
        ("radboud", "0", "negative"),
        ("radboud", "1", "3+3"),
        ("radboud", "4", "4+4"),
        ("radboud", "5", "5+5"),
    ]
    assert labels[4:] == [
        ("karolinska", "1", "3+3"),
        ("karolinska", "4", "4+4"),
        ("karolinska", "5", "5+5"),
        ("karolinska", "0", "0+0"),
    ]
    assert seen == [(number, 8) for number in range(1, 9)]
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    expected = {f"{name}.tiff" for name in ids} | {f"{name}_mask.tiff" for name in ids} | {"train.csv"}
    assert names == expected


@pytest.mark.parametrize("grade", GRADES)
@pytest.mark.parametrize("provider", ["radboud", "karolinska"])
def test_labels_agree_with_tissue_and_grade(grade: str, provider: str) -> None:
    slide = make_slide(2, grade, provider, SIZE)
    assert slide.image.shape == (*SIZE, 3)
    assert slide.mask.shape == slide.tissue.shape == SIZE
    assert slide.image.dtype == slide.mask.dtype == np.uint8
    assert slide.tissue.dtype == bool
    assert np.array_equal(slide.mask > 0, slide.tissue)
    assert 0.4 < slide.tissue.mean() < 0.6
    values, counts = np.unique(slide.mask[slide.tissue], return_counts=True)
    share = dict(zip(values.tolist(), (counts / counts.sum()).tolist(), strict=True))
    if provider == "radboud":
        assert set(share) == {1, 2, GRADES[grade][0]}
        assert share[GRADES[grade][0]] > 0.15
        assert share[1] > 0.15
    elif grade == "benign":
        assert set(share) == {1}
    else:
        assert set(share) == {1, 2}
        assert 0.45 < share[2] < 0.75


@pytest.mark.parametrize("provider", ["radboud", "karolinska"])
def test_background_is_near_white_and_tissue_is_pink(provider: str) -> None:
    slide = make_slide(4, "4", provider, SIZE)
    far = cv2.erode((~slide.tissue).view(np.uint8), np.ones((9, 9), np.uint8)) > 0
    assert slide.image[far].min() > 230
    stroma = slide.image[slide.mask == 1].astype(float).mean(0)
    assert stroma[1] < stroma[0] - 25
    assert stroma[1] < stroma[2] - 25
    assert (slide.image[slide.tissue].min(1) < 215).mean() > 0.75


def test_portrait_slide_has_upright_cores() -> None:
    tissue = make_slide(1, "benign", size=(768, 512)).tissue
    assert tissue.any(1).mean() > tissue.any(0).mean()


def test_openslide_sees_pandas_pyramid(written: tuple[Path, PhantomSlide]) -> None:
    root, slide = written
    for path in (slide_path(root, slide), mask_path(root, slide)):
        with openslide.open_slide(path) as opened:
            assert opened.level_dimensions == ((1536, 1024), (384, 256), (96, 64))
            assert opened.level_downsamples == (1, 4, 16)
            assert float(opened.properties[openslide.PROPERTY_NAME_MPP_X]) == 0.5
            assert float(opened.properties[openslide.PROPERTY_NAME_MPP_Y]) == 0.5
            region = np.asarray(opened.read_region((256, 256), 0, (300, 200)))[..., :3]
            assert np.array_equal(region, tifffile.imread(path, key=0)[256:456, 256:556])


def test_tags_are_those_of_panda(written: tuple[Path, PhantomSlide]) -> None:
    root, slide = written
    with tifffile.TiffFile(slide_path(root, slide)) as tiff:
        assert len(tiff.pages) == 3
        for page, ratio in zip(tiff.pages, (1, 4, 16), strict=True):
            assert page.compression == tifffile.COMPRESSION.JPEG
            assert page.photometric == tifffile.PHOTOMETRIC.YCBCR
            assert page.tags["YCbCrSubSampling"].value == (2, 2)
            assert (page.tilelength, page.tilewidth) == (512, 512)
            assert page.tags["XResolution"].value == page.tags["YResolution"].value == (20_000 // ratio, 1)
            assert page.tags["ResolutionUnit"].value == tifffile.RESUNIT.CENTIMETER
            assert page.is_reduced == (ratio > 1)
    with tifffile.TiffFile(mask_path(root, slide)) as tiff:
        assert len(tiff.pages) == 3
        assert tiff.pages[0].compression == tifffile.COMPRESSION.DEFLATE
        assert tiff.pages[0].photometric == tifffile.PHOTOMETRIC.RGB


def test_files_hold_the_picture_and_the_exact_mask(written: tuple[Path, PhantomSlide]) -> None:
    root, slide = written
    for key, ratio in enumerate((1, 4, 16)):
        stored = tifffile.imread(mask_path(root, slide), key=key)
        assert np.array_equal(stored[..., 0], slide.mask[::ratio, ::ratio])
        assert not stored[..., 1:].any()
    image = tifffile.imread(slide_path(root, slide), key=0).astype(float)
    assert 10 * np.log10(255**2 / ((image - slide.image) ** 2).mean()) > 34
    small = tifffile.imread(slide_path(root, slide), key=1).astype(float)
    mean = slide.image.reshape(256, 4, 384, 4, 3).mean((1, 3))
    assert np.abs(small - mean).mean() < 6


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        ((0, "2"), "'2'"),
        ((0, "3", "oulu"), "'oulu'"),
        ((-1, "3"), "seed -1"),
        ((0, "3", "radboud", (500, 768)), "500"),
        ((0, "3", "radboud", (512, 770)), "770"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[int, str], cause: str) -> None:
    with pytest.raises(UsageError, match=cause):
        make_slide(*arguments)
