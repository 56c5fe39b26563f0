"""Schedules against the original DINO code's; which parameters are decayed; what the optimizer is told each step."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from pipeline.config import OptimConfig, PretrainConfig, TrainConfig
from pipeline.methods.protocol import parameter_groups
from pipeline.models.heads import DinoHead
from pipeline.schedules import cosine, effective_lr
from pipeline.trainer import build_optimizer, set_schedules

VALUES = st.floats(0, 1, allow_nan=False)


def original(base: float, final: float, steps: int, warmup: int) -> np.ndarray:
    """As ``cosine_scheduler`` in the original code's utils.py: all values at once, warm-up from 0."""
    rise = np.linspace(0, base, warmup)
    place = np.arange(steps - warmup)
    fall = final + 0.5 * (base - final) * (1 + np.cos(np.pi * place / len(place)))
    return np.concatenate([rise, fall])


@given(base=VALUES, final=VALUES, steps=st.integers(1, 60), warmup=st.integers(0, 59))
def test_cosine_is_the_original_codes(base: float, final: float, steps: int, warmup: int) -> None:
    assume(warmup < steps)
    found = [cosine(step, steps, base, final, warmup) for step in range(steps)]
    np.testing.assert_allclose(found, original(base, final, steps, warmup), rtol=1e-12, atol=1e-15)


def test_cosine_stays_at_the_end_value_after_the_last_step() -> None:
    assert cosine(10, 10, 1.0, 0.25) == cosine(99, 10, 1.0, 0.25) == 0.25


@pytest.mark.parametrize(
    ("batch", "cap", "expected"), [(256, 1.0, 5e-4), (1024, 1.0, 2e-3), (9600, 4e-3, 4e-3), (2048, 4e-3, 4e-3)]
)
def test_learning_rate_is_linear_in_the_batch_up_to_its_cap(batch: int, cap: float, expected: float) -> None:
    assert effective_lr(5e-4, batch, cap) == pytest.approx(expected, rel=1e-12)


class Small(nn.Module):
    """Every kind of parameter there is: matrices, biases, norms, tokens, prototypes, a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2)
        self.norm = nn.BatchNorm2d(4)
        self.gamma = nn.Parameter(torch.ones(4))
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.head = DinoHead(4, 6, 5, 3)


def test_biases_and_vectors_are_not_decayed_and_what_is_not_trained_is_in_no_group() -> None:
    model = Small()
    decayed, plain = parameter_groups(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {
        "conv.weight", "token", "head.mlp.0.weight", "head.mlp.2.weight", "head.mlp.4.weight",
        "head.last_layer.weight_v",
    }  # fmt: skip
    assert {names[id(p)] for p in plain["params"]} == {
        "conv.bias", "norm.weight", "norm.bias", "gamma", "head.mlp.0.bias", "head.mlp.2.bias", "head.mlp.4.bias",
    }  # fmt: skip
    assert (decayed["decayed"], plain["decayed"]) == (True, False)


def test_optimizer_is_told_each_steps_values_and_decays_only_the_decayed() -> None:
    steps, lr = 12, 3e-3
    optim = OptimConfig(warmup_steps=3, lr_end=1e-5, weight_decay=0.04, weight_decay_end=0.4)
    config = PretrainConfig(optim=optim, train=TrainConfig(steps=steps))
    optimizer = build_optimizer(Small())
    rates, decays = original(lr, 1e-5, steps, 3), original(0.04, 0.4, steps, 0)
    for step in range(steps):
        now = set_schedules(optimizer, config, step, lr)
        assert now["lr"] == pytest.approx(rates[step], rel=1e-12)
        assert now["weight_decay"] == pytest.approx(decays[step], rel=1e-12)
        decayed, plain = optimizer.param_groups
        assert (decayed["lr"], decayed["weight_decay"]) == (now["lr"], now["weight_decay"])
        assert (plain["lr"], plain["weight_decay"]) == (now["lr"], 0.0)


def test_a_learning_rate_below_lr_end_never_rises_after_the_warm_up() -> None:
    config = PretrainConfig(optim=OptimConfig(warmup_steps=0, lr_end=1e-3), train=TrainConfig(steps=5))
    optimizer = build_optimizer(Small())
    assert {set_schedules(optimizer, config, step, 1e-4)["lr"] for step in range(5)} == {1e-4}


def test_weight_decay_moves_only_what_it_should() -> None:
    model = Small()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    optimizer = build_optimizer(model)
    optim = OptimConfig(warmup_steps=0, weight_decay=0.5, weight_decay_end=0.5)
    set_schedules(optimizer, replace(PretrainConfig(train=TrainConfig(steps=2000)), optim=optim), 0, 0.1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        shrinks = parameter.ndim > 1 and not name.endswith((".bias", "weight_g"))
        assert torch.allclose(parameter, torch.tensor(0.95 if shrinks else 1.0)), name
