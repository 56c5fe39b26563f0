"""One optimizer step as one unit: accumulate, check, clip, update, then what the method updates."""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import PretrainConfig
from pipeline.data.augment import colour_spec, make_views
from pipeline.data.loader import Batch
from pipeline.data.randomness import derive_seed
from pipeline.methods.protocol import Method, parameter_groups
from pipeline.runtime import Runtime, autocast
from pipeline.schedules import cosine, effective_lr
from tiling.errors import BonyError

_STREAM_FORWARD = 2
# Buffers are BatchNorm statistics, which are the same on all ranks already. PyTorch 2.15 renamed the option.
_NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_KEEP_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _NEW_NAME else "broadcast_buffers": False}


def global_batch(config: PretrainConfig, world: int) -> int:
    """Samples per optimizer step over all ranks."""
    return config.train.batch_per_rank * config.train.accumulate * world


def build_optimizer(student: nn.Module) -> torch.optim.Optimizer:
    """AdamW over decayed and undecayed parameters; lr and weight decay are set anew each step."""
    fused = next(student.parameters()).is_cuda
    return torch.optim.AdamW(parameter_groups(student), lr=0.0, fused=fused)


def set_schedules(optimizer: torch.optim.Optimizer, config: PretrainConfig, step: int, lr: float) -> dict[str, float]:
    """Put this step's learning rate and weight decay into the optimizer; returns both."""
    optim, steps = config.optim, config.train.steps
    now = {
        "lr": cosine(step, steps, lr, min(optim.lr_end, lr), optim.warmup_steps),
        "weight_decay": cosine(step, steps, optim.weight_decay, optim.weight_decay_end),
    }
    for group in optimizer.param_groups:
        group["lr"] = now["lr"]
        group["weight_decay"] = now["weight_decay"] if group["decayed"] else 0.0
    return now


@torch.no_grad()
def clip_gradients(parameters: Iterator[nn.Parameter], limit: float, mode: str) -> torch.Tensor:
    """Clip in place, by each parameter's own norm or by the global one, without a host sync.

    Returns:
        The global gradient norm before clipping, a scalar on the device.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    total: torch.Tensor = norms.norm()
    if limit > 0:
        factors = (limit / ((norms if mode == "per_param" else total.expand(len(norms))) + 1e-6)).clamp(max=1)
        torch._foreach_mul_(gradients, list(factors.unbind()))
    return total


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
        self.lr = effective_lr(config.optim.lr, global_batch(config, runtime.world), config.optim.lr_cap)
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
            settings.mean, settings.std, dtype,
        )  # fmt: skip

    def gradients(self, batches: Iterator[Batch], step: int) -> tuple[dict[str, torch.Tensor], list[Batch]]:
        """Accumulate the gradient of one optimizer step.

        Returns:
            This rank's figures averaged over its micro-batches, and the micro-batches.
        """
        accumulate = self.config.train.accumulate
        self.optimizer.zero_grad(set_to_none=True)
        figures: dict[str, torch.Tensor] = {}
        seen: list[Batch] = []
        for micro, batch in enumerate(islice(batches, accumulate)):
            seen.append(batch)
            # Drop path draws from torch's generator: seeding it makes it a function of seed, step and rank.
            torch.manual_seed(derive_seed(self.config.train.seed, _STREAM_FORWARD, step, micro, self.runtime.rank))
            with self._sync(last=micro == accumulate - 1):
                with autocast(self.runtime.device, self.config.train.precision):
                    loss, more = self.method.loss(self.wrapped, self.views(batch))
                torch.autograd.backward(loss / accumulate)
            for name, value in {"loss": loss.detach(), **more}.items():
                figures[name] = figures.get(name, 0) + value / accumulate
        return figures, seen

    def _sync(self, last: bool) -> AbstractContextManager[object]:
        """Ranks exchange gradients with the last micro-batch only."""
        if last or not isinstance(self.wrapped, DistributedDataParallel):
            return nullcontext()
        return self.wrapped.no_sync()

    def _agreed(self, figures: dict[str, torch.Tensor], step: int, seen: list[Batch]) -> dict[str, torch.Tensor]:
        """Figures averaged over all ranks; what is not finite on one rank is not finite in the average.

        Raises:
            BonyError: The loss of some rank, or the gradient, is not finite.
        """
        own = torch.stack([value.to(figures["loss"].dtype) for value in figures.values()])
        means = self.runtime.sum(own) / self.runtime.world
        mean = dict(zip(figures, means.unbind(), strict=True))
        if not bool(torch.isfinite(mean["loss"] + mean["grad_norm"])):
            loss_is_finite = bool(torch.isfinite(mean["loss"]))
            elsewhere = not loss_is_finite and bool(torch.isfinite(figures["loss"]))
            tiles = [int(number) for batch in seen for number in batch.ids][:16]
            here = "it is finite here" if elsewhere else f"tiles here begin with {tiles}"
            what = "gradient" if loss_is_finite else "loss"
            raise BonyError(
                f"{what} is not finite at step {step} (rank {self.runtime.rank}: {here})",
                self.config.out,
                "nothing was updated; lower optim.lr or optim.lr_cap and continue from the last checkpoint",
            )
        return mean

    def step(
        self, batches: Iterator[Batch], step: int, epoch: float
    ) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Optimizer step number ``step`` (from 0), ``epoch`` passes into the data.

        Returns:
            Mean figures over micro-batches and ranks, on the device; this step's schedule values.

        Raises:
            BonyError: Loss or gradient is not finite on some rank; nothing but BatchNorm statistics has changed.
        """
        figures, seen = self.gradients(batches, step)
        self.method.before_update(epoch)
        optim = self.config.optim
        figures["grad_norm"] = clip_gradients(self.method.student.parameters(), optim.clip, optim.clip_mode)
        figures = self._agreed(figures, step, seen)
        now = set_schedules(self.optimizer, self.config, step, self.lr)
        self.optimizer.step()
        self.method.after_update(step, self.config.train.steps, self.runtime)
        return figures, now
