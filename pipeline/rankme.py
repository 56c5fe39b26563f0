"""RankMe: how many dimensions a batch of features really uses (Garrido et al. 2023, "RankMe", ICML)."""

import math
from collections import deque

import torch

KEPT_ROWS = 2048


@torch.no_grad()
def rankme(features: torch.Tensor) -> float:
    """Effective rank of features: exp of the entropy of their singular values, as shares of their sum.

    It lies between 1 (all rows are multiples of one) and min(N, D), so that figures compare only for one D and for N
    well above it. The features are not centred, as in the paper: what all of them share is one dimension.

    The singular values are roots of the eigenvalues of the smaller Gram matrix, in float64: one of 1e-8 of the largest
    is still told from 0, which float32 features are not exact to.

    Args:
        features: Shape (N, D), of any floating type, on any device; the device is waited for.

    Returns:
        NaN where a feature is not finite, there are none, or all are 0.
    """
    wide = features.to(torch.float64)
    if not wide.numel() or not bool(wide.isfinite().all()):
        return math.nan
    gram = wide @ wide.T if len(wide) < wide.shape[1] else wide.T @ wide
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


class RecentFeatures:
    """The last features of a run, on the device, until their rank is asked for."""

    def __init__(self) -> None:
        self._parts: deque[torch.Tensor] = deque()
        self._rows = 0

    def add(self, features: torch.Tensor) -> None:
        """Take in features, shape (N, D); the oldest go where ``KEPT_ROWS`` newer ones are there."""
        self._parts.append(features.detach()[:KEPT_ROWS])
        self._rows += len(self._parts[-1])
        while self._rows - len(self._parts[0]) >= KEPT_ROWS:
            self._rows -= len(self._parts.popleft())

    def rankme(self) -> float:
        """RankMe of the last ``KEPT_ROWS`` of them; NaN where there are none."""
        return rankme(torch.cat(list(self._parts))[-KEPT_ROWS:]) if self._parts else math.nan
