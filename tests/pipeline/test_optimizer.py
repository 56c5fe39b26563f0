"""The step's precision: the loss's scale in fp16, what the host reads, torch.compile; clipping is in test_trainer."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.commands.parser import pretrain_config
from pipeline.data.loader import Batch
from pipeline.methods import build_method
from pipeline.methods.protocol import Moment
from pipeline.optimizer import LossScale
from pipeline.runtime import Runtime, one_device
from pipeline.trainer import Trainer
from tiling.store import TileStore

Words = Callable[..., list[str]]
CPU = torch.device("cpu")


def made_trainer(words: list[str], device: torch.device = CPU) -> Trainer:
    config = pretrain_config(words)
    torch.manual_seed(7)
    with TileStore(config.data) as store:
        return Trainer(config, Runtime(0, 1, device), build_method(config, Runtime(0, 1, device), store))


def batches(step: int, number: int = 2, device: torch.device = CPU) -> list[Batch]:
    """Micro-batches of 2 tiles that follow from the step."""
    made = []
    for micro in range(number):
        ids = np.arange(2) + 10 * step + 2 * micro
        pixels = np.random.default_rng(ids.tolist()).integers(0, 256, (2, 48, 48, 3), np.uint8)
        made.append(Batch(ids, np.zeros_like(ids), torch.from_numpy(pixels).to(device)))
    return made


def step(trainer: Trainer, number: int) -> dict[str, torch.Tensor]:
    device = trainer.runtime.device
    return trainer.step(iter(batches(number, device=device)), Moment(number, 100, 1.0)).figures


def parameters(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.method.student.parameters()]


# ---- the loss's scale ------------------------------------------------------------------------------------------------


def test_scale_follows_pytorchs_rule() -> None:
    ours = LossScale(CPU, active=True)
    theirs = torch.amp.GradScaler("cpu", init_scale=LossScale.START, growth_interval=LossScale.GROW_AFTER)
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    for number in range(2 * LossScale.GROW_AFTER + 9):
        overflow = number in (3, 4, 1000, LossScale.GROW_AFTER + 1007)
        theirs.scale(parameter.sum()).backward()
        if overflow:
            parameter.grad.fill_(torch.inf)
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours.update(torch.tensor(overflow))
        assert float(ours.value) == theirs.get_scale(), number
    assert float(ours.value) == LossScale.START / 8  # it grew once


def test_without_fp16_the_scale_stays_1() -> None:
    scale = LossScale(CPU, active=False)
    for _ in range(3):
        scale.update(torch.tensor(True))
    assert float(scale.value) == 1


@pytest.mark.parametrize(("saved", "active", "then"), [(512.0, True, 512.0), (1.0, True, 65536.0), (512.0, False, 1.0)])
def test_a_run_may_go_on_in_another_precision(saved: float, active: bool, then: float) -> None:
    scale = LossScale(CPU, active)
    scale.state()["loss_scale"].fill_(saved)
    scale.loaded()
    assert float(scale.value) == then


@pytest.mark.usefixtures("one_thread")
def test_fp16_leaves_out_steps_that_overflow_and_then_learns(words: Words, tmp_path: Path) -> None:
    trainer = made_trainer(words(tmp_path, {"train.precision": "fp16"}))
    trainer.state()["loss_scale"].fill_(2.0**40)  # no gradient of fp16 survives that
    before, skipped = parameters(trainer), 0
    while all(map(torch.equal, before, parameters(trainer))):
        figures = step(trainer, skipped)
        trainer.require_finite()  # an overflow is no fault while the scale may still fall
        assert torch.isfinite(figures["loss"])
        assert float(figures["loss_scale"]) in (2.0 ** (39 - skipped), 2.0 ** (40 - skipped))
        assert trainer.method.centre.any() == figures["grad_norm"].isfinite()
        skipped += 1
        assert skipped < 40
    assert skipped > 5
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {1}


@pytest.mark.usefixtures("one_thread")
def test_fp16_gradients_are_those_of_fp32_whatever_the_scale(words: Words, tmp_path: Path) -> None:
    norms, moved = {}, {}
    for precision, scale in (("fp32", 1.0), ("fp16", 4.0), ("fp16", 16.0)):
        trainer = made_trainer(words(tmp_path, {"train.precision": precision, "optim.clip_mode": "global"}))
        trainer.state()["loss_scale"].fill_(scale)
        before = parameters(trainer)
        norms[precision, scale] = float(step(trainer, 3)["grad_norm"])
        moved[precision, scale] = torch.cat(
            [(b - a).flatten() for a, b in zip(before, parameters(trainer), strict=True)]
        )
    exact = norms["fp32", 1.0]
    for key, norm in norms.items():
        assert norm == pytest.approx(exact, rel=0.05), key
        assert torch.cosine_similarity(moved[key], moved["fp32", 1.0], dim=0) > 0.9


@pytest.mark.usefixtures("one_thread")
def test_fp16_whose_scale_can_fall_no_more_stops(words: Words, tmp_path: Path) -> None:
    trainer = made_trainer(words(tmp_path, {"train.precision": "fp16"}))
    trainer.state()["loss_scale"].fill_(1.0)
    trainer.method.before_update = lambda moment: next(trainer.method.student.parameters()).grad.fill_(torch.inf)
    before = parameters(trainer)
    step(trainer, 0)
    with pytest.raises(Exception, match="gradient is not finite at step 0"):
        trainer.require_finite()
    assert all(map(torch.equal, before, parameters(trainer)))


# ---- what the host reads ---------------------------------------------------------------------------------------------


class HostReads(TorchDispatchMode):
    """Counts what makes a host wait for its device: a number read from a tensor, a shape that depends on values."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name.rstrip("_") in self.WAITS or any(name.startswith(f"{wait}.") for wait in self.WAITS):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "changes", [{}, {"train.precision": "fp16"}, {"optim.clip_mode": "global", "model.drop_path": 0.1}]
)
def test_a_step_reads_nothing_back_from_the_device(words: Words, tmp_path: Path, changes: dict[str, object]) -> None:
    """Twins of CUDA's synchronising calls, seen on a CPU."""
    trainer = made_trainer(words(tmp_path, changes))
    step(trainer, 0)  # the first one makes the optimizer's state
    with HostReads() as reads:
        step(trainer, 1)
    assert reads.seen == []
    with HostReads() as reads:
        trainer.require_finite()
    assert reads.seen == ["_local_scalar_dense"]  # the mode does see one


@pytest.mark.skipif(not torch.cuda.is_available(), reason="left out: needs CUDA")
def test_a_step_never_waits_for_the_gpu(words: Words, tmp_path: Path) -> None:
    trainer = made_trainer(words(tmp_path), one_device())
    step(trainer, 0)
    made = iter(batches(1, device=trainer.runtime.device))
    torch.cuda.set_sync_debug_mode("error")
    try:
        figures = trainer.step(made, Moment(1, 100, 1.0)).figures
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(figures["loss"])


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="left out: torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_compiled_networks_take_the_same_steps(words: Words, tmp_path: Path) -> None:
    """With the names that checkpoints have."""
    found = {}
    for compiled in (False, True):
        trainer = made_trainer(words(tmp_path, {"train.compile": compiled}))
        found[compiled] = [float(step(trainer, number)["loss"]) for number in range(2)]
        names = set(trainer.method.student.state_dict())
        assert "backbone.cls_token" in names
    assert found[True] == pytest.approx(found[False], rel=1e-4)
