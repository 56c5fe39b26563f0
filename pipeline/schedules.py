"""Schedules as pure functions of the step."""

import math


def cosine(step: int, steps: int, start: float, end: float, warmup: int = 0) -> float:
    """Linear warm-up from 0 to ``start``, then a cosine to ``end`` (the original DINO code's ``cosine_scheduler``).

    Args:
        step: Optimizer step, from 0.
        steps: Steps in all.
        start: Value after the warm-up.
        end: Value that the cosine tends to at ``steps``.
        warmup: Steps of warm-up.

    >>> [cosine(step, 4, 1.0, 0.0) for step in (0, 2)]
    [1.0, 0.5]
    >>> [cosine(step, 10, 1.0, 0.0, warmup=3) for step in (0, 1, 2)]
    [0.0, 0.5, 1.0]
    """
    if step < warmup:
        return start * step / max(warmup - 1, 1)
    share = (step - warmup) / max(steps - warmup, 1)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * min(share, 1.0)))


def linear(epoch: float, warmup: float, start: float, end: float) -> float:
    """From ``start`` to ``end`` in ``warmup`` epochs, then ``end``.

    >>> [linear(epoch, 2, 0.04, 0.08) for epoch in (0, 1, 2, 3)]
    [0.04, 0.06, 0.08, 0.08]
    """
    return end if epoch >= warmup else start + (end - start) * epoch / warmup


def effective_lr(lr: float, global_batch: int, cap: float) -> float:
    """The linear rule, lr x global batch / 256 (Goyal et al. 2017), up to ``cap``.

    >>> effective_lr(5e-4, 512, 4e-3)
    0.001
    """
    return min(lr * global_batch / 256, cap)
