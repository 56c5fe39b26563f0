"""DINO: self-distillation with no labels (Caron et al. 2021), views paired by identity.

The original code drops the pair with equal *index*, which is the wrong one when the student does not see the globals.
Here a pair is a teacher view and a student view that are not the same view, and a view that enters no pair is not
encoded: with one global crop the student sees the local ones only.
"""

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import nn

from pipeline.config import PretrainConfig
from pipeline.data.haar import input_side
from pipeline.data.views import ViewSpec, view_specs
from pipeline.methods.protocol import MicroBatch, Moment, Outcome, follow, grouped_by_size
from pipeline.models.encoders import build_encoder, require_size, width
from pipeline.models.heads import DinoHead
from pipeline.models.initial import InitialWeights, initial_weights
from pipeline.runtime import Runtime
from pipeline.schedules import cosine, linear
from tiling.errors import UsageError
from tiling.store import TileStore


class Projector(nn.Module):
    """Backbone and head, over views of several sizes."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, views: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """V views (B, 3, S, S), those of one size together -> features (V * B, D), outputs (V * B, K), view by view."""
        features = torch.cat([self.backbone(batch) for batch in grouped_by_size(views)])
        return features, self.head(features)


def paired(names_t: Sequence[str], names_s: Sequence[str]) -> list[tuple[int, int]]:
    """Positions (teacher, student) of all pairs of different views.

    >>> paired(["g0"], ["l0", "l1"])
    [(0, 0), (0, 1)]
    >>> paired(["g0", "g1"], ["g0", "g1"])
    [(0, 1), (1, 0)]
    """
    return [(t, s) for t, name in enumerate(names_t) for s, other in enumerate(names_s) if name != other]


def dino_loss(
    teacher_TBK: torch.Tensor,
    student_SBK: torch.Tensor,
    pairs: Sequence[tuple[int, int]],
    centre_K: torch.Tensor,
    teacher_temp: float,
    student_temp: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the student's softmax under the teacher's centred, sharpened one (Caron et al. 2021, eq. 1-3).

    Args:
        teacher_TBK: Teacher outputs of T views, shape (T, B, K).
        student_SBK: Student outputs of S views, shape (S, B, K).
        pairs: Positions (teacher view, student view) to compare.
        centre_K: Subtracted from the teacher's outputs, shape (K,).
        teacher_temp: Teacher's temperature.
        student_temp: Student's temperature.

    Returns:
        Mean loss over pairs and samples, and the mean entropy of the teacher's distributions, both scalars.
    """
    log_p = F.log_softmax((teacher_TBK - centre_K) / teacher_temp, dim=-1)
    p = log_p.exp()
    log_q = F.log_softmax(student_SBK / student_temp, dim=-1)
    terms = [-(p[t] * log_q[s]).sum(dim=-1).mean() for t, s in pairs]
    return torch.stack(terms).mean(), -(p * log_p).sum(dim=-1).mean()


def wide(outputs: torch.Tensor) -> torch.Tensor:
    """Half-precision outputs as float32, in which softmax and sums are computed; wider ones as they are."""
    return outputs.float() if outputs.dtype in (torch.half, torch.bfloat16) else outputs


class Dino:
    """The method, on the trainer's protocol (pipeline.methods.protocol.Method)."""

    def __init__(self, config: PretrainConfig, runtime: Runtime, store: TileStore) -> None:
        views, method, model, device = config.views, config.method, config.model, runtime.device
        specs = view_specs(
            views.global_crops, views.local_crops, views.global_size, views.local_size, views.global_scale,
            views.local_scale, views.preset,
        )  # fmt: skip
        self._teacher_names = [spec.name for spec in specs if spec.is_global]
        pairs = paired(self._teacher_names, [spec.name for spec in specs])
        self._student_names = [spec.name for position, spec in enumerate(specs) if any(s == position for _, s in pairs)]
        self._pairs = paired(self._teacher_names, self._student_names)
        if not pairs:
            count = views.global_crops + views.local_crops
            raise UsageError(f"views.global_crops + views.local_crops is {count}, DINO compares 2 views or more")
        self.views: tuple[ViewSpec, ...] = specs
        backbone = build_encoder(model.name, model.drop_path, config.train.recompute)
        for spec in specs:
            require_size(backbone, input_side(spec.size, views.input))
        head = DinoHead(width(backbone), method.out_dim, method.hidden_dim, method.bottleneck_dim)
        self._projector = Projector(backbone, head).to(device)
        self.student: nn.Module = self._projector
        self._prototypes = head.last_layer
        self.teacher = copy.deepcopy(self._projector).requires_grad_(False)
        for part in self.teacher.modules():
            if isinstance(part, DropPath):
                part.drop_prob = 0.0
        # The teacher stays in train mode: its BatchNorm statistics come from its own global views, as in the
        # original; the student's come from local ones and must not be averaged into it.
        self.teacher.train()
        self.encoder = self.teacher.backbone
        self.centre = torch.zeros(method.out_dim, device=device)
        self._sum = torch.zeros_like(self.centre)
        self._count = 0
        self._method, self._runtime, self._architecture = method, runtime, model.name
        self.constants = {"ln_k": math.log(method.out_dim)}

    def begin_with(self, path: Path) -> InitialWeights:
        """Student and teacher both begin with these weights; with the head too where it is of the run's sizes."""
        method = self._method
        sizes = {"out_dim": method.out_dim, "hidden_dim": method.hidden_dim, "bottleneck_dim": method.bottleneck_dim}
        weights = initial_weights(path, self._architecture, sizes)
        for network in (self._projector, self.teacher):
            network.backbone.load_state_dict(weights.backbone)
            if weights.head is not None:
                network.head.load_state_dict(weights.head)
        return weights

    def loss(self, student: nn.Module, batch: MicroBatch, moment: Moment) -> Outcome:
        """Loss of one micro-batch; the teacher's outputs are added up for the centre."""
        named = {spec.name: view for spec, view in zip(self.views, batch.views, strict=True)}
        with torch.no_grad():
            features, raw = self.teacher([named[name] for name in self._teacher_names])
            teacher = wide(raw)
            self._sum += teacher.sum(dim=0)
            self._count += len(teacher)
        out = wide(student([named[name] for name in self._student_names])[1])
        loss, entropy = dino_loss(
            teacher.view(len(self._teacher_names), -1, teacher.shape[-1]),
            out.view(len(self._student_names), -1, out.shape[-1]),
            self._pairs,
            self.centre,
            self.teacher_temp(moment.epoch),
            self._method.student_temp,
        )
        figures = {
            "teacher_entropy": entropy.detach(),
            "kl": (loss - entropy).detach(),
            "centre_norm": self.centre.norm(),
            "feature_std": F.normalize(out.detach(), dim=-1).std(dim=0, correction=0).mean() * out.shape[-1] ** 0.5,
        }
        return Outcome(loss, figures, features.detach())

    def teacher_temp(self, epoch: float) -> float:
        """The teacher's temperature, which may rise linearly at first (the original's ``teacher_temp_schedule``)."""
        method = self._method
        return linear(epoch, method.teacher_temp_warmup_epochs, method.teacher_temp_start, method.teacher_temp)

    def before_update(self, moment: Moment) -> None:
        """Drop the prototypes' gradients while they are frozen."""
        if moment.epoch < self._method.freeze_last_layer_epochs:
            for parameter in self._prototypes.parameters():
                parameter.grad = None

    @torch.no_grad()
    def after_update(self, moment: Moment, applied: torch.Tensor) -> None:
        """One EMA of the teacher's parameters and one of the centre, over all micro-batches and ranks."""
        momentum = cosine(moment.step, moment.steps, self._method.ema_start, self._method.ema_end)
        follow(self.teacher, self._projector, momentum, applied)
        mean = self._runtime.sum(self._sum) / (self._count * self._runtime.world)
        moved = self.centre.lerp(mean, 1 - self._method.centre_momentum)
        self.centre.copy_(torch.where(applied, moved, self.centre))
        self._sum.zero_()
        self._count = 0

    def networks(self) -> dict[str, nn.Module]:
        """Student and teacher."""
        return {"student": self.student, "teacher": self.teacher}

    def state(self) -> dict[str, torch.Tensor]:
        """The centre."""
        return {"centre": self.centre}
