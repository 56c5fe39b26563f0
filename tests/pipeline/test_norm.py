"""The one BatchNorm: PyTorch's in one process; over two real gloo ranks what one process computes for all samples."""

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipeline.models import norm
from pipeline.models.norm import BatchNorm, synchronise
from pipeline.runtime import joined

CHANNELS, SPLIT, STEPS = 5, (3, 8), 3  # rank 0 has 3 of 8 samples: ranks need not be equal


def made(dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Inputs and upstream gradients of three steps, means and spreads different by channel."""
    generator = torch.Generator().manual_seed(3)
    spread = torch.logspace(-1, 1, CHANNELS).view(1, -1, 1, 1)
    inputs = [torch.randn(8, CHANNELS, 4, 6, generator=generator) * spread + 3 * spread for _ in range(STEPS)]
    upstream = [torch.randn(8, CHANNELS, 4, 6, generator=generator) for _ in range(STEPS)]
    return [x.to(dtype) for x in inputs], [g.to(dtype) for g in upstream]


def affine(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The layer with a weight and bias that are not 1 and 0."""
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2, CHANNELS))
        layer.bias.copy_(torch.linspace(-1, 1, CHANNELS))
    return layer.to(dtype)


def figures(layer: nn.Module, dtype: torch.dtype, rows: slice) -> dict[str, torch.Tensor]:
    """Outputs, gradients and running statistics of some rows of the batch, by name."""
    found = {}
    for step, (x, g) in enumerate(zip(*made(dtype), strict=True)):
        mine = x[rows].clone().requires_grad_()
        out = layer(mine)
        layer.zero_grad()
        out.backward(g[rows])
        found |= {f"out{step}": out.detach(), f"input_grad{step}": mine.grad}
        found |= {f"{name}_grad{step}": parameter.grad.clone() for name, parameter in layer.named_parameters()}
        found |= {f"{name}{step}": buffer.clone() for name, buffer in layer.named_buffers()}
    layer.eval()
    with torch.no_grad():
        found["out_eval"] = layer(made(dtype)[0][0][rows])
    return found


def first_step(layer: nn.Module, dtype: torch.dtype, rows: slice) -> dict[str, torch.Tensor]:
    """Far from 0 for its spread (mean 1,000, deviation 1), where the running mean still says 0."""
    generator = torch.Generator().manual_seed(4)
    x, g = (torch.randn(8, CHANNELS, 9, 11, generator=generator) for _ in range(2))
    mine = (1000 + x)[rows].to(dtype).requires_grad_()
    out = layer(mine)
    out.backward(g[rows].to(dtype))
    return {"out": out.detach(), "input_grad": mine.grad, "running_var": layer.running_var}


def saved_elements(rows: slice) -> torch.Tensor:
    """How many numbers the backward pass keeps for every number of the input."""
    sizes = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    x = made(torch.float32)[0][0][rows].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        BatchNorm(CHANNELS)(x)
    return torch.tensor(sum(sizes) / x.numel())


def worker(folder: Path) -> None:
    """One of two ranks: its part of the batch, in three precisions."""
    torch.set_num_threads(1)
    with joined() as runtime:
        rows = slice(0, SPLIT[0]) if runtime.rank == 0 else slice(*SPLIT)
        for dtype in (torch.float64, torch.float32):
            found = figures(affine(BatchNorm(CHANNELS), dtype), dtype, rows)
            torch.save(found, folder / f"{dtype}-{runtime.rank}.pt".removeprefix("torch."))
        for dtype in (torch.bfloat16, torch.float16):
            half = affine(BatchNorm(CHANNELS), torch.float32)(made(dtype)[0][0][rows])
            torch.save(half.detach(), folder / f"{dtype}-{runtime.rank}.pt".removeprefix("torch."))
        flat = torch.linspace(4.3, 97.1, CHANNELS).view(1, -1, 1, 1).expand(8, -1, 9, 11)[rows]
        torch.save(BatchNorm(CHANNELS)(flat).detach(), folder / f"flat-{runtime.rank}.pt")
        torch.save(first_step(BatchNorm(CHANNELS), torch.float32, rows), folder / f"shifted-{runtime.rank}.pt")
        torch.save(saved_elements(rows), folder / f"saved-{runtime.rank}.pt")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, ranks: Callable[..., None]) -> dict[str, list]:
    folder = tmp_path_factory.mktemp("norm")
    ranks(__file__, 2, folder)
    names = ("float64", "float32", "bfloat16", "float16", "flat", "shifted", "saved")
    return {name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)] for name in names}


@pytest.mark.parametrize(("name", "limit"), [("float64", 1e-12), ("float32", 2e-6)])
def test_two_ranks_equal_one_process(parts: dict[str, list], name: str, limit: float) -> None:
    dtype = getattr(torch, name)
    whole = figures(affine(nn.BatchNorm2d(CHANNELS), dtype), dtype, slice(None))
    first, second = parts[name]
    assert first.keys() == whole.keys()
    for key, expected in whole.items():
        if key.startswith(("out", "input_grad")):
            found = torch.cat([first[key], second[key]])
        elif key.startswith(("weight_grad", "bias_grad")):
            found = first[key] + second[key]
        else:
            assert torch.equal(first[key], second[key]), key
            found = first[key]
        assert found.dtype == expected.dtype
        assert (found - expected).abs().max() <= limit * max(1, expected.abs().max()), key


@pytest.mark.parametrize(("name", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_half_precision_inputs_have_float32_statistics(parts: dict[str, list], name: str, bits: int) -> None:
    x = made(getattr(torch, name))[0][0]
    expected = affine(nn.BatchNorm2d(CHANNELS), torch.float32)(x.float())
    found = torch.cat(parts[name])
    assert found.dtype == x.dtype
    # Rounding the exact result to the bits there are is all that may have happened.
    assert torch.all((found.float() - expected).abs() <= 2**-bits * expected.abs() + 1e-6)


def test_no_digits_are_lost_far_from_zero_at_the_first_step(parts: dict[str, list]) -> None:
    expected = first_step(nn.BatchNorm2d(CHANNELS).double(), torch.float64, slice(None))
    first, second = parts["shifted"]
    # At 1,000 float32 tells apart steps of 6e-5.
    for name, limit in (("out", 2e-4), ("input_grad", 2e-4)):
        assert (torch.cat([first[name], second[name]]) - expected[name]).abs().max() < limit
    assert torch.allclose(first["running_var"].double(), expected["running_var"], rtol=1e-5)


def test_the_backward_pass_keeps_the_input_and_nothing_else_of_its_size(parts: dict[str, list]) -> None:
    assert all(1 <= float(kept) < 1.4 for kept in parts["saved"])


def test_a_channel_without_variance_gives_zeros_not_nan(parts: dict[str, list]) -> None:
    """Glass: every pixel the same, far from 0, where rounding can make E[x^2] - E[x]^2 negative."""
    assert torch.cat(parts["flat"]).abs().max() < 0.1


@pytest.fixture
def alone_in_a_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone_in_a_group")
def test_the_gradient_is_that_of_the_formula() -> None:
    """By finite differences, through the statistics too; over several ranks see the tests above."""

    def formula(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return norm._Normalise.apply(x, weight, bias, *norm._statistics(x), 1e-5)

    generator = torch.Generator().manual_seed(6)
    x, weight, bias = (torch.randn(*shape, generator=generator).double() for shape in ((3, 2, 2, 2), (2,), (2,)))
    assert torch.autograd.gradcheck(formula, tuple(value.requires_grad_() for value in (x, weight, bias)))


def test_what_is_computed_again_leaves_statistics_alone() -> None:
    x, layer = made(torch.float32)[0][0], affine(BatchNorm(CHANNELS), torch.float32)
    expected = layer(x)
    before = copy.deepcopy(layer.state_dict())
    with norm.statistics_kept():
        assert torch.equal(layer(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    layer(x)
    assert layer.num_batches_tracked == 2


@pytest.mark.parametrize("training", [True, False])
def test_one_process_is_pytorchs(training: bool) -> None:
    ours, theirs = (affine(kind(CHANNELS), torch.float32) for kind in (BatchNorm, nn.BatchNorm2d))
    for layer in (ours, theirs):
        layer.running_mean.fill_(0.5)
        layer.running_var.fill_(2.0)
        layer.train(training)
    x = made(torch.float32)[0][0]
    assert torch.equal(ours(x), theirs(x))
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())


def test_takes_any_number_of_dimensions_but_one() -> None:
    layer = BatchNorm(4)
    assert layer(torch.randn(6, 4)).shape == (6, 4)
    assert layer(torch.randn(6, 4, 3)).shape == (6, 4, 3)
    with pytest.raises(ValueError, match="1 dimensions"):
        layer(torch.randn(4))


@pytest.mark.usefixtures("one_thread")
def test_synchronise_replaces_every_batchnorm_and_keeps_names_and_values() -> None:
    import timm  # not above: it takes seconds, which the ranks need not spend

    torch.manual_seed(0)
    plain = timm.create_model("xcit_nano_12_p16_224", num_classes=0)
    for layer in plain.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight)
            layer.running_var.uniform_(0.5, 2)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    count = sum(isinstance(layer, nn.BatchNorm2d) for layer in plain.modules())
    x = torch.randn(2, 3, 32, 32)
    expected = [plain.train(mode)(x).detach() for mode in (False, True)]
    plain.load_state_dict(before)
    ours = synchronise(plain)
    assert count > 0
    assert sum(isinstance(layer, BatchNorm) for layer in ours.modules()) == count
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in ours.modules())
    after = ours.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    for mode, values in zip((False, True), expected, strict=True):
        assert torch.equal(ours.train(mode)(x), values)


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
