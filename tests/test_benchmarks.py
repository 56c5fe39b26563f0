"""That the benchmarks run and report: no figure is judged here, machines differ."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data.randomness import derive_seed
from pipeline.pretrain import _STREAM_INIT
from tiling import codec
from tiling.slide import open_slide
from tiling.tissue import tissue_mask

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for made slides: both scripts use the same."""
    return tmp_path_factory.mktemp("bench")


def run(script: str, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "error", str(ROOT / "benchmarks" / script), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def test_tiling_reports_rates_steps_and_fidelity(work: Path) -> None:
    report = run("tiling.py", "--quick", "--work", str(work), "--peers-dir", str(work / "none"))
    made = report["made 4,096 px"]
    # The same places, filters and pixels: whoever kept another number of tiles did other work.
    assert len(set(made["tiles"].values())) == 1
    assert made["tiles"]["Bony"] > 50
    assert set(made["tiles_per_cpu_s"]) == set(made["tiles"])
    rates = made["tiles_per_cpu_s"]
    assert rates["decode once (ceiling)"] > rates["decode once + encode (floor)"] > rates["OpenSlide + zarr"]
    assert made["of_floor"] == pytest.approx(rates["Bony"] / rates["decode once + encode (floor)"], rel=0.01)
    steps = made["steps_us_per_tile"]
    assert all(steps[name] > 0 for name in ("decode", "filter", "encode", "write, crc32c", "pictures", "the rest"))
    assert made["fidelity"]["psnr_db"] >= report["targets"]["psnr_db"]
    assert not any(path.is_dir() and not path.name.startswith("bony-kept") for path in work.iterdir())


def test_memory_reports_the_peak_of_a_worker(work: Path) -> None:
    report = run("tiling_memory.py", "--quick", "--work", str(work))
    runs = [value for name, value in report.items() if " px" in name]
    assert len(runs) == 3
    assert all(50 < one["peak_mb"] < 1000 for one in runs)
    assert all(one["tiles"] > 0 for one in runs)
    assert report["within_limit"] is True


def test_loader_reports_every_step_and_both_orders() -> None:
    report = run("loader.py", "--quick", "--batch", "20")
    steps = ("order", "read, threads 1", "copy", "views")
    assert set(report["share"]) == set(steps)
    assert sum(report["share"].values()) == pytest.approx(1, abs=0.01)
    assert all(
        report["ms_per_tile"][name]["wall"] > 0 for name in ("views", "read, threads 2", "pure decode, threads 2")
    )
    for figures in report["overlapped"].values():
        assert figures["samples_per_s"] == pytest.approx(1000 / figures["ms_per_tile"], rel=0.01)
        assert 0 <= figures["waited_share"] <= 1
    everywhere, by_shards = (report["epoch_order"][name] for name in ("global", "shards"))
    assert everywhere["slides_in_9600"] > by_shards["slides_in_9600"] > 100
    assert by_shards["held_mb"] == pytest.approx(everywhere["held_mb"], rel=0.05)


def test_augment_reports_both_pipelines_the_limit_and_ratios() -> None:
    report = run("augment.py", "--samples", "3", "--rounds", "2")
    cpu = report["cpu"]
    times = cpu["ms_per_sample"]
    assert set(times) == {
        "bony_original", "bony_histology", "original_bicubic", "original_bilinear", "sampling_alone",
    }  # fmt: skip
    assert all(time > 0 for time in times.values())
    assert times["sampling_alone"] < times["bony_original"]
    assert 0 < cpu["share_of_limit"] < 1
    assert cpu["original_bilinear_over_bony"] > 0
    assert (report["gpu"] is None) == (not torch.cuda.is_available())


def test_made_slide_is_a_pyramid_with_tissue_that_its_pattern_decides(tmp_path: Path) -> None:
    from benchmarks.made_slide import make_pattern, write_slide

    pattern = make_pattern(4096)
    np.testing.assert_array_equal(make_pattern(4096), pattern)
    path = tmp_path / "made.tiff"
    write_slide(path, 5000, pattern)
    with open_slide(path) as slide:
        assert [(level.width, level.height) for level in slide.levels] == [(5000, 5000), (1250, 1250), (312, 312)]
        assert slide.mpp == pytest.approx(0.5)
        settings = slide.jpeg(0)
        assert settings is not None
        assert (settings.subsampling, settings.rgb) == ("4:2:0", False)
        segment = slide.read_segment(0, 0)
        assert np.abs(segment.astype(int) - pattern[:512, :512]).mean() < 4
        # The ninth segment of a row starts the pattern again.
        np.testing.assert_array_equal(slide.read_segment(0, 8), segment)
        overview, _ = slide.overview()
        assert 0.3 < tissue_mask(overview).mean() < 0.5


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_steps_count_a_nested_call_for_itself_alone_and_inside_a_whole_step_for_that_step() -> None:
    from benchmarks.steps import WHOLE, Clock

    clock = Clock()
    inner = clock.wrap("decode", lambda: burn(0.04))
    cut = clock.wrap("cut", lambda: (burn(0.02), inner(), burn(0.02)))
    whole = clock.wrap(WHOLE[0], lambda: (burn(0.02), inner()))
    cut()
    assert clock.seconds == pytest.approx({"cut": 0.04, "decode": 0.04}, abs=0.01)
    whole()
    assert clock.seconds == pytest.approx({"cut": 0.04, "decode": 0.04, WHOLE[0]: 0.06}, abs=0.01)


def test_steps_leave_no_trace_and_say_when_a_name_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import steps

    encode = codec.encode
    with steps.timed_steps() as seconds:
        assert codec.encode is not encode
        codec.encode(np.zeros((224, 224, 3), np.uint8), "zstd", None)
    assert codec.encode is encode
    assert set(seconds) == {"encode"}
    monkeypatch.setitem(steps.STEPS, "pictures", ["tiling.pictures:no_such_name"])
    with pytest.raises(LookupError, match=r"tiling\.pictures:no_such_name is gone"), steps.timed_steps():
        pass
    assert codec.encode is encode


def test_the_slides_that_are_held_out_are_the_ones_that_were_drawn(shared_data: Path) -> None:
    from benchmarks import does_it_learn as learn

    seed, drawn = learn.draw_held_out(shared_data / "panda_gleason_tiles/manifest.csv")
    assert (seed, len(set(drawn))) == (0, 30)
    assert learn.HELD_OUT.read_text().split() == drawn


def test_neighbours_vote_as_the_original_knn_code_has_them_vote() -> None:
    from benchmarks import learn_judged as learn

    rng = np.random.default_rng(0)
    # All about as far from each other, so that the last of the 20 counts too.
    known, asked, labels = rng.normal(3, size=(90, 5)), rng.normal(3, size=(200, 5)), rng.integers(3, size=90)
    expected = []
    for one in asked:
        alike = [float(one @ other / np.linalg.norm(one) / np.linalg.norm(other)) for other in known]
        votes = [0.0, 0.0, 0.0]
        for place in sorted(range(90), key=lambda place: -alike[place])[:20]:
            votes[labels[place]] += np.exp(alike[place] / 0.07)
        expected.append(int(np.argmax(votes)))
    tiles = learn.Tiles(np.append(labels, np.zeros(200, np.int64)), np.arange(290), np.arange(290) >= 90)
    assert learn.by_neighbours(np.concatenate([known, asked]), tiles).tolist() == expected
    assert len(set(expected)) == 3


def test_slides_are_resampled_whole_within_their_class_and_the_same_for_all_contenders() -> None:
    from benchmarks import learn_judged as learn

    labels = np.repeat([0, 1], [12, 6])
    slides = np.array([0] * 8 + [1] * 4 + [2] * 3 + [3] * 3)
    hits = {"one": slides % 2 == 0, "other": slides % 2 == 1}
    drawn = learn.resampled(hits, labels, slides)
    # Of class 0 both slides, one of them twice, or the other twice: 8 of 12 tiles right, all, or none; so of class 1.
    assert {round(value, 6) for value in drawn["one"]} == {
        round((a + b) / 2, 6) for a in (0, 8 / 12, 1) for b in (0, 0.5, 1)
    }
    np.testing.assert_allclose(drawn["one"] + drawn["other"], 1)
    assert drawn["one"].mean() == pytest.approx(((1 + 0 + 2 * 8 / 12) / 4 + 0.5) / 2, abs=0.02)


def test_the_random_contender_is_what_the_run_begins_with(tmp_path: Path) -> None:
    from benchmarks import does_it_learn as learn
    from pipeline.methods import build_method
    from pipeline.runtime import Runtime

    settings = learn.config(tmp_path, tmp_path, seed=1, steps=40)
    encoder = learn.untrained(settings, 0.5)
    torch.manual_seed(derive_seed(1, _STREAM_INIT))
    begun = build_method(settings, Runtime(0, 1, torch.device("cpu")), None).networks()["teacher"].state_dict()
    assert encoder.head is not None
    for name, network in (("backbone", encoder.backbone), ("head", encoder.head)):
        assert all(torch.equal(value, begun[f"{name}.{key}"]) for key, value in network.state_dict().items())


@pytest.mark.slow
def test_does_it_learn_runs_again_from_what_is_there(tmp_path: Path, shared_data: Path) -> None:
    first = run("does_it_learn.py", "--quick", "--seeds", "0", "1", "--out", str(tmp_path))
    assert (first["slides"], first["tiles"]) == (30, 30)
    known = json.loads((tmp_path / "seed-0/run.json").read_text())
    assert known["slides"] == 75
    assert len(first["balanced_accuracy"]) == 3
    table = first["balanced_accuracy"]["kNN, held-out slides"]
    for point, low, high in table["pretrained, cls"]:
        assert 0 <= low <= point <= high <= 1
    for ours, random, apart in zip(
        table["pretrained, cls"], table["random, cls"], table["pretrained, cls - random, cls"], strict=True
    ):
        assert apart[0] == pytest.approx(ours[0] - random[0], abs=2e-4)
    assert first["training"]["seed 0"] != first["training"]["seed 1"]
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}
    assert len(times) == 4  # two seeds, trained and not
    assert run("does_it_learn.py", "--quick", "--seeds", "0", "1", "--out", str(tmp_path)) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")} == times


def test_train_step_reports_bonys_step_where_the_original_is_not_there() -> None:
    options = ["--model", "vit_tiny_patch16_224", "--batch", "2", "--steps", "1", "--rounds", "1", "--out-dim", "64"]
    report = run("train_step.py", *options)
    assert set(report["figures"]) == {"Bony", "Bony, views ready", "Bony, recompute"}
    assert report["flops_per_sample"] > 1e9
    for figures in report["figures"].values():
        assert 0 < figures["samples_per_s"] < report["limit"]["samples_per_s_at_peak"]
        assert figures["over_original"] is None
