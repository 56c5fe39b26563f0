"""Projection heads."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

# Shortest length that is divided by; the usual 1e-12 is 0 in float16, and a gradient divided by less than this would
# pass float16's largest number.
_SHORTEST = {torch.float16: 1e-3}
_SHORTEST_ELSE = 1e-6


class UnitLinear(nn.Module):
    """Linear layer without bias whose weight rows have unit length: weight norm with its gain fixed to 1.

    The names ``weight_g`` and ``weight_v`` are those of the original DINO code (``torch.nn.utils.weight_norm``), which
    PyTorch's newer parametrization would change.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_features, 1), requires_grad=False)
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        # nn.Linear's default, which is what weight_norm found in the original code.
        nn.init.kaiming_uniform_(self.weight_v, a=5**0.5)

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        """(B, in_features) -> (B, out_features)."""
        return F.linear(x_BD, self.weight_g * self.weight_v / self.weight_v.norm(dim=1, keepdim=True))


class DinoHead(nn.Module):
    """DINO's head (Caron et al. 2021, appendix C): 3-layer MLP, L2 norm, prototypes of unit length.

    Args:
        in_dim: Width of the backbone's output.
        out_dim: Number of prototypes, K.
        hidden_dim: Width of the hidden layers.
        bottleneck_dim: Width before the prototypes.
    """

    def __init__(self, in_dim: int, out_dim: int, hidden_dim: int = 2048, bottleneck_dim: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = UnitLinear(bottleneck_dim, out_dim)

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        """Features (B, in_dim) -> cosines with the prototypes (B, out_dim), each in [-1, 1]."""
        out = self.mlp(x_BD)
        cosines: torch.Tensor = self.last_layer(F.normalize(out, dim=-1, eps=_SHORTEST.get(out.dtype, _SHORTEST_ELSE)))
        return cosines


def sizes_of_head(state: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The sizes that ``DinoHead`` was made with, of its state dict."""
    prototypes = state["last_layer.weight_v"].shape
    return {"out_dim": prototypes[0], "hidden_dim": len(state["mlp.0.bias"]), "bottleneck_dim": prototypes[1]}
