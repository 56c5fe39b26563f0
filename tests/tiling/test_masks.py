"""Masks under boxes of a slide: label images of several sizes and kinds, and annotations."""

import json
from contextlib import closing
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from tiling import datasets
from tiling.datasets import Dataset, Source
from tiling.errors import MaskError, SlideError
from tiling.grid import Cut
from tiling.labels import GLEASON_ANNOTATIONS, SCHEMES, UNLABELLED, Scheme, read_class_map
from tiling.masks import MaskReader, open_mask, open_mask_file, tile_labels
from tiling.run import tile
from tiling.settings import TileSettings
from tiling.slide import Slide, open_slide
from tiling.store import TileStore

ALL = Scheme(tuple(map(str, range(250))), None, pixels={value: value for value in range(250)})
BINARY = Scheme(("no", "yes"), (0, 1), ("no", "yes"), {0: 0, 255: 1})


@pytest.fixture(scope="module")
def slide_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A white slide of 1000 x 611 px with a level at 1/4."""
    path = tmp_path_factory.mktemp("masks") / "slide.tiff"
    write_pyramid(path, [np.full((611, 1000, 3), 255, np.uint8), np.full((153, 250, 3), 255, np.uint8)])
    return path


def write_pyramid(path: Path, levels: list[np.ndarray], compression: str = "deflate") -> None:
    photometric = "rgb" if levels[0].ndim == 3 else "minisblack"
    with tifffile.TiffWriter(path) as tiff:
        for number, pixels in enumerate(levels):
            tiff.write(
                pixels, tile=(128, 128), compression=compression, photometric=photometric, subfiletype=int(number > 0),
                resolution=(20000, 20000), resolutionunit="CENTIMETER",
            )  # fmt: skip


def labels_of(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A label image of 6 values in blobs."""
    small = np.random.default_rng(seed).integers(0, 6, (height // 20 + 1, width // 20 + 1), np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST)


def boxes(mask: MaskReader, cut: Cut, step: int = 97) -> dict[tuple[int, int], np.ndarray]:
    """Values under many boxes, in row order."""
    found = {}
    for y in [*range(0, cut.level.height - cut.span, step), cut.level.height - cut.span]:
        for x in [*range(0, cut.level.width - cut.span, step), cut.level.width - cut.span]:
            values = mask.at(x, y, cut.span)
            assert values is not None
            assert values.dtype == np.uint8
            found[x, y] = values
    return found


def cut_of(slide: Slide, level: int = 0, span: int = 64) -> Cut:
    return Cut(slide.levels[level], span, span, 0.5 * slide.levels[level].downsample)


def assert_reads(path: Path, slide_file: Path, expected: np.ndarray, level: int = 0) -> None:
    """The mask's boxes under a level are those of ``expected``, which has that level's size."""
    with open_slide(slide_file) as slide:
        cut = cut_of(slide, level)
        with closing(open_mask_file(path, ALL, slide, cut)) as mask:
            for (x, y), values in boxes(mask, cut).items():
                assert np.array_equal(values, expected[y : y + 64, x : x + 64])


# Label images


@pytest.mark.parametrize("compression", ["deflate", "lzw", "none"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_label_tiff_of_the_slides_size(compression: str, channels: int, slide_file: Path, tmp_path: Path) -> None:
    labels = labels_of(611, 1000)
    pixels = labels if channels == 1 else cv2.merge([labels, labels * 0 + 7, labels * 0])
    write_pyramid(tmp_path / "mask.tif", [pixels], compression)
    assert_reads(tmp_path / "mask.tif", slide_file, labels)


def test_the_level_of_the_cuts_size_is_read(slide_file: Path, tmp_path: Path) -> None:
    fine, coarse = labels_of(611, 1000), labels_of(153, 250, seed=1)
    write_pyramid(tmp_path / "mask.tif", [fine, coarse])
    assert_reads(tmp_path / "mask.tif", slide_file, coarse, level=1)


def test_a_finer_mask_is_given_at_its_own_resolution(slide_file: Path, tmp_path: Path) -> None:
    labels = labels_of(611, 1000)
    write_pyramid(tmp_path / "mask.tif", [labels])
    with (
        open_slide(slide_file) as slide,
        closing(open_mask_file(tmp_path / "mask.tif", ALL, slide, cut_of(slide, 1))) as mask,
    ):
        found = boxes(mask, cut_of(slide, 1))
        for (x, y), values in found.items():
            top = min(round(y * 611 / 153), 611 - 256)
            assert np.array_equal(values, labels[top : top + 256, 4 * x : 4 * x + 256])


def test_nothing_past_the_lower_edge_is_read(tmp_path: Path) -> None:
    """Levels whose sides are rounded differently ask for more rows than there are."""
    write_pyramid(tmp_path / "a.tiff", [np.zeros((403, 1000, 3), np.uint8), np.zeros((101, 250, 3), np.uint8)])
    Image.fromarray(np.full((403, 1000), 5, np.uint8)).save(tmp_path / "mask.png")
    with open_slide(tmp_path / "a.tiff") as slide:
        mask = open_mask_file(tmp_path / "mask.png", ALL, slide, cut_of(slide, 1))
        assert all((values == 5).all() for values in boxes(mask, cut_of(slide, 1)).values())


@pytest.mark.parametrize("rounding", [np.floor, np.ceil])
@pytest.mark.parametrize("times", [2, 7, 16])
@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_a_coarser_mask_is_looked_up_at_pixel_centres(
    suffix: str, times: int, rounding: np.ufunc, slide_file: Path, tmp_path: Path
) -> None:
    height, width = (int(rounding(side / times)) for side in (611, 1000))
    labels = np.random.default_rng(times).integers(0, 6, (height, width), np.uint8)
    path = tmp_path / f"mask{suffix}"
    write_pyramid(path, [labels]) if suffix == ".tif" else Image.fromarray(labels).save(path)
    with open_slide(slide_file) as slide, closing(open_mask_file(path, ALL, slide, cut_of(slide))) as mask:
        for (x, y), values in boxes(mask, cut_of(slide), step=41).items():
            columns = [int((x + at + 0.5) * width / 1000) for at in range(64)]
            rows = [int((y + at + 0.5) * height / 611) for at in range(64)]
            assert np.array_equal(values, labels[np.ix_(rows, columns)])


@pytest.mark.parametrize("size", [(611, 999), (610, 1000), (153, 200), (1222, 2000), (400, 667)])
def test_a_mask_of_another_size(size: tuple[int, int], slide_file: Path, tmp_path: Path) -> None:
    Image.fromarray(np.zeros(size, np.uint8)).save(tmp_path / "mask.png")
    write_pyramid(tmp_path / "mask.tif", [np.zeros(size, np.uint8)])
    for path in (tmp_path / "mask.png", tmp_path / "mask.tif"):
        with open_slide(slide_file) as slide, pytest.raises(MaskError) as raised:
            open_mask_file(path, ALL, slide, cut_of(slide))
        assert str(raised.value) == (
            f"{path}: mask is {size[1]} x {size[0]} px, its slide 1000 x 611 px; masks must have the slide's "
            "level-0 size, or a whole fraction of it"
        )


def png(pixels: np.ndarray, mode: str) -> Image.Image:
    image = Image.fromarray(pixels)
    if mode == "P":
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
    elif mode == "RGB":
        image = Image.merge("RGB", [image, Image.new("L", image.size, 9), image])
    elif mode == "RGBA":
        image = Image.merge("RGBA", [image, image, image, Image.new("L", image.size, 0)])
    elif mode == "I;16":
        image = Image.fromarray(pixels.astype(np.uint16))
    return image


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "I;16"])
def test_kinds_of_png(mode: str, slide_file: Path, tmp_path: Path) -> None:
    labels = labels_of(611, 1000)
    png(labels, mode).save(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as written:
        assert written.mode == mode
    assert_reads(tmp_path / "mask.png", slide_file, labels)


def test_pngs_that_are_no_masks(slide_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    with open_slide(slide_file) as slide:
        Image.fromarray(np.full((611, 1000), 300, np.uint16)).save(path)
        with pytest.raises(MaskError, match=r"mask\.png: mask holds value 300, 0 to 255 are read"):
            open_mask_file(path, ALL, slide, cut_of(slide))
        path.write_bytes(path.read_bytes()[:60])
        with pytest.raises(MaskError, match=r"mask\.png: mask does not decode"):
            open_mask_file(path, ALL, slide, cut_of(slide))


def test_lossy_masks_are_quantised(slide_file: Path, tmp_path: Path) -> None:
    labels = np.where(labels_of(611, 1000) > 2, 255, 0).astype(np.uint8)
    Image.fromarray(labels).save(tmp_path / "mask.jpg", quality=80)
    with (
        open_slide(slide_file) as slide,
        closing(open_mask_file(tmp_path / "mask.jpg", BINARY, slide, cut_of(slide))) as mask,
    ):
        agree = [
            np.mean(values == labels[y : y + 64, x : x + 64] // 255)
            for (x, y), values in boxes(mask, cut_of(slide)).items()
        ]
    assert min(agree) > 0.99


def test_a_value_that_is_not_known(slide_file: Path, tmp_path: Path) -> None:
    labels = np.zeros((611, 1000), np.uint8)
    labels[500, 500] = 8
    Image.fromarray(labels).save(tmp_path / "mask.png")
    with (
        open_slide(slide_file) as slide,
        closing(open_mask_file(tmp_path / "mask.png", BINARY, slide, cut_of(slide))) as mask,
    ):
        assert mask.at(0, 0, 64) is not None
        with pytest.raises(MaskError, match=r"mask\.png: mask holds value 8, known are 0, 255 \(no, yes\); add it to"):
            mask.at(480, 480, 64)


def test_damage_stays_inside_its_segment(slide_file: Path, tmp_path: Path, spoil: object) -> None:
    write_pyramid(tmp_path / "mask.tif", [labels_of(611, 1000)])
    x0, y0, _, _ = spoil(tmp_path / "mask.tif", 9)  # type: ignore[operator]
    with (
        open_slide(slide_file) as slide,
        closing(open_mask_file(tmp_path / "mask.tif", ALL, slide, cut_of(slide))) as mask,
    ):
        assert mask.at(0, 0, 64) is not None
        assert mask.at(x0 - 1, y0, 64) is None
        assert mask.at(x0 + 128, y0, 64) is not None


def test_open_mask_of_a_slide_without_one(slide_file: Path) -> None:
    with open_slide(slide_file) as slide:
        assert open_mask(Source("a", (slide_file,)), slide, cut_of(slide)) is None
        with pytest.raises(
            MaskError, match=r"a\.tif: what the mask's values mean is not known; give it with --class-map"
        ):
            open_mask(Source("a", (slide_file,), Path("a.tif")), slide, cut_of(slide))
        with pytest.raises(SlideError, match=r"gone\.tif: no such file"):
            open_mask(Source("a", (slide_file,), Path("gone.tif"), scheme=ALL), slide, cut_of(slide))


def test_pandas_masks(cohort: Path) -> None:
    for source in datasets.panda(cohort).sources:
        assert source.mask is not None
        with open_slide(source.images[0]) as slide:
            cut = cut_of(slide, span=224)
            mask = open_mask(source, slide, cut)
            assert mask is not None
            with closing(mask):
                whole = tifffile.imread(source.mask)[..., 0]
                for (x, y), values in boxes(mask, cut, step=224).items():
                    assert np.array_equal(values, whole[y : y + 224, x : x + 224])


# Annotations


def square(name: str, x: int, y: int, side: int) -> dict[str, object]:
    ring = [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]
    return {
        "type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"classification": {"name": name}},
    }  # fmt: skip


@pytest.mark.parametrize("level", [0, 1])
def test_annotations_are_drawn_at_the_scale_of_the_cut(level: int, slide_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "slide.geojson"
    path.write_text(json.dumps([square("Gleason 4", 100, 200, 320), square("benign", 0, 0, 240)]))
    with open_slide(slide_file) as slide:
        cut = cut_of(slide, level)
        down = slide.levels[level].downsample
        mask = open_mask_file(path, GLEASON_ANNOTATIONS, slide, cut)
        for (x, y), values in boxes(mask, cut).items():
            columns, rows = np.meshgrid((x + np.arange(64) + 0.5) * down, (y + np.arange(64) + 0.5) * down)
            expected = np.where((columns < 240) & (rows < 240), 1, 0)
            expected[(columns > 100) & (columns < 420) & (rows > 200) & (rows < 520)] = 3
            assert np.mean(values != expected) < (0.03 if level else 1e-9)


def test_annotations_with_an_unknown_class(slide_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "slide.geojson"
    path.write_text(json.dumps([square("Nerve", 0, 0, 100)]))
    with open_slide(slide_file) as slide:
        with pytest.raises(
            MaskError, match=r"slide\.geojson: annotation class 'Nerve', known are .*; map it with --class-map"
        ):
            open_mask_file(path, GLEASON_ANNOTATIONS, slide, cut_of(slide))
        (tmp_path / "map.yaml").write_text("{classes: [background, gland], values: {gland: gland, nerve: null}}")
        mask = open_mask_file(path, read_class_map(tmp_path / "map.yaml"), slide, cut_of(slide))
        values = mask.at(0, 0, 64)
        assert values is not None
        assert not values.any()


def test_annotations_of_another_slide(slide_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "slide.geojson"
    path.write_text(json.dumps([square("G3", 5000, 40, 100)]))
    with (
        open_slide(slide_file) as slide,
        pytest.raises(
            MaskError,
            match=r"all annotations lie outside the slide of 1000 x 611 px: from 5000, 40 to 5100, 140; their coord",
        ),
    ):
        open_mask_file(path, GLEASON_ANNOTATIONS, slide, cut_of(slide))


# Labels of tiles


def test_labels_of_a_tile(slide_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "slide.geojson"
    path.write_text(json.dumps([square("G3", 0, 0, 32), square("Benign", 32, 0, 32)]))
    with open_slide(slide_file) as slide:
        cut = Cut(slide.levels[0], 64, 32, 1.0)
        mask = open_mask_file(path, GLEASON_ANNOTATIONS, slide, cut)
        found = tile_labels(mask, 0, 0, cut, GLEASON_ANNOTATIONS, 0.25)
        assert found is not None
        assert found.mask.shape == (32, 32)
        assert found.coverage == (0.5, 0.25, 0.25, 0, 0)
        assert found.label == 2
        strict = tile_labels(mask, 0, 0, cut, GLEASON_ANNOTATIONS, 0.26)
        assert strict is not None
        assert strict.label == UNLABELLED


def test_a_store_of_annotated_slides(cohort: Path, tmp_path: Path) -> None:
    """Annotations drawn round a mask's own values give the labels that the mask gives."""
    found = datasets.panda(cohort)
    graded = tuple(source for source in found.sources if source.provider == "radboud")
    (tmp_path / "drawn").mkdir()
    for source in graded:
        assert source.mask is not None
        labels = tifffile.imread(source.mask)[..., 0]
        features = []
        for value, name in enumerate(SCHEMES["radboud"].values[1:], start=1):
            contours, _ = cv2.findContours((labels == value).astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)[
                -2:
            ]
            for contour in contours:
                ring = contour[:, 0].tolist()
                geometry = {"type": "Polygon", "coordinates": [[*ring, ring[0]]]}
                features.append(
                    {"type": "Feature", "geometry": geometry, "properties": {"classification": {"name": name}}}
                )
        (tmp_path / "drawn" / f"{source.slide_id}.geojson").write_text(json.dumps(features))
    tile(Dataset("slides", graded, found.class_names), tmp_path / "by_mask", TileSettings())
    annotated = datasets.slides([source.images[0] for source in graded], tmp_path / "drawn")
    tile(annotated, tmp_path / "drawn_store", TileSettings())
    with TileStore(tmp_path / "by_mask") as by_mask, TileStore(tmp_path / "drawn_store") as drawn:
        assert len(drawn) == len(by_mask) > 0
        assert np.mean(drawn.labels() == by_mask.labels()) > 0.95
        assert drawn.description.class_names == by_mask.description.class_names
        assert f"coverage_{drawn.description.class_names[2]}" in drawn.index.column_names
