"""XCiT as its paper has it, in plain tensor operations on the original's own names, against timm's encoder.

El-Nouby et al. 2021 (arXiv:2106.09681), section 3: cross-covariance attention, local patch interaction, feed-forward
network; class attention of Touvron et al. 2021 (arXiv:2103.17239), section 3. Nothing of timm's or the original's code
is used, so a wrong renaming, order or transposition shows.
"""

import math

import pytest
import torch
from torch.nn import functional

from pipeline.models import facebook
from pipeline.models.encoders import build_encoder

State = dict[str, torch.Tensor]

pytestmark = pytest.mark.usefixtures("one_thread")


class Layers:
    """The layers below one name of a state dict."""

    def __init__(self, state: State, name: str = "") -> None:
        self.state, self.name = state, name

    def at(self, name: object) -> "Layers":
        return Layers(self.state, f"{self.name}{name}.")

    def value(self, name: str) -> torch.Tensor:
        return self.state[f"{self.name}{name}"]

    @property
    def members(self) -> list[int]:
        names = (name.removeprefix(self.name) for name in self.state if name.startswith(self.name))
        return sorted({int(name.split(".")[0]) for name in names})

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bnc,dc->bnd", x, self.value("weight")) + self.value("bias")

    def layer_norm(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        spread = (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        return centred / spread * self.value("weight") + self.value("bias")

    def batch_norm(self, x: torch.Tensor) -> torch.Tensor:
        mean, variance, weight, bias = (
            self.value(name).view(1, -1, 1, 1) for name in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * weight + bias

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.at("fc2").linear(functional.gelu(self.at("fc1").linear(x)))

    def queries_keys_values(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        """Tokens (B, N, D) -> (3, B, heads, N, D / heads)."""
        batch, tokens, channels = x.shape
        joint = self.at("qkv").linear(x).view(batch, tokens, 3, heads, channels // heads)
        return torch.einsum("bnqhc->qbhnc", joint)


def cross_covariance_attention(layers: Layers, x: torch.Tensor) -> torch.Tensor:
    """Equation 1: V softmax(normalised K^T normalised Q / temperature), channels attending to channels."""
    temperature = layers.value("temperature")  # the original multiplies by it
    q, k, v = layers.queries_keys_values(x, len(temperature))
    q, k = (side / side.norm(dim=2, keepdim=True) for side in (q, k))  # each channel's column over the tokens
    weights = (torch.einsum("bhnc,bhnd->bhcd", q, k) * temperature).softmax(dim=-1)
    return layers.at("proj").linear(torch.einsum("bhcd,bhnd->bnhc", weights, v).flatten(2))


def local_patch_interaction(layers: Layers, x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Section 3.3: two depth-wise 3 x 3 convolutions over the grid of patches, GELU and BatchNorm between."""

    def convolved(name: str, grid: torch.Tensor) -> torch.Tensor:
        weight, bias = (layers.at(name).value(kind) for kind in ("weight", "bias"))
        padded = functional.pad(grid, (1, 1, 1, 1))
        shifted = (padded[..., r : r + rows, c : c + columns] * weight[:, 0, r, c].view(-1, 1, 1)
                   for r in range(3) for c in range(3))  # fmt: skip
        return sum(shifted, start=bias.view(-1, 1, 1))

    grid = x.transpose(1, 2).unflatten(2, (rows, columns))
    grid = layers.at("bn").batch_norm(functional.gelu(convolved("conv1", grid)))
    return convolved("conv2", grid).flatten(2).transpose(1, 2)


def class_attention(layers: Layers, x: torch.Tensor, heads: int) -> torch.Tensor:
    """The class token attends to all tokens: (B, 1 + N, D) -> (B, 1, D)."""
    q, k, v = layers.queries_keys_values(x, heads)
    weights = (torch.einsum("bhc,bhnc->bhn", q[:, :, 0], k) / math.sqrt(k.shape[-1])).softmax(dim=-1)
    return layers.at("proj").linear(torch.einsum("bhn,bhnc->bhc", weights, v).flatten(1)[:, None])


def positions(layers: Layers, rows: int, columns: int) -> torch.Tensor:
    """Section 4.1: a Fourier code of each patch's place, rows first, projected: (1, N, D)."""

    def code(count: int) -> torch.Tensor:
        angle = torch.arange(1, count + 1, dtype=torch.float64) / count * 2 * math.pi
        angles = angle[:, None] / 10000 ** (torch.arange(0, 32, 2) / 32)
        return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)  # (count, 32)

    vertical = code(rows)[:, None].expand(-1, columns, -1)
    horizontal = code(columns)[None].expand(rows, -1, -1)
    codes = torch.cat([vertical, horizontal], dim=2).flatten(0, 1)
    projection = layers.at("pos_embeder").at("token_projection")
    return codes @ projection.value("weight").flatten(1).T + projection.value("bias")


def by_hand(state: State, images: torch.Tensor, tokens_norm: bool) -> torch.Tensor:
    """Features (B, D) of a backbone in the original's names, in eval mode."""
    layers, x = Layers(state), images
    stem = layers.at("patch_embed").at("proj")
    for number in stem.members:
        x = functional.conv2d(x, stem.at(number).at(0).value("weight"), stride=2, padding=1)
        x = stem.at(number).at(1).batch_norm(x)
        x = x if number == stem.members[-1] else functional.gelu(x)
    rows, columns = x.shape[2:]
    x = x.flatten(2).transpose(1, 2) + positions(layers, rows, columns)
    for number in layers.at("blocks").members:
        block = layers.at("blocks").at(number)
        x = x + block.value("gamma1") * cross_covariance_attention(block.at("attn"), block.at("norm1").layer_norm(x))
        local = local_patch_interaction(block.at("local_mp"), block.at("norm3").layer_norm(x), rows, columns)
        x = x + block.value("gamma3") * local
        x = x + block.value("gamma2") * block.at("mlp").feed_forward(block.at("norm2").layer_norm(x))
    heads = len(layers.at("blocks").at(0).at("attn").value("temperature"))
    x = torch.cat([layers.value("cls_token").expand(len(x), -1, -1), x], dim=1)
    for number in layers.at("cls_attn_blocks").members:
        block = layers.at("cls_attn_blocks").at(number)
        seen = block.at("norm1").layer_norm(x)
        seen = torch.cat([class_attention(block.at("attn"), seen, heads), seen[:, 1:]], dim=1)
        x = x + block.value("gamma1") * seen
        # The original's tokens_norm: all tokens are normalised, or the class token alone; the sum starts from there.
        normal = block.at("norm2").layer_norm(x)
        x = normal if tokens_norm else torch.cat([normal[:, :1], x[:, 1:]], dim=1)
        token = x[:, :1] + block.value("gamma2") * block.at("mlp").feed_forward(x[:, :1])
        x = torch.cat([token, 2 * x[:, 1:]], dim=1)
    return layers.at("norm").layer_norm(x)[:, 0]


def lively(state: State) -> State:
    """Weights with which every layer matters: LayerScale, BatchNorm and temperatures far from their first values."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, tensor in state.items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            found[name] = tensor
        elif name.endswith("running_var") or "gamma" in name or "temperature" in name:
            found[name] = 0.25 + noise.abs() / 4
        else:
            found[name] = tensor + noise / 10 if tensor.ndim == 1 else noise / math.sqrt(tensor[0].numel())
    return found


@pytest.mark.parametrize(("name", "tokens_norm"), [("xcit_nano_12_p16_224", False), ("xcit_tiny_12_p8_224", True)])
@pytest.mark.parametrize("px", [224, 96])
def test_timms_xcit_is_the_papers_under_the_originals_names(name: str, tokens_norm: bool, px: int) -> None:
    encoder = build_encoder(name).eval()
    encoder.load_state_dict(lively(encoder.state_dict()))
    theirs = {key: tensor.double() for key, tensor in facebook.to_original(encoder.state_dict()).items()}
    images = torch.randn(2, 3, px, px, generator=torch.Generator().manual_seed(px), dtype=torch.float64)
    with torch.no_grad():
        expected = by_hand(theirs, images, tokens_norm)
        in_double, in_single = encoder.double()(images), encoder.float()(images.float())
    size = expected.abs().max()
    assert (in_double - expected).abs().max() < 2e-7 * size  # timm's table of positions is float32
    assert (in_single - expected).abs().max() < 2e-6 * size
    assert (expected[0] - expected[1]).abs().max() > 0.05 * size
