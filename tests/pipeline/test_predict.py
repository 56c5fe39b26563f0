"""Prediction against known truth: made slides whose mask says every tile's class, decoded back out of the files."""

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
from PIL import Image
from torch import nn

from pipeline.bundle import Bundle, Decoder
from pipeline.commands.predict import run
from pipeline.downstream.fit import classifier
from pipeline.models.encoders import build_encoder
from pipeline.models.frozen import FrozenEncoder
from pipeline.models.heads import DinoHead
from pipeline.palette import class_colours
from pipeline.predict import predict, problems
from pipeline.scoring import Score
from tiling import datasets
from tiling.cut import Candidate, cut_slide
from tiling.datasets import Dataset
from tiling.errors import BonyError, UsageError
from tiling.labels import GLEASON_CLASSES
from tiling.phantom import PhantomSlide, make_slide, write_slide
from tiling.run import tile
from tiling.settings import TileSettings
from tiling.store import TileStore

pytestmark = pytest.mark.usefixtures("one_thread")

COLOURS = np.array(class_colours(GLEASON_CLASSES))
# Radboud's mask value -> class: background, stroma and benign glands (healthy), Gleason 3, 4, 5.
CLASS_OF_VALUE = np.array([0, 1, 1, 2, 3, 4])
NONE = -1


def make_bundle(decoder: bool = True, mpp: float = 0.5, sha256: str = "b" * 64, tile_px: int = 224) -> Bundle:
    """A bundle in memory: random networks whose decoder does not find all tiles alike."""
    torch.manual_seed(0)
    backbone = build_encoder("xcit_nano_12_p16_224").eval().requires_grad_(False)
    head = DinoHead(128, 64, 32, 16).eval().requires_grad_(False)
    triples = (0.6, 0.4, 0.5), (0.2, 0.3, 0.1)
    encoder = FrozenEncoder("xcit_nano_12_p16_224", backbone, head, *triples, mpp, "e" * 64, "s" * 64)
    model = classifier(64, 5, nn.Linear).eval().requires_grad_(False)
    graded = Decoder(model, "head", GLEASON_CLASSES, class_colours(GLEASON_CLASSES)) if decoder else None
    return Bundle(Path("none"), sha256, encoder, graded, TileSettings(tile_px=tile_px, mpp=mpp), {})


@dataclass(frozen=True)
class Made:
    """A made slide on disk, its truth, and how it is cut."""

    path: Path
    truth: PhantomSlide
    side: int  # of a tile, in level-0 pixels
    tile_px: int  # of the bundle
    mpp: float  # of the bundle
    slide_mpp: float | None = None  # override

    @property
    def true_mpp(self) -> float:
        return self.slide_mpp or 0.5

    def score(self, candidates: Sequence[Candidate]) -> dict[str, np.ndarray]:
        """An oracle: the mask's class under each tile."""
        found = [self.true_class(candidate.x, candidate.y) for candidate in candidates]
        return {"probabilities": (0.6 * np.eye(5)[found] + 0.08).astype(np.float32)}

    def true_class(self, x: int, y: int) -> int:
        """The class that covers most of the tile."""
        values = CLASS_OF_VALUE[self.truth.mask[y : y + self.side, x : x + self.side]]
        return int(np.bincount(values.ravel()).argmax())

    def true_tiles(self) -> dict[tuple[int, int], int]:
        """Class of each tile of the grid with at least half of it tissue, by its corner."""
        height, width = self.truth.mask.shape
        corners = [
            (x, y)
            for y in range(0, height - self.side + 1, self.side)
            for x in range(0, width - self.side + 1, self.side)
        ]
        tissue = self.truth.tissue
        return {
            (x, y): self.true_class(x, y)
            for x, y in corners
            if tissue[y : y + self.side, x : x + self.side].mean() >= 0.5
        }

    def dataset(self) -> Dataset:
        return datasets.slides([self.path])

    def predict(self, out: Path, score: Score | None = None) -> Path:
        """DIR/<slide_id> after a prediction by the oracle."""
        predict(
            self.dataset(),
            make_bundle(mpp=self.mpp, tile_px=self.tile_px),
            out,
            self.slide_mpp,
            score=score or self.score,
        )
        return out / self.truth.image_id


# Grade, size, tile side at level 0, in the bundle, its mpp, --slide-mpp: as it is, resampled, from level 1.
CASES = {
    "benign": ("benign", (1792, 2240), 224, 224, 0.5, None),
    "3": ("3", (2240, 2688), 224, 224, 0.5, None),
    "4": ("4", (2240, 2688), 224, 224, 0.5, None),
    "5": ("5", (2688, 2240), 224, 224, 0.5, None),
    "finer": ("4", (2240, 2688), 320, 160, 0.5, 0.25),
    "coarser": ("5", (2240, 1792), 256, 128, 1.0, None),
    "level 1": ("5", (1792, 2240), 256, 64, 2.0, None),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """A slide of CASES, made when first asked for; never changed."""
    root, known = tmp_path_factory.mktemp("made"), dict[str, Made]()

    def get(name: str) -> Made:
        if name not in known:
            grade, size, side, px, mpp, slide_mpp = CASES[name]
            slide = make_slide(7, grade, size=size)
            write_slide(slide, root)
            path = root / "train_images" / f"{slide.image_id}.tiff"
            known[name] = Made(path, slide, side, px, mpp, slide_mpp)
        return known[name]

    return get


@pytest.fixture(scope="module")
def predicted(made: Callable[[str], Made], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """DIR/<slide_id> of a slide of CASES, by the oracle; never changed."""
    known = dict[str, Path]()

    def get(name: str) -> Path:
        if name not in known:
            known[name] = made(name).predict(tmp_path_factory.mktemp("predicted") / "out")
        return known[name]

    return get


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


@pytest.mark.parametrize("name", CASES)
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


@pytest.mark.parametrize("name", CASES)
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


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / "tiles.parquet").to_pylist()
    return rows


@pytest.mark.parametrize("name", ["4", "finer", "coarser", "level 1"])
def test_rows_and_summary_say_what_the_mask_says(
    name: str, made: Callable[[str], Made], predicted: Callable[[str], Path]
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


def test_the_highest_grade_is_that_of_any_tile(small: Made, tmp_path: Path) -> None:
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


def test_a_decoder_that_does_not_grade_says_nothing_of_grades(made: Callable[[str], Made], tmp_path: Path) -> None:
    bundle = make_bundle()
    assert bundle.decoder is not None
    other = replace(bundle.decoder, class_names=("a", "b", "c", "d", "e"))
    done = predict(made("4").dataset(), replace(bundle, decoder=other), tmp_path / "out", score=made("4").score)
    assert "highest_grade" not in done.summaries[0]
    assert list(done.summaries[0]["classes"]) == ["a", "b", "c", "d", "e"]


def test_a_level_of_a_crooked_downsample(tmp_path: Path) -> None:
    """Level 1 is 4.004 times smaller: tiles differ by a pixel of level 0, and join without gap or overlap."""
    noise = np.random.default_rng(0).integers(60, 200, (165, 231, 3), np.uint8)
    levels = [cv2.resize(noise, (2310, 1650)), cv2.resize(noise, (577, 412))]
    downsample = (2310 / 577 + 1650 / 412) / 2
    with tifffile.TiffWriter(tmp_path / "crooked.tiff") as file:
        for number, (level, ratio) in enumerate(zip(levels, (1, downsample), strict=True)):
            scale: dict[str, Any] = {"resolution": (2e4 / ratio, 2e4 / ratio), "resolutionunit": 3}
            file.write(level, tile=(256, 256), subfiletype=number, metadata=None, **scale)

    def score(candidates: Sequence[Candidate]) -> dict[str, np.ndarray]:
        return {"probabilities": np.eye(5, dtype=np.float32)[[(one.x + one.y) // 256 % 2 for one in candidates]]}

    bundle = make_bundle(mpp=2.0, tile_px=64)
    predict(datasets.slides([tmp_path / "crooked.tiff"]), bundle, tmp_path / "out", score=score)
    edges = np.rint(downsample * 64 * np.arange(10)).astype(int).tolist()
    assert {b - a for a, b in pairwise(edges)} == {256, 257}
    places = {(row["x"], row["y"]) for row in rows_of(tmp_path / "out/crooked")}
    assert places == {(x, y) for x in edges[:9] for y in edges[:6]}
    painted = np.zeros((1650, 2310), int)
    for feature in json.loads((tmp_path / "out/crooked/regions.geojson").read_bytes())["features"]:
        painted += raster(feature["geometry"]["coordinates"], (1650, 2310))
    assert (painted[: edges[6], : edges[9]] == 1).all()
    assert painted.sum() == edges[6] * edges[9]


def store_of(made: Made, root: Path) -> TileStore:
    """The slide's tiles, cut and stored without loss by `bony tile`."""
    tile(made.dataset(), root / "store", TileSettings(codec="zstd"))
    return TileStore(root / "store")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A slide of some 20 tiles, for the real networks and for what has nothing to do with classes."""
    root, slide = tmp_path_factory.mktemp("small"), make_slide(3, "4", size=(1120, 1344))
    write_slide(slide, root)
    return Made(root / "train_images" / f"{slide.image_id}.tiff", slide, 224, 224, 0.5)


def test_the_bundles_networks_score_the_tiles_that_tile_cuts(small: Made, tmp_path: Path) -> None:
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


def test_without_a_decoder_there_are_embeddings_and_no_pictures(small: Made, tmp_path: Path) -> None:
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


def files_of(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def folder_of_slides(small: Made, tmp_path: Path) -> Path:
    """Three times the small slide, under names of its own."""
    (tmp_path / "slides").mkdir()
    for name in ("a", "b", "c"):
        shutil.copy(small.path, tmp_path / f"slides/{name}.tiff")
    return tmp_path / "slides"


def test_the_same_command_continues(folder_of_slides: Path, small: Made, tmp_path: Path) -> None:
    """Stopped in the second slide, nothing half stands; continued, all ends as in one go."""
    slides, calls = datasets.slides([folder_of_slides]), 0

    def stopped(candidates: Sequence[Candidate]) -> dict[str, np.ndarray]:
        nonlocal calls
        calls += 1
        if calls > 5:
            raise KeyboardInterrupt
        return small.score(candidates)

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        predict(slides, make_bundle(), out, batch=5, score=stopped)
    assert sorted(path.name for path in out.iterdir()) == ["a", "predictions.json"]
    assert threading.active_count() == 1
    tiles = 0

    def counting(candidates: Sequence[Candidate]) -> dict[str, np.ndarray]:
        nonlocal tiles
        tiles += len(candidates)
        return small.score(candidates)

    done = predict(slides, make_bundle(), out, batch=5, score=counting)
    assert tiles == 2 * len(rows_of(out / "a"))
    assert [summary["slide_id"] for summary in done.summaries] == ["a", "b", "c"]
    predict(slides, make_bundle(), tmp_path / "at_once", batch=5, score=small.score)
    assert files_of(out) == files_of(tmp_path / "at_once")


KILLED = """
import sys, time
from pathlib import Path
import tests_predict as here
from tiling import datasets

def score(candidates):
    Path(sys.argv[3]).touch()
    time.sleep(60)

here.predict(datasets.slides([Path(sys.argv[1])]), here.make_bundle(), Path(sys.argv[2]), batch=5, score=score)
"""


def test_killed_half_way_nothing_half_stands(small: Made, tmp_path: Path) -> None:
    (tmp_path / "tests_predict.py").symlink_to(__file__)
    (tmp_path / "killed.py").write_text(KILLED)
    out, mark = tmp_path / "out", tmp_path / "mark"
    process = subprocess.Popen([sys.executable, tmp_path / "killed.py", small.path, out, mark], cwd=tmp_path)
    try:
        end = time.monotonic() + 60
        while not mark.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        assert mark.exists()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (out / small.truth.image_id).exists()
    assert problems(out) == []
    folder = small.predict(out)
    assert problems(out) == []
    assert len(rows_of(folder)) > 10


def test_a_slide_made_broken_is_made_again(small: Made, tmp_path: Path) -> None:
    folder = small.predict(tmp_path / "out")
    before = files_of(folder)
    for name in before:
        if name != "COMPLETE":
            data = bytearray((folder / name).read_bytes())
            data[len(data) // 2] ^= 1
            (folder / name).write_bytes(data)
            assert problems(tmp_path / "out") == [f"{folder / name}: sha256 differs from COMPLETE"]
            small.predict(tmp_path / "out")
            assert problems(tmp_path / "out") == []
    assert files_of(folder) == before


def test_another_bundle_or_another_folder_is_refused(small: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    small.predict(out)
    before = files_of(out)
    with pytest.raises(UsageError, match="predictions of another bundle; choose another --out"):
        predict(small.dataset(), make_bundle(sha256="c" * 64), out, score=small.score)
    with pytest.raises(UsageError, match=r"stands there already, with 0.5 um per level-0 pixel, not 0.25"):
        predict(small.dataset(), make_bundle(), out, 0.25, score=small.score)
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / small.path.name
    other.write_bytes(small.path.read_bytes() + b"0")
    with pytest.raises(UsageError, match="stands there already, of another file"):
        predict(datasets.slides([other]), make_bundle(), out, score=small.score)
    assert files_of(out) == before
    predict(small.dataset(), make_bundle(), out, 0.5, score=small.score)  # the very scale it was made with
    with pytest.raises(UsageError, match="exists and holds no predictions"):
        predict(small.dataset(), make_bundle(), tmp_path / "other", score=small.score)
    with pytest.raises(UsageError, match="slide_mpp is 40"):
        predict(small.dataset(), make_bundle(), tmp_path / "new", 40, score=small.score)
    with pytest.raises(UsageError, match="--batch is 0"):
        predict(small.dataset(), make_bundle(), tmp_path / "new", batch=0, score=small.score)
    assert not (tmp_path / "new").exists()


def test_a_slide_coarser_than_the_bundle_is_refused(small: Made, tmp_path: Path) -> None:
    with pytest.raises(
        BonyError, match=r"finest level has 0.5 um/px, coarser than the 0.25 .*bundle needs 0.25 um"
    ) as error:
        predict(small.dataset(), make_bundle(mpp=0.25), tmp_path / "out", score=small.score)
    assert small.path.name in str(error.value)
    assert not (tmp_path / "out").exists()


def spoil(path: Path, number: int) -> None:
    """Overwrite one compressed tile of level 0."""
    with tifffile.TiffFile(path) as tiff:
        at, size = tiff.pages[0].dataoffsets[number], tiff.pages[0].databytecounts[number]
    data = bytearray(path.read_bytes())
    data[at : at + size] = np.random.default_rng(0).bytes(size)
    path.write_bytes(data)


def test_bad_slides_do_not_stop_the_others(folder_of_slides: Path, small: Made, tmp_path: Path) -> None:
    (folder_of_slides / "b.tiff").write_bytes((folder_of_slides / "b.tiff").read_bytes()[:5000])
    spoil(folder_of_slides / "c.tiff", 4)
    Image.fromarray(small.truth.image).save(folder_of_slides / "d.png")
    out = tmp_path / "out"
    done = predict(datasets.slides([folder_of_slides]), make_bundle(), out, score=small.score)
    lines = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["slide_id"], line["left_out"]) for line in lines] == [("b", True), ("c", False), ("d", True)]
    assert tuple(lines) == done.quarantined
    assert "tiles lie on damaged segments and were dropped" in lines[1]["reason"]
    assert "does not say its scale" in lines[2]["reason"]
    assert "--slide-mpp" in lines[2]["reason"]
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["a", "c"]
    whole, damaged = (json.loads((out / name / "summary.json").read_bytes())["tiles"] for name in ("a", "c"))
    assert whole["damaged"] == 0 < damaged["damaged"]
    assert whole["kept"] > damaged["kept"]
    with (out / "summary.csv").open() as file:
        assert [(row["slide_id"], row["damaged_tiles"]) for row in csv.DictReader(file)] == [
            ("a", "0"),
            ("c", str(damaged["damaged"])),
        ]
    # Given its scale, the picture is predicted, and leaves the list; the others' lines stay.
    again = predict(datasets.slides([folder_of_slides / "d.png"]), make_bundle(), out, 0.5, score=small.score)
    assert again.quarantined == ()
    assert again.summaries[0]["slide_mpp_overridden"] is True
    assert again.summaries[0]["stated_mpp"] is None
    lines = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [line["slide_id"] for line in lines] == ["b", "c"]


def test_not_one_good_slide_leaves_nothing(folder_of_slides: Path, small: Made, tmp_path: Path) -> None:
    for path in folder_of_slides.iterdir():
        path.write_bytes(b"no slide at all")
    with pytest.raises(BonyError, match=r"no slide could be predicted; the first one: .*a\.tiff"):
        predict(datasets.slides([folder_of_slides]), make_bundle(), tmp_path / "out", score=small.score)
    assert not (tmp_path / "out").exists()


def test_fluorescence_is_listed_as_doubtful(tmp_path: Path) -> None:
    dark = np.random.default_rng(0).integers(0, 50, (1000, 1500, 3), np.uint8)
    tifffile.imwrite(tmp_path / "dapi.tiff", dark, tile=(256, 256), resolution=(2e4, 2e4), resolutionunit=3)
    done = predict(datasets.slides([tmp_path / "dapi.tiff"]), make_bundle(), tmp_path / "out")
    assert [(entry["left_out"], entry["reason"]) for entry in done.quarantined] == [
        (False, "does not look like bright-field: dark background")
    ]


@pytest.mark.parametrize("decoder", [True, False])
def test_an_empty_slide_has_empty_but_valid_files(decoder: bool, tmp_path: Path) -> None:
    white = np.full((1000, 1500, 3), 245, np.uint8)
    tifffile.imwrite(tmp_path / "white.tiff", white, tile=(256, 256), resolution=(2e4, 2e4), resolutionunit=3)
    done = predict(datasets.slides([tmp_path / "white.tiff"]), make_bundle(decoder), tmp_path / "out")
    folder = tmp_path / "out/white"
    assert done.summaries[0]["remark"] == "no tissue found"
    assert done.quarantined == ()
    table = pq.read_table(folder / "tiles.parquet")
    assert len(table) == 0
    assert {"x", "y", "side", "class" if decoder else "head"} <= set(table.column_names)
    if decoder:
        assert json.loads((folder / "regions.geojson").read_bytes()) == {"type": "FeatureCollection", "features": []}
        with Image.open(folder / "heatmap.png") as image:
            assert image.convert("RGB").getpixel((600, 400)) == (245, 245, 245)
        assert done.summaries[0]["highest_grade"] is None


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[np.ndarray]]:
    """Weak references to the pixels of every kept tile that was cut."""
    cut: list[weakref.ref[np.ndarray]] = []

    def watching(*arguments: Any) -> Iterator[Candidate]:
        for candidate in cut_slide(*arguments):
            if candidate.tile is not None and not candidate.reason:
                cut.append(weakref.ref(candidate.tile))
            yield candidate

    monkeypatch.setattr("pipeline.predict.cut_slide", watching)
    return cut


def test_few_tiles_are_in_memory_and_the_next_are_cut_meanwhile(
    made: Callable[[str], Made], watched: list[weakref.ref[np.ndarray]], tmp_path: Path
) -> None:
    slide, batch, scored, most = made("3"), 4, 0, 0

    def score(candidates: Sequence[Candidate]) -> dict[str, np.ndarray]:
        nonlocal scored, most
        scored += len(candidates)
        end = time.monotonic() + 20
        while len(candidates) == batch and len(watched) < min(scored + batch, total) and time.monotonic() < end:
            time.sleep(0.001)
        assert len(watched) >= min(scored + batch, total), "the next batch waits for this one"
        most = max(most, sum(tile() is not None for tile in watched))
        return slide.score(candidates)

    total = len(rows_of(slide.predict(tmp_path / "first")))
    watched.clear()
    predict(slide.dataset(), make_bundle(), tmp_path / "out", batch=batch, score=score)
    assert scored == total > 8 * batch
    assert most <= 2 * batch + 1


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), BonyError("odd")])
def test_errors_of_the_networks_leave_no_thread_and_no_folder(error: Exception, small: Made, tmp_path: Path) -> None:
    def score(candidates: Sequence[Candidate]) -> dict[str, np.ndarray]:
        raise error

    with pytest.raises(type(error), match=str(error)):
        predict(small.dataset(), make_bundle(), tmp_path / "out", batch=2, score=score)
    assert threading.active_count() == 1
    assert not (tmp_path / "out" / small.truth.image_id).exists()
    assert not (tmp_path / "out/.work").exists()


def test_errors_while_cutting_reach_the_caller(small: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    def failing(*arguments: Any) -> Iterator[Candidate]:
        for number, candidate in enumerate(cut_slide(*arguments)):
            if number == 12:
                raise BonyError("the disk is gone")
            yield candidate

    monkeypatch.setattr("pipeline.predict.cut_slide", failing)
    with pytest.raises(BonyError, match="the disk is gone"):
        predict(small.dataset(), make_bundle(), tmp_path / "out", batch=2, score=small.score)
    assert threading.active_count() == 1


def test_scores_that_are_not_finite_are_refused(small: Made, tmp_path: Path) -> None:
    def score(candidates: Sequence[Candidate]) -> dict[str, np.ndarray]:
        return {"probabilities": np.full((len(candidates), 5), np.nan, np.float32)}

    with pytest.raises(BonyError, match="scores that are not finite"):
        predict(small.dataset(), make_bundle(), tmp_path / "out", score=score)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--bundle` gives the bundle in memory."""
    monkeypatch.setattr("pipeline.bundle.open_bundle", lambda path, device: make_bundle())


@pytest.mark.usefixtures("opened")
def test_the_command_prints_a_table_and_says_where_things_are(
    folder_of_slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(folder_of_slides), "--bundle", "bundle", "--out", str(tmp_path / "out")]
    assert run(words) == 0
    said = capsys.readouterr()
    assert "1/3 a: " in said.err
    for word in ("slide", "mm2", "gleason5", "highest grade", "100.0%", str(tmp_path / "out")):
        assert word in said.out
    (folder_of_slides / "z.tiff").write_bytes(b"no slide")
    assert run(words) == 3
    said = capsys.readouterr()
    assert "quarantine.jsonl: 1 slides left out or damaged" in said.out
    assert "1/4" not in said.err
    Image.fromarray(make_slide(3, "4", size=(512, 512)).image).save(tmp_path / "scan.png")
    assert run([str(tmp_path / "scan.png"), *words[1:], "--slide-mpp", "0.25", "--batch", "3"]) == 0
    assert json.loads((tmp_path / "out/scan/summary.json").read_bytes())["slide_mpp"] == 0.25


@pytest.mark.usefixtures("opened")
def test_pictures_may_not_land_among_the_slides(folder_of_slides: Path) -> None:
    with pytest.raises(UsageError, match="would count as slides"):
        run([str(folder_of_slides), "--bundle", "bundle", "--out", str(folder_of_slides / "predictions")])


def test_help_needs_no_torch() -> None:
    program = (
        "import sys, pipeline.commands.predict as command\n"
        "try: command.run(['--help'])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "bony predict slide.svs --bundle bundle --out predictions" in done.stdout
