"""The configs in jobs/configs: each parses, says what its source says, and trains, shrunken, for two steps."""

import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from pipeline.commands.parser import pretrain_config
from pipeline.config import PretrainConfig, fixed_values, flatten
from pipeline.models.encoders import build_encoder, width
from pipeline.monitor import read_metrics
from pipeline.pretrain import pretrain
from pipeline.schedules import effective_lr, linear
from pipeline.trainer import global_batch

CONFIGS = Path(__file__).parents[2] / "jobs/configs"
PANDA = 2_852_703  # tiles
REPORT, XCIT, VIT = "dino_xcit_m24", "dino_xcit_m24_original", "dino_vit_s16"
RANKS = {REPORT: 24, XCIT: 16, VIT: 16}

# What each recipe says, by config key, and what follows from it: samples a step, its rate, epochs of PANDA.
FACTS = {
    REPORT: {
        "model.name": "xcit_medium_24_p16_224", "model.drop_path": 0.1, "method.out_dim": 4096,
        "method.teacher_temp_warmup_epochs": 0.0, "method.teacher_temp": 0.04, "views.global_crops": 1,
        "views.local_crops": 5, "views.global_scale": [0.4, 1.0], "views.local_scale": [0.05, 0.4],
        "optim.lr_end": 1e-6, "train.batch_per_rank": 100, "train.accumulate": 4,
    },
    XCIT: {
        "model.name": "xcit_medium_24_p16_224", "model.drop_path": 0.15, "method.out_dim": 65536,
        "method.teacher_temp_start": 0.04, "method.teacher_temp": 0.07, "method.teacher_temp_warmup_epochs": 30.0,
        "views.global_crops": 2, "views.local_crops": 8, "views.global_scale": [0.3, 1.0],
        "views.local_scale": [0.05, 0.3], "optim.lr_end": 1e-5,
    },
    VIT: {
        "model.name": "vit_small_patch16_224", "model.drop_path": 0.1, "method.out_dim": 4096,
        "method.teacher_temp_warmup_epochs": 0.0, "method.teacher_temp": 0.04, "views.global_crops": 2,
        "views.local_crops": 8, "views.global_scale": [0.4, 1.0], "views.local_scale": [0.05, 0.4],
        "optim.lr_end": 1e-6,
    },
}  # fmt: skip
COMMON = {
    "method.student_temp": 0.1, "method.centre_momentum": 0.9, "method.ema_start": 0.996, "method.ema_end": 1.0,
    "method.hidden_dim": 2048, "method.bottleneck_dim": 256, "method.freeze_last_layer_epochs": 1.0,
    "views.global_size": 224, "views.local_size": 96, "views.preset": "original", "optim.weight_decay": 0.04,
    "optim.weight_decay_end": 0.4, "optim.clip": 3.0, "optim.clip_mode": "per_param",
}  # fmt: skip
STEPS = {REPORT: (9600, 4e-3, 100), XCIT: (1024, 1e-3, 300), VIT: (1024, 2e-3, 100)}

SHRUNKEN = {
    "method.out_dim": 64,
    "method.hidden_dim": 32,
    "method.bottleneck_dim": 16,
    "views.global_size": 64,
    "views.local_size": 32,
    "optim.warmup_steps": 1,
    "train.batch_per_rank": 2,
    "train.accumulate": 1,
    "train.steps": 2,
    "train.threads": 1,
    "train.log_every": 1,
}
SMALL = {"xcit_medium_24_p16_224": "xcit_nano_12_p16_224", "vit_small_patch16_224": "vit_tiny_patch16_224"}


def preset(name: str, *words: str) -> PretrainConfig:
    return pretrain_config(["--config", str(CONFIGS / f"{name}.yaml"), *words])


def test_every_pretraining_config_is_known_here() -> None:
    """A sweep names another config as its base, and is none itself."""
    found = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert {name for name in found if not name.startswith("sweep_")} == {*FACTS, "demo"}


@pytest.mark.parametrize("name", FACTS)
def test_facts_of_its_source(name: str) -> None:
    values = flatten(asdict(preset(name)))
    for key, value in (COMMON | FACTS[name]).items():
        assert values[key] == value, key


@pytest.mark.parametrize("name", FACTS)
def test_batch_rate_and_length(name: str) -> None:
    config = preset(name)
    samples, rate, epochs = STEPS[name]
    optim, train = config.optim, config.train
    assert global_batch(config, RANKS[name]) == samples
    assert effective_lr(optim.lr, samples, optim.lr_cap) == pytest.approx(rate, rel=1e-12)
    an_epoch = PANDA / samples
    assert train.steps == pytest.approx(epochs * an_epoch, rel=1e-3)
    assert optim.warmup_steps == pytest.approx(10 * an_epoch, rel=1e-3)
    assert config.checkpoint.keep_every % config.checkpoint.every == 0


def test_only_the_report_s_run_needs_the_cap() -> None:
    capped = [
        name for name, (samples, rate, _) in STEPS.items() if preset(name).optim.lr * samples / 256 > rate * (1 + 1e-9)
    ]
    assert capped == [REPORT]


def test_temperature_of_the_xcit_recipe_rises_for_thirty_epochs() -> None:
    method = preset(XCIT).method
    rise = (method.teacher_temp_warmup_epochs, method.teacher_temp_start, method.teacher_temp)
    assert [linear(epoch, *rise) for epoch in (0, 15, 30, 300)] == pytest.approx([0.04, 0.055, 0.07, 0.07])


@pytest.mark.parametrize(("name", "features", "millions"), [(REPORT, 512, 83.9), (VIT, 384, 21.7)])
def test_networks_are_the_ones_meant(name: str, features: int, millions: float) -> None:
    model = preset(name).model
    with torch.device("meta"):
        encoder = build_encoder(model.name, model.drop_path)
    assert width(encoder) == features
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", [*FACTS, "demo"])
def test_shrunken_it_trains(name: str, store: Path, tmp_path: Path) -> None:
    """The same file with a small network and few prototypes: every part of it is taken in by the trainer."""
    model = preset(name).model.name
    changes = SHRUNKEN | {"model.name": SMALL.get(model, model), "data": store, "out": tmp_path / "run"}
    config = preset(name, *(word for key, value in changes.items() for word in (f"--{key}", str(value))))
    kept = fixed_values(preset(name)).keys() - changes.keys()
    assert all(fixed_values(config)[key] == fixed_values(preset(name))[key] for key in kept)
    lines = read_metrics(pretrain(config))
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert lines[0]["loss"] < 2 * math.log(64)
