"""Tiling against a known truth: made slides, whose tissue and masks are known for every pixel."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile

from tiling import datasets
from tiling.filters import Thresholds
from tiling.grid import tile_corners
from tiling.labels import SCHEMES, UNLABELLED, coverage, label
from tiling.phantom import PhantomSlide, make_slide, write_slide
from tiling.run import tile
from tiling.settings import TileSettings
from tiling.store import TileStore

SLIDES = [("benign", "radboud", (2688, 3584)), ("4", "radboud", (2688, 3584)), ("3", "karolinska", (1792, 2240))]
PX = 224


@pytest.fixture(scope="module")
def made() -> list[PhantomSlide]:
    return [make_slide(seed, grade, provider, size) for seed, (grade, provider, size) in enumerate(SLIDES, start=10)]


@pytest.fixture(scope="module")
def store(made: list[PhantomSlide], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    rows = ["image_id,data_provider,isup_grade,gleason_score"]
    for slide in made:
        write_slide(slide, root)
        rows.append(f"{slide.image_id},{slide.provider},{slide.isup_grade},{slide.gleason_score}")
    (root / "train.csv").write_text("\n".join(rows) + "\n")
    tile(datasets.panda(root), root / "store", TileSettings())
    return root / "store"


def box(plane: np.ndarray, x: int, y: int, side: int = PX) -> np.ndarray:
    return plane[y : y + side, x : x + side]


def rows_of(store: Path, slide: PhantomSlide) -> list[dict[str, object]]:
    return pq.read_table(store / "slides" / slide.image_id / "rows.parquet").to_pylist()


def test_kept_tiles_are_those_on_tissue(store: Path, made: list[PhantomSlide]) -> None:
    both = either = 0
    for slide in made:
        kept = {(row["x"], row["y"]) for row in rows_of(store, slide) if row["kept"]}
        corners = tile_corners(slide.image.shape[1], slide.image.shape[0], PX).tolist()
        share = {(x, y): box(slide.tissue, x, y).mean() for x, y in corners}
        true = {place for place, tissue in share.items() if tissue >= Thresholds().min_tissue}
        both, either = both + len(kept & true), either + len(kept | true)
        assert len(kept & true) >= 0.9 * len(kept | true)
        assert all(share[place] > 0.6 * Thresholds().min_tissue for place in kept)
    assert both >= 0.9 * either


def test_labels_coverage_and_masks_are_the_true_ones(store: Path, made: list[PhantomSlide]) -> None:
    by_id = {slide.image_id: slide for slide in made}
    labels: set[tuple[str, int]] = set()
    with TileStore(store) as reader:
        for number, row in enumerate(reader.index.to_pylist()):
            slide = by_id[row["slide_id"]]
            scheme, crop = SCHEMES[slide.provider], box(slide.mask, row["x"], row["y"])
            shares = coverage(crop, scheme)
            assert np.array_equal(reader.read_mask(number), crop)
            assert [row[f"coverage_{name}"] for name in scheme.values] == shares.tolist()
            assert row["label"] == label(shares, scheme, TileSettings().min_label_share)
            labels.add((slide.provider, row["label"]))
            assert (row["provider"], row["isup_grade"]) == (slide.provider, slide.isup_grade)
            assert row["mpp"] == 0.5
        assert np.array_equal(reader.labels(), [row["label"] for row in reader.index.to_pylist()])
    assert labels == {("radboud", 1), ("radboud", 3), ("karolinska", UNLABELLED)}


def test_columns_of_the_other_provider_are_empty(store: Path) -> None:
    with TileStore(store) as reader:
        for row in reader.index.to_pylist():
            assert (row["coverage_cancer"] is None) == (row["provider"] == "radboud")
            assert (row["coverage_gleason5"] is None) == (row["provider"] == "karolinska")


def test_spelling_of_a_benign_score(store: Path, made: list[PhantomSlide]) -> None:
    assert made[0].gleason_score == "negative"
    with TileStore(store) as reader:
        scores = {row["slide_id"]: row["gleason_score"] for row in reader.index.to_pylist()}
    assert [scores[slide.image_id] for slide in made] == ["0+0", "4+4", "3+3"]


@pytest.mark.parametrize(("mpp", "level", "span"), [(1.0, 0, 448), (2.0, 1, 224), (4.0, 1, 448)])
def test_coarser_tiles_have_the_true_labels_too(
    mpp: float, level: int, span: int, made: list[PhantomSlide], tmp_path: Path
) -> None:
    slide, ratio = made[1], (1, 4)[level]
    write_slide(slide, tmp_path)
    source = datasets.Source(
        slide.image_id,
        (tmp_path / "train_images" / f"{slide.image_id}.tiff",),
        tmp_path / "train_label_masks" / f"{slide.image_id}_mask.tiff",
        slide.provider,
        scheme=SCHEMES[slide.provider],
    )
    tile(
        datasets.Dataset("one", (source,)),
        tmp_path / "store",
        TileSettings(mpp=mpp, thresholds=Thresholds(0.2, 0.95, min_edges=0, min_texture=0)),
    )
    scheme = SCHEMES["radboud"]
    with TileStore(tmp_path / "store") as reader:
        assert reader.mpp == pytest.approx(mpp)
        assert len(reader) >= 1
        for number, row in enumerate(reader.index.to_pylist()):
            crop = box(slide.mask, row["x"], row["y"], span * ratio)[::ratio, ::ratio]
            shares = coverage(crop, scheme)
            assert [row[f"coverage_{name}"] for name in scheme.values] == shares.tolist()
            assert row["label"] == label(shares, scheme, TileSettings().min_label_share)
            assert np.array_equal(reader.read_mask(number), crop[:: span // PX, :: span // PX])


def test_a_mask_of_one_level_serves_every_level(made: list[PhantomSlide], tmp_path: Path) -> None:
    """Where the mask has no level of the cut's size, its level 0 is read under the same tissue."""
    slide = made[1]
    write_slide(slide, tmp_path)
    mask = tmp_path / "flat_mask.tiff"
    tifffile.imwrite(mask, slide.mask, tile=(512, 512), compression="deflate")
    source = datasets.Source(
        slide.image_id,
        (tmp_path / "train_images" / f"{slide.image_id}.tiff",),
        mask,
        slide.provider,
        scheme=SCHEMES[slide.provider],
    )
    tile(datasets.Dataset("one", (source,)), tmp_path / "store", TileSettings(mpp=2.0))
    with TileStore(tmp_path / "store") as reader:
        assert len(reader) >= 1
        for number, row in enumerate(reader.index.to_pylist()):
            crop = box(slide.mask, row["x"], row["y"], 4 * PX)
            assert row["coverage_gleason4"] == coverage(crop, SCHEMES["radboud"])[4]
            assert set(np.unique(reader.read_mask(number))) <= set(np.unique(crop))
            assert reader.read_mask(number).shape == (PX, PX)
