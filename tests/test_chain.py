"""The main job on real input, by the contract's names, as real processes: slides to an evaluated encoder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

BIN = Path(sys.executable).parent
REPOSITORY = Path(__file__).parents[1]
SHORT = ["--train.steps", "6", "--train.batch_per_rank", "4", "--optim.warmup_steps", "2", "--train.log_every", "1"]


def run(*words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    command = [str(BIN / str(words[0])), *map(str, words[1:])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY, check=False)
    assert done.returncode == code, f"{command} gave {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def chain(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every command of the chain on slides of PANDA pixels; returns the folder of all boxes."""
    out = tmp_path_factory.mktemp("chain")
    store = out / "store"
    run("bony", "tile", "--dataset", "panda", "--root", shared_data / "panda_stitched", "--out", store, "--workers", 2)
    run("bony", "index", store)
    run("bony", "verify", store)
    config = ["--config", "jobs/configs/demo.yaml", "--data", store, "--out", out / "run", *SHORT]
    assert "Warning" not in run("torchrun", "--nproc-per-node", 2, "-m", "pipeline.pretrain", *config).stderr
    run("bony", "embed", "--encoder", out / "run", "--data", store, "--out", out / "features")
    places = ["--data", store, "--features", out / "features"]
    run("bony", "evaluate", "panda", *places, "--out", out / "result")
    return out


def test_every_box_verifies(chain: Path) -> None:
    for box in ("store", "run", "features", "result"):
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
    """Every slide of panda_stitched carries one label: 4 benign, 5 Gleason 3, 3 Gleason 4."""
    index = pq.read_table(chain / "store/index.parquet")
    of_slide = dict(zip(index["slide_id"].to_pylist(), index["label"].to_pylist(), strict=True))
    assert len(of_slide) == 12
    assert sorted(of_slide.values()) == [1] * 4 + [2] * 5 + [3] * 3
    pairs = set(zip(index["slide_id"].to_pylist(), index["label"].to_pylist(), strict=True))
    assert len(pairs) == 12
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
