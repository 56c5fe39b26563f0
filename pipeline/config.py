"""The configuration of a pretraining run: frozen dataclasses, validated once, then trusted.

Every key can stand in a YAML file and be overridden on the command line as ``--section.key value``.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tiling.errors import UsageError

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
CLIP_MODES = ("per_param", "global")
INPUTS = ("rgb", "haar")
SHUFFLES = ("global", "shards")
DAMAGED = ("stop", "skip")
# Mean and standard deviation of the 994 labelled PANDA tiles of the shared data, RGB in [0, 1].
PANDA_MEAN = (0.748, 0.504, 0.692)
PANDA_STD = (0.167, 0.230, 0.161)


def _require(condition: bool, key: str, value: object, limit: str) -> None:
    if not condition:
        raise UsageError(f"{key} is {value}, must be {limit}")


def _require_one_of(known: tuple[str, ...], key: str, value: str) -> None:
    _require(value in known, key, repr(value), f"one of {', '.join(known)}")


@dataclass(frozen=True)
class ModelConfig:
    """The encoder.

    Args:
        name: Any timm XCiT or ViT, such as xcit_medium_24_p16_224.
        drop_path: Stochastic depth rate of the student.
        init_from: Weights to begin with: a RUN, a bundle, a .pth of the original DINO code, or a timm model's state
            dict (.safetensors, .pth). None begins with random ones.
    """

    name: str = "xcit_medium_24_p16_224"
    drop_path: float = 0.1
    init_from: Path | None = None

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
        teacher_temp_start: Its temperature at the start, from which it rises linearly.
        teacher_temp_warmup_epochs: Epochs in which it rises; 0 keeps it constant at teacher_temp.
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
    teacher_temp_start: float = 0.04
    teacher_temp_warmup_epochs: float = 0.0
    student_temp: float = 0.1
    centre_momentum: float = 0.9
    ema_start: float = 0.996
    ema_end: float = 1.0
    freeze_last_layer_epochs: float = 1.0

    def __post_init__(self) -> None:
        for key in ("out_dim", "hidden_dim", "bottleneck_dim"):
            _require(getattr(self, key) >= 2, f"method.{key}", getattr(self, key), "2 or more")
        for key in ("teacher_temp", "teacher_temp_start", "student_temp"):
            _require(getattr(self, key) > 0, f"method.{key}", getattr(self, key), "above 0")
        for key in ("centre_momentum", "ema_start", "ema_end"):
            _require(0 <= getattr(self, key) <= 1, f"method.{key}", getattr(self, key), "0 to 1")
        for key in ("freeze_last_layer_epochs", "teacher_temp_warmup_epochs"):
            _require(getattr(self, key) >= 0, f"method.{key}", getattr(self, key), "0 or more")


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
        input: What the network is given: rgb, or haar, the approximation (LL) band of the view's Haar wavelet
            transform, half as wide and high.
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
    input: str = "rgb"
    mean: tuple[float, float, float] = PANDA_MEAN
    std: tuple[float, float, float] = PANDA_STD

    def __post_init__(self) -> None:
        _require(self.global_crops >= 1, "views.global_crops", self.global_crops, "1 or more")
        _require(self.local_crops >= 0, "views.local_crops", self.local_crops, "0 or more")
        for key in ("global_size", "local_size"):
            _require(getattr(self, key) >= 8, f"views.{key}", getattr(self, key), "8 or more")
        for key in ("global_scale", "local_scale"):
            low, high = getattr(self, key)
            _require(0 < low <= high <= 1, f"views.{key}", (low, high), "two shares in 0 to 1, the lower one first")
        _require_one_of(INPUTS, "views.input", self.input)
        if self.input == "haar":
            for key in ("global_size", "local_size"):
                _require(getattr(self, key) % 2 == 0, f"views.{key}", getattr(self, key), "even for views.input haar")
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
        _require_one_of(CLIP_MODES, "optim.clip_mode", self.clip_mode)


@dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Args:
        batch_per_rank: Tiles per rank and micro-batch.
        accumulate: Micro-batches per optimizer step.
        steps: Optimizer steps in all.
        seed: Decides the initial weights, the order of tiles, every view, and drop path.
        precision: auto (bf16 on a GPU, fp32 on a CPU), fp32, bf16, fp16 (with a loss scale that adapts).
        compile: Compile the networks with torch.compile: minutes at the start, then faster steps.
        recompute: Keep no activations inside the encoder's blocks and compute them again for the gradient: a third more
            computation, a fraction of the memory.
        threads: Threads that read and decode tiles, per rank.
        shuffle: global mixes all tiles of an epoch; shards mixes those of some shards at a time, so that a parallel
            file system reads few files at once.
        damaged: What a tile with a wrong checksum does: stop the run with its name, or be skipped and counted.
        log_every: Steps between lines of metrics.jsonl; what is not finite is noticed there.
        timeout: Seconds that a rank waits for the others before the run ends.
    """

    batch_per_rank: int = 100
    accumulate: int = 4
    steps: int = 30000
    seed: int = 0
    precision: str = "auto"
    compile: bool = False
    recompute: bool = False
    threads: int = 4
    shuffle: str = "global"
    damaged: str = "stop"
    log_every: int = 10
    timeout: int = 600

    def __post_init__(self) -> None:
        for key in ("batch_per_rank", "accumulate", "steps", "threads", "log_every", "timeout"):
            _require(getattr(self, key) >= 1, f"train.{key}", getattr(self, key), "1 or more")
        _require(self.seed >= 0, "train.seed", self.seed, "0 or more")
        for key, known in (("precision", PRECISIONS), ("shuffle", SHUFFLES), ("damaged", DAMAGED)):
            _require_one_of(known, f"train.{key}", getattr(self, key))


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints.

    Args:
        every: Steps between checkpoints; the last step is always saved.
        keep: How many of the newest are kept.
        keep_every: Checkpoints whose step is a multiple of this are kept too; 0 keeps only the newest.
    """

    every: int = 500
    keep: int = 3
    keep_every: int = 0

    def __post_init__(self) -> None:
        for key in ("every", "keep"):
            _require(getattr(self, key) >= 1, f"checkpoint.{key}", getattr(self, key), "1 or more")
        _require(self.keep_every >= 0, "checkpoint.keep_every", self.keep_every, "0 or more")


@dataclass(frozen=True)
class MonitorConfig:
    """What is watched beside the loss.

    Args:
        probe: A labelled TileStore on which the encoder is judged while it trains, by its nearest neighbours on other
            slides; None judges nothing.
        probe_every: Steps between judgements; the last step is always judged.
        probe_tiles: At most so many labelled tiles, spread evenly over classes and slides.
    """

    probe: Path | None = None
    probe_every: int = 1000
    probe_tiles: int = 2000

    def __post_init__(self) -> None:
        for key in ("probe_every", "probe_tiles"):
            _require(getattr(self, key) >= 1, f"monitor.{key}", getattr(self, key), "1 or more")


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
        monitor: What is watched beside the loss.
    """

    data: Path | None = None
    out: Path | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

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
    "data", "out", "train.batch_per_rank", "train.accumulate", "train.precision", "train.compile", "train.recompute",
    "train.threads", "train.damaged", "train.log_every", "train.timeout", "checkpoint.every", "checkpoint.keep",
    "checkpoint.keep_every", "monitor.probe", "monitor.probe_every", "monitor.probe_tiles",
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
