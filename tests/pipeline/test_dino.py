"""DINO: lightly's loss, centre and head; the closed form for 1 global + 5 locals; views paired by identity."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.loss import DINOLoss
from lightly.models.modules.heads import DINOProjectionHead
from torch import nn
from torch.nn import functional

from pipeline.config import MethodConfig, ModelConfig, PretrainConfig, ViewsConfig
from pipeline.methods import build_method, dino
from pipeline.methods.dino import Dino, dino_loss, paired, wide
from pipeline.methods.protocol import MicroBatch, Moment, Outcome
from pipeline.models.heads import DinoHead
from pipeline.runtime import Runtime
from pipeline.schedules import cosine
from tiling.errors import UsageError

Array = np.ndarray
CPU = torch.device("cpu")
ALONE = Runtime(0, 1, CPU)
STEPS, BATCH = 5, 4
METHOD = MethodConfig(out_dim=24, hidden_dim=16, bottleneck_dim=8, teacher_temp=0.05, student_temp=0.2, ema_start=0.9)

pytestmark = pytest.mark.usefixtures("double")


class TinyBackbone(nn.Module):
    """Images of any size to 12 features; remembers the images it was given."""

    num_features = 12

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 16, self.num_features)
        self.seen: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images.detach().clone())
        return torch.tanh(self.linear(functional.adaptive_avg_pool2d(images, 4).flatten(1)))


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dino, "build_encoder", lambda name, drop_path, recompute: TinyBackbone())
    torch.manual_seed(0)


def made_dino(global_crops: int, local_crops: int) -> Dino:
    views = ViewsConfig(global_crops=global_crops, local_crops=local_crops, global_size=16, local_size=8)
    return Dino(PretrainConfig(method=METHOD, views=views), ALONE, None)


def loss_of(method: Dino, views: list[torch.Tensor]) -> Outcome:
    ids = np.arange(len(views[0]))
    return method.loss(method.student, MicroBatch(views, ids, 0 * ids), Moment(0, STEPS, 1.0))


def made_views(method: Dino, batch: int = BATCH) -> list[torch.Tensor]:
    """Random images; the corner pixel of each says which view it is of."""
    views = [torch.randn(batch, 3, spec.size, spec.size) for spec in method.views]
    for number, view in enumerate(views):
        view[:, :, 0, 0] = 100 + number
    return views


def encoded(network: nn.Module) -> list[int]:
    """Which views a network has encoded, once per image of a batch of 1, in order."""
    return [int(image[0, 0, 0]) - 100 for images in network.backbone.seen for image in images]


def learn(method: Dino, loss: torch.Tensor, step: int) -> None:
    """One plain gradient step, then what the method updates."""
    method.student.zero_grad()
    loss.backward()
    with torch.no_grad():
        for parameter in method.student.parameters():
            if parameter.grad is not None:
                parameter -= 3.0 * parameter.grad
    method.after_update(Moment(step, STEPS, 1.0), torch.tensor(True))


def test_loss_and_centre_are_lightlys_over_several_steps() -> None:
    method = made_dino(2, 3)
    theirs = DINOLoss(
        METHOD.out_dim, METHOD.teacher_temp, METHOD.teacher_temp, 1, METHOD.student_temp, METHOD.centre_momentum
    )
    losses = []
    for step in range(STEPS):
        views = made_views(method)
        with torch.no_grad():
            teacher = [method.teacher([view])[1] for view in views[:2]]
            student = [method.student([view])[1] for view in views]
        outcome = loss_of(method, views)
        loss, figures = outcome.loss, outcome.figures
        expected = theirs(teacher, student)
        assert loss.item() == pytest.approx(float(expected), rel=1e-9)
        assert float(figures["kl"] + figures["teacher_entropy"]) == pytest.approx(loss.item(), rel=1e-9)
        learn(method, loss, step)
        assert (method.centre - theirs.center.flatten()).abs().max() < 1e-9
        losses.append(loss.item())
    assert method.centre.abs().max() > 1e-3  # it did evolve, or the comparison says nothing
    assert len(set(losses)) == STEPS


def test_loss_in_float32_is_lightlys_to_1e_6() -> None:
    generator = torch.Generator().manual_seed(2)
    teacher, student = (torch.randn(n, 8, 64, generator=generator, dtype=torch.float32) * 0.3 for n in (2, 5))
    theirs = DINOLoss(64, 0.04, 0.04, 1, 0.1)
    theirs.center = theirs.center.float() + 0.1 * torch.randn(1, 1, 64, generator=generator, dtype=torch.float32)
    names = ["g0", "g1", "l0", "l1", "l2"]
    loss, _ = dino_loss(teacher, student, paired(names[:2], names), theirs.center.flatten().clone(), 0.04, 0.1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(float(theirs(list(teacher), list(student))), rel=1e-6)


def closed_form(
    teacher: np.ndarray, student: np.ndarray, pairs: Sequence[tuple[int, int]], centre: np.ndarray
) -> float:
    """Caron et al. 2021, eq. 1 to 3, one number at a time."""
    terms = []
    for (t, s), b in product(pairs, range(teacher.shape[1])):
        sharp = [math.exp((x - c) / METHOD.teacher_temp) for x, c in zip(teacher[t, b], centre, strict=True)]
        soft = [math.exp(x / METHOD.student_temp) for x in student[s, b]]
        terms.append(-sum(p / sum(sharp) * math.log(q / sum(soft)) for p, q in zip(sharp, soft, strict=True)))
    return sum(terms) / len(terms)


def test_one_global_and_five_locals_is_the_closed_form_and_the_student_never_sees_the_global() -> None:
    method = made_dino(1, 5)
    centre = np.zeros(METHOD.out_dim)
    for step in range(3):
        views = made_views(method)
        with torch.no_grad():
            teacher = method.teacher(views[:1])[1].view(1, BATCH, -1).numpy()
            student = method.student(views[1:])[1].view(5, BATCH, -1).numpy()
        method.student.backbone.seen.clear()
        method.teacher.backbone.seen.clear()
        outcome = loss_of(method, views)
        loss, figures = outcome.loss, outcome.figures
        assert encoded(method.student) == [view for view in range(1, 6) for _ in range(BATCH)]
        assert encoded(method.teacher) == [0] * BATCH
        assert loss.item() == pytest.approx(closed_form(teacher, student, [(0, s) for s in range(5)], centre), rel=1e-9)
        p = functional.softmax(torch.from_numpy((teacher[0] - centre) / METHOD.teacher_temp), dim=-1)
        assert float(figures["teacher_entropy"]) == pytest.approx(float(-(p * p.log()).sum(-1).mean()), rel=1e-9)
        learn(method, loss, step)
        centre = 0.9 * centre + 0.1 * teacher.reshape(-1, METHOD.out_dim).mean(axis=0)
        assert np.abs(method.centre.numpy() - centre).max() < 1e-12


@settings(max_examples=25, deadline=None)
@given(global_crops=st.integers(1, 4), local_crops=st.integers(0, 4))
def test_any_mix_of_views_pairs_every_teacher_view_with_every_other_view(global_crops: int, local_crops: int) -> None:
    if global_crops + local_crops < 2:
        return
    method = made_dino(global_crops, local_crops)
    views = made_views(method, batch=1)
    with torch.no_grad():
        outputs = {
            n: (method.teacher([view])[1].numpy(), method.student([view])[1].numpy()) for n, view in enumerate(views)
        }
    method.student.backbone.seen.clear()
    method.teacher.backbone.seen.clear()
    loss = loss_of(method, views).loss
    pairs = [(t, s) for t in range(global_crops) for s in range(len(views)) if t != s]
    assert encoded(method.teacher) == list(range(global_crops))
    assert encoded(method.student) == sorted({s for _, s in pairs})
    terms = [
        closed_form(outputs[t][0][None], outputs[s][1][None], [(0, 0)], np.zeros(METHOD.out_dim)) for t, s in pairs
    ]
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-9)


@given(names=st.lists(st.text(max_size=3), unique=True, max_size=8), split=st.integers(0, 8), shift=st.integers(0, 8))
def test_pairs_are_by_name_whatever_the_order(names: list[str], split: int, shift: int) -> None:
    teacher, student = names[:split], names[shift:] + names[:shift]
    found = [(teacher[t], student[s]) for t, s in paired(teacher, student)]
    assert len(found) == len(set(found))
    assert set(found) == {(t, s) for t in teacher for s in student if t != s}


def test_teacher_follows_the_student_and_keeps_out_of_the_gradient() -> None:
    method = made_dino(2, 1)
    assert all(torch.equal(t, s) for t, s in zip(method.teacher.parameters(), method.student.parameters(), strict=True))
    for step in range(2):
        before = [p.clone() for p in method.teacher.parameters()]
        loss = loss_of(method, made_views(method)).loss
        learn(method, loss, step)
        momentum = cosine(step, STEPS, METHOD.ema_start, METHOD.ema_end)
        for old, new, student in zip(before, method.teacher.parameters(), method.student.parameters(), strict=True):
            assert not new.requires_grad
            assert (new - (momentum * old + (1 - momentum) * student)).abs().max() < 1e-12


def test_teacher_has_no_drop_path_and_the_student_has(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.models.encoders import build_encoder

    monkeypatch.setattr(dino, "build_encoder", build_encoder)
    model = ModelConfig("xcit_nano_12_p16_224", drop_path=0.5)
    views = ViewsConfig(global_size=32, local_size=16, local_crops=1)
    method = Dino(PretrainConfig(model=model, method=METHOD, views=views), ALONE, None)
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        taught, learnt = ([network([image])[1] for _ in range(2)] for network in (method.teacher, method.student))
    assert torch.equal(*taught)
    assert not torch.equal(*learnt)


def test_teacher_temperature_rises_as_in_the_original_code() -> None:
    """``np.linspace(start, end, warmup epochs)`` by epochs there; here by parts of epochs, with the same two ends."""
    warm = replace(METHOD, teacher_temp_start=0.04, teacher_temp=0.07, teacher_temp_warmup_epochs=30)
    method = Dino(PretrainConfig(method=warm), ALONE, None)
    assert [method.teacher_temp(epoch) for epoch in (0, 15, 30, 90)] == pytest.approx([0.04, 0.055, 0.07, 0.07])
    assert made_dino(1, 1).teacher_temp(0.0) == METHOD.teacher_temp


def test_an_update_that_is_not_applied_changes_no_state() -> None:
    method = made_dino(2, 1)
    views = made_views(method)
    views[0] *= float("nan")
    loss_of(method, views)
    before = [p.clone() for p in (*method.teacher.parameters(), method.centre)]
    for parameter in method.student.parameters():
        parameter.data += 1
    method.after_update(Moment(0, STEPS, 1.0), torch.tensor(False))
    assert all(torch.equal(*pair) for pair in zip(before, (*method.teacher.parameters(), method.centre), strict=True))
    loss_of(method, made_views(method))
    method.after_update(Moment(1, STEPS, 1.0), torch.tensor(True))
    assert torch.isfinite(method.centre).all()
    assert not torch.equal(method.centre, before[-1])


@pytest.mark.parametrize(("epoch", "frozen"), [(0.0, True), (0.99, True), (1.0, False), (3.2, False)])
def test_prototypes_are_frozen_for_the_first_epoch(epoch: float, frozen: bool) -> None:
    method = made_dino(1, 1)
    loss = loss_of(method, made_views(method)).loss
    loss.backward()
    method.before_update(Moment(0, STEPS, epoch))
    grads = {name: parameter.grad for name, parameter in method.student.named_parameters()}
    assert (grads["head.last_layer.weight_v"] is None) == frozen
    assert all(g is not None for name, g in grads.items() if "last_layer" not in name)


def test_softmax_is_never_computed_in_half_precision() -> None:
    assert wide(torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.float32
    assert wide(torch.zeros(2, dtype=torch.float64)).dtype == torch.float64


def test_unknown_method_is_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"'swav'.*dino"):
        build_method(PretrainConfig(method=replace(METHOD, name="swav")), ALONE, None)


# torch deprecates the function that the original code, lightly and all published checkpoints use.
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_head_is_lightlys_with_the_names_of_the_original_code() -> None:
    ours, theirs = DinoHead(12, 24, 16, 8), DINOProjectionHead(12, 16, 8, 24)
    nn.init.normal_(ours.mlp[0].bias)
    names = ["mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias", "mlp.4.weight", "mlp.4.bias"]
    names += ["last_layer.weight_g", "last_layer.weight_v"]
    assert set(ours.state_dict()) == set(names)
    theirs.load_state_dict({name.replace("mlp", "layers"): value for name, value in ours.state_dict().items()})
    x = torch.randn(6, 12)
    assert (ours(x) - theirs(x)).abs().max() < 1e-12
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    other = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.requires_grad == other[name.replace("mlp", "layers")].requires_grad
        if name == "last_layer.weight_g":
            assert not parameter.requires_grad
            assert torch.all(parameter == 1)
        else:
            assert (parameter.grad - other[name.replace("mlp", "layers")].grad).abs().max() < 1e-12
    assert torch.all(ours(x).abs() <= 1 + 1e-12)


def test_head_starts_as_in_the_original_code() -> None:
    head = DinoHead(384, 512, 512, 256)
    for layer in (head.mlp[0], head.mlp[2], head.mlp[4]):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert torch.all(layer.bias == 0)
    rows = head.last_layer.weight_v
    assert rows.abs().max().item() <= 256**-0.5
    assert rows.std().item() == pytest.approx(256**-0.5 / 3**0.5, rel=0.05)


def test_head_in_bfloat16_has_no_nan_where_features_vanish() -> None:
    head = DinoHead(12, 24, 16, 8).bfloat16()
    assert torch.isfinite(head(torch.zeros(2, 12, dtype=torch.bfloat16))).all()
