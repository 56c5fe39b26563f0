"""Which run may be continued, and from which checkpoint; that it ends as if it had not stopped is in test_faults."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.checkpoint import newest_sound
from pipeline.commands.parser import pretrain_config
from pipeline.monitor import read_metrics
from pipeline.pretrain import pretrain
from tiling.errors import StoreError, UsageError

# ---- which RUN may be continued --------------------------------------------------------------------------------------


@pytest.fixture
def started(_tiny: None, tmp_path: Path, words: Callable[..., list[str]]) -> Iterator[Path]:
    """A run of 4 steps that has lost its last checkpoint: it stands at step 2."""
    run = tmp_path / "started"
    pretrain(pretrain_config(words(run)))
    shutil.rmtree(run / "checkpoints/step-00000004")
    return run


def test_a_finished_run_is_left_alone(started: Path, words: Callable[..., list[str]]) -> None:
    pretrain(pretrain_config(words(started)))
    before = {path: path.read_bytes() for path in started.rglob("*") if path.is_file()}
    pretrain(pretrain_config(words(started)))
    assert {path: path.read_bytes() for path in started.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "spread",
    [
        {"train.batch_per_rank": 4, "train.accumulate": 1},
        {"train.batch_per_rank": 1, "train.accumulate": 4},
        {"checkpoint.every": 1, "checkpoint.keep": 9, "train.log_every": 2, "train.threads": 2},
    ],
)
def test_how_the_work_is_spread_may_change(
    started: Path, words: Callable[..., list[str]], spread: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(pretrain_config(words(started, spread)))
    assert "step-00000002 at step 2" in capsys.readouterr().err
    about = json.loads((newest_sound(started) / "state.json").read_bytes())
    assert (about["step"], about["samples_seen"]) == (4, 16)
    assert [line["step"] for line in read_metrics(started)] == (
        [1, 2, 3, 4] if "train.log_every" not in spread else [1, 2, 4]
    )


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"method.out_dim": 32}, "method.out_dim = 64, not 32"),
        ({"optim.lr": 0.01}, "optim.lr = 0.064, not 0.01"),
        ({"train.steps": 5}, "train.steps = 4, not 5"),
        ({"train.seed": 1}, "train.seed = 0, not 1"),
        ({"views.local_crops": 3}, "views.local_crops = 2, not 3"),
        ({"views.mean": "[0.5,0.5,0.5]"}, "views.mean"),
        ({"train.batch_per_rank": 4}, "4 samples a step, not 8"),
        ({"train.accumulate": 3}, "4 samples a step, not 6"),
    ],
)
def test_another_config_is_refused_naming_the_key(
    started: Path, words: Callable[..., list[str]], changes: dict[str, object], key: str
) -> None:
    before = {path: path.stat().st_mtime_ns for path in started.rglob("*")}
    with pytest.raises(UsageError, match=key) as caught:
        pretrain(pretrain_config(words(started, changes)))
    assert "\n" not in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in started.rglob("*")} == before


def test_another_store_is_refused(started: Path, other_store: Path, words: Callable[..., list[str]]) -> None:
    with pytest.raises(StoreError, match="not what this run was started on"):
        pretrain(pretrain_config(words(started, data=other_store)))


def test_the_same_store_elsewhere_is_accepted(
    started: Path, store: Path, tmp_path: Path, words: Callable[..., list[str]]
) -> None:
    moved = shutil.copytree(store, tmp_path / "moved")
    pretrain(pretrain_config(words(started, data=moved)))
    assert newest_sound(started).name == "step-00000004"


@pytest.mark.usefixtures("_tiny")
def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path: Path, words: Callable[..., list[str]]) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match="is no run"):
        pretrain(pretrain_config(words(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_falls_back_past_a_damaged_checkpoint_and_ends_the_same(
    started: Path, words: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    options = words(started, {"checkpoint.every": 1})
    pretrain(pretrain_config(options))
    straight = load_file(started / "checkpoints/step-00000004/student.safetensors")
    for name in ("step-00000004/optimizer.safetensors", "step-00000003/teacher.safetensors"):
        os.truncate(started / "checkpoints" / name, 1000)
    capsys.readouterr()
    pretrain(pretrain_config(options))
    said = capsys.readouterr().err
    for name in ("step-00000004/optimizer.safetensors", "step-00000003/teacher.safetensors"):
        assert f"damaged checkpoint passed over: {started}/checkpoints/{name}" in said
    assert "step-00000002 at step 2" in said
    assert newest_sound(started).name == "step-00000004"
    again = load_file(started / "checkpoints/step-00000004/student.safetensors")
    assert all(torch.equal(again[name], value) for name, value in straight.items())
    assert [line["step"] for line in read_metrics(started)] == [1, 2, 3, 4]


# ---- first weights ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
def test_a_run_begins_with_another_runs_teacher_and_says_so(
    words: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    pretrain(pretrain_config(words(first, {"train.steps": 1})))
    teacher = load_file(newest_sound(first) / "teacher.safetensors")
    options = {
        "model.init_from": first,
        "train.steps": 2,
        "checkpoint.every": 1,
        "optim.lr": 1e-9,
        "optim.lr_end": 1e-9,
    }
    capsys.readouterr()
    pretrain(pretrain_config(words(second, options)))
    assert f"beginning with the teacher of step 1 of {first}" in capsys.readouterr().err
    begun = load_file(second / "checkpoints/step-00000001/student.safetensors")
    parameters = [name for name in begun if "running_" not in name and "num_batches" not in name]
    assert max(float((begun[name] - teacher[name]).abs().max()) for name in parameters) < 1e-6
    shutil.rmtree(first)  # not asked for again
    shutil.rmtree(second / "checkpoints/step-00000002")
    pretrain(pretrain_config(words(second, options)))
    about = json.loads((newest_sound(second) / "state.json").read_bytes())
    assert about["step"] == 2
    assert about["begins_with"]["what"].startswith("teacher of step 1")
    assert len(about["begins_with"]["sha256"]) == 64


@pytest.mark.usefixtures("one_thread")
def test_first_weights_that_are_not_there_leave_no_run(words: Callable[..., list[str]], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        pretrain(pretrain_config(words(tmp_path / "run", {"model.init_from": tmp_path / "nothing"})))
    assert not (tmp_path / "run").exists()
