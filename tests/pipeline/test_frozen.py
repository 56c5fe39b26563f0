"""A frozen encoder: the run's teacher and nothing else, by its own normalisation; damaged ones are refused."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch.nn import functional

from pipeline.commands.parser import pretrain_config
from pipeline.data.augment import make_views
from pipeline.data.views import colour_spec, view_specs
from pipeline.models.encoders import build_encoder
from pipeline.models.frozen import FrozenEncoder, load_encoder
from pipeline.models.norm import BatchNorm
from pipeline.pretrain import pretrain
from tiling import atomic
from tiling.errors import CheckpointError, DamageError, UsageError
from tiling.store import TileStore

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, words: Callable[..., list[str]]) -> Path:
    """A run of 2 steps with checkpoints at both, and a normalisation of its own."""
    run = tmp_path_factory.mktemp("frozen") / "run"
    changes = {
        "train.steps": 2, "train.accumulate": 1, "checkpoint.every": 1, "model.drop_path": 0.2,
        "method.ema_start": 0.5, "views.mean": "[0.6,0.4,0.5]", "views.std": "[0.2,0.3,0.1]",
    }  # fmt: skip
    pretrain(pretrain_config(words(run, changes)))
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def by_hand(folder: Path, tiles: torch.Tensor) -> dict[str, torch.Tensor]:
    """Features from the file and timm's own model, by the formulas."""
    weights = load_file(folder / "teacher.safetensors")
    parts = {
        key: {n.removeprefix(f"{key}."): w for n, w in weights.items() if n.startswith(key)}
        for key in ("backbone", "head")
    }
    model = timm.create_model("xcit_nano_12_p16_224", num_classes=0)
    model.load_state_dict(parts["backbone"])
    x = tiles.permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor([0.6, 0.4, 0.5]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.1]).view(3, 1, 1)
    with torch.no_grad():
        cls = model.eval()(x)
    w, out = parts["head"], cls
    for layer in (0, 2, 4):
        out = out @ w[f"mlp.{layer}.weight"].T + w[f"mlp.{layer}.bias"]
        out = functional.gelu(out) if layer < 4 else out
    rows = w["last_layer.weight_v"]
    cosines = (out / out.norm(dim=1, keepdim=True)) @ (rows / rows.norm(dim=1, keepdim=True)).T
    return {"cls": cls, "head": cosines}


def test_features_are_the_teachers_in_eval_mode(trained: Path, store: Path) -> None:
    encoder = load_encoder(trained, CPU)
    with TileStore(store) as opened:
        tiles = torch.from_numpy(opened.read(torch.arange(3).numpy()))
        assert encoder.mpp == opened.mpp == pytest.approx(0.5)
    found, expected = encoder.features(tiles), by_hand(trained / "checkpoints/step-00000002", tiles)
    assert found.keys() == expected.keys()
    for tap, values in expected.items():
        assert found[tap].dtype == torch.float32
        assert torch.allclose(found[tap], values, rtol=0, atol=1e-5 * float(values.abs().max()))
        assert values.std(dim=0).max() > 1e-4  # not the same for every tile
    assert found["cls"].shape == (3, 128)
    assert found["head"].shape == (3, 64)
    assert torch.allclose(encoder.features(tiles[1:2])["cls"], found["cls"][1:2], atol=1e-5)  # no batch statistics


def test_describes_itself(trained: Path) -> None:
    encoder = load_encoder(trained, CPU)
    assert isinstance(encoder, FrozenEncoder)
    assert (encoder.name, encoder.mean, encoder.std) == ("xcit_nano_12_p16_224", (0.6, 0.4, 0.5), (0.2, 0.3, 0.1))
    assert encoder.sha256 == atomic.sha256_file(trained / "checkpoints/step-00000002/teacher.safetensors")
    assert encoder.store_fingerprint == json.loads((trained / "run.json").read_bytes())["store_fingerprint"]
    assert not encoder.backbone.training
    assert not any(parameter.requires_grad for parameter in encoder.backbone.parameters())


def test_a_tile_that_does_not_divide_into_patches_is_refused(trained: Path) -> None:
    encoder = replace(load_encoder(trained, CPU), backbone=build_encoder("vit_tiny_patch16_224"))
    for kind, px in (("rgb", 216), ("haar", 208)):
        with pytest.raises(UsageError, match=r"do not divide into patches of 16 px"):
            replace(encoder, input=kind).features(torch.zeros(1, px, px, 3, dtype=torch.uint8))


def test_teacher_is_neither_the_student_nor_an_older_one(trained: Path) -> None:
    folders = [trained / "checkpoints" / name for name in ("step-00000001", "step-00000002")]
    encoders = [load_encoder(folder, CPU) for folder in (*folders, trained)]
    assert encoders[0].sha256 != encoders[1].sha256 == encoders[2].sha256
    tiles = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8)
    older, newer, newest = (encoder.features(tiles)["cls"] for encoder in encoders)
    assert torch.equal(newer, newest)
    assert (older - newer).abs().max() > 1e-4
    teacher, student = (load_file(folders[1] / f"{name}.safetensors") for name in ("teacher", "student"))
    assert any(not torch.equal(teacher[name], value) for name, value in student.items())


def test_eval_mode_agrees_with_train_mode_on_global_views(
    tmp_path: Path, words: Callable[..., list[str]], store: Path
) -> None:
    """The teacher trains in train mode and is used in eval mode: its running statistics are those of its views."""
    changes = {
        "train.steps": 60, "train.batch_per_rank": 8, "train.accumulate": 1, "checkpoint.every": 60, "optim.lr": 0.01,
        "views.local_crops": 1, "method.ema_start": 0.9,
    }  # fmt: skip
    pretrain(pretrain_config(words(tmp_path / "run", changes)))
    encoder = load_encoder(tmp_path / "run", CPU)
    with TileStore(store) as opened:
        ids = np.arange(len(opened))
        tiles = torch.from_numpy(opened.read(ids))
    spec = view_specs(1, 1, 64, 32, (0.4, 1.0), (0.05, 0.4), "histology")[0]
    assert spec.is_global
    colour, epochs = colour_spec("histology"), np.full(len(ids), 1000)  # views that no step has seen
    views = make_views(tiles, ids, epochs, [spec], colour, 0, encoder.mean, encoder.std)[0]

    def outputs(training: bool) -> list[torch.Tensor]:
        backbone = copy.deepcopy(encoder.backbone).train(training)
        with torch.no_grad():
            cls = backbone(views)
            return [cls, encoder.head(cls)]

    def alike(found: torch.Tensor, expected: torch.Tensor) -> float:
        """Mean cosine, around the means of all views, which would hide every difference."""
        centred = (found - found.mean(dim=0), expected - expected.mean(dim=0))
        return float(functional.cosine_similarity(*centred).mean())

    for used, trained in zip(outputs(training=False), outputs(training=True), strict=True):
        assert functional.cosine_similarity(used, trained).min() > 0.99
        assert alike(used, trained) > 0.95
    for layer in encoder.backbone.modules():
        if isinstance(layer, BatchNorm):
            layer.reset_running_stats()
    assert alike(outputs(training=False)[0], outputs(training=True)[0]) < 0.6  # and it need not have been so


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1000] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["teacher.safetensors", "optimizer.safetensors"])
def test_one_flipped_bit_is_refused(run: Path, name: str) -> None:
    folder = run / "checkpoints/step-00000002"
    flip(folder / name)
    with pytest.raises(DamageError, match=f"step-00000002/{name}"):
        load_encoder(folder, CPU)


def test_of_a_run_the_newest_sound_one_is_taken(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older = load_encoder(run / "checkpoints/step-00000001", CPU).sha256
    flip(run / "checkpoints/step-00000002/teacher.safetensors")
    assert load_encoder(run, CPU).sha256 == older
    assert "step-00000002/teacher.safetensors" in capsys.readouterr().err
    flip(run / "checkpoints/step-00000001/teacher.safetensors")
    with pytest.raises(CheckpointError, match="none of 2 checkpoints is sound"):
        load_encoder(run, CPU)


def test_a_checkpoint_that_does_not_fit_what_it_says_is_refused(run: Path) -> None:
    folder = run / "checkpoints/step-00000002"
    about = json.loads((folder / "state.json").read_bytes())
    about["config"]["method.out_dim"] = 65
    atomic.write_json(folder / "state.json", about)
    atomic.seal(folder)
    with pytest.raises(CheckpointError, match=r"tensor head\.last_layer\.weight_g is \(64, 1\)"):
        load_encoder(folder, CPU)


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UsageError, match="is no run and no checkpoint"):
            load_encoder(path, CPU)
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        load_encoder(run, CPU)
