"""A frozen encoder by one contract: uint8 tiles in, features out, with its own normalisation and scale."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pipeline import checkpoint
from pipeline.models.encoders import build_encoder, width
from pipeline.models.heads import DinoHead
from tiling import atomic
from tiling.errors import CheckpointError, UsageError

Triple = tuple[float, float, float]


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
        store_fingerprint: Identity of the store it was pretrained on.
    """

    name: str
    backbone: nn.Module
    head: Callable[[torch.Tensor], torch.Tensor] | None
    mean: Triple
    std: Triple
    mpp: float
    sha256: str
    store_fingerprint: str

    @torch.no_grad()
    def features(self, tiles: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features of uint8 tiles (B, px, px, 3) on the encoder's device: ``cls`` (B, D), ``head`` (B, K), float32."""
        images = tiles.permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(values, device=tiles.device).view(1, 3, 1, 1) for values in (self.mean, self.std))
        cls = self.backbone((images - mean) / std)
        found = {"cls": cls.float()}
        if self.head is not None:
            found["head"] = self.head(cls).float()
        return found


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
    state = checkpoint.read_state(folder)
    config = state["config"]
    backbone = build_encoder(config["model.name"])
    head = DinoHead(
        width(backbone),
        config["method.out_dim"],
        config["method.hidden_dim"],
        config["method.bottleneck_dim"],
    )
    teacher = nn.ModuleDict({"backbone": backbone, "head": head})
    checkpoint.load_network(folder, "teacher", teacher)
    teacher.eval().requires_grad_(False).to(device)
    return FrozenEncoder(
        name=config["model.name"],
        backbone=teacher["backbone"],
        head=teacher["head"],
        mean=tuple(config["views.mean"]),
        std=tuple(config["views.std"]),
        mpp=float(state["mpp"]),
        sha256=atomic.sha256_file(folder / "teacher.safetensors"),
        store_fingerprint=state["store_fingerprint"],
    )
