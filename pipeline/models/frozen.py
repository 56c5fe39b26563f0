"""A frozen encoder by one contract: uint8 tiles in, features out, with its own normalisation and scale."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline import checkpoint
from pipeline.data.haar import Triple, network_input
from pipeline.models import facebook
from pipeline.models.encoders import build_encoder, require_size, width
from pipeline.models.heads import DinoHead, sizes_of_head
from tiling import atomic
from tiling.errors import CheckpointError, UsageError

# What the original code normalises with, whatever it was trained on.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class FrozenEncoder:
    """An encoder that is only used, never trained.

    Args:
        name: Architecture.
        backbone: Normalised images (B, 3, S, S) -> CLS features (B, D).
        head: CLS features -> head output (B, K); None when it has no head.
        mean: Per-channel mean, RGB in [0, 1].
        std: Per-channel standard deviation.
        mpp: um/px it was trained at.
        sha256: Identity of the weights.
        store_fingerprint: Identity of the store it was pretrained on; "" where that is not known.
        input: What the backbone is fed: rgb, or haar for the approximation of a tile's Haar transform.
    """

    name: str
    backbone: nn.Module
    head: nn.Module | None
    mean: Triple
    std: Triple
    mpp: float
    sha256: str
    store_fingerprint: str
    input: str = "rgb"

    @torch.no_grad()
    def features(self, tiles: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features of uint8 tiles (B, px, px, 3) on the encoder's device: ``cls`` (B, D), ``head`` (B, K), float32.

        They are computed in the type of the weights.

        Raises:
            UsageError: The encoder takes no tiles of this size.
        """
        cls = encoded(self.backbone, tiles, self.input, self.mean, self.std)
        found = {"cls": cls.float()}
        if self.head is not None:
            found["head"] = self.head(cls).float()
        return found

    def double(self) -> "FrozenEncoder":
        """The same in float64: what float32 should come close to on any machine."""
        head = None if self.head is None else copy.deepcopy(self.head).double()
        return replace(self, backbone=copy.deepcopy(self.backbone).double(), head=head)


def encoded(backbone: nn.Module, tiles: torch.Tensor, input: str, mean: Triple, std: Triple) -> torch.Tensor:
    """CLS features (B, D) of whole uint8 tiles (B, px, px, 3), in the type of the weights.

    Raises:
        UsageError: The backbone takes no tiles of this size.
    """
    images = tiles.permute(0, 3, 1, 2).to(next(backbone.parameters()).dtype) / 255
    x = network_input(images, input, mean, std)
    require_size(backbone, x.shape[-1])
    features: torch.Tensor = backbone(x)
    return features


def networks(name: str, head: Mapping[str, int] | None) -> nn.ModuleDict:
    """``backbone`` and, unless ``head`` is None, a DINO ``head`` of these ``HEAD_SIZES``: untrained, in eval mode."""
    parts: dict[str, nn.Module] = {"backbone": build_encoder(name)}
    if head is not None:
        parts["head"] = DinoHead(width(parts["backbone"]), **head)
    return nn.ModuleDict(parts).eval().requires_grad_(False)


def head_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """Sizes of the DINO head in a run's config."""
    return {key: int(config[f"method.{key}"]) for key in ("out_dim", "hidden_dim", "bottleneck_dim")}


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint folder that a path means: a checkpoint itself, or the newest sound one of a RUN.

    Raises:
        UsageError: It is neither.
        CheckpointError: The run has no sound checkpoint.
    """
    if (path / checkpoint.STATE).is_file():
        return path
    if not (path / checkpoint.FOLDER).is_dir():
        raise UsageError("is no run and no checkpoint", path, "give a RUN folder made by `bony pretrain`")
    folder = checkpoint.newest_sound(path)
    if folder is None:
        raise CheckpointError("the run has no checkpoint yet", path, "let it train until its first one")
    return folder


def load_encoder(path: Path, device: torch.device) -> FrozenEncoder:
    """The teacher of a RUN's newest sound checkpoint, or of one checkpoint, in eval mode.

    Raises:
        UsageError: The path is no run.
        DamageError: A file of the checkpoint is damaged.
        CheckpointError: The checkpoint does not fit the architecture it names.
    """
    folder = resolve_checkpoint(path)
    return encoder_of(folder, checkpoint.read_state(folder), device)


def encoder_of(folder: Path, state: Mapping[str, Any], device: torch.device) -> FrozenEncoder:
    """The teacher of a checkpoint that was found sound when its ``state`` was read, in eval mode.

    Raises:
        CheckpointError: It does not fit the architecture it names.
    """
    config = state["config"]
    teacher = networks(config["model.name"], head_sizes(config))
    checkpoint.load_network(folder, "teacher", teacher)
    teacher.to(device)
    return FrozenEncoder(
        name=config["model.name"],
        backbone=teacher["backbone"],
        head=teacher["head"],
        mean=tuple(config["views.mean"]),
        std=tuple(config["views.std"]),
        mpp=float(state["mpp"]),
        sha256=atomic.sha256_file(folder / "teacher.safetensors"),
        store_fingerprint=state["store_fingerprint"],
        input=config.get("views.input", "rgb"),
    )


def load_original(path: Path, mpp: float, device: torch.device) -> FrozenEncoder:
    """The teacher of a checkpoint file of the original DINO code, in eval mode.

    Args:
        path: Its ``.pth`` file.
        mpp: um/px it was trained at; the file does not say.
        device: Where to put it.

    Raises:
        UsageError: There is no such file.
        CheckpointError: It holds something else, or an architecture that is not known.
    """
    found = facebook.read_original(path)
    name = facebook.timm_name(found)
    tensors = {f"backbone.{key}": tensor for key, tensor in found.backbone.items()}
    sizes = None
    if found.head is not None:
        tensors |= {f"head.{key}": tensor for key, tensor in found.head.items()}
        sizes = sizes_of_head(found.head)
    teacher = networks(name, sizes)
    checkpoint.require_fitting(path, tensors, teacher)
    teacher.load_state_dict(tensors)
    teacher.to(device)
    head = teacher["head"] if sizes else None
    return FrozenEncoder(
        name, teacher["backbone"], head, IMAGENET_MEAN, IMAGENET_STD, mpp, atomic.sha256_file(path), ""
    )
