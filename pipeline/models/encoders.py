"""Encoders by name, from timm; weights never come from the network."""

import difflib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import timm
import torch
from timm.layers.patch_embed import PatchEmbed
from torch import nn
from torch.utils.checkpoint import checkpoint

from pipeline.models.norm import statistics_kept, synchronise
from tiling.errors import UsageError

FAMILIES = ("xcit_", "vit_")
# Their relative positions are a table of one size.
_ONE_SIZE = ("vit_relpos_", "vit_srelpos_")


def build_encoder(name: str, drop_path: float = 0.0, recompute: bool = False) -> nn.Module:
    """A randomly initialised timm XCiT or ViT without classifier: images (B, 3, H, W) -> features (B, num_features).

    Positions are interpolated for other input sizes than the model's own (XCiT's Fourier positions need nothing);
    ``require_size`` says which sizes it takes. BatchNorm is synchronised over ranks.

    Args:
        name: timm's name.
        drop_path: Stochastic depth rate in training.
        recompute: Keep no activations inside the blocks, and compute them again for the gradient.

    Raises:
        UsageError: timm knows no such model, or it is of another family.
    """
    if not name.startswith(FAMILIES) or name.startswith(_ONE_SIZE) or not timm.is_model(name):
        known = [model for family in FAMILIES for model in timm.list_models(f"{family}*", exclude_filters="*relpos*")]
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"close ones: {', '.join(near)}" if near else f"choose a timm model of {', '.join(FAMILIES)}"
        raise UsageError(f"model.name is {name!r}, no XCiT or ViT of timm for any input size has that name", do=hint)
    encoder: nn.Module = timm.create_model(
        name, pretrained=False, num_classes=0, drop_path_rate=drop_path, **create_options(name)
    )
    if recompute:
        blocks = list(_blocks(encoder))
        kinds = {kind: _recomputed(kind) for kind in {type(block) for block in blocks}}
        for block in blocks:
            block.__class__ = kinds[type(block)]  # the parameters' names stay
    return synchronise(encoder)


def create_options(name: str) -> dict[str, Any]:
    """Options of ``timm.create_model`` that this architecture needs to take images of any size."""
    return {"dynamic_img_size": True} if name.startswith("vit_") else {}


def width(encoder: nn.Module) -> int:
    """Number of features that an encoder gives per image."""
    return int(encoder.num_features)  # type: ignore[arg-type]  # timm sets it on every model


def require_size(encoder: nn.Module, px: int) -> None:
    """Raise UsageError where an encoder takes no images of ``px`` x ``px``.

    A ViT that cuts images into patches takes multiples of the patch; XCiT's and the hybrids' convolutions pad.
    """
    embed = getattr(encoder, "patch_embed", None)
    patch = max(embed.patch_size) if isinstance(embed, PatchEmbed) else 1
    if px % patch:
        near = patch * max(1, round(px / patch))
        raise UsageError(f"images of {px} px do not divide into patches of {patch} px", do=f"use {near} px, or an XCiT")


def _blocks(encoder: nn.Module) -> Iterator[nn.Module]:
    for stack in ("blocks", "cls_attn_blocks"):
        yield from getattr(encoder, stack, ())


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around a block's forward pass, and around the second one for the gradient."""
    return nullcontext(), statistics_kept()


def _recomputed(kind: type[nn.Module]) -> type[nn.Module]:
    """A kind of block that keeps no activations: they are computed again in the backward pass."""

    class Recomputed(kind):  # type: ignore[misc, valid-type]
        def forward(self, *inputs: Any, **named: Any) -> Any:
            if not torch.is_grad_enabled():
                return super().forward(*inputs, **named)
            # torch.compile takes no contexts of ours, and needs none: it changes a buffer once.
            contexts: dict[str, Any] = {} if torch.compiler.is_compiling() else {"context_fn": _contexts}
            return checkpoint(super().forward, *inputs, use_reentrant=False, **contexts, **named)

    return Recomputed
