"""One BatchNorm for every device, with statistics over all ranks by a differentiable all-reduce.

PyTorch's SyncBatchNorm refuses the CPU and breaks torch.compile. XCiT has BatchNorm in its patch embedding and in every
local patch interaction; without synchronisation its gradients depend on how the batch is spread over ranks.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is the all-reduce of the gradients."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


class BatchNorm(_BatchNorm):
    """BatchNorm over (B, C) or (B, C, ...) whose training statistics are those of all ranks' samples together."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected (B, C, ...), got {input.dim()} dimensions")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise ``input`` (B, C, ...); statistics are over all ranks in training."""
        if not self.training or _world() == 1:
            alone: torch.Tensor = super().forward(input)
            return alone
        if self.running_mean is None or self.running_var is None or self.momentum is None:
            raise ValueError("statistics must be tracked with a momentum")
        wide = input.float() if input.dtype in (torch.half, torch.bfloat16) else input
        dims = [0, *range(2, input.dim())]
        shape = (1, -1, *[1] * (input.dim() - 2))
        # The running mean is the same on all ranks; taking it off first keeps E[x^2] - E[x]^2 from cancelling.
        shift = self.running_mean.detach().clone().to(wide.dtype).view(shape)
        shifted = wide - shift
        count = torch.full((1,), shifted.numel() / shifted.shape[1], dtype=wide.dtype, device=wide.device)
        sums = _SumOverRanks.apply(torch.cat([shifted.sum(dims), shifted.square().sum(dims), count]))
        total, squares, number = sums.split([self.num_features, self.num_features, 1])
        mean = total / number
        variance = (squares / number - mean.square()).clamp(min=0)  # rounding may take it below
        with torch.no_grad():
            unbiased = variance * number / (number - 1).clamp(min=1)
            self.running_mean.lerp_((mean + shift.flatten()).to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        scale = torch.rsqrt(variance + self.eps)
        normal: torch.Tensor = (shifted - mean.view(shape)) * scale.view(shape)
        if self.affine:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(input.dtype)


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
