"""Bad input after tiling: one clear line, the right exit code, nothing written or lost."""

import json
from pathlib import Path

import pytest

from pipeline.cli import COMMANDS, main
from tiling import datasets, phantom
from tiling.run import tile
from tiling.settings import TileSettings


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bad")
    phantom.write_slide(phantom.make_slide(0, "4", size=(896, 896)), root)
    tile(datasets.slides([root / "train_images"]), root / "store", TileSettings())
    return root / "store"


def complaint(capsys: pytest.CaptureFixture[str], code: int, *words: object) -> str:
    """The one line that a command complains with; checks its exit code."""
    assert main([str(word) for word in words]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bony: error: ")]
    assert len(lines) == 1
    return lines[0]


def test_unknown_command_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(capsys, 2, "tiel", "x")
    assert "'tiel'" in line
    assert "tile, index, verify" in line


def test_missing_option_points_to_help(capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(capsys, 2, "tile", "x.tiff")
    assert "--out" in line
    assert "bony tile --help" in line


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"bony {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--model.nmae", "x", "--model.nmae"),
        ("--train.steps", "many", "train.steps"),
        ("--train.steps", "0", "train.steps is 0, must be 1 or more"),
        ("--views.global_scale", "[0.9,0.4]", "views.global_scale is (0.9, 0.4)"),
        ("--optim.warmup_steps", "99999", "below train.steps"),
        ("--model.name", "xcit_nan_12_p16_224", "xcit_nano_12_p16_224"),
        ("--method.name", "dion", "known are dino"),
        ("--views.preset", "wild", "histology"),
    ],
)
def test_bad_config_starts_nothing(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, says: str
) -> None:
    config = ["--config", "jobs/configs/demo.yaml", "--data", store, "--out", tmp_path / "run"]
    line = complaint(capsys, 2, "pretrain", *config, option, value)
    assert says in line
    assert not (tmp_path / "run").exists()


def test_config_file_that_is_missing_or_has_an_unknown_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.yaml" in complaint(capsys, 2, "pretrain", "--config", tmp_path / "nowhere.yaml")
    (tmp_path / "bad.yaml").write_text("train: {stepz: 3}\n")
    assert "stepz" in complaint(capsys, 2, "pretrain", "--config", tmp_path / "bad.yaml")


def test_pretrain_on_what_is_no_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pretrain", "--config", "jobs/configs/demo.yaml", "--data", tmp_path / "none", "--out", tmp_path / "run"]
    assert "not a tile store" in complaint(capsys, 1, *words)
    assert not (tmp_path / "run").exists()


def test_store_of_another_format_version(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    description = json.loads((store / "store.json").read_text())
    (tmp_path / "store").mkdir()
    (tmp_path / "store/store.json").write_text(json.dumps(description | {"format_version": 99}))
    line = complaint(capsys, 1, "verify", tmp_path / "store")
    assert "format version 99, this software reads 2" in line


def test_out_folder_that_holds_something_else_is_left_alone(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious.txt").write_text("keep me")
    words = ["--config", "jobs/configs/demo.yaml", "--data", store, "--out", tmp_path]
    assert "is no run" in complaint(capsys, 2, "pretrain", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_embed_and_verify_of_what_is_no_box(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["embed", "--encoder", tmp_path, "--data", store, "--out", tmp_path / "f"]
    assert "is no run and no checkpoint" in complaint(capsys, 2, *words)
    assert not (tmp_path / "f").exists()
    assert "is no box that bony makes" in complaint(capsys, 2, "verify", tmp_path)


def test_export_and_predict_of_what_is_no_box(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert "is no run and no checkpoint" in complaint(capsys, 2, "export", tmp_path, "--out", out)
    phantom.write_slide(phantom.make_slide(0, "4", size=(512, 512)), tmp_path)
    words = ["predict", tmp_path / "train_images", "--bundle", tmp_path, "--out", out]
    assert "is no bundle" in complaint(capsys, 2, *words)
    assert "report" in complaint(capsys, 2, "report", "--out", out)
    assert "is no box that bony makes" in complaint(capsys, 2, "report", tmp_path, "--out", out)
    assert not out.exists()


def test_an_original_checkpoint_without_a_scale(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["embed", "--encoder", tmp_path / "dino.pth", "--data", store, "--out", tmp_path / "f"]
    assert "--encoder-mpp" in complaint(capsys, 2, *words)
    (tmp_path / "dino.pth").write_bytes(b"not a checkpoint")
    assert "dino.pth" in complaint(capsys, 1, *words, "--encoder-mpp", "0.5")
    assert not (tmp_path / "f").exists()


def test_demo_on_a_folder_that_is_not_panda_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(capsys, 2, "demo", "--slides", tmp_path, "--out", tmp_path / "demo")
    assert "train.csv" in line
    assert not (tmp_path / "demo").exists()
