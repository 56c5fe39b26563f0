"""Checkpoints: exact, never half there, never damaged unseen, never of another model."""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from pipeline import checkpoint
from pipeline.checkpoint import Position, list_checkpoints, newest_sound
from tiling import atomic
from tiling.errors import CheckpointError, DamageError

FILES = ("student.safetensors", "teacher.safetensors", "method.safetensors", "optimizer.safetensors", "state.json")


class Model:
    """A small stand-in for a method and its optimizer: all that a checkpoint holds."""

    def __init__(self, seed: int, width: int = 6, out: int = 3, centre: int = 4) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.student = nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.Linear(width, out))
        self.teacher = nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.Linear(width, out))
        self.centre = torch.randn(centre, generator=generator)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=0.1)
        with torch.no_grad():
            for tensor in (*self.student.parameters(), *self.teacher.parameters()):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
        for _ in range(2):
            self.student(torch.randn(8, 5, generator=generator)).square().sum().backward()
            self.optimizer.step()

    def save(self, run: Path, step: int, keep: int = 3) -> Path:
        networks, state = {"student": self.student, "teacher": self.teacher}, {"centre": self.centre}
        return checkpoint.save(run, Position(step, 10 * step), networks, state, self.optimizer, {"mpp": 0.5}, keep)

    def load(self, folder: Path) -> Position:
        networks, state = {"student": self.student, "teacher": self.teacher}, {"centre": self.centre}
        return checkpoint.load(folder, networks, state, self.optimizer)

    def tensors(self) -> dict[str, torch.Tensor]:
        """A copy of everything, by name."""
        parts = {"student": self.student.state_dict(), "teacher": self.teacher.state_dict(), "": {"c": self.centre}}
        parts |= {f"adam{number}": state for number, state in self.optimizer.state_dict()["state"].items()}
        return {f"{part}.{name}": value.clone() for part, values in parts.items() for name, value in values.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at steps 2 and 4, read only."""
    run = tmp_path_factory.mktemp("sound")
    Model(1).save(run, 2)
    Model(2).save(run, 4)
    return run


@pytest.fixture
def run(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "run")


# ---- what is saved ---------------------------------------------------------------------------------------------------


def test_loads_exactly_what_was_saved(run: Path) -> None:
    model = Model(3)
    assert not same(model.tensors(), Model(2).tensors())
    assert model.load(run / "checkpoints/step-00000004") == Position(4, 40)
    assert same(model.tensors(), Model(2).tensors())


def test_holds_tensors_and_json_only_and_names_the_newest(run: Path) -> None:
    folder = newest_sound(run)
    assert folder == run / "checkpoints/step-00000004"
    assert (run / "checkpoints/latest").read_text() == "step-00000004\n"
    assert {path.name for path in folder.iterdir()} == {*FILES, "COMPLETE"}
    assert {line.split("  ")[1] for line in (folder / "COMPLETE").read_text().splitlines()} == set(FILES)
    about = json.loads((folder / "state.json").read_bytes())
    assert (about["step"], about["samples_seen"], about["mpp"]) == (4, 40, 0.5)
    assert load_file(folder / "teacher.safetensors").keys() == Model(2).teacher.state_dict().keys()


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_keeps_the_newest(tmp_path: Path, keep: int) -> None:
    for step in range(1, 6):
        Model(step).save(tmp_path, step, keep)
        assert [int(folder.name[-8:]) for folder in list_checkpoints(tmp_path)] == list(range(1, step + 1))[-keep:]
    assert not (tmp_path / "checkpoints/work").exists()


def test_no_checkpoint_is_none_not_an_error(tmp_path: Path) -> None:
    assert newest_sound(tmp_path) is None


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FILES, "COMPLETE"])
@pytest.mark.parametrize("harm", [truncate, lambda path: flip(path, 4321), Path.unlink], ids=["cut", "flip", "gone"])
def test_damaged_newest_is_named_and_passed_over(
    run: Path, name: str, harm: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    harm(run / "checkpoints/step-00000004" / name)
    folder = newest_sound(run)
    assert folder == run / "checkpoints/step-00000002"
    said = capsys.readouterr().err
    # A changed COMPLETE that can still be read lists another digest: the file that has not got it is named.
    assert str(run / "checkpoints/step-00000004" / ("" if name == "COMPLETE" else name)) in said
    assert said.count("\n") == 1
    model = Model(3)
    assert model.load(folder).step == 2
    assert same(model.tensors(), Model(1).tensors())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from([*FILES, "COMPLETE"]), bit=st.integers(0, 10**6))
def test_any_one_bit_is_noticed(run: Path, name: str, bit: int) -> None:
    path = run / "checkpoints/step-00000004" / name
    flip(path, bit)
    try:
        assert newest_sound(run) == run / "checkpoints/step-00000002"
        with pytest.raises(DamageError, match=r"step-00000004"):
            Model(3).load(path.parent)
    finally:
        flip(path, bit)
    assert newest_sound(run) == path.parent


def test_all_damaged_is_an_error_not_a_fresh_start(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truncate(run / "checkpoints/step-00000002/student.safetensors")
    (run / "checkpoints/step-00000004/COMPLETE").unlink()
    with pytest.raises(CheckpointError, match="none of 2 checkpoints is sound"):
        newest_sound(run)
    said = capsys.readouterr().err
    assert "step-00000004/COMPLETE" in said
    assert "step-00000002/student.safetensors" in said


@pytest.mark.parametrize("harm", [truncate, Path.unlink])
def test_continuing_replaces_the_damaged_one(run: Path, harm: Callable[[Path], None]) -> None:
    harm(run / "checkpoints/step-00000004/COMPLETE")
    Model(5).save(run, 4)
    assert newest_sound(run) == run / "checkpoints/step-00000004"
    model = Model(3)
    model.load(run / "checkpoints/step-00000004")
    assert same(model.tensors(), Model(5).tensors())


def test_damaged_newer_ones_never_push_a_sound_one_out(run: Path) -> None:
    truncate(run / "checkpoints/step-00000004/student.safetensors")
    assert newest_sound(run) == run / "checkpoints/step-00000002"
    Model(3).save(run, 3, keep=1)
    assert newest_sound(run) == run / "checkpoints/step-00000003"


def test_other_format_version_is_refused(run: Path) -> None:
    folder = run / "checkpoints/step-00000004"
    about = json.loads((folder / "state.json").read_bytes()) | {"format_version": 99}
    atomic.write_json(folder / "state.json", about)
    atomic.seal(folder)
    with pytest.raises(CheckpointError, match="format version 99"):
        Model(3).load(folder)


# ---- another model ---------------------------------------------------------------------------------------------------


def deeper(model: Model) -> None:
    model.teacher.append(nn.Linear(3, 3))


def shallower(model: Model) -> None:
    del model.teacher[2]


def fewer_trained(model: Model) -> None:
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
    run: Path, sizes: dict[str, int], change: Callable[[Model], None] | None, named: str
) -> None:
    model = Model(3, **sizes)
    if change:
        change(model)
    before = model.tensors()
    with pytest.raises(CheckpointError, match=named) as caught:
        model.load(run / "checkpoints/step-00000004")
    assert "\n" not in str(caught.value)
    assert "step-00000004" in str(caught.value)
    assert same(model.tensors(), before)


# ---- kills -----------------------------------------------------------------------------------------------------------


def test_half_written_folder_is_never_taken_for_a_checkpoint_and_goes_with_the_next_save(run: Path) -> None:
    half = run / "checkpoints/work/step-00000006.4242"
    shutil.copytree(run / "checkpoints/step-00000004", half)
    truncate(half / "student.safetensors")
    (half / "COMPLETE").unlink()
    assert newest_sound(run) == run / "checkpoints/step-00000004"
    assert len(list_checkpoints(run)) == 2
    Model(5).save(run, 6)
    assert newest_sound(run) == run / "checkpoints/step-00000006"
    assert not half.exists()


def test_a_killed_save_leaves_the_one_before_or_its_own(tmp_path: Path, ranks: Callable[..., None]) -> None:
    """60 forked savers killed at random moments; the checks are in ``worker``, in a process that may fork."""
    ranks(__file__, 1, tmp_path)
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())
    assert len(outcomes) == 60
    assert sum(outcomes) > 5  # some saves were finished in time,
    assert sum(outcomes) < 55  # and some were cut off, or nothing has been tried


def worker(folder: Path) -> None:
    """Fork, save, kill, look; over and over."""
    torch.set_num_threads(1)
    dice = random.Random(5)
    model, run = Model(0, width=4000), folder / "run"
    start = time.monotonic()
    model.save(run, 0)
    took, last, outcomes = time.monotonic() - start, 0, []
    for step in range(1, 61):
        child = os.fork()
        if child == 0:
            with torch.no_grad():
                model.centre.fill_(step)
            model.save(run, step)
            os._exit(0)
        time.sleep(dice.uniform(0, 1.5 * took))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = newest_sound(run)
        position = model.load(found)
        assert position.step in (step, last), (position, step, last)
        assert torch.all(model.centre == position.step) or position.step == 0
        for other in list_checkpoints(run)[-3:]:  # a kill may also have hit the removal of an older one
            assert not atomic.damaged_files(other)
        outcomes.append(position.step == step)
        took *= 0.9 if outcomes[-1] else 1.1  # the machine's pace changes; half of the saves are to be cut off
        last = position.step
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
