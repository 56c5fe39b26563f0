"""Checkpoints: exact, the right ones kept, never of another model or format."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pipeline.boxes import CHECKPOINT
from pipeline.checkpoint import Position, list_checkpoints, newest_sound
from tiling import atomic
from tiling.errors import CheckpointError

FILES = {"student.safetensors", "teacher.safetensors", "method.safetensors", "optimizer.safetensors", "state.json"}
MakeModel = Callable[..., Any]


def steps(run: Path) -> list[int]:
    return [int(folder.name[-8:]) for folder in list_checkpoints(run)]


# ---- what is saved ---------------------------------------------------------------------------------------------------


def test_loads_exactly_what_was_saved(run: Path, model: MakeModel) -> None:
    loaded, expected = model(3), model(2).tensors()
    assert not loaded.equals(expected)
    assert loaded.load(run / "checkpoints/step-00000004") == Position(4, 40)
    assert loaded.equals(expected)


def test_holds_tensors_and_json_only_and_names_the_newest(run: Path, model: MakeModel) -> None:
    folder = newest_sound(run)
    assert folder == run / "checkpoints/step-00000004"
    assert (run / "checkpoints/latest").read_text() == "step-00000004\n"
    assert {path.name for path in folder.iterdir()} == {*FILES, "COMPLETE"}
    assert {line.split("  ")[1] for line in (folder / "COMPLETE").read_text().splitlines()} == FILES
    about = json.loads((folder / "state.json").read_bytes())
    assert (about["step"], about["samples_seen"], about["mpp"]) == (4, 40, 0.5)
    assert load_file(folder / "teacher.safetensors").keys() == model(2).teacher.state_dict().keys()


def test_a_sound_one_of_the_same_step_stays_and_is_the_latest(run: Path, model: MakeModel) -> None:
    before = (run / "checkpoints/step-00000004/COMPLETE").stat()
    (run / "checkpoints/latest").write_text("step-00000002\n")  # killed between the two renames
    model(2).save(run, 4)
    assert (run / "checkpoints/step-00000004/COMPLETE").stat() == before
    assert (run / "checkpoints/latest").read_text() == "step-00000004\n"


# ---- which are kept --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "keep_every", "kept"),
    [
        (1, 0, [7]), (2, 0, [6, 7]), (9, 0, [1, 2, 3, 4, 5, 6, 7]), (1, 1, [1, 2, 3, 4, 5, 6, 7]), (1, 3, [3, 6, 7]),
        (3, 3, [3, 5, 6, 7]), (2, 9, [6, 7]),
    ],
)  # fmt: skip
def test_keeps_the_newest_and_every_nth(
    tmp_path: Path, model: MakeModel, keep: int, keep_every: int, kept: list[int]
) -> None:
    for step in range(1, 8):
        model(step).save(tmp_path, step, keep, keep_every)
        assert steps(tmp_path)[-keep:] == list(range(1, step + 1))[-keep:]
    assert steps(tmp_path) == kept
    assert {path.name for path in (tmp_path / "checkpoints").iterdir() if not path.is_dir()} == {"latest"}
    assert len(list((tmp_path / "checkpoints").iterdir())) == len(kept) + 1


def test_what_is_no_checkpoint_is_not_touched(run: Path, model: MakeModel) -> None:
    others = [run / "checkpoints" / name for name in ("step-00000001.bak", "step-old", "notes")]
    for folder in others:
        folder.mkdir()
    model(5).save(run, 6, keep=1)
    assert steps(run) == [6]
    assert all(folder.is_dir() for folder in others)


def test_steps_of_nine_digits_come_after_those_of_eight(tmp_path: Path, model: MakeModel) -> None:
    for step in (99_999_999, 100_000_000):
        model(1).save(tmp_path, step)
    assert newest_sound(tmp_path) == tmp_path / "checkpoints/step-100000000"


def test_no_checkpoint_is_none_not_an_error(tmp_path: Path) -> None:
    assert newest_sound(tmp_path) is None


# ---- another format, another model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 99])
def test_an_older_or_newer_format_is_refused_and_said(run: Path, model: MakeModel, version: int) -> None:
    folder = run / "checkpoints/step-00000004"
    about = json.loads((folder / "state.json").read_bytes()) | {"format_version": version}
    atomic.write_json(folder / "state.json", about)
    atomic.seal(folder)
    # No older checkpoint is taken instead: its format is sound, and going back in silence would lose steps.
    assert newest_sound(run) == folder
    loaded = model(3)
    before = loaded.tensors()
    said = rf"step-00000004/state\.json.*format version {version}, .* reads {CHECKPOINT.version}"
    with pytest.raises(CheckpointError, match=said):
        loaded.load(folder)
    assert loaded.equals(before)


def deeper(model: Any) -> None:
    model.teacher.append(nn.Linear(3, 3))


def shallower(model: Any) -> None:
    del model.teacher[2]


def fewer_trained(model: Any) -> None:
    model.optimizer = torch.optim.AdamW(list(model.student.parameters())[:3])


@pytest.mark.parametrize(
    ("sizes", "change", "named"),
    [
        ({"width": 7}, None, r"tensor 0\.weight is \(6, 5\) in the checkpoint and \(7, 5\) in the model"),
        ({"out": 2}, None, r"tensor 2\.weight is \(3, 6\) in the checkpoint and \(2, 6\)"),
        ({"centre": 5}, None, r"tensor centre is \(4,\) in the checkpoint and \(5,\)"),
        ({}, deeper, r"teacher.*tensor 3\.weight is missing in the checkpoint and \(3, 3\)"),
        ({}, shallower, r"teacher.*tensor 2\.bias is \(3,\) in the checkpoint and missing in the model"),
        ({}, fewer_trained, r"optimizer.*tensor 3\.\w+ is .* in the checkpoint and missing in the model"),
    ],
)
def test_another_architecture_is_refused_and_nothing_is_filled(
    run: Path, model: MakeModel, sizes: dict[str, int], change: Callable[[Any], None] | None, named: str
) -> None:
    other = model(3, **sizes)
    if change:
        change(other)
    before = other.tensors()
    with pytest.raises(CheckpointError, match=named) as caught:
        other.load(run / "checkpoints/step-00000004")
    assert "\n" not in str(caught.value)
    assert "step-00000004" in str(caught.value)
    assert other.equals(before)
