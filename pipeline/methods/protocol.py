"""What the training loop asks of a self-supervised method; the loop knows nothing else of it."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import nn

from pipeline.data.augment import ViewSpec
from pipeline.runtime import Runtime


class Method(Protocol):
    """A self-supervised method.

    Attributes:
        views: The views it wants of every tile; views that it would not encode are not made.
        student: What is trained; the loop wraps it for several ranks and passes the wrapped one to ``loss``.
        constants: Figures for the reader that do not change, such as ln K.
    """

    views: tuple[ViewSpec, ...]
    student: nn.Module
    constants: dict[str, float]

    def loss(self, student: nn.Module, views: Sequence[torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of one micro-batch and detached figures for the log.

        Args:
            student: ``self.student``, or its wrapper.
            views: One tensor (B, 3, S, S) per entry of ``self.views``.
        """

    def before_update(self, epoch: float) -> None:
        """Called with all gradients of a step in place, before clipping and the optimizer."""

    def after_update(self, step: int, steps: int, runtime: Runtime) -> None:
        """Called once after the optimizer's update number ``step`` (from 0) of ``steps``."""

    def networks(self) -> dict[str, nn.Module]:
        """Everything with parameters or buffers that a checkpoint must hold, by name."""

    def state(self) -> dict[str, torch.Tensor]:
        """Further tensors that a checkpoint must hold; filled in place when one is loaded."""


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
            yield torch.cat(list(views[start:end]))
            start = end
