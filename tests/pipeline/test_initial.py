"""Weights to begin with: every kind of source read bit by bit, the wrong architecture named, the head where it fits."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.commands.parser import pretrain_config
from pipeline.export import export
from pipeline.models import facebook
from pipeline.models.encoders import build_encoder
from pipeline.models.heads import DinoHead
from pipeline.models.initial import InitialWeights, initial_weights
from pipeline.pretrain import pretrain
from tiling import atomic
from tiling.errors import CheckpointError, DamageError, UsageError

NANO, TINY, VIT = "xcit_nano_12_p16_224", "xcit_tiny_12_p16_224", "vit_tiny_patch16_224"
SIZES = {"out_dim": 64, "hidden_dim": 32, "bottleneck_dim": 16}  # of the runs of conftest

State = dict[str, torch.Tensor]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory, words: Callable[..., list[str]]) -> Path:
    """A run with checkpoints at steps 1 and 2, and the bundle of its last one."""
    root = tmp_path_factory.mktemp("initial")
    changes = {"train.steps": 2, "train.accumulate": 1, "checkpoint.every": 1, "method.ema_start": 0.5}
    pretrain(pretrain_config(words(root / "run", changes)))
    export(root / "run", root / "bundle")
    return root


@pytest.fixture(scope="module")
def backbone() -> State:
    torch.manual_seed(0)
    return build_encoder(NANO).state_dict()


@pytest.fixture(scope="module")
def head() -> State:
    return DinoHead(128, **SIZES).state_dict()


def same(found: Mapping[str, torch.Tensor] | None, expected: Mapping[str, torch.Tensor]) -> bool:
    return (
        found is not None
        and found.keys() == expected.keys()
        and all(torch.equal(value, expected[name]) for name, value in found.items())
    )


def part(folder: Path, name: str) -> State:
    """One network's tensors of a checkpoint's teacher."""
    state = load_file(folder / "teacher.safetensors")
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def require_usable(found: InitialWeights, name: str = NANO) -> None:
    build_encoder(name).load_state_dict(found.backbone)
    if found.head is not None:
        DinoHead(128, **SIZES).load_state_dict(found.head)


@pytest.mark.parametrize(("source", "step", "what"), [
    ("run", 2, "teacher of step 2 of {}, with its head"),
    ("run/checkpoints/step-00000001", 1, "teacher of step 1 of {}, with its head"),
    ("bundle", 2, "teacher of bundle {}, with its head"),
])  # fmt: skip
def test_a_teacher_of_ours(boxes: Path, source: str, step: int, what: str) -> None:
    found = initial_weights(boxes / source, NANO, SIZES)
    folder = boxes / f"run/checkpoints/step-0000000{step}"
    assert same(found.backbone, part(folder, "backbone"))
    assert same(found.head, part(folder, "head"))
    assert found.sha256 == atomic.sha256_file(folder / "teacher.safetensors")
    assert found.what == what.format(boxes / source)
    require_usable(found)


@pytest.mark.parametrize("source", ["run", "bundle"])
def test_a_head_of_other_sizes_begins_anew(boxes: Path, source: str) -> None:
    found = initial_weights(boxes / source, NANO, SIZES | {"out_dim": 4096, "hidden_dim": 2048})
    assert found.head is None
    apart = "(out_dim 64 there, 4096 here, hidden_dim 32 there, 2048 here)"
    assert found.what.endswith(f"{boxes / source}, its head begins anew {apart}")
    assert same(found.backbone, part(boxes / "run/checkpoints/step-00000002", "backbone"))
    without = initial_weights(boxes / source, NANO, None)
    assert without.head is None
    assert without.what.endswith(str(boxes / source))


@pytest.mark.parametrize("under", ["", "module."])
def test_the_originals_teacher(backbone: State, head: State, tmp_path: Path, under: str) -> None:
    path = tmp_path / "dino.pth"
    teacher = facebook.teacher_state(backbone, head)
    student = {name: torch.zeros_like(value) for name, value in teacher.items()}
    named = {f"{under}{name}": value for name, value in teacher.items()}
    torch.save({"student": student, "teacher": named, "epoch": 3}, path)
    found = initial_weights(path, NANO, SIZES)
    assert same(found.backbone, backbone)
    assert same(found.head, head)
    assert found.sha256 == atomic.sha256_file(path)
    assert found.what == f"teacher of {path} (original DINO code), with its head"


LAYOUTS: dict[str, Callable[[State], object]] = {
    "timm": dict,
    "timm, with a classifier": lambda s: s | {"head.weight": torch.ones(10, 128), "head.bias": torch.ones(10)},
    "timm, as its trainer saves": lambda s: {"epoch": 3, "arch": NANO, "state_dict": s},
    "timm, under DDP": lambda s: {"model": {f"module.{name}": value for name, value in s.items()}},
    "the original's published": facebook.to_original,
    "the original's supervised": lambda s: {"model": facebook.to_original(s) | {"head.weight": torch.ones(10, 128)}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_state_dict(backbone: State, tmp_path: Path, layout: str) -> None:
    path = tmp_path / "weights.pth"
    torch.save(LAYOUTS[layout](backbone), path)
    found = initial_weights(path, NANO, SIZES)
    assert same(found.backbone, backbone)
    assert found.head is None
    names = "timm's names" if layout.startswith("timm") else "original names"
    assert found.what == f"weights of {path} ({names}), without a head: it begins anew"
    require_usable(found)


def test_safetensors(backbone: State, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(backbone | {"head.weight": torch.ones(10, 128)}, path)
    found = initial_weights(path, NANO, None)
    assert same(found.backbone, backbone)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        initial_weights(path, NANO, None)


def test_a_vit_of_another_input_size_has_its_positions_resampled(tmp_path: Path) -> None:
    torch.manual_seed(0)
    larger = build_encoder("vit_tiny_patch16_384")
    state = larger.state_dict()
    torch.save(state, tmp_path / "vit.pth")
    found = initial_weights(tmp_path / "vit.pth", VIT, None)
    assert found.backbone["pos_embed"].shape == (1, 197, 192)
    assert torch.equal(found.backbone["pos_embed"][:, 0], state["pos_embed"][:, 0])
    assert same({**found.backbone, "pos_embed": state["pos_embed"]}, state)
    encoder = build_encoder(VIT).eval()
    encoder.load_state_dict(found.backbone)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():  # the larger one interpolates its own positions to the same grid
        assert torch.allclose(encoder(images), larger.eval()(images), atol=1e-5)


@pytest.mark.parametrize(("name", "message"), [
    (TINY, r"tensor cls_token is \(1, 1, 128\) in the checkpoint and \(1, 1, 192\) in the model"),
    (VIT, "tensor cls_token is"),
    ("xcit_nano_12_p8_224", r"tensor patch_embed\.proj\.0\.0\.weight is \(16, 3, 3, 3\) in the checkpoint and \(32,"),
])  # fmt: skip
@pytest.mark.parametrize("source", ["run", "bundle", "dino.pth", "timm.safetensors"])
def test_another_architecture_is_named(
    boxes: Path, backbone: State, head: State, tmp_path: Path, source: str, name: str, message: str
) -> None:
    torch.save({"teacher": facebook.teacher_state(backbone, head)}, tmp_path / "dino.pth")
    save_file(backbone, tmp_path / "timm.safetensors")
    path = boxes / source if (boxes / source).exists() else tmp_path / source
    with pytest.raises(CheckpointError, match=f"{message}.*; these are of {NANO}: set model.name to it"):
        initial_weights(path, name, SIZES)


def test_what_cannot_be_told_is_refused_all_the_same(backbone: State, tmp_path: Path) -> None:
    lacking = {name: value for name, value in backbone.items() if name != "blocks.3.gamma2"}
    more = backbone | {"blocks.3.ls.gamma": torch.ones(1)}
    for state, tensor in ((lacking, "blocks.3.gamma2"), (more, "blocks.3.ls.gamma"), ({"fc1.w": torch.ones(1)}, "")):
        torch.save(state, tmp_path / "weights.pth")
        with pytest.raises(CheckpointError, match=rf"weights\.pth: tensor {tensor}.*set model.name to theirs"):
            initial_weights(tmp_path / "weights.pth", NANO, None)


@pytest.mark.parametrize(("content", "message"), [
    ([torch.ones(1)], "holds no weights by name"),
    ({}, "holds no weights by name"),
    ({"model": {}}, "holds no weights by name"),
    ({"epoch": 3}, "'epoch' is a int, no tensor"),
    ({"teacher": {"student.x": torch.ones(1)}}, "lacks 'cls_token'|holds 'student.x'"),
])  # fmt: skip
def test_files_of_something_else_are_refused(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=message) as caught:
        initial_weights(tmp_path / "file.pth", NANO, None)
    assert str(caught.value).startswith(str(tmp_path / "file.pth"))


def test_damage_is_refused(boxes: Path, tmp_path: Path) -> None:
    for source, file in (("run/checkpoints/step-00000002", "teacher"), ("bundle", "model")):
        copy = Path(shutil.copytree(boxes / source, tmp_path / Path(source).name))
        path = copy / f"{file}.safetensors"
        data = bytearray(path.read_bytes())
        data[-1000] ^= 4
        path.write_bytes(data)
        with pytest.raises(DamageError, match=f"{file}.safetensors"):
            initial_weights(copy, NANO, SIZES)


def test_nothing_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"does not exist; model\.init_from is"):
        initial_weights(tmp_path / "nowhere", NANO, None)
    with pytest.raises(UsageError, match="is no run and no checkpoint"):
        initial_weights(tmp_path, NANO, None)
