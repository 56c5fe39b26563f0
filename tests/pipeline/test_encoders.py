"""Encoders: any size, drop path, activations computed again bit by bit, one graph over ranks."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.models.encoders import build_encoder, require_size, width
from pipeline.runtime import joined
from tiling.errors import UsageError

XCIT, VIT = "xcit_nano_12_p16_224", "vit_tiny_patch16_224"
SPLIT = (2, 5)  # rank 0 has 2 of 5 images

Figures = dict[str, torch.Tensor]


def short(name: str, drop_path: float = 0.0, recompute: bool = False) -> nn.Module:
    """An encoder of 2 blocks and, where it has them, 1 class-attention block; always the same weights."""
    torch.manual_seed(0)
    encoder = build_encoder(name, drop_path, recompute)
    encoder.blocks = encoder.blocks[-2:]  # a ViT's last ones drop most
    if name == XCIT:
        encoder.cls_attn_blocks = encoder.cls_attn_blocks[:1]
    return encoder


def trained(encoder: nn.Module, rows: slice, compiled: nn.Module | None = None) -> Figures:
    """Outputs, gradients and state after two steps, computed by ``compiled`` where it is given."""
    network = encoder if compiled is None else compiled
    images = torch.randn(SPLIT[1], 3, 48, 48, generator=torch.Generator().manual_seed(1))[rows]
    figures = {}
    for step in range(2):
        torch.manual_seed(10 + step)  # drop path draws from it
        out = network(images)
        out.square().sum().backward()
        figures[f"out{step}"] = out.detach()
    gradients = {f"{name}_grad": parameter.grad for name, parameter in encoder.named_parameters()}
    return {**figures, **gradients, **encoder.state_dict()}


def worker(folder: Path) -> None:
    """One of two ranks: encoders as they are, recomputed, and compiled."""
    torch.set_num_threads(1)
    with joined() as runtime:
        rows = slice(0, SPLIT[0]) if runtime.rank == 0 else slice(*SPLIT)
        found = {
            f"{name}, recompute {recompute}": trained(short(name, 0.5, recompute), rows)
            for name in (XCIT, VIT)
            for recompute in (False, True)
        }
        # The patch embedding is compiled as it is, the blocks recomputed.
        encoder = short(XCIT, recompute=True)
        compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True)
        found["compiled"], found["not compiled"] = trained(encoder, rows, compiled), trained(short(XCIT), rows)
        torch.save(found, folder / f"{runtime.rank}.pt")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, ranks: Callable[..., None]) -> list[dict[str, Figures]]:
    folder = tmp_path_factory.mktemp("encoders")
    ranks(__file__, 2, folder, seconds=240)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def same(found: Figures, expected: Figures) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", [XCIT, VIT])
def test_recomputing_changes_no_bit_over_two_ranks(parts: list[dict[str, Figures]], name: str) -> None:
    for part in parts:
        assert same(part[f"{name}, recompute True"], part[f"{name}, recompute False"])


def test_over_two_ranks_it_compiles_to_one_graph_that_computes_the_same(parts: list[dict[str, Figures]]) -> None:
    for part in parts:
        found, expected = part["compiled"], part["not compiled"]
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            assert torch.allclose(found[name], values, rtol=1e-5, atol=1e-6 * float(values.abs().max())), name
    first, second = (part["not compiled"] for part in parts)
    assert torch.equal(first["norm.weight"], second["norm.weight"])
    assert not torch.equal(first["norm.weight_grad"], second["norm.weight_grad"])  # ranks of different images


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", [XCIT, VIT])
def test_recomputing_changes_no_bit_in_one_process(name: str) -> None:
    plain, again = (short(name, 0.5, recompute) for recompute in (False, True))
    other = copy.deepcopy(again)  # as a teacher is made
    expected = trained(plain, slice(None))
    assert same(trained(again, slice(None)), expected)
    assert same(trained(other, slice(None)), expected)
    if name == XCIT:
        assert plain.patch_embed.proj[0][1].num_batches_tracked == again.blocks[0].local_mp.bn.num_batches_tracked == 2
    with torch.no_grad():
        images = torch.randn(2, 3, 48, 48)
        assert torch.equal(plain.eval()(images), again.eval()(images))


def kept(encoder: nn.Module) -> int:
    """Numbers, beside the weights, that one forward pass keeps for the gradient."""
    weights = {parameter.data_ptr() for parameter in encoder.parameters()}
    sizes = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            sizes[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = encoder(torch.randn(4, 3, 64, 64))
    assert out.requires_grad
    return sum(sizes.values())


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("name", "left_out"), [(XCIT, "cls_attn_blocks"), (XCIT, "blocks"), (VIT, None)])
def test_recomputing_keeps_a_fraction(name: str, left_out: str | None) -> None:
    kept_by = {}
    for recompute in (False, True):
        encoder = short(name, 0.0, recompute)
        encoder.patch_embed.requires_grad_(False)  # convolutions are no blocks
        if left_out is not None:
            setattr(encoder, left_out, nn.ModuleList())
        kept_by[recompute] = kept(encoder)
    assert kept_by[True] < kept_by[False] / 2


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", [XCIT, VIT])
def test_any_size_gives_features_and_positions_matter(name: str) -> None:
    encoder = short(name).eval()
    with torch.no_grad():
        for px in (224, 160, 96, 48):
            require_size(encoder, px)
            image = torch.randn(1, 3, px, px, generator=torch.Generator().manual_seed(px))
            out = encoder(torch.cat([image, image.roll(px // 2, dims=3)]))
            assert out.shape == (2, width(encoder))
            assert out.isfinite().all()
            assert (out[0] - out[1]).abs().max() > 1e-5


@pytest.mark.usefixtures("one_thread")
def test_positions_of_a_vit_are_interpolated() -> None:
    """Positions that grow along x, as 14 columns have them, do so as 6 and as 10 columns."""
    encoder = short(VIT).eval()
    columns = torch.arange(14.0).expand(14, 14).reshape(1, 196, 1).expand(-1, -1, 192)
    with torch.no_grad():
        encoder.pos_embed[:, 1:] = columns
        encoder.patch_embed.proj.weight.zero_()
        encoder.patch_embed.proj.bias.zero_()
        for px, count in ((96, 6), (160, 10)):
            tokens = encoder._pos_embed(encoder.patch_embed(torch.zeros(1, 3, px, px)))
            grid = tokens[0, 1:, 0].view(count, count)
            expected = (torch.arange(count) + 0.5) * 14 / count - 0.5  # pixel centres
            assert torch.allclose(grid, grid[:1].expand_as(grid), atol=1e-4)
            assert (grid[0] - expected)[1:-1].abs().max() < 0.2
            assert (grid[0, 1:] > grid[0, :-1]).all()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", [XCIT, VIT])
def test_drop_path_drops_in_training_alone(name: str) -> None:
    images = torch.randn(1, 3, 48, 48).expand(8, -1, -1, -1)

    def spread(encoder: nn.Module) -> float:
        with torch.no_grad():
            out = encoder(images)
        return float((out - out[:1]).abs().max())

    encoder = short(name, drop_path=0.5)
    for block in encoder.blocks:
        for parameter in (value for key, value in block.named_parameters() if "gamma" in key):
            nn.init.ones_(parameter)  # XCiT's blocks add next to nothing at first
    assert spread(encoder.train()) > 1e-2  # the same image, other blocks
    assert spread(encoder.eval()) < 1e-5
    rates = {part.drop_prob for part in encoder.modules() if type(part).__name__ == "DropPath"}
    assert max(rates) == pytest.approx(0.5)
    assert spread(short(name).train()) < 1e-5


@pytest.mark.parametrize(("name", "px", "near"), [(VIT, 100, 96), (VIT, 8, 16), ("vit_small_patch14_dinov2", 96, 98)])
def test_a_size_that_does_not_divide_into_patches_is_refused(name: str, px: int, near: int) -> None:
    with torch.device("meta"):
        encoder = build_encoder(name)
    with pytest.raises(UsageError, match=rf"images of {px} px do not divide into patches of \d+ px; use {near} px"):
        require_size(encoder, px)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", [XCIT, "vit_small_resnet50d_s16_224"])
def test_convolutions_take_any_size(name: str) -> None:
    encoder = build_encoder(name).eval()
    require_size(encoder, 100)
    with torch.no_grad():
        assert encoder(torch.zeros(1, 3, 100, 100)).shape == (1, width(encoder))


@pytest.mark.parametrize(("name", "hint"), [
    ("xcit_nano_12_p16", "close ones: .*xcit_nano_12_p16_224"),
    ("resnet18", "choose a timm model of xcit_, vit_"),
    ("vit_relpos_small_patch16_224", "close ones: vit_"),
])  # fmt: skip
def test_other_names_are_refused(name: str, hint: str) -> None:
    with pytest.raises(UsageError, match=rf"model.name is '{name}', no XCiT or ViT .*{hint}"):
        build_encoder(name)


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
