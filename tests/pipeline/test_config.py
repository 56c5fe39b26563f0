"""The configuration: files and overrides, and one line with exit code 2 for whatever is wrong with them."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from pipeline.cli import main
from pipeline.commands.parser import pretrain_config
from pipeline.config import OptimConfig, PretrainConfig, TrainConfig, fixed_values, flatten
from tiling.errors import UsageError

FILE = {
    "data": "tiles",
    "model": {"name": "vit_tiny_patch16_224"},
    "views": {"global_crops": 2, "local_scale": [0.1, 0.3], "mean": [0.5, 0.6, 0.7]},
    "train": {"steps": 50, "seed": 3},
    "optim": {"warmup_steps": 5, "lr": 1e-4},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(FILE))
    return path


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command says."""
    assert main(["pretrain", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("bony: error: ")
    assert err.count("\n") == 1
    return err


def test_file_then_overrides_then_defaults(file: Path) -> None:
    config = pretrain_config(
        ["--config", str(file), "--train.steps", "60", "--out=there", "--views.global_size", "64", "--optim.lr=2e-4"]
    )
    assert config.data == Path("tiles")
    assert config.out == Path("there")
    assert (config.train.steps, config.train.seed, config.train.accumulate) == (60, 3, TrainConfig().accumulate)
    assert (config.views.global_crops, config.views.global_size) == (2, 64)
    assert (config.views.local_scale, config.views.mean) == ((0.1, 0.3), (0.5, 0.6, 0.7))
    assert config.optim == replace(OptimConfig(), warmup_steps=5, lr=2e-4)
    assert config.model.name == "vit_tiny_patch16_224"


def test_nothing_given_is_the_defaults() -> None:
    assert pretrain_config([]) == PretrainConfig()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("train: {stepz: 5}", "stepz"),
        ("trane: {steps: 5}", "trane"),
        ("train: {steps: many}", "train.steps"),
        ("train: {steps: 1.5}", "train.steps"),
        ("train: [1, 2]", "train is [1, 2], must be a section"),
        ("optim: 5", "optim"),
        ("views:", "views"),
        ("views: {mean: [0.5, 0.5]}", "views.mean"),
        ("train: {steps: 5", "line 1, column 8"),
        ("model: {name: vit_tiny_patch16_224}\nmodel.drop_path: high", "model.drop_path"),
    ],
)
def test_wrong_file_is_one_line_naming_the_key(
    tmp_path: Path, text: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert named in refused(["--config", str(path)], capsys)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--trane.steps", "5"], "--trane.steps"),
        (["--train.step", "2000"], "--train.step"),  # no abbreviations: tomorrow they may mean another key
        (["--train.steps"], "--train.steps"),
        (["--train.steps", "many"], "train.steps"),
        (["--train.steps", "0"], "train.steps is 0, must be 1 or more"),
        (["--train.accumulate", "-2"], "train.accumulate is -2"),
        (["--train.seed", "-1"], "train.seed is -1"),
        (["--train.precision", "fp8"], "train.precision is 'fp8', must be one of auto, fp32, bf16"),
        (["--model.drop_path", "1"], "model.drop_path is 1"),
        (["--method.out_dim", "1"], "method.out_dim is 1"),
        (["--method.teacher_temp", "0"], "method.teacher_temp is 0"),
        (["--method.ema_start", "1.1"], "method.ema_start is 1.1"),
        (["--views.global_crops", "0"], "views.global_crops is 0"),
        (["--views.input", "haar", "--views.local_size", "95"], "views.local_size is 95"),
        (["--views.local_size", "4"], "views.local_size is 4"),
        (["--views.global_scale", "[0.5,0.4]"], "views.global_scale is (0.5, 0.4)"),
        (["--views.std", "[0.1,0,0.1]"], "views.std is"),
        (["--optim.lr", "0"], "optim.lr is 0"),
        (["--optim.lr", ".nan"], "optim.lr is nan"),
        (["--optim.clip", "-1"], "optim.clip is -1"),
        (["--optim.clip_mode", "soft"], "optim.clip_mode is 'soft'"),
        (["--train.steps", "1000"], "optim.warmup_steps is 1000, must be below train.steps (1000)"),
        (["--checkpoint.every", "0"], "checkpoint.every is 0"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        ([], "--data is missing"),
        (["--data", "tiles"], "--out is missing"),
    ],
)
def test_wrong_option_is_one_line_naming_the_key(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in refused(words, capsys)


def test_an_override_before_the_file_is_refused(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(["--train.steps", "60", "--config", str(file)], capsys)
    assert "--train.steps" in said
    assert "put --config first" in said
    assert "--train.steps" in refused(["--train.steps=60", f"--config={file}"], capsys)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"method.name": "swav"}, "method.name is 'swav', known are dino"),
        ({"model.name": "xcit_nano_12_p16_225"}, "xcit_nano_12_p16_224"),
        ({"model.name": "resnet50"}, "model.name is 'resnet50'"),
        ({"views.preset": "loud"}, "loud"),
        ({"views.local_crops": 0}, "views.global_crops + views.local_crops is 1"),
        ({"model.name": "vit_tiny_patch16_224", "views.local_size": 40}, "images of 40 px do not divide into patches"),
    ],
)
def test_unknown_names_are_refused_before_a_run_is_made(
    change: dict[str, str], named: str, words: Callable[..., list[str]], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert named in refused(words(tmp_path / "run", change), capsys)
    assert not (tmp_path / "run").exists()


def test_a_bad_config_is_refused_without_waiting_for_torch() -> None:
    code = (
        "import sys; from pipeline.cli import main; code = main(['pretrain', '--train.steps', '0']); "
        "sys.exit(code if 'torch' not in sys.modules else 9)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert "train.steps is 0" in done.stderr


def test_what_decides_the_result_must_stay_and_what_does_not_may_change() -> None:
    every, fixed = flatten(asdict(PretrainConfig())), fixed_values(PretrainConfig())
    assert every.keys() - fixed.keys() == {
        "data", "out", "train.batch_per_rank", "train.accumulate", "train.precision", "train.compile",
        "train.recompute", "train.threads", "train.damaged", "train.log_every", "train.timeout", "checkpoint.every",
        "checkpoint.keep", "checkpoint.keep_every", "monitor.probe", "monitor.probe_every", "monitor.probe_tiles",
    }  # fmt: skip
    assert fixed["views.mean"] == [0.748, 0.504, 0.692]


def test_a_wrong_default_cannot_be_built_in_code_either() -> None:
    with pytest.raises(UsageError, match=r"train\.batch_per_rank is 0"):
        TrainConfig(batch_per_rank=0)
