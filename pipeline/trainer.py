"""One optimizer step as one unit: accumulate, check, clip, update, then what the method updates.

The host never waits for the device here. Whether everything is finite is decided on the device, where it turns the
updates of optimizer and method into ones that change nothing; the host learns of it when figures are logged anyway.
"""

import inspect
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import PretrainConfig
from pipeline.data.augment import make_views
from pipeline.data.loader import Batch
from pipeline.data.randomness import derive_seed
from pipeline.data.views import colour_spec
from pipeline.methods.protocol import Method, MicroBatch, Moment
from pipeline.optimizer import LossScale, build_optimizer, clip_gradients, set_schedules
from pipeline.runtime import Runtime, autocast, half_precision
from pipeline.schedules import effective_lr
from tiling.errors import BonyError

_STREAM_FORWARD = 2
# Buffers are BatchNorm statistics, which are the same on all ranks already. PyTorch 2.15 renamed the option.
_NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_KEEP_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _NEW_NAME else "broadcast_buffers": False}


def global_batch(config: PretrainConfig, world: int) -> int:
    """Samples per optimizer step over all ranks."""
    return config.train.batch_per_rank * config.train.accumulate * world


@dataclass(frozen=True)
class Step:
    """What one optimizer step leaves for the monitor.

    Args:
        figures: Means over micro-batches and ranks, scalars on the device.
        features: Some features of this rank's tiles, (N, D), on the device.
        schedules: Learning rate and weight decay.
    """

    figures: dict[str, torch.Tensor]
    features: torch.Tensor
    schedules: dict[str, float]


@dataclass(frozen=True)
class _Recent:
    """What an error would name: this rank's micro-batches of one step, and their losses on the device."""

    step: int
    ids: list[np.ndarray]
    losses: list[torch.Tensor]


class Trainer:
    """One optimizer step as one unit; everything it needs, built once.

    Args:
        config: The run.
        runtime: This rank.
        method: The method, with its networks on the device.
    """

    def __init__(self, config: PretrainConfig, runtime: Runtime, method: Method) -> None:
        self.config, self.runtime, self.method = config, runtime, method
        self.optimizer = build_optimizer(method.student)
        self.colour = colour_spec(config.views.preset)
        self.global_batch = global_batch(config, runtime.world)
        self.lr = effective_lr(config.optim.lr, self.global_batch, config.optim.lr_cap)
        self._half = half_precision(runtime.device, config.train.precision)
        self._scale = LossScale(runtime.device, self._half is torch.float16)
        self._bad_step = torch.full((), -1, dtype=torch.int64, device=runtime.device)
        self._bad_ranks = torch.zeros(runtime.world, device=runtime.device)
        self._recent: deque[_Recent] = deque(maxlen=config.train.log_every)
        if config.train.compile:
            for network in method.networks().values():
                network.compile()
        self.wrapped: nn.Module = method.student
        if runtime.world > 1:
            # DDP warns of XCiT's depth-wise kernels (C, 1, 3, 3): the stride of a dimension of 1 says nothing.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            self.wrapped = DistributedDataParallel(method.student, gradient_as_bucket_view=True, **_KEEP_BUFFERS)

    def views(self, batch: Batch) -> list[torch.Tensor]:
        """The method's views of a micro-batch, in the precision of the parameters."""
        settings, dtype = self.config.views, next(self.method.student.parameters()).dtype
        return make_views(
            batch.tiles, batch.ids, batch.epochs, self.method.views, self.colour, self.config.train.seed,
            settings.mean, settings.std, dtype, settings.input,
        )  # fmt: skip

    def state(self) -> dict[str, torch.Tensor]:
        """All tensors beside networks and optimizer that a checkpoint must hold; filled in place when one is loaded."""
        return {**self.method.state(), **self._scale.state()}

    def loaded(self) -> None:
        """To be called when ``state`` was filled from a checkpoint."""
        self._scale.loaded()

    def gradients(self, batches: Iterator[Batch], moment: Moment) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Accumulate the gradient of one optimizer step, times the loss's scale.

        Returns:
            This rank's figures averaged over its micro-batches, and features of the last one, (N, D).
        """
        accumulate, seed = self.config.train.accumulate, self.config.train.seed
        self.optimizer.zero_grad(set_to_none=True)
        figures: dict[str, torch.Tensor] = {}
        recent = _Recent(moment.step, [], [])
        features = torch.empty(0)
        for micro, batch in enumerate(islice(batches, accumulate)):
            # Drop path draws from torch's generator: seeding it makes it a function of seed, step and rank.
            torch.manual_seed(derive_seed(seed, _STREAM_FORWARD, moment.step, micro, self.runtime.rank))
            with self._sync(last=micro == accumulate - 1):
                with autocast(self.runtime.device, self._half):
                    made = MicroBatch(self.views(batch), batch.ids, batch.epochs)
                    outcome = self.method.loss(self.wrapped, made, moment)
                torch.autograd.backward(outcome.loss * self._scale.value / accumulate)
            recent.ids.append(batch.ids)
            recent.losses.append(outcome.loss.detach())
            features = outcome.features
            for name, value in {"loss": outcome.loss.detach(), **outcome.figures}.items():
                figures[name] = figures.get(name, 0) + value / accumulate
        self._recent.append(recent)
        return figures, features

    def _sync(self, last: bool) -> AbstractContextManager[object]:
        """Ranks exchange gradients with the last micro-batch only."""
        if last or not isinstance(self.wrapped, DistributedDataParallel):
            return nullcontext()
        return self.wrapped.no_sync()

    def step(self, batches: Iterator[Batch], moment: Moment) -> Step:
        """One optimizer step. Where something is not finite it changes nothing but BatchNorm's statistics."""
        figures, features = self.gradients(batches, moment)
        self.method.before_update(moment)
        optim = self.config.optim
        norm = clip_gradients(
            self.method.student.parameters(),
            optim.clip,
            optim.clip_mode,
            self._scale.value if self._scale.active else None,
        )
        mean, applied = self._agreed({**figures, "grad_norm": norm}, moment)
        now = set_schedules(self.optimizer, self.config, moment.step, self.lr)
        # Fused AdamW leaves everything as it is where this is 1: torch.amp.GradScaler's way, without its copy to host.
        self.optimizer.found_inf = (~applied).to(torch.float32)  # type: ignore[attr-defined]
        self.optimizer.step()
        self.method.after_update(moment, applied)
        if self._scale.active:
            mean["loss_scale"] = self._scale.value.clone()
        return Step(mean, features, now)

    def _agreed(self, figures: dict[str, torch.Tensor], moment: Moment) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Figures averaged over all ranks, and whether the update applies: decided by all ranks, on the device."""
        kind, world = figures["loss"].dtype, self.runtime.world
        lost = torch.zeros(world, dtype=kind, device=self.runtime.device)
        lost[self.runtime.rank] = (~torch.isfinite(figures["loss"])).to(kind)
        own = torch.stack([value.to(kind) for value in figures.values()])
        total = self.runtime.sum(torch.cat([own / world, lost]))
        means, ranks = total[: len(own)], total[len(own) :]
        mean = dict(zip(figures, means.unbind(), strict=True))
        overflow = ~torch.isfinite(mean["grad_norm"])
        # A gradient that is not finite is no fault in fp16, as long as a smaller scale may help.
        fatal = (ranks.sum() > 0) | (overflow & (self._scale.value <= 1))
        first = fatal & (self._bad_step < 0)
        self._bad_step.copy_(torch.where(first, moment.step, self._bad_step))
        self._bad_ranks.copy_(torch.where(first, ranks, self._bad_ranks))
        self._scale.update(overflow)
        return mean, ~overflow & (self._bad_step < 0)

    def require_finite(self) -> None:
        """Wait for the device, and stop where a loss or gradient was not finite; nothing was updated from then on.

        To be called by all ranks, every ``train.log_every`` steps and before anything is saved.

        Raises:
            BonyError: It names the step, and on the ranks where the loss was not finite their tiles.
        """
        step = int(self._bad_step)
        if step < 0:
            return
        bad = [rank for rank, lost in enumerate(self._bad_ranks.tolist()) if lost]
        what = f"loss is not finite at step {step} on rank {', '.join(map(str, bad))}" if bad else (
            f"gradient is not finite at step {step}, though the loss is"
        )  # fmt: skip
        raise BonyError(
            f"{what} ({self._tiles_of(step, self.runtime.rank in bad)})",
            self.config.out,
            "nothing was updated from there on; lower optim.lr or optim.lr_cap in another --out, which model.init_from"
            " may begin with this run's newest checkpoint",
        )

    def _tiles_of(self, step: int, lost: bool) -> str:
        """This rank's tiles of a step: those of the micro-batches whose loss was lost, or all."""
        (recent,) = [one for one in self._recent if one.step == step]
        chosen = [
            ids for ids, loss in zip(recent.ids, recent.losses, strict=True) if not lost or not bool(loss.isfinite())
        ]
        numbers = ", ".join(str(number) for ids in chosen for number in ids.tolist())
        return f"rank {self.runtime.rank}'s tiles there, as rows of the store's index: {numbers}"
