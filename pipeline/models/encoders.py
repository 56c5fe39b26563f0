"""Encoders by name, from timm; weights never come from the network."""

import difflib
from typing import Any

import timm
from torch import nn

from pipeline.models.norm import synchronise
from tiling.errors import UsageError

FAMILIES = ("xcit_", "vit_")


def build_encoder(name: str, drop_path: float = 0.0) -> nn.Module:
    """A randomly initialised timm XCiT or ViT without classifier: images (B, 3, H, W) -> features (B, num_features).

    Positions are interpolated for other input sizes than the model's own (XCiT's Fourier positions need nothing).
    BatchNorm is synchronised over ranks.

    Raises:
        UsageError: timm knows no such model, or it is of another family.
    """
    if not name.startswith(FAMILIES) or not timm.is_model(name):
        known = [model for family in FAMILIES for model in timm.list_models(f"{family}*")]
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"close ones: {', '.join(near)}" if near else f"choose a timm model of {', '.join(FAMILIES)}"
        raise UsageError(f"model.name is {name!r}, no XCiT or ViT of timm has that name", do=hint)
    encoder: nn.Module = timm.create_model(
        name, pretrained=False, num_classes=0, drop_path_rate=drop_path, **create_options(name)
    )
    return synchronise(encoder)


def create_options(name: str) -> dict[str, Any]:
    """Options of ``timm.create_model`` that this architecture needs to take images of any size."""
    return {"dynamic_img_size": True} if name.startswith("vit_") else {}


def width(encoder: nn.Module) -> int:
    """Number of features that an encoder gives per image."""
    return int(encoder.num_features)  # type: ignore[arg-type]  # timm sets it on every model
