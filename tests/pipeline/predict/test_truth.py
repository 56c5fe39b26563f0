"""Prediction against known truth: made slides whose mask says every tile's class, decoded back out of the files."""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
from PIL import Image

from pipeline.bundle import Bundle
from pipeline.palette import class_colours
from pipeline.predict import predict, problems
from tiling import datasets
from tiling.cut import Candidate
from tiling.datasets import Dataset
from tiling.labels import GLEASON_CLASSES
from tiling.phantom import PhantomSlide
from tiling.run import tile
from tiling.settings import TileSettings
from tiling.store import TileStore

pytestmark = pytest.mark.usefixtures("one_thread")

MakeBundle = Callable[..., Bundle]
RowsOf = Callable[[Path], list[dict[str, Any]]]

COLOURS = np.array(class_colours(GLEASON_CLASSES))
NONE = -1


class Made(Protocol):
    """What is used here of a made slide, which is conftest's."""

    @property
    def truth(self) -> PhantomSlide: ...

    @property
    def side(self) -> int: ...

    @property
    def mpp(self) -> float: ...

    @property
    def slide_mpp(self) -> float | None: ...

    @property
    def true_mpp(self) -> float: ...

    def score(self, candidates: Sequence[Candidate]) -> dict[str, np.ndarray]: ...

    def true_class(self, x: int, y: int) -> int: ...

    def true_tiles(self) -> dict[tuple[int, int], int]: ...

    def dataset(self) -> Dataset: ...


def class_in_picture(shown: np.ndarray, plain: np.ndarray) -> int:
    """What a tile's place of the heat map shows, given the slide's own pixels there: a class, or NONE."""
    grey = plain.mean(axis=(0, 1)) @ [0.299, 0.587, 0.114]
    mixed = 0.55 * grey + 0.45 * COLOURS
    candidates = np.concatenate([mixed, plain.mean(axis=(0, 1))[None]])
    nearest = int(np.abs(candidates - shown.mean(axis=(0, 1))).sum(axis=1).argmin())
    return nearest if nearest < len(COLOURS) else NONE


def classes_in_file(path: Path, made: Made) -> dict[tuple[int, int], int]:
    """The class at the place of every true tile, out of heatmap.png."""
    with Image.open(path) as image:
        place = json.loads(image.text["slide"])  # type: ignore[attr-defined]
        picture = np.asarray(image.convert("RGB"))
    shown = picture[place["top"] :, place["left"] :][: place["height"], : place["width"]]
    plain = cv2.resize(made.truth.image, (place["width"], place["height"]), interpolation=cv2.INTER_AREA)
    scale = place["width"] / made.truth.mask.shape[1]
    found = {}
    for x, y in made.true_tiles():
        x0, y0, x1, y1 = (round(value * scale) for value in (x, y, x + made.side, y + made.side))
        inside = np.s_[y0 + 3 : y1 - 3, x0 + 3 : x1 - 3]
        found[x, y] = class_in_picture(shown[inside], plain[inside])
    return found


def test_heat_map_matches_the_mask(name: str, made: Callable[[str], Made], predicted: Callable[[str], Path]) -> None:
    slide = made(name)
    truth, found = slide.true_tiles(), classes_in_file(predicted(name) / "heatmap.png", slide)
    assert len(truth) >= 20
    assert any(number > 1 for number in truth.values()) == (slide.truth.isup_grade > 0)
    right = sum(found[place] == number for place, number in truth.items())
    print(f"{name}: {right} of {len(truth)} tissue tiles, {right / len(truth):.1%}")
    assert right >= 0.9 * len(truth)
    # What is not right was dropped by a filter; no tile shows another class.
    assert {found[place] for place, number in truth.items() if found[place] != number} <= {NONE}


def raster(rings: list[list[list[int]]], shape: tuple[int, int]) -> np.ndarray:
    """Pixels inside an upright polygon by the even-odd rule, bool (H, W): each upright edge flips all to its right."""
    flips = np.zeros((shape[0], shape[1] + 1), np.uint8)
    for ring in rings:
        for (x0, y0), (x1, y1) in pairwise(ring):
            if x0 == x1:
                flips[min(y0, y1) : max(y0, y1), x0] ^= 1
    return np.bitwise_xor.accumulate(flips, axis=1)[:, :-1].astype(bool)


def test_polygons_lie_on_the_right_pixels(
    name: str, made: Callable[[str], Made], predicted: Callable[[str], Path]
) -> None:
    slide = made(name)
    shape = slide.truth.mask.shape
    painted = np.full(shape, NONE)
    for feature in json.loads((predicted(name) / "regions.geojson").read_bytes())["features"]:
        pixels = raster(feature["geometry"]["coordinates"], shape)
        assert (painted[pixels] == NONE).all(), "regions overlap"
        named = feature["properties"]["classification"]
        number = GLEASON_CLASSES.index(named["name"])
        assert named["color"] == COLOURS[number].tolist()
        painted[pixels] = number
        area_mm2 = pixels.sum() * (slide.true_mpp / 1000) ** 2
        assert feature["properties"]["measurements"]["area mm2"] == pytest.approx(area_mm2, abs=1e-6)
    covered = 0
    for y in range(0, shape[0], slide.side):
        for x in range(0, shape[1], slide.side):
            there = np.unique(painted[y : y + slide.side, x : x + slide.side])
            assert len(there) == 1, "a region ends inside a tile"
            if there[0] != NONE:
                assert there[0] == slide.true_class(x, y)
                covered += (x, y) in slide.true_tiles()
    assert covered >= 0.9 * len(slide.true_tiles())


@pytest.mark.parametrize("name", ["4", "finer", "coarser", "level 1"])
def test_rows_and_summary_say_what_the_mask_says(
    name: str, made: Callable[[str], Made], predicted: Callable[[str], Path], rows_of: RowsOf
) -> None:
    slide, folder = made(name), predicted(name)
    rows, summary = rows_of(folder), json.loads((folder / "summary.json").read_bytes())
    assert {row["side"] for row in rows} == {slide.side}
    assert all(row["class"] == GLEASON_CLASSES[slide.true_class(row["x"], row["y"])] for row in rows)
    assert all(row[f"p_{row['class']}"] == pytest.approx(0.68) for row in rows)
    tile_mm2 = (slide.side * slide.true_mpp / 1000) ** 2
    counts = {name: sum(row["class"] == name for row in rows) for name in GLEASON_CLASSES}
    for found, count in zip(summary["classes"].values(), counts.values(), strict=True):
        assert found["tiles"] == count
        assert found["share"] == pytest.approx(count / len(rows), abs=1e-6)
        assert found["area_mm2"] == pytest.approx(count * tile_mm2, abs=1e-6)
    assert list(summary["classes"]) == list(GLEASON_CLASSES)
    assert summary["tissue_area_mm2"] == pytest.approx(len(rows) * tile_mm2, abs=1e-6)
    grade = f"gleason{slide.truth.gleason_score[0]}"
    assert summary["highest_grade"] == {"name": grade, **summary["classes"][grade]}
    assert summary["tiles"]["kept"] == len(rows)
    assert (summary["slide_mpp"], summary["stated_mpp"]) == (slide.true_mpp, 0.5)
    assert summary["slide_mpp_overridden"] == (slide.slide_mpp is not None)
    assert summary["tile_mpp"] == pytest.approx(slide.mpp)
    assert summary["bundle_sha256"] == "b" * 64
    assert "not a diagnosis" in summary["note"]
    stated = json.loads(pq.read_schema(folder / "tiles.parquet").metadata[b"bony"])
    assert all(summary[key] == value for key, value in stated.items())
    with (folder.parent / "summary.csv").open() as file:
        [row] = csv.DictReader(file)
    assert row["slide_id"] == slide.truth.image_id
    assert int(row["tiles"]) == len(rows)
    assert float(row[f"share_{grade}"]) == summary["classes"][grade]["share"]
    assert (row["highest_grade"], row["highest_grade_share"]) == (grade, row[f"share_{grade}"])


def test_a_benign_slide_has_no_highest_grade(predicted: Callable[[str], Path]) -> None:
    summary = json.loads((predicted("benign") / "summary.json").read_bytes())
    assert summary["highest_grade"] is None
    assert summary["classes"]["healthy"]["tiles"] > 0


def test_the_highest_grade_is_that_of_any_tile(small: Made, make_bundle: MakeBundle, tmp_path: Path) -> None:
    """One tile of Gleason 4 among many of Gleason 3."""
    first = set[tuple[int, int]]()

    def score(candidates: Sequence[Candidate]) -> dict[str, np.ndarray]:
        first.add((candidates[0].x, candidates[0].y))
        return {"probabilities": np.eye(5, dtype=np.float32)[[3 if (c.x, c.y) in first else 2 for c in candidates]]}

    summary = predict(small.dataset(), make_bundle(), tmp_path / "out", score=score).summaries[0]
    kept = summary["tiles"]["kept"]
    assert summary["classes"]["gleason3"]["tiles"] == kept - 1 > 5
    assert summary["highest_grade"]["name"] == "gleason4"
    assert summary["highest_grade"]["share"] == pytest.approx(1 / kept, abs=1e-6)
    assert summary["highest_grade"]["area_mm2"] == pytest.approx(0.112**2)


def test_a_decoder_that_does_not_grade_says_nothing_of_grades(
    made: Callable[[str], Made], make_bundle: MakeBundle, tmp_path: Path
) -> None:
    bundle = make_bundle()
    assert bundle.decoder is not None
    other = replace(bundle.decoder, class_names=("a", "b", "c", "d", "e"))
    done = predict(made("4").dataset(), replace(bundle, decoder=other), tmp_path / "out", score=made("4").score)
    assert "highest_grade" not in done.summaries[0]
    assert list(done.summaries[0]["classes"]) == ["a", "b", "c", "d", "e"]


def test_a_level_of_a_crooked_downsample(make_bundle: MakeBundle, rows_of: RowsOf, tmp_path: Path) -> None:
    """Level 1 is 4.004 times smaller: tiles differ by a pixel of level 0, and join without gap or overlap."""
    noise = np.random.default_rng(0).integers(60, 200, (165, 231, 1), np.uint8) + np.array([40, 0, 30], np.uint8)
    levels = [cv2.resize(noise, size, interpolation=cv2.INTER_NEAREST) for size in ((2310, 1650), (577, 412))]
    down_x, down_y = 2310 / 577, 1650 / 412
    with tifffile.TiffWriter(tmp_path / "crooked.tiff") as file:
        for number, (level, ratio) in enumerate(zip(levels, (1, down_x), strict=True)):
            scale: dict[str, Any] = {"resolution": (2e4 / ratio, 2e4 / ratio), "resolutionunit": 3}
            file.write(level, tile=(256, 256), subfiletype=number, metadata=None, **scale)

    def score(candidates: Sequence[Candidate]) -> dict[str, np.ndarray]:
        return {"probabilities": np.eye(5, dtype=np.float32)[[(one.x + one.y) // 256 % 2 for one in candidates]]}

    bundle = make_bundle(mpp=2.0, tile_px=64)
    predict(datasets.slides([tmp_path / "crooked.tiff"]), bundle, tmp_path / "out", score=score)
    xs, ys = (np.rint(down * 64 * np.arange(n)).astype(int).tolist() for down, n in ((down_x, 10), (down_y, 7)))
    assert {b - a for a, b in pairwise(xs)} == {256, 257}
    places = {(row["x"], row["y"]) for row in rows_of(tmp_path / "out/crooked")}
    assert places == {(x, y) for x in xs[:9] for y in ys[:6]}
    painted = np.zeros((1650, 2310), int)
    for feature in json.loads((tmp_path / "out/crooked/regions.geojson").read_bytes())["features"]:
        painted += raster(feature["geometry"]["coordinates"], (1650, 2310))
    assert (painted[: ys[6], : xs[9]] == 1).all()
    assert painted.sum() == ys[6] * xs[9]


def store_of(made: Made, root: Path) -> TileStore:
    """The slide's tiles, cut and stored without loss by `bony tile`."""
    tile(made.dataset(), root / "store", TileSettings(codec="zstd"))
    return TileStore(root / "store")


def test_the_bundles_networks_score_the_tiles_that_tile_cuts(
    small: Made, make_bundle: MakeBundle, rows_of: RowsOf, tmp_path: Path
) -> None:
    bundle = make_bundle()
    predict(small.dataset(), bundle, tmp_path / "out", batch=7)
    rows = rows_of(tmp_path / "out" / small.truth.image_id)
    with store_of(small, tmp_path) as store:
        places = list(zip(store.index["x"].to_pylist(), store.index["y"].to_pylist(), strict=True))
        tiles = torch.from_numpy(store.read(np.arange(len(store))))
    assert [(row["x"], row["y"]) for row in rows] == places
    assert bundle.decoder is not None
    expected = bundle.decoder.model(bundle.encoder.features(tiles)["head"]).softmax(dim=1).numpy()
    found = np.array([[row[f"p_{name}"] for name in GLEASON_CLASSES] for row in rows])
    assert np.abs(found - expected).max() < 1e-5
    assert found.std(axis=0).max() > 1e-6  # not the same for every tile
    assert [row["class"] for row in rows] == [GLEASON_CLASSES[number] for number in expected.argmax(axis=1)]


def test_without_a_decoder_there_are_embeddings_and_no_pictures(
    small: Made, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    bundle = make_bundle(decoder=False)
    predict(small.dataset(), bundle, tmp_path / "out", batch=7)
    folder = tmp_path / "out" / small.truth.image_id
    assert {path.name for path in folder.iterdir()} == {"COMPLETE", "summary.json", "tiles.parquet"}
    with store_of(small, tmp_path) as store:
        expected = bundle.encoder.features(torch.from_numpy(store.read(np.arange(len(store)))))
    table = pq.read_table(folder / "tiles.parquet")
    assert table.column_names == ["x", "y", "side", "cls", "head"]
    for tap, width in (("cls", 128), ("head", 64)):
        found = np.array(table[tap].to_pylist(), np.float32)
        assert found.shape == (len(table), width)
        assert torch.allclose(torch.from_numpy(found), expected[tap], atol=1e-5)
    summary = json.loads((folder / "summary.json").read_bytes())
    assert summary["tissue_area_mm2"] == pytest.approx(len(table) * 0.112**2)
    assert not {"classes", "highest_grade"} & summary.keys()
    assert problems(tmp_path / "out") == []
