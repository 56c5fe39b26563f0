"""One BatchNorm for every device, with statistics over all ranks.

PyTorch's SyncBatchNorm refuses the CPU and breaks torch.compile. XCiT has BatchNorm in its patch embedding and in every
local patch interaction; without synchronisation its gradients depend on how the batch is spread over ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_HALF = (torch.half, torch.bfloat16)
_statistics_kept = False


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def statistics_kept() -> Iterator[None]:
    """Inside, training leaves running statistics alone: a forward pass that is computed again was counted already."""
    global _statistics_kept
    before, _statistics_kept = _statistics_kept, True
    try:
        yield
    finally:
        _statistics_kept = before


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in _HALF else x


def _per_channel(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(C,) to be broadcast over ``x`` (B, C, ...)."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


@torch.no_grad()
def _statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and biased variance per channel of all ranks' ``x`` (B, C, ...), each (C,), and the number of values, ().

    Each rank's own mean and sum of squares around it are exchanged in one all-gather and joined by the formula of
    Chan et al. (1979), which cancels no digits however far the mean is from 0, and takes ranks of unequal batches.
    """
    variance, mean = torch.var_mean(_wide(x), dim=[0, *range(2, x.dim())], correction=0)
    count = mean.new_full((1,), x.numel() // x.shape[1])
    own = torch.cat([mean, variance * count, count])
    gathered = own.new_empty(_world() * len(own))
    dist.all_gather_into_tensor(gathered, own)
    means, squares, counts = torch.split(gathered.view(-1, len(own)), [len(mean), len(mean), 1], dim=1)
    number = counts.sum()
    joint = (means * counts).sum(dim=0) / number
    around = squares + counts * (means - joint).square()
    return joint, around.sum(dim=0) / number, number


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias, where mean and variance are those of all ranks' ``x``.

    Saves nothing of ``x``'s size but ``x``. The gradient goes through mean and variance: Ioffe & Szegedy (2015),
    section 3, with sums over all ranks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        mean: torch.Tensor,
        variance: torch.Tensor,
        number: torch.Tensor,
        eps: float,
    ) -> torch.Tensor:
        """(B, C, ...) -> the same shape and type."""
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(variance + eps), number)
        ctx.eps = eps
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)  # one pass on every device

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Of x, weight and bias; the last two are this rank's own."""
        x, weight, mean, inverse, number = ctx.saved_tensors
        # This rank's sums of gradient * normal and of gradient, in one pass; x's gradient needs those of all ranks.
        _, weight_grad, bias_grad = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, None, None, mean, inverse, True, ctx.eps, [False, True, True]
        )
        sums = torch.cat([weight_grad, bias_grad])
        dist.all_reduce(sums)
        along, total = (sums / number).chunk(2)
        scale = weight * inverse
        away = (_wide(x) - _per_channel(mean, x)) * _per_channel(-scale * inverse * along, x)
        x_grad = away + gradient * _per_channel(scale, x) - _per_channel(scale * total, x)
        return x_grad.to(x.dtype), weight_grad, bias_grad, None, None, None, None


class BatchNorm(_BatchNorm):
    """BatchNorm over (B, C) or (B, C, ...) whose training statistics are those of all ranks' samples together."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected (B, C, ...), got {input.dim()} dimensions")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise ``input`` (B, C, ...); statistics are over all ranks in training."""
        if not self.training or (_world() == 1 and not _statistics_kept):
            alone: torch.Tensor = super().forward(input)
            return alone
        self._check_input_dim(input)
        running_mean, running_var, batches = self.running_mean, self.running_var, self.num_batches_tracked
        if running_mean is None or running_var is None or batches is None or self.momentum is None or not self.affine:
            raise ValueError("must be affine, and its statistics tracked by a momentum")
        if _world() == 1:
            unused = running_mean.clone(), running_var.clone()
            return F.batch_norm(input, *unused, self.weight, self.bias, training=True, eps=self.eps)
        mean, variance, number = _statistics(input)
        if not _statistics_kept:
            unbiased = variance * number / (number - 1).clamp(min=1)
            running_mean.lerp_(mean.to(running_mean.dtype), self.momentum)
            running_var.lerp_(unbiased.to(running_var.dtype), self.momentum)
            batches.add_(1)
        normal: torch.Tensor = _Normalise.apply(input, self.weight, self.bias, mean, variance, number, self.eps)
        return normal


def synchronise(module: nn.Module) -> nn.Module:
    """Replace every BatchNorm inside ``module`` by ``BatchNorm``, keeping parameters, buffers and their names."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm) and not isinstance(child, BatchNorm):
            ours = BatchNorm(child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
            ours.load_state_dict(child.state_dict())
            setattr(module, name, ours.train(child.training))
        else:
            synchronise(child)
    return module
