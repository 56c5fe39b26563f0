"""Prediction as a job: continued, killed, refused, slides that are bad or empty, what is in memory meanwhile."""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image

from pipeline.bundle import Bundle
from pipeline.predict import predict, problems
from pipeline.scoring import Score
from tiling import datasets
from tiling.cut import Candidate, cut_slide
from tiling.datasets import Dataset
from tiling.errors import BonyError, UsageError
from tiling.phantom import PhantomSlide

pytestmark = pytest.mark.usefixtures("one_thread")

MakeBundle = Callable[..., Bundle]
RowsOf = Callable[[Path], list[dict[str, Any]]]


class Made(Protocol):
    """What is used here of a made slide, which is conftest's."""

    @property
    def path(self) -> Path: ...

    @property
    def truth(self) -> PhantomSlide: ...

    def score(self, candidates: Sequence[Candidate]) -> dict[str, np.ndarray]: ...

    def dataset(self) -> Dataset: ...

    def predict(self, out: Path, score: Score | None = None) -> Path: ...


def files_of(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.usefixtures("no_thread_stays")
def test_the_same_command_continues(
    folder_of_slides: Path, small: Made, make_bundle: MakeBundle, rows_of: RowsOf, tmp_path: Path
) -> None:
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
from shared import bundle_in_memory
from pipeline.predict import predict
from tiling import datasets

def score(candidates):
    Path(sys.argv[3]).touch()
    time.sleep(60)

predict(datasets.slides([Path(sys.argv[1])]), bundle_in_memory(), Path(sys.argv[2]), batch=5, score=score)
"""


def test_killed_half_way_nothing_half_stands(small: Made, rows_of: RowsOf, tmp_path: Path) -> None:
    (tmp_path / "shared.py").symlink_to(Path(__file__).with_name("conftest.py"))
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


def test_another_bundle_or_another_folder_is_refused(small: Made, make_bundle: MakeBundle, tmp_path: Path) -> None:
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


def test_a_slide_coarser_than_the_bundle_is_refused(small: Made, make_bundle: MakeBundle, tmp_path: Path) -> None:
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


def test_bad_slides_do_not_stop_the_others(
    folder_of_slides: Path, small: Made, make_bundle: MakeBundle, tmp_path: Path
) -> None:
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


def test_not_one_good_slide_leaves_nothing(
    folder_of_slides: Path, small: Made, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    for path in folder_of_slides.iterdir():
        path.write_bytes(b"no slide at all")
    with pytest.raises(BonyError, match=r"no slide could be predicted; the first one: .*a\.tiff"):
        predict(datasets.slides([folder_of_slides]), make_bundle(), tmp_path / "out", score=small.score)
    assert not (tmp_path / "out").exists()


def test_fluorescence_is_listed_as_doubtful(make_bundle: MakeBundle, tmp_path: Path) -> None:
    dark = np.random.default_rng(0).integers(0, 50, (1000, 1500, 3), np.uint8)
    tifffile.imwrite(tmp_path / "dapi.tiff", dark, tile=(256, 256), resolution=(2e4, 2e4), resolutionunit=3)
    done = predict(datasets.slides([tmp_path / "dapi.tiff"]), make_bundle(), tmp_path / "out")
    assert [(entry["left_out"], entry["reason"]) for entry in done.quarantined] == [
        (False, "does not look like bright-field: dark background")
    ]


@pytest.mark.parametrize("decoder", [True, False])
def test_an_empty_slide_has_empty_but_valid_files(decoder: bool, make_bundle: MakeBundle, tmp_path: Path) -> None:
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
    made: Callable[[str], Made],
    watched: list[weakref.ref[np.ndarray]],
    make_bundle: MakeBundle,
    rows_of: RowsOf,
    tmp_path: Path,
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


@pytest.mark.usefixtures("no_thread_stays")
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), BonyError("odd")])
def test_errors_of_the_networks_leave_no_thread_and_no_folder(
    error: Exception, small: Made, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    def score(candidates: Sequence[Candidate]) -> dict[str, np.ndarray]:
        raise error

    with pytest.raises(type(error), match=str(error)):
        predict(small.dataset(), make_bundle(), tmp_path / "out", batch=2, score=score)
    assert not (tmp_path / "out" / small.truth.image_id).exists()
    assert not (tmp_path / "out/.work").exists()


@pytest.mark.usefixtures("no_thread_stays")
def test_errors_while_cutting_reach_the_caller(
    small: Made, make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def failing(*arguments: Any) -> Iterator[Candidate]:
        for number, candidate in enumerate(cut_slide(*arguments)):
            if number == 12:
                raise BonyError("the disk is gone")
            yield candidate

    monkeypatch.setattr("pipeline.predict.cut_slide", failing)
    with pytest.raises(BonyError, match="the disk is gone"):
        predict(small.dataset(), make_bundle(), tmp_path / "out", batch=2, score=small.score)


def test_scores_that_are_not_finite_are_refused(small: Made, make_bundle: MakeBundle, tmp_path: Path) -> None:
    def score(candidates: Sequence[Candidate]) -> dict[str, np.ndarray]:
        return {"probabilities": np.full((len(candidates), 5), np.nan, np.float32)}

    with pytest.raises(BonyError, match="scores that are not finite"):
        predict(small.dataset(), make_bundle(), tmp_path / "out", score=score)
