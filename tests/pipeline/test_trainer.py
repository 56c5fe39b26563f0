"""One optimizer step is one unit: accumulation, clipping, EMA and centre; two real ranks against one; a NaN loss."""

import hashlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.commands.parser import pretrain_config
from pipeline.data.loader import Batch, Loader
from pipeline.data.views import draw
from pipeline.methods import build_method
from pipeline.methods.protocol import Moment, Outcome
from pipeline.optimizer import clip_gradients
from pipeline.runtime import Runtime, joined
from pipeline.schedules import cosine
from pipeline.trainer import Trainer, global_batch
from tiling.errors import BonyError
from tiling.store import TileStore

ALONE = Runtime(0, 1, torch.device("cpu"))
PX = 48


def made_batch(first: int, number: int) -> Batch:
    """Tiles that follow from their ids, which count from ``first``."""
    ids = np.arange(first, first + number)
    tiles = [np.random.default_rng(int(i)).integers(0, 256, (PX, PX, 3), np.uint8) for i in ids]
    return Batch(ids, np.zeros_like(ids), torch.from_numpy(np.stack(tiles)))


def made_trainer(options: list[str], runtime: Runtime = ALONE) -> Trainer:
    config = pretrain_config(options)
    torch.manual_seed(7)
    with TileStore(config.data) as store:
        return Trainer(config, runtime, build_method(config, runtime, store))


def at(step: int, steps: int = 4, epoch: float = 1.0) -> Moment:
    return Moment(step, steps, epoch)


def spoilt(outcome: Outcome) -> Outcome:
    return replace(outcome, loss=outcome.loss * float("nan"))


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    named = trainer.method.student.named_parameters()
    return {name: parameter.grad.clone() for name, parameter in named if parameter.requires_grad}


def relative(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Norm of the whole difference over the norm of the whole."""
    assert found.keys() == expected.keys()
    apart = sum((found[name] - expected[name]).square().sum() for name in expected)
    return float((apart / sum(value.square().sum() for value in expected.values())).sqrt())


def state_hash(trainer: Trainer) -> str:
    """Everything that an update changes: both networks' parameters, optimizer, learning rates, centre."""
    total = hashlib.sha256()
    tensors = [p for network in trainer.method.networks().values() for p in network.parameters()]
    tensors += trainer.method.state().values()
    for values in trainer.optimizer.state_dict()["state"].values():
        tensors += values.values()
    for tensor in tensors:
        total.update(tensor.detach().numpy().tobytes())
    return total.hexdigest()


# ---- two ranks against one -------------------------------------------------------------------------------------------


def first_steps(trainer: Trainer, store: TileStore) -> dict[str, Any]:
    """What a rank does in two steps of a run: samples, what is drawn for them, views, gradients, centre, BatchNorm."""
    config, runtime, method = trainer.config, trainer.runtime, trainer.method
    batch, found = config.train.batch_per_rank, {}
    loader = Loader(store, config.train.seed, batch, runtime.rank, runtime.world, 0, runtime.device)
    batches = iter(loader)
    try:
        for step in range(2):
            mine = list(islice(batches, config.train.accumulate))
            found[f"ids{step}"] = [one.ids.tolist() for one in mine]
            for one in mine:
                views = trainer.views(one)
                for row, sample in enumerate(one.ids.tolist()):
                    found[f"sample{sample}"] = torch.cat([view[row].flatten() for view in views])
                    found[f"digest{sample}"] = [
                        draw(
                            spec, trainer.colour, config.train.seed, one.epochs[row : row + 1], one.ids[row : row + 1],
                            store.tile_px,
                        ).digest()
                        for spec in method.views
                    ]  # fmt: skip
            if step == 0:
                trainer.gradients(iter(mine), at(0))
                found["gradients"] = gradients(trainer)
                method.after_update(
                    at(1, 1), torch.tensor(True)
                )  # of the centre; ema_end of 1 leaves the teacher alone
                found["centre"] = method.centre.clone()
                found["buffers"] = dict(method.networks()["teacher"].named_buffers(prefix="teacher"))
                found["buffers"] |= dict(method.networks()["student"].named_buffers(prefix="student"))
                found["buffers"] = {name: value.clone() for name, value in found["buffers"].items()}
            else:
                found["loss"] = float(trainer.step(iter(mine), at(step)).figures["loss"])
    finally:
        loader.close()
    found["after"] = dict(method.student.state_dict())
    return found


def nan_on_last_rank(trainer: Trainer) -> dict[str, Any]:
    """A step whose loss is not a number on the last rank alone: the error, and the state before and after."""
    runtime, honest, before = trainer.runtime, trainer.method.loss, state_hash(trainer)

    def poisoned(*given: Any) -> Outcome:
        outcome = honest(*given)
        return spoilt(outcome) if runtime.rank == runtime.world - 1 else outcome

    trainer.method.loss = poisoned
    batches = iter([made_batch(100 * runtime.rank, 2), made_batch(100 * runtime.rank + 2, 2)])
    try:
        trainer.step(batches, at(5))
        trainer.require_finite()
    except BonyError as error:
        return {"error": str(error), "kept": state_hash(trainer) == before}
    return {"error": "", "kept": False}


def worker(out: str, options: list[str]) -> None:
    """One rank."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    with joined() as runtime:
        trainer = made_trainer(options, runtime)
        with TileStore(trainer.config.data) as store:
            found = first_steps(trainer, store)
        found |= nan_on_last_rank(trainer)
        torch.save(found, f"{out}-{runtime.rank}.pt")


# The teacher sees globals only and the student all views, of two sizes, in two micro-batches.
SHARED = {"views.global_crops": 2, "views.local_crops": 1, "train.accumulate": 2, "method.freeze_last_layer_epochs": 0}


@pytest.fixture(scope="module")
def spread(
    tmp_path_factory: pytest.TempPathFactory, words: Callable[..., list[str]], ranks: Callable[..., None]
) -> list:
    """What two ranks of 2 samples did."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks(__file__, 2, folder / "rank", *words(folder / "run", SHARED | {"train.batch_per_rank": 2}))
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture
def whole(double: None, words: Callable[..., list[str]], store: Path, tmp_path: Path) -> dict[str, Any]:
    """What one rank of 4 samples does."""
    with TileStore(store) as tiles:
        return first_steps(made_trainer(words(tmp_path / "run", SHARED | {"train.batch_per_rank": 4})), tiles)


def test_two_ranks_equal_one_rank_with_the_same_global_batch(spread: list, whole: dict[str, Any]) -> None:
    first, second = spread
    for step in range(2):
        joined_ids = [a + b for a, b in zip(first[f"ids{step}"], second[f"ids{step}"], strict=True)]
        assert joined_ids == whole[f"ids{step}"]
    samples = [name.removeprefix("digest") for name in whole if name.startswith("digest")]
    assert len(samples) == 16  # two steps of two micro-batches of four
    std = min(pretrain_config([]).views.std)
    for sample in samples:
        (rank,) = [rank for rank in spread if f"digest{sample}" in rank]
        assert rank[f"digest{sample}"] == whole[f"digest{sample}"]
        assert (rank[f"sample{sample}"] - whole[f"sample{sample}"]).abs().max() * std <= 1 / 255
    for rank in spread:
        assert relative(rank["gradients"], whole["gradients"]) < 1e-9
        assert relative(rank["buffers"], whole["buffers"]) < 1e-12
        assert (rank["centre"] - whole["centre"]).abs().max() < 1e-12
        assert rank["loss"] == pytest.approx(whole["loss"], rel=1e-6)  # of the second step, after an update
    assert whole["centre"].abs().max() > 1e-6
    assert whole["gradients"]["backbone.patch_embed.proj.0.0.weight"].norm() > 0


def test_ranks_stay_the_same_and_report_one_loss(spread: list) -> None:
    first, second = spread
    assert all(torch.equal(first["after"][name], value) for name, value in second["after"].items())
    assert first["loss"] == second["loss"]


def test_nan_on_one_rank_stops_all_and_changes_nothing(spread: list) -> None:
    for rank, found in enumerate(spread):
        assert "loss is not finite at step 5 on rank 1" in found["error"]
        assert f"rank {rank}'s tiles" in found["error"]
        assert found["kept"]
    assert "100, 101, 102, 103" in spread[1]["error"]
    assert "100, 101" not in spread[0]["error"]


# ---- one rank --------------------------------------------------------------------------------------------------------

VIT = {"model.name": "vit_tiny_patch16_224", "views.global_size": 32, "views.local_size": 16, "views.global_crops": 2}


@pytest.mark.usefixtures("double")
def test_four_micro_batches_are_one_batch_and_one_update(words: Callable[..., list[str]], tmp_path: Path) -> None:
    split = made_trainer(words(tmp_path, VIT | {"train.accumulate": 4, "train.batch_per_rank": 2}))
    at_once = made_trainer(words(tmp_path, VIT | {"train.accumulate": 1, "train.batch_per_rank": 8}))
    assert global_batch(split.config, 1) == global_batch(at_once.config, 1)
    split.gradients(iter([made_batch(2 * n, 2) for n in range(4)]), at(0))
    at_once.gradients(iter([made_batch(0, 8)]), at(0))
    assert relative(gradients(split), gradients(at_once)) < 1e-9

    trainer = made_trainer(words(tmp_path, VIT | {"train.accumulate": 4, "method.ema_start": 0.9}))
    method, outputs = trainer.method, []
    method.teacher.register_forward_hook(lambda module, views, out: outputs.append(out[1].clone()))
    for step in range(2):
        teacher = [p.clone() for p in method.teacher.parameters()]
        student, centre = [p.clone() for p in method.student.parameters()], method.centre.clone()
        outputs.clear()
        rest = iter([made_batch(2 * n, 2) for n in range(5)])
        trainer.step(rest, at(step, trainer.config.train.steps))
        assert len(list(rest)) == 1  # four were taken
        assert [len(out) for out in outputs] == [4] * 4
        assert torch.allclose(method.centre, 0.9 * centre + 0.1 * torch.cat(outputs).mean(0), rtol=0, atol=1e-12)
        momentum = cosine(step, trainer.config.train.steps, 0.9, 1.0)
        moved = 0
        for old, new, was, now in zip(
            teacher, method.teacher.parameters(), student, method.student.parameters(), strict=True
        ):
            assert torch.allclose(new, momentum * old + (1 - momentum) * now, rtol=0, atol=1e-12)
            moved += not torch.equal(was, now)
        assert moved > len(student) / 2
        assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {step + 1}


@pytest.mark.usefixtures("one_thread")
def test_drop_path_is_a_function_of_seed_and_step(words: Callable[..., list[str]], tmp_path: Path) -> None:
    """Whatever was drawn before, as after a resume; micro-batches with the same tiles still differ."""
    trainer = made_trainer(words(tmp_path, {"model.drop_path": 0.3, "train.batch_per_rank": 3}))
    found = []
    for step, noise in ((3, 0), (3, 5), (4, 0)):
        torch.rand(noise)
        trainer.gradients(iter([made_batch(0, 3), made_batch(0, 3)]), at(step))
        found.append(gradients(trainer))
    assert relative(found[1], found[0]) < 1e-6  # BatchNorm's running statistics have moved, and do not matter
    assert relative(found[2], found[0]) > 1e-3


@pytest.mark.usefixtures("one_thread")
def test_nan_loss_names_step_and_tiles_and_changes_nothing(words: Callable[..., list[str]], tmp_path: Path) -> None:
    trainer = made_trainer(words(tmp_path, {"train.log_every": 3}))
    trainer.step(iter([made_batch(0, 2), made_batch(2, 2)]), at(0))
    trainer.require_finite()
    before, honest, calls = state_hash(trainer), trainer.method.loss, []

    def second_is_nan(*given: Any) -> Outcome:
        outcome = honest(*given)
        calls.append(outcome)
        return spoilt(outcome) if len(calls) == 2 else outcome

    trainer.method.loss = second_is_nan
    trainer.step(iter([made_batch(40, 2), made_batch(42, 2)]), at(1))
    trainer.step(iter([made_batch(0, 2), made_batch(2, 2)]), at(2))  # the host does not know yet: nothing changes
    with pytest.raises(BonyError, match=r"loss is not finite at step 1 on rank 0 .*: 42, 43\)") as caught:
        trainer.require_finite()
    assert "\n" not in str(caught.value)
    assert state_hash(trainer) == before
    fresh = made_trainer(words(tmp_path))
    untouched = state_hash(fresh)
    fresh.step(iter([made_batch(0, 2), made_batch(2, 2)]), at(1))
    assert state_hash(fresh) != untouched  # the hash does see an update


@pytest.mark.usefixtures("one_thread")
def test_gradient_that_is_not_finite_changes_nothing(words: Callable[..., list[str]], tmp_path: Path) -> None:
    """A finite loss may have a gradient that is not: sqrt at 0."""
    trainer = made_trainer(words(tmp_path))
    trainer.step(iter([made_batch(0, 2), made_batch(2, 2)]), at(0))
    before, honest = state_hash(trainer), trainer.method.loss

    def steep(*given: Any) -> Outcome:
        outcome = honest(*given)
        return replace(outcome, loss=outcome.loss + (outcome.loss - outcome.loss.detach()).abs().sqrt())

    trainer.method.loss = steep
    trainer.step(iter([made_batch(0, 2), made_batch(2, 2)]), at(1))
    with pytest.raises(BonyError, match=r"gradient is not finite at step 1, though the loss is .*: 0, 1, 2, 3\)"):
        trainer.require_finite()
    assert state_hash(trainer) == before


@pytest.mark.usefixtures("one_thread")
def test_bf16_step_keeps_parameters_in_float32(words: Callable[..., list[str]], tmp_path: Path) -> None:
    trainer = made_trainer(words(tmp_path, {"train.precision": "bf16"}))
    seen = []
    trainer.method.student.head.register_forward_hook(lambda module, x, out: seen.append(out.dtype))
    figures = trainer.step(iter([made_batch(0, 2), made_batch(2, 2)]), at(0)).figures
    assert set(seen) == {torch.bfloat16}
    assert torch.isfinite(figures["loss"])
    assert {p.dtype for p in trainer.method.student.parameters()} == {torch.float32}


# ---- clipping --------------------------------------------------------------------------------------------------------


def made_parameters() -> Iterator[nn.Parameter]:
    """Gradient norms from 0.01 to 100, a zero one, and a parameter without gradient."""
    generator = torch.Generator().manual_seed(4)
    for number, size in enumerate((0.01, 1.0, 2.99, 3.01, 100.0, 0.0)):
        parameter = nn.Parameter(torch.zeros(4, number + 1))
        gradient = torch.randn(4, number + 1, generator=generator)
        parameter.grad = gradient * (size / gradient.norm())
        yield parameter
    yield nn.Parameter(torch.zeros(2))


@pytest.mark.parametrize("mode", ["per_param", "global"])
@pytest.mark.parametrize("limit", [0.0, 0.5, 3.0, 1e4])
def test_clipping_is_pytorchs(mode: str, limit: float) -> None:
    ours, theirs = list(made_parameters()), list(made_parameters())
    total = clip_gradients(iter(ours), limit, mode)
    expected = torch.cat([p.grad.flatten() for p in theirs if p.grad is not None]).norm()
    assert float(total) == pytest.approx(float(expected), rel=1e-6)
    for group in [[p] for p in theirs] if mode == "per_param" else [theirs]:
        if limit:
            torch.nn.utils.clip_grad_norm_(group, limit)
    for found, reference in zip(ours, theirs, strict=True):
        assert (found.grad is None) == (reference.grad is None)
        if found.grad is not None:
            assert torch.allclose(found.grad, reference.grad, rtol=1e-6, atol=0)


if __name__ == "__main__":
    worker(sys.argv[1], sys.argv[2:])
