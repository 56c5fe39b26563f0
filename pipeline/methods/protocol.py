"""What the training loop asks of a method; the loop knows nothing else of it. docs/methods.md sketches seven on it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from pipeline.data.views import ViewSpec
from pipeline.models.initial import InitialWeights


@dataclass(frozen=True)
class Moment:
    """When something happens in a run.

    Args:
        step: Optimizer step, from 0.
        steps: Steps of the whole run.
        epoch: Passes over the data so far.
    """

    step: int
    steps: int
    epoch: float


@dataclass(frozen=True)
class MicroBatch:
    """What one rank is given at once.

    Args:
        views: One tensor (B, 3, S, S) per entry of the method's ``views``.
        ids: Index rows of the tiles in the store, int64, shape (B,): what masks and labels are functions of. One may be
            there twice, with the same views, where it stands in for a damaged tile.
        epochs: Which pass over the data each is in, int64, shape (B,).
    """

    views: Sequence[torch.Tensor]
    ids: np.ndarray
    epochs: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """What a method makes of a micro-batch.

    Args:
        loss: Scalar to be minimised.
        figures: Detached scalars for the log, on the device; of the same names in every micro-batch on every rank.
            They are averaged.
        features: Detached features of the encoder that the run is for, shape (N, D): their rank is watched.
    """

    loss: torch.Tensor
    figures: Mapping[str, torch.Tensor]
    features: torch.Tensor


class Method(Protocol):
    """A way to train an encoder. It is built from (PretrainConfig, Runtime, TileStore).

    Attributes:
        views: The views it wants of every tile; views that it would not encode are not made.
        student: What is trained; the loop wraps it for several ranks and passes the wrapped one to ``loss``.
        encoder: The network that the run is for: images (B, 3, S, S) -> features (B, D); a submodule of one of
            ``networks()``. Whoever uses it on one rank only does so in eval mode, where BatchNorm asks no other rank.
        constants: Figures for the reader that do not change, such as ln K.
    """

    views: tuple[ViewSpec, ...]
    student: nn.Module
    encoder: nn.Module
    constants: dict[str, float]

    def begin_with(self, path: Path) -> InitialWeights:
        """Fill the networks of a new run with weights from elsewhere (``model.init_from``); returns what they are."""

    def loss(self, student: nn.Module, batch: MicroBatch, moment: Moment) -> Outcome:
        """Loss of one micro-batch; several may come before one update.

        It calls ``student`` once, and every trained parameter has its part in the loss (DistributedDataParallel). It
        may call collectives, as all ranks are here at once, each with as many samples. What is random is a function of
        seed, epoch and id (``pipeline.data.randomness.uniforms``, streams from METHOD_STREAM on).

        Args:
            student: ``self.student``, or its wrapper.
            batch: This rank's share.
            moment: Of the update to come.
        """

    def before_update(self, moment: Moment) -> None:
        """Called with all gradients of a step in place, before clipping and the optimizer; they may be dropped here.

        Their values are still multiplied by the loss's scale.
        """

    def after_update(self, moment: Moment, applied: torch.Tensor) -> None:
        """Called once after the optimizer's update.

        Args:
            moment: Of this update.
            applied: Bool scalar on the device: False where the update was left out, because something was not finite.
                Nothing that a checkpoint holds may change then; asking the host would make it wait for the device.
        """

    def networks(self) -> dict[str, nn.Module]:
        """Everything with parameters or buffers that a checkpoint must hold, by name."""

    def state(self) -> dict[str, torch.Tensor]:
        """Further tensors that a checkpoint must hold; filled in place when one is loaded.

        Checkpoints are made between steps: what ``after_update`` empties is none of them.
        """


def parameter_groups(student: nn.Module) -> list[dict[str, object]]:
    """Decayed parameters, then biases and 1-D ones that are not (the original DINO code's ``get_params_groups``)."""
    trained = [(name, parameter) for name, parameter in student.named_parameters() if parameter.requires_grad]
    plain = [p for name, p in trained if name.endswith(".bias") or p.ndim == 1]
    decayed = [p for name, p in trained if not (name.endswith(".bias") or p.ndim == 1)]
    return [{"params": decayed, "decayed": True}, {"params": plain, "decayed": False, "weight_decay": 0.0}]


def grouped_by_size(views: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Consecutive views of one size joined along the batch: each is one forward pass of the backbone."""
    start = 0
    for end in range(1, len(views) + 1):
        if end == len(views) or views[end].shape[-1] != views[start].shape[-1]:
            group = views[start:end]
            yield torch.cat(list(group)) if len(group) > 1 else group[0]
            start = end


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, momentum: float, applied: torch.Tensor) -> None:
    """Exponential moving average of the parameters of ``fast`` in ``slow``, in place; buffers are left alone.

    Args:
        slow: The network that follows, such as a teacher or a momentum encoder.
        fast: The network that is trained, of the same shapes.
        momentum: Share of the old value that stays.
        applied: Bool scalar on the device; nothing changes where it is False.
    """
    old: list[torch.Tensor] = list(slow.parameters())
    new: list[torch.Tensor] = list(fast.parameters())
    change = torch._foreach_sub(new, old)
    torch._foreach_mul_(change, (1 - momentum) * applied.to(change[0].dtype))
    torch._foreach_add_(old, change)
