"""Saving behind the back of training: what is written is what was there at the call, and no error is lost."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.checkpoint import Position, newest_sound, read_state, step_folder
from pipeline.saver import Saver
from tiling.errors import CheckpointError

MakeModel = Callable[..., Any]
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


@contextmanager
def nothing_is_written_yet(run: Path, step: int) -> Iterator[None]:
    """The thread finds a checkpoint of this step there, whose COMPLETE nobody writes before the end: a pipe."""
    listing = step_folder(run, step) / "COMPLETE"
    listing.parent.mkdir(parents=True)
    os.mkfifo(listing)
    yield
    listing.write_bytes(b"damaged\n")


def spoil(tensors: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.add_(1)


# ---- exact -----------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(60)
@pytest.mark.parametrize("device", DEVICES)
def test_a_step_does_not_wait_for_the_disk_and_what_it_changes_is_not_saved(
    tmp_path: Path, model: MakeModel, device: str
) -> None:
    trained, other = model(1, device=device), model(2, device=device)
    expected = trained.tensors()
    with Saver(tmp_path, keep=3) as saver:
        with nothing_is_written_yet(tmp_path, 1):
            trained.begin(saver, 1)
            spoil(trained.live())
            saver.poll()
        saver.wait()
        assert other.load(newest_sound(tmp_path)) == Position(1, 10)
    assert other.equals(expected)
    assert not trained.equals(expected)


@pytest.mark.parametrize("device", DEVICES)
def test_a_thread_that_trains_on_all_the_while_changes_nothing(tmp_path: Path, model: MakeModel, device: str) -> None:
    trained, other = model(1, width=20000, device=device), model(2, width=20000, device=device)
    may_train, stop, rounds = threading.Event(), threading.Event(), 0

    def train() -> None:
        nonlocal rounds
        while not stop.is_set():
            if may_train.wait(0.01):
                spoil(trained.live())
                rounds += 1

    trainer = threading.Thread(target=train)
    trainer.start()
    trained_meanwhile = 0
    try:
        with Saver(tmp_path, keep=9) as saver:
            for step in range(1, 9):
                expected = trained.tensors()
                trained.begin(saver, step)
                before = rounds
                may_train.set()
                saver.wait()
                trained_meanwhile += rounds - before
                may_train.clear()
                time.sleep(0.05)  # a round under way ends
                other.load(step_folder(tmp_path, step))
                assert other.equals(expected), step
    finally:
        stop.set()
        trainer.join()
    assert trained_meanwhile > 8


def test_values_that_describe_are_taken_at_the_call_too(tmp_path: Path, model: MakeModel) -> None:
    about = {"software": {"bony": "1"}}
    with Saver(tmp_path, keep=3) as saver, nothing_is_written_yet(tmp_path, 1):
        saver.save(Position(1, 2), *model(1).parts, about)
        about["software"]["bony"] = "2"
    assert read_state(step_folder(tmp_path, 1))["software"] == {"bony": "1"}


def test_tensors_that_come_and_go_between_saves_are_saved_as_they_are(tmp_path: Path, model: MakeModel) -> None:
    trained = model(1)
    optimizer = trained.optimizer = torch.optim.AdamW(trained.student.parameters(), lr=0.1)
    with Saver(tmp_path, keep=9) as saver:
        for step, frozen in enumerate([6, 2, 0, 0], 1):  # moments come with a parameter's first gradient
            trained.student(torch.randn(8, 5)).square().sum().backward()
            for parameter in list(trained.student.parameters())[:frozen]:
                parameter.grad = None
            optimizer.step()
            expected = trained.tensors()
            trained.write(saver, step)
            other = model(2)
            other.optimizer = torch.optim.AdamW(other.student.parameters(), lr=0.1)
            other.load(step_folder(tmp_path, step))
            assert other.equals(expected), step
    assert len(expected) == 2 * 9 + 1 + 6 * 3


def test_memory_that_was_prepared_is_used_for_every_save(tmp_path: Path, model: MakeModel) -> None:
    trained, other = model(1), model(2)
    with Saver(tmp_path, keep=3) as saver:
        saver.prepare(*trained.parts)
        saver.wait()
        prepared = dict(saver._files)
        for step in (1, 2):
            spoil(trained.live())
            trained.write(saver, step)
            assert {name: id(file) for name, file in saver._files.items()} == {n: id(f) for n, f in prepared.items()}
            other.load(step_folder(tmp_path, step))
            assert other.equals(trained.tensors())
    assert len(prepared) == 4


def test_any_networks_and_state_and_scalars_on_any_side(tmp_path: Path) -> None:
    networks = {"online": nn.Linear(2, 2), "predictor": nn.Linear(2, 1)}
    state = {"centre": torch.randn(3), "scale": torch.tensor(65536.0), "growth": torch.tensor(7, dtype=torch.int32)}
    optimizer = torch.optim.SGD(networks["online"].parameters(), lr=0.1, momentum=0.9)
    networks["online"](torch.randn(4, 2)).sum().backward()
    optimizer.step()
    with Saver(tmp_path, keep=1) as saver:
        saver.save(Position(1, 2), networks, state, optimizer, {})
    folder = step_folder(tmp_path, 1)
    assert {path.stem for path in folder.glob("*.safetensors")} == {"online", "predictor", "method", "optimizer"}


# ---- one at a time ---------------------------------------------------------------------------------------------------


def test_a_second_save_waits_for_the_first(tmp_path: Path, model: MakeModel) -> None:
    with Saver(tmp_path, keep=9) as saver:
        for step in (1, 2, 3):
            model(step, width=5000).begin(saver, step)
            assert all(step_folder(tmp_path, earlier).exists() for earlier in range(1, step))
    for step in (1, 2, 3):
        other = model(9, width=5000)
        other.load(step_folder(tmp_path, step))
        assert other.equals(model(step, width=5000).tensors())


def test_the_thread_ends_with_the_saver(tmp_path: Path, model: MakeModel) -> None:
    with Saver(tmp_path, keep=3) as saver:
        model(1).begin(saver, 1)
        assert any(thread.name.startswith("saver") for thread in threading.enumerate())
    assert not any(thread.name.startswith("saver") for thread in threading.enumerate())
    assert newest_sound(tmp_path) == step_folder(tmp_path, 1)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def failing(tmp_path: Path, model: MakeModel) -> Saver:
    """A saver whose save of step 2 fails, after one of step 1: a file lies where its folder should."""
    saver = Saver(tmp_path, keep=3)
    model(1).write(saver, 1)
    (tmp_path / "checkpoints/work").touch()
    model(2).begin(saver, 2)
    return saver


def poll_until_it_is_known(saver: Saver) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        saver.poll()
        time.sleep(0.001)


@pytest.mark.parametrize("ask", [poll_until_it_is_known, Saver.wait, Saver.close])
def test_an_error_of_the_thread_is_raised_once_by_whoever_asks_first(
    failing: Saver, ask: Callable[[Saver], None]
) -> None:
    with pytest.raises(CheckpointError, match="step-00000002: the checkpoint cannot be written"):
        ask(failing)
    failing.poll()
    failing.wait()
    failing.close()


def test_the_next_save_raises_it_and_the_one_after_is_written(tmp_path: Path, failing: Saver, model: MakeModel) -> None:
    with failing as saver:
        with pytest.raises(CheckpointError, match="step-00000002: the checkpoint cannot be written"):
            model(3).begin(saver, 3)
        (tmp_path / "checkpoints/work").unlink()
        model(3).begin(saver, 3)
    assert newest_sound(tmp_path) == step_folder(tmp_path, 3)


def test_poll_says_nothing_while_all_is_well_or_under_way(tmp_path: Path, model: MakeModel) -> None:
    with Saver(tmp_path, keep=3) as saver:
        saver.poll()
        with nothing_is_written_yet(tmp_path, 1):
            model(1).begin(saver, 1)
            saver.poll()
        saver.wait()
        saver.poll()
    assert newest_sound(tmp_path) == step_folder(tmp_path, 1)


def test_another_error_on_its_way_is_not_hidden(failing: Saver, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError, match="training"), failing:
        raise KeyError("training")
    assert "step-00000002: the checkpoint cannot be written" in capsys.readouterr().err


def test_an_error_that_is_not_the_disk_s_is_raised_too(tmp_path: Path, model: MakeModel) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"), Saver(tmp_path, keep=3) as saver:
        saver.save(Position(1, 2), *model(1).parts, {"config": object()})
    assert not step_folder(tmp_path, 1).exists()
    assert newest_sound(tmp_path) is None
