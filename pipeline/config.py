"""The configuration of a pretraining run: frozen dataclasses, validated once, then trusted.

Every key can stand in a YAML file and be overridden on the command line as ``--section.key value``.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tiling.errors import UsageError

PRECISIONS = ("auto", "fp32", "bf16")
# Mean and standard deviation of the 994 labelled PANDA tiles of the shared data, RGB in [0, 1].
PANDA_MEAN = (0.748, 0.504, 0.692)
PANDA_STD = (0.167, 0.230, 0.161)


def _require(condition: bool, key: str, value: object, limit: str) -> None:
    if not condition:
        raise UsageError(f"{key} is {value}, must be {limit}")


@dataclass(frozen=True)
class ModelConfig:
    """The encoder.

    Args:
        name: Any timm XCiT or ViT, such as xcit_medium_24_p16_224.
        drop_path: Stochastic depth rate of the student.
    """

    name: str = "xcit_medium_24_p16_224"
    drop_path: float = 0.1

    def __post_init__(self) -> None:
        _require(0 <= self.drop_path < 1, "model.drop_path", self.drop_path, "0 or more, below 1")


@dataclass(frozen=True)
class MethodConfig:
    """The self-supervised method: DINO (Caron et al. 2021).

    Args:
        name: Which method: dino.
        out_dim: Number of prototypes, K.
        hidden_dim: Width of the head's hidden layers.
        bottleneck_dim: Width before the prototypes.
        teacher_temp: Temperature of the teacher's softmax.
        student_temp: Temperature of the student's softmax.
        centre_momentum: Momentum of the centre of the teacher's outputs.
        ema_start: Momentum of the teacher's weights at the start; rises to ema_end on a cosine.
        ema_end: Momentum of the teacher's weights at the end.
        freeze_last_layer_epochs: Epochs during which the prototypes do not move.
    """

    name: str = "dino"
    out_dim: int = 4096
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    teacher_temp: float = 0.04
    student_temp: float = 0.1
    centre_momentum: float = 0.9
    ema_start: float = 0.996
    ema_end: float = 1.0
    freeze_last_layer_epochs: float = 1.0

    def __post_init__(self) -> None:
        for key in ("out_dim", "hidden_dim", "bottleneck_dim"):
            _require(getattr(self, key) >= 2, f"method.{key}", getattr(self, key), "2 or more")
        for key in ("teacher_temp", "student_temp"):
            _require(getattr(self, key) > 0, f"method.{key}", getattr(self, key), "above 0")
        for key in ("centre_momentum", "ema_start", "ema_end"):
            _require(0 <= getattr(self, key) <= 1, f"method.{key}", getattr(self, key), "0 to 1")
        _require(
            self.freeze_last_layer_epochs >= 0,
            "method.freeze_last_layer_epochs",
            self.freeze_last_layer_epochs,
            "0 or more",
        )


@dataclass(frozen=True)
class ViewsConfig:
    """Multi-crop views.

    Args:
        global_crops: Large crops; the teacher sees them.
        local_crops: Small crops; only the student sees them.
        global_size: Side of a global crop in pixels.
        local_size: Side of a local crop in pixels.
        global_scale: Least and largest share of the tile's area in a global crop.
        local_scale: Least and largest share of the tile's area in a local crop.
        preset: Strengths of the augmentations: histology, or original (as in the DINO code).
        mean: Per-channel mean that inputs are normalised with, RGB in [0, 1].
        std: Per-channel standard deviation that inputs are normalised with.
    """

    global_crops: int = 1
    local_crops: int = 5
    global_size: int = 224
    local_size: int = 96
    global_scale: tuple[float, float] = (0.4, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.4)
    preset: str = "histology"
    mean: tuple[float, float, float] = PANDA_MEAN
    std: tuple[float, float, float] = PANDA_STD

    def __post_init__(self) -> None:
        _require(self.global_crops >= 1, "views.global_crops", self.global_crops, "1 or more")
        _require(self.local_crops >= 0, "views.local_crops", self.local_crops, "0 or more")
        _require(
            self.global_crops + self.local_crops >= 2,
            "views.global_crops + views.local_crops",
            self.global_crops + self.local_crops,
            "2 or more, since one view has no other to be compared with",
        )
        for key in ("global_size", "local_size"):
            _require(getattr(self, key) >= 8, f"views.{key}", getattr(self, key), "8 or more")
        for key in ("global_scale", "local_scale"):
            low, high = getattr(self, key)
            _require(0 < low <= high <= 1, f"views.{key}", (low, high), "two shares in 0 to 1, the lower one first")
        _require(min(self.std) > 0, "views.std", self.std, "above 0")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedules; the learning rate is lr x global batch / 256, up to lr_cap.

    Args:
        lr: Learning rate per 256 samples of the global batch.
        lr_cap: Upper limit of the scaled learning rate; the linear rule diverges for very large batches.
        lr_end: Learning rate at the end of the cosine.
        warmup_steps: Steps of linear warm-up from 0.
        weight_decay: Weight decay at the start; biases and 1-D parameters have none.
        weight_decay_end: Weight decay at the end of the cosine.
        clip: Gradient norm limit; 0 does not clip.
        clip_mode: per_param clips each parameter's gradient by its own norm (the original code); global the whole.
    """

    lr: float = 5e-4
    lr_cap: float = 4e-3
    lr_end: float = 1e-6
    warmup_steps: int = 1000
    weight_decay: float = 0.04
    weight_decay_end: float = 0.4
    clip: float = 3.0
    clip_mode: str = "per_param"

    def __post_init__(self) -> None:
        for key in ("lr", "lr_cap", "lr_end"):
            _require(getattr(self, key) > 0, f"optim.{key}", getattr(self, key), "above 0")
        for key in ("warmup_steps", "weight_decay", "weight_decay_end", "clip"):
            _require(getattr(self, key) >= 0, f"optim.{key}", getattr(self, key), "0 or more")
        modes = ("per_param", "global")
        _require(self.clip_mode in modes, "optim.clip_mode", repr(self.clip_mode), f"one of {', '.join(modes)}")


@dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Args:
        batch_per_rank: Tiles per rank and micro-batch.
        accumulate: Micro-batches per optimizer step.
        steps: Optimizer steps in all.
        seed: Decides the initial weights, the order of tiles, every view, and drop path.
        precision: auto (bf16 on a GPU, fp32 on a CPU), fp32, bf16.
        threads: Threads that read and decode tiles, per rank.
        log_every: Steps between lines of metrics.jsonl.
    """

    batch_per_rank: int = 100
    accumulate: int = 4
    steps: int = 30000
    seed: int = 0
    precision: str = "auto"
    threads: int = 4
    log_every: int = 10

    def __post_init__(self) -> None:
        for key in ("batch_per_rank", "accumulate", "steps", "threads", "log_every"):
            _require(getattr(self, key) >= 1, f"train.{key}", getattr(self, key), "1 or more")
        _require(self.seed >= 0, "train.seed", self.seed, "0 or more")
        _require(
            self.precision in PRECISIONS, "train.precision", repr(self.precision), f"one of {', '.join(PRECISIONS)}"
        )


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints.

    Args:
        every: Steps between checkpoints; the last step is always saved.
        keep: How many of the newest are kept.
    """

    every: int = 500
    keep: int = 3

    def __post_init__(self) -> None:
        _require(self.every >= 1, "checkpoint.every", self.every, "1 or more")
        _require(self.keep >= 1, "checkpoint.keep", self.keep, "1 or more")


@dataclass(frozen=True)
class PretrainConfig:
    """A pretraining run.

    Args:
        data: The TileStore to train on.
        out: The RUN folder; one that exists is continued.
        model: The encoder.
        method: The self-supervised method.
        views: Multi-crop views.
        optim: Optimizer and schedules.
        train: The loop.
        checkpoint: Checkpoints.
    """

    data: Path | None = None
    out: Path | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        _require(
            self.optim.warmup_steps < self.train.steps,
            "optim.warmup_steps",
            self.optim.warmup_steps,
            f"below train.steps ({self.train.steps})",
        )


# What may differ when a run is continued: where things are, how often they are written, how the work is spread.
# The product ranks x batch_per_rank x accumulate must stay; the trainer checks it.
_FREE_KEYS = (
    "data", "out", "train.batch_per_rank", "train.accumulate", "train.precision", "train.threads", "train.log_every",
    "checkpoint.every", "checkpoint.keep",
)  # fmt: skip


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested config values by dotted key; tuples as lists, paths as text.

    >>> flatten({"views": {"scale": (0.1, 1.0)}, "data": None})
    {'views.scale': [0.1, 1.0], 'data': None}
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            flat |= flatten(value, f"{key}.")
        else:
            flat[key] = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
    return flat


def fixed_values(config: PretrainConfig) -> dict[str, Any]:
    """The values, by dotted key, that must stay the same when a run is continued."""
    return {key: value for key, value in flatten(asdict(config)).items() if key not in _FREE_KEYS}
