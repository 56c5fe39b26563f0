"""The whole job on real input, by the contract's names, as real processes: slides to a prediction on a new one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.bundle import open_bundle
from pipeline.features import read_features
from tiling.store import TileStore

BIN = Path(sys.executable).parent
REPOSITORY = Path(__file__).parents[1]
BOXES = ("store", "run", "features", "result", "bundle", "predictions")
LEFT_OUT = "30b5ee6b12c39a6b22f0ed0875e0452d"
SHORT = ["--train.steps", "6", "--train.batch_per_rank", "4", "--optim.warmup_steps", "2", "--train.log_every", "1"]


def run(*words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    command = [str(BIN / str(words[0])), *map(str, words[1:])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY, check=False)
    assert done.returncode == code, f"{command} gave {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def chain(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every command of the chain on slides of PANDA pixels but one; returns the folder of all boxes."""
    out = tmp_path_factory.mktemp("chain")
    store, root = out / "store", shared_data / "panda_stitched"
    slides = [path for path in sorted(root.glob("train_images/*.tiff")) if path.stem != LEFT_OUT]
    assert len(slides) == 11
    run("bony", "tile", *slides, "--dataset", "panda", "--root", root, "--out", store, "--workers", 2)
    run("bony", "index", store)
    run("bony", "verify", store)
    config = ["--config", "jobs/configs/demo.yaml", "--data", store, "--out", out / "run", *SHORT]
    assert "Warning" not in run("torchrun", "--nproc-per-node", 2, "-m", "pipeline.pretrain", *config).stderr
    run("bony", "embed", "--encoder", out / "run", "--data", store, "--out", out / "features")
    places = ["--data", store, "--features", out / "features"]
    run("bony", "evaluate", "panda", *places, "--out", out / "result")
    run("bony", "export", out / "run", "--decoder", out / "result", "--out", out / "bundle")
    run("bony", "verify", out / "bundle")
    new = [root / f"train_images/{LEFT_OUT}.tiff", shared_data / "wsi/CMU-1-Small-Region.svs"]
    run("bony", "predict", *new, "--bundle", out / "bundle", "--out", out / "predictions")
    run("bony", "report", *(out / box for box in BOXES), "--out", out / "report.html")
    return out


def test_every_box_verifies(chain: Path) -> None:
    for box in BOXES:
        assert "sound" in run("bony", "verify", chain / box).stdout


def test_run_logged_every_step_of_two_ranks(chain: Path) -> None:
    lines = [json.loads(line) for line in (chain / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(line["loss"]) and line["samples_per_s"] > 0 for line in lines)
    about = json.loads((chain / "run/run.json").read_text())
    assert (about["ranks"], about["global_batch"]) == (2, 8)
    assert any((chain / "run/tensorboard").iterdir())


def test_result_is_judged_on_slides_that_were_not_trained_on(chain: Path) -> None:
    result = json.loads((chain / "result/results.json").read_text())
    test = result["metrics"]["test"]
    assert {"accuracy", "balanced_accuracy", "macro_f1", "confusion", "per_class"} <= test.keys()
    assert np.sum(test["confusion"]) == test["n"] == result["counts"]["test"]["tiles"] > 0
    table = pq.read_table(chain / "result/predictions.parquet")
    parts: dict[str, set[str]] = {}
    for slide, part in zip(table["slide_id"].to_pylist(), table["part"].to_pylist(), strict=True):
        parts.setdefault(part, set()).add(slide)
    assert sorted(parts) == ["test", "train", "val"]
    assert sum(len(slides) for slides in parts.values()) == len(set.union(*parts.values()))


def test_labels_are_those_of_the_weak_masks(chain: Path, shared_data: Path) -> None:
    """Every slide of panda_stitched carries one label: 4 benign, 5 Gleason 3 (one is left out), 3 Gleason 4."""
    index = pq.read_table(chain / "store/index.parquet")
    of_slide = dict(zip(index["slide_id"].to_pylist(), index["label"].to_pylist(), strict=True))
    assert len(of_slide) == 11
    assert LEFT_OUT not in of_slide
    assert sorted(of_slide.values()) == [1] * 4 + [2] * 4 + [3] * 3
    pairs = set(zip(index["slide_id"].to_pylist(), index["label"].to_pylist(), strict=True))
    assert len(pairs) == 11
    listed = (shared_data / "panda_stitched/train.csv").read_text()
    assert all(slide in listed for slide in of_slide)


def test_continuing_a_finished_run_says_so_and_changes_nothing(chain: Path) -> None:
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (chain / "run/checkpoints").rglob("*"))
    words = ["--config", "jobs/configs/demo.yaml", "--data", chain / "store", "--out", chain / "run", *SHORT]
    done = run("bony", "pretrain", *words, "--train.batch_per_rank", 8)
    assert "all 6 steps are done already" in done.stderr
    assert sorted((path.name, path.stat().st_mtime_ns) for path in (chain / "run/checkpoints").rglob("*")) == before


def test_paper_protocol_splits_tiles_and_says_so(chain: Path) -> None:
    places = ["--data", chain / "store", "--features", chain / "features", "--out", chain / "paper"]
    done = run("bony", "evaluate", "panda", *places, "--protocol", "paper")
    assert "warning" in done.stderr
    result = json.loads((chain / "paper/results.json").read_text())
    assert result["protocol"] == "paper"
    assert any("tiles of one slide" in warning for warning in result["warnings"])


def test_prediction_on_slides_that_nobody_trained_on(chain: Path) -> None:
    for slide_id, size in ((LEFT_OUT, None), ("CMU-1-Small-Region", (2220, 2967))):
        folder = chain / "predictions" / slide_id
        summary = json.loads((folder / "summary.json").read_text())
        table = pq.read_table(folder / "tiles.parquet")
        assert summary["tiles"]["kept"] == len(table) > 10
        classes = summary["classes"]
        assert sum(found["tiles"] for found in classes.values()) == len(table)
        assert sum(found["area_mm2"] for found in classes.values()) == pytest.approx(
            summary["tissue_area_mm2"], rel=1e-3
        )
        shares = np.stack([table[f"p_{name}"].to_numpy() for name in classes])
        assert np.allclose(shares.sum(axis=0), 1, atol=1e-5)
        assert list(np.asarray(list(classes))[shares.argmax(axis=0)]) == table["class"].to_pylist()
        regions = json.loads((folder / "regions.geojson").read_text())
        points = np.concatenate(
            [np.asarray(ring) for feature in regions["features"] for ring in feature["geometry"]["coordinates"]]
        )
        width, height = size or (summary["width"], summary["height"])
        assert (summary["width"], summary["height"]) == (width, height)
        assert (points >= 0).all()
        assert (points <= (width, height)).all()
        with Image.open(folder / "heatmap.png") as picture:
            assert picture.size[0] > 800


def test_features_of_the_left_out_slide_are_those_its_prediction_used(chain: Path, shared_data: Path) -> None:
    """The bundle on a slide, and tiling, embedding and the decoder step by step, end at the same probabilities."""
    slide = shared_data / f"panda_stitched/train_images/{LEFT_OUT}.tiff"
    run("bony", "tile", slide, "--codec", "zstd", "--out", chain / "new/store")
    run("bony", "embed", "--encoder", chain / "bundle", "--data", chain / "new/store", "--out", chain / "new/features")
    with TileStore(chain / "new/store") as store:
        features = {"head": torch.from_numpy(read_features(chain / "new/features", store, "head"))}
        places = [store.index[name].to_numpy() for name in "xy"]
    decoder = open_bundle(chain / "bundle", torch.device("cpu")).decoder
    assert decoder is not None
    expected = decoder.probabilities(features).numpy()
    table = pq.read_table(chain / "predictions" / LEFT_OUT / "tiles.parquet")
    assert all((table[name].to_numpy() == place).all() for name, place in zip("xy", places, strict=True))
    found = np.stack([table[f"p_{name}"].to_numpy() for name in decoder.class_names], axis=1)
    assert np.abs(found - expected).max() < 1e-3


def test_the_model_card_is_enough(chain: Path, shared_data: Path, tmp_path: Path) -> None:
    """Its commands as they are written, in the bundle's folder, on a slide of one's own."""
    bundle = shutil.copytree(chain / "bundle", tmp_path / "bundle")
    lines = [line.strip() for line in (bundle / "MODEL_CARD.md").read_text().splitlines() if line.startswith("    ")]
    commands = [line for line in lines if line.startswith(("bony", "sha256sum"))]
    assert [command.split()[:2] for command in commands] == [
        ["sha256sum", "-c"],
        ["bony", "verify"],
        ["bony", "predict"],
    ]
    slide = str(shared_data / "wsi/CMU-1-Small-Region.svs")
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for command in [*commands, "bony verify ."]:
        words = command.replace("/path/to/slide.svs", slide).split()
        subprocess.run(words, cwd=bundle, env=environment, capture_output=True, check=True)
    ours, theirs = (path / "predictions/CMU-1-Small-Region" for path in (tmp_path, chain))
    for name in ("regions.geojson", "heatmap.png"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    refused = run("bony", "predict", slide, "--bundle", bundle, "--out", bundle / "predictions", code=2)
    assert "lies inside the bundle" in refused.stderr
    assert not (bundle / "predictions").exists()


def test_report_shows_every_box(chain: Path) -> None:
    page = (chain / "report.html").read_text()
    for box in BOXES:
        assert str(chain / box) in page
    assert page.count("data:image/png;base64,") >= 5
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
