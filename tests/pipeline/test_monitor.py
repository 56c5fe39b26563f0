"""What a run reports: figures, their averages, RankMe, the arithmetic per tile, and what becomes of the lines."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from pipeline import flops, monitor
from pipeline.commands.parser import pretrain_config
from pipeline.config import ModelConfig, PretrainConfig, ViewsConfig
from pipeline.flops import Peak, flops_per_sample, known_peak, measured_flops, peak
from pipeline.methods import build_method
from pipeline.methods.dino import Dino
from pipeline.methods.protocol import MicroBatch, Moment
from pipeline.models.encoders import build_encoder
from pipeline.monitor import Monitor, read_metrics
from pipeline.pretrain import pretrain
from pipeline.rankme import KEPT_ROWS, RecentFeatures, rankme
from pipeline.runtime import Runtime
from pipeline.trainer import Step
from tiling.store import TileStore

CPU = torch.device("cpu")


def by_definition(features: np.ndarray) -> float:
    """Garrido et al. 2023, equation 1, by singular values in float64."""
    values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    shares = values / values.sum() + 1e-7
    return float(np.exp(-(shares * np.log(shares)).sum()))


# ---- RankMe ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(300, 40), (40, 300), (64, 64), (5, 1)])
def test_rankme_is_that_of_the_paper(shape: tuple[int, int]) -> None:
    features = np.random.default_rng(0).normal(size=shape) * np.geomspace(1, 1e-3, shape[1]) + 0.5
    for kind, digits in ((torch.float64, 1e-4), (torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        tensor = torch.from_numpy(features).to(kind)
        assert rankme(tensor) == pytest.approx(by_definition(tensor.double().numpy()), rel=1e-4)
        assert rankme(tensor) == pytest.approx(by_definition(features), rel=digits)


def test_rankme_counts_dimensions() -> None:
    """Closed forms: equal directions count fully, copies of one row count once."""
    assert rankme(torch.eye(7).repeat(5, 1)) == pytest.approx(7)
    assert rankme(torch.randn(1, 9).repeat(50, 1) * 1e3) == pytest.approx(1, abs=1e-4)
    assert rankme(torch.eye(7).repeat(5, 1).half() * 100) == pytest.approx(7)  # squares overflow fp16


@pytest.mark.parametrize(
    "features", [torch.full((4, 3), math.nan), torch.tensor([[1.0, math.inf]]), torch.zeros(4, 3), torch.zeros(0, 3)]
)
def test_rankme_of_nothing_is_not_a_number(features: torch.Tensor) -> None:
    assert math.isnan(rankme(features))


@pytest.mark.parametrize("rows", [1, 100, 1500, KEPT_ROWS, 5000])
def test_the_last_features_are_kept_and_no_more(rows: int) -> None:
    recent = RecentFeatures()
    assert math.isnan(recent.rankme())
    parts = [torch.randn(rows, 6) * torch.arange(1, 7) ** number for number in range(1 + 6000 // rows)]
    for part in parts:
        recent.add(part.requires_grad_())
    held = list(recent._parts)
    assert not any(part.requires_grad for part in held)  # no graph is kept alive
    assert KEPT_ROWS <= sum(map(len, held)) < KEPT_ROWS + rows
    last = torch.cat([part[:KEPT_ROWS] for part in parts])[-KEPT_ROWS:]
    assert recent.rankme() == rankme(last)


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def test_the_arithmetic_of_xcit_medium_is_the_published_one() -> None:
    """REPRODUCTION.md: forward, 2 per multiply and add."""
    meta = torch.device("meta")
    with meta:
        encoder = build_encoder("xcit_medium_24_p16_224").eval()
        for size, gflop in ((224, 32.2), (96, 5.9)):
            with flops.Counter() as counter:
                encoder(torch.empty(1, 3, size, size))
            assert counter.with_gradient / 1e9 == pytest.approx(gflop, abs=0.05)


def test_the_teacher_costs_its_forward_pass_only(store: Path) -> None:
    """ViT-S/16: 4.6 G multiplications (Touvron et al. 2021) and as many additions."""
    forward = 9.2e9
    teacher_and_students = arithmetic(store, "vit_small_patch16_224", global_crops=1, local_size=224, local_crops=1)
    expected = 4 * (forward + head_flops(384))
    assert teacher_and_students == pytest.approx(expected, rel=0.01)
    # Two globals: the teacher encodes both, and so does the student.
    both = arithmetic(store, "vit_small_patch16_224", global_crops=2, local_crops=0)
    assert both == pytest.approx(2 * expected, rel=0.01)


def arithmetic(store: Path, model: str, **views: int) -> float:
    config = PretrainConfig(model=ModelConfig(model), views=replace(ViewsConfig(), **views))
    with TileStore(store) as tiles:
        before = torch.random.get_rng_state()
        found = flops_per_sample(config, tiles)
        assert torch.equal(torch.random.get_rng_state(), before)
    return found


def head_flops(features: int) -> int:
    """The head of MethodConfig's sizes: 3 layers and the prototypes."""
    return 2 * (features * 2048 + 2048 * 2048 + 2048 * 256 + 256 * 4096)


@pytest.mark.parametrize(
    ("gpu", "kind", "tflops"),
    [
        ("Tesla V100-SXM2-32GB", "fp16", 125),
        ("Tesla V100-PCIE-16GB", "fp16", 112),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156),
        ("NVIDIA A100 80GB PCIe", "bf16", 312),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA GH200 480GB", "bf16", 989),
        ("NVIDIA H200", "fp32", 67),
        ("NVIDIA GB200", "bf16", 2500),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA H200 MIG 1g.18gb", "bf16", None),
        ("NVIDIA RTX A1000", "bf16", None),
        ("NVIDIA GeForce RTX 4090", "bf16", None),
    ],
)
def test_peaks_by_name(gpu: str, kind: str, tflops: float | None) -> None:
    found = known_peak(gpu, kind)
    assert found == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_a_cpu_is_measured() -> None:
    best = peak(CPU, "auto")
    assert best.measured
    assert best.of == "cpu, fp32"
    assert best.flops == pytest.approx(measured_flops(CPU, torch.float32), rel=0.9)  # others use the machine too
    assert 1e9 < best.flops < 1e14


# ---- lines -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path, words: Callable[..., list[str]]) -> PretrainConfig:
    """A run of 40 steps of 8 tiles, logged every second one."""
    (tmp_path / "run").mkdir()
    changes = {"train.steps": 40, "train.log_every": 2, "train.accumulate": 4}
    return pretrain_config(words(tmp_path / "run", changes))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The monitor's clock, in seconds; a test sets it."""
    now = [100.0]
    monkeypatch.setattr(monitor, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def opened(config: PretrainConfig, first_step: int = 0, world: int = 1) -> Monitor:
    runtime = Runtime(0, world, CPU)
    assert config.data is not None
    with TileStore(config.data) as store:
        return Monitor(config, runtime, build_method(config, Runtime(0, 1, CPU), store), store, first_step)


def made_step(features: torch.Tensor | None = None, **figures: float) -> Step:
    rows = torch.randn(4, 8) if features is None else features
    return Step({name: torch.tensor(value) for name, value in figures.items()}, rows, {"lr": 0.1})


def test_a_line_holds_means_and_rates(config: PretrainConfig, clock: list[float]) -> None:
    watched = opened(config)
    features = torch.randn(2, 30, 8)
    watched.add(made_step(features[0], loss=1.0, kl=0.5), 8)
    clock[0] += 3
    assert watched.log(1, last=False, epoch=0.1, waited_s=0.5) is None
    watched.add(made_step(features[1], loss=2.0, kl=math.inf), 8)
    clock[0] += 1
    line = watched.log(2, last=False, epoch=0.2, waited_s=1.0, skipped=2)
    assert line is not None
    watched.add(made_step(loss=5.0, kl=0.1), 8)
    clock[0] += 2
    assert watched.log(3, last=True, epoch=0.3, waited_s=2.5, skipped=2) is not None
    watched.close()
    first, second = read_metrics(config.out)
    assert (first["step"], first["loss"], first["kl"], first["lr"], first["epoch"]) == (2, 1.5, None, 0.1, 0.2)
    assert math.isinf(line["kl"])
    assert first["ln_k"] == pytest.approx(math.log(64))
    assert first["samples_per_s"] == 16 / 4
    assert first["data_wait_share"] == 1 / 4
    assert (first["skipped_tiles"], first["skipped_share"]) == (2, 2 / 16)
    assert first["rankme"] == pytest.approx(rankme(features.flatten(0, 1)))
    assert first["mfu"] == pytest.approx(4 * first["gflop_per_tile"] / (1000 * first["peak_tflops"]))
    assert 0.05 < first["memory_gib"] < 64
    assert (second["step"], second["loss"], second["samples_per_s"], second["data_wait_share"]) == (3, 5.0, 4, 0.75)
    assert (second["skipped_tiles"], second["skipped_share"]) == (2, 2 / 24)


def test_ranks_share_the_arithmetic_and_the_tiles(
    config: PretrainConfig, clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(monitor, "peak", lambda device, precision: Peak(2e12, False, "a GPU"))
    lines = []
    for world in (1, 2):
        watched = opened(replace(config, train=replace(config.train, accumulate=4 // world)), world=world)
        assert "mfu is of 2 TFLOP/s a rank (a GPU, from its data sheet)" in capsys.readouterr().err
        for _ in range(2):
            watched.add(made_step(loss=1.0), 8)
        clock[0] += 1
        lines.append(watched.log(2, last=True, epoch=0.0, skipped=1))
        watched.close()
    one, two = lines
    assert two["samples_per_s"] == one["samples_per_s"] == 16
    assert (one["peak_is_measured"], one["peak_tflops"], two["peak_tflops"]) == (0, 2, 4)
    assert one["mfu"] == pytest.approx(16 * one["gflop_per_tile"] / 2000)
    assert two["mfu"] == pytest.approx(one["mfu"] / 2)
    assert two["skipped_share"] == pytest.approx(one["skipped_share"] * 2)  # of half as many tiles


def fed(watched: Monitor, steps: range, **figures: float) -> None:
    for step in steps:
        watched.add(made_step(**figures), 8)
        watched.log(step, last=False, epoch=0.0)


def test_an_alarm_is_said_when_it_begins_and_when_it_ends(
    config: PretrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"loss": 3.0, "teacher_entropy": 2.0, "grad_norm": 1.0}
    uniform = {"loss": 4.1, "teacher_entropy": math.log(64), "grad_norm": 1.0}
    watched = opened(config)
    fed(watched, range(1, 25), **uniform)
    fed(watched, range(25, 41), **good)
    watched.close()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("alarm")]
    assert len(said) == 2
    assert said[0].startswith("alarm uniform_teacher at step 20: the teacher's entropy 4.159 is at ln K = 4.159")
    assert "lower method.teacher_temp" in said[0]
    assert said[1] == "alarm uniform_teacher is over at step 34"
    lines = read_metrics(config.out)
    assert {line["step"] for line in lines if line["alarms"] == ["uniform_teacher"]} == set(range(20, 33, 2))
    assert {line["step"] for line in lines if not line["alarms"]} == {*range(2, 20, 2), *range(34, 41, 2)}


def test_a_run_that_goes_on_forgets_later_lines_and_knows_the_rest(
    config: PretrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    watched = opened(config)
    for step in range(1, 31):
        watched.add(made_step(loss=4.1, teacher_entropy=math.log(64)), 8)
        watched.log(step, last=False, epoch=0.0, skipped=step // 20)
    watched.close()
    with (config.out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 32, "lo')
    capsys.readouterr()
    watched = opened(config, first_step=26)
    assert [line["step"] for line in read_metrics(config.out)] == list(range(2, 27, 2))
    watched.add(made_step(loss=4.1, teacher_entropy=math.log(64)), 8)
    watched.log(27, last=True, epoch=0.0, skipped=1)
    watched.close()
    assert "alarm" not in capsys.readouterr().err  # both were said before
    last = read_metrics(config.out)[-1]
    assert (last["step"], last["skipped_tiles"], last["skipped_share"]) == (27, 2, 2 / (27 * 8))
    assert last["alarms"] == ["uniform_teacher", "damaged_tiles"]


def test_what_cannot_be_counted_ends_no_run(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def asks(self: Dino, student: nn.Module, batch: MicroBatch, moment: Moment) -> Any:
        return float(student(list(batch.views))[1].sum())  # a value, which the meta device does not have

    monkeypatch.setattr(Dino, "loss", asks)
    watched = opened(config)
    fed(watched, range(1, 3), loss=1.0)
    watched.close()
    assert "no mfu: the arithmetic cannot be counted (" in capsys.readouterr().err
    (line,) = read_metrics(config.out)
    assert "mfu" not in line
    assert line["samples_per_s"] > 0


def test_a_real_run_logs_everything(tmp_path: Path, words: Callable[..., list[str]], one_thread: None) -> None:
    pretrain(pretrain_config(words(tmp_path / "run")))
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    numbers = {
        "loss", "teacher_entropy", "kl", "centre_norm", "feature_std", "grad_norm", "rankme", "lr", "weight_decay",
        "epoch", "ln_k", "samples_per_s", "data_wait_share", "memory_gib", "mfu", "gflop_per_tile", "peak_tflops",
        "peak_is_measured", "skipped_tiles", "skipped_share",
    }  # fmt: skip
    for line in lines:
        assert line.keys() == numbers | {"step", "alarms"}
        assert all(math.isfinite(line[key]) for key in numbers)
        assert 1 <= line["rankme"] <= 128
        assert 0 <= line["data_wait_share"] < 1
    board = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) == numbers
    seen = {event.step: event.value for event in board.Scalars("rankme")}
    assert seen == pytest.approx({line["step"]: line["rankme"] for line in lines})
