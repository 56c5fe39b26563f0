"""AdamW, its schedules, clipping and the loss's scale: everything on the device, without a wait of the host."""

from collections.abc import Iterator

import torch
from torch import nn

from pipeline.config import PretrainConfig
from pipeline.methods.protocol import parameter_groups
from pipeline.schedules import cosine


def build_optimizer(student: nn.Module) -> torch.optim.Optimizer:
    """AdamW over decayed and undecayed parameters; lr and weight decay are set anew each step."""
    return torch.optim.AdamW(parameter_groups(student), lr=0.0, fused=True)


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
def clip_gradients(
    parameters: Iterator[nn.Parameter], limit: float, mode: str, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Take off the loss's scale and clip, in place: by each parameter's own norm or by the global one.

    Args:
        parameters: What is trained; those without gradient are left out.
        limit: Largest norm; 0 does not clip.
        mode: per_param or global.
        scale: What the loss was multiplied by, a scalar on the device; None for 1.

    Returns:
        The global gradient norm before clipping, a scalar on the device.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    if scale is not None:
        norms = norms / scale
    total: torch.Tensor = norms.norm()
    factors = torch.ones_like(norms)
    if limit > 0:
        factors = (limit / ((norms if mode == "per_param" else total.expand(len(norms))) + 1e-6)).clamp(max=1)
    if scale is not None:
        factors = factors / scale
    if limit > 0 or scale is not None:
        torch._foreach_mul_(gradients, list(factors.unbind()))
    return total


class LossScale:
    """What the loss is multiplied by so that fp16 gradients neither vanish nor overflow, decided on the device.

    The rule of ``torch.amp.GradScaler``: halved when a gradient overflows, doubled after so many steps in which none
    did. Without fp16 it stays 1.

    Args:
        device: Where it lives.
        active: Whether the run computes in fp16.
    """

    START, GROW_AFTER = 65536.0, 2000

    def __init__(self, device: torch.device, active: bool) -> None:
        self.active = active
        self.value = torch.tensor(self.START if active else 1.0, device=device)
        self._good = torch.zeros((), device=device)

    def update(self, overflow: torch.Tensor) -> None:
        """After a step: ``overflow`` says, on the device, whether a gradient was not finite."""
        if not self.active:
            return
        good = torch.where(overflow, 0, self._good + 1)
        grown = torch.where(good >= self.GROW_AFTER, self.value * 2, self.value)
        self.value.copy_(torch.where(overflow, self.value / 2, grown))
        self._good.copy_(torch.where(good >= self.GROW_AFTER, 0, good))

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold; filled in place when one is loaded."""
        return {"loss_scale": self.value, "loss_scale_good_steps": self._good}

    def loaded(self) -> None:
        """After ``state`` was filled: the run may have had another precision when it was saved."""
        if not self.active:
            self.value.fill_(1.0)
        elif float(self.value) <= 1.0:
            self.value.fill_(self.START)
