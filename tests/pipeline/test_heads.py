"""DINO's head: lightly's outputs from the same weights; no NaN and no infinity in half precision; its gain is fixed."""

from contextlib import nullcontext

import pytest
import torch
from lightly.models.modules.heads import DINOProjectionHead
from torch import nn

from pipeline.models.heads import DinoHead

HALF = [torch.float16, torch.bfloat16]

pytestmark = pytest.mark.usefixtures("one_thread")


# torch deprecates the function that the original code, lightly and all published checkpoints use.
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_outputs_are_lightlys_at_the_real_size() -> None:
    torch.manual_seed(0)
    ours, theirs = DinoHead(384, 4096), DINOProjectionHead(384, 2048, 256, 4096)
    theirs.load_state_dict({name.replace("mlp", "layers"): value for name, value in ours.state_dict().items()})
    x = torch.randn(8, 384)
    assert (ours(x) - theirs(x)).abs().max() < 1e-6
    assert ours(x).std() > 0.01


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("scale", [0.0, 1e-7, 1e-4, 1.0, 100.0])
@pytest.mark.parametrize("automatic", [True, False], ids=["autocast", "half weights"])
def test_half_precision_gives_finite_outputs_and_gradients(dtype: torch.dtype, scale: float, automatic: bool) -> None:
    torch.manual_seed(1)
    head = DinoHead(64, 512, 128, 32)
    x = torch.randn(4, 64) * scale
    if not automatic:
        head, x = head.to(dtype), x.to(dtype)
    x.requires_grad_()
    with torch.autocast("cpu", dtype) if automatic else nullcontext():
        out = head(x)
    assert out.dtype == dtype
    assert out.isfinite().all()
    assert out.abs().max() <= 1.01
    out.float().sum().backward()
    out_of = dict(head.named_parameters()) | {"input": x}
    assert all(value.grad.isfinite().all() for value in out_of.values() if value.requires_grad)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_close_to_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    head, x = DinoHead(64, 512, 128, 32), torch.randn(16, 64)
    with torch.autocast("cpu", dtype):
        out = head(x)
    assert (out - head(x)).abs().max() < 16 * torch.finfo(dtype).eps


def test_zeros_give_zeros_and_what_is_shorter_than_the_limit_is_not_made_longer() -> None:
    head = DinoHead(8, 16, 8, 4)
    assert torch.all(head(torch.zeros(2, 8)) == 0)  # biases begin at 0
    nn.init.constant_(head.mlp[4].bias, 1e-9)
    assert head(torch.zeros(2, 8)).abs().max() < 1e-2


def test_the_gain_stays_one() -> None:
    torch.manual_seed(3)
    head = DinoHead(8, 16, 8, 4)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1, weight_decay=0.5)
    before = head.last_layer.weight_v.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        head(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
    assert torch.all(head.last_layer.weight_g == 1)
    assert (head.last_layer.weight_v - before).abs().max() > 0.1
    x = torch.randn(64, 8)
    assert head(x).abs().max() <= 1 + 1e-6  # cosines, however long the rows have become
