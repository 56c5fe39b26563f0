"""The original's names and files: exactly its list, exactly invertible, every real layout read, nothing ever run."""

import argparse
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.models import facebook
from pipeline.models.encoders import build_encoder, width
from pipeline.models.heads import DinoHead
from tiling.errors import CheckpointError, UsageError

NANO, MEDIUM, VIT = "xcit_nano_12_p16_224", "xcit_medium_24_p16_224", "vit_small_patch16_224"
QKV = "cls_attn_blocks.1.attn.qkv"

Shapes = dict[str, tuple[int, ...]]
State = dict[str, torch.Tensor]

pytestmark = pytest.mark.usefixtures("one_thread")


# The original's list of names and shapes, as rules. Written down from its real state dicts (facebookresearch/dino and
# /xcit, MultiCropWrapper of xcit_nano_12_p16, xcit_medium_24_p16 and vit_small with DINOHead) and equal to them.


def layer(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def batch_norm(name: str, d: int) -> Shapes:
    running: Shapes = {f"{name}.running_mean": (d,), f"{name}.running_var": (d,), f"{name}.num_batches_tracked": ()}
    return layer(name, d) | running


def inside(folder: str, count: int, member: Shapes) -> Shapes:
    return {f"{folder}.{n}.{name}": shape for n in range(count) for name, shape in member.items()}


def gammas(count: int, d: int) -> Shapes:
    return {f"gamma{n + 1}": (d,) for n in range(count)}


def original_shapes(d: int, depth: int, heads: int | None) -> Shapes:
    """Wrapper of an XCiT with patch 16, or of a ViT when ``heads`` is None, with a head of 4,096 outputs."""
    attention = layer("attn.qkv", 3 * d, d) | layer("attn.proj", d, d)
    mlp = layer("norm2", d) | layer("mlp.fc1", 4 * d, d) | layer("mlp.fc2", d, 4 * d)
    plain = layer("norm1", d) | attention | mlp
    backbone: Shapes = {"cls_token": (1, 1, d)}
    if heads is None:
        backbone |= {"pos_embed": (1, 197, d)} | layer("patch_embed.proj", d, 3, 16, 16)
        backbone |= inside("blocks", depth, plain) | layer("norm", d)
    else:
        channels = (3, d // 8, d // 4, d // 2, d)
        for n in range(4):
            backbone[f"patch_embed.proj.{2 * n}.0.weight"] = (channels[n + 1], channels[n], 3, 3)
            backbone |= batch_norm(f"patch_embed.proj.{2 * n}.1", channels[n + 1])
        block = gammas(3, d) | layer("norm1", d) | {"attn.temperature": (heads, 1, 1)} | attention | mlp
        block |= layer("norm3", d) | layer("local_mp.conv1", d, 1, 3, 3) | batch_norm("local_mp.bn", d)
        block |= layer("local_mp.conv2", d, 1, 3, 3)
        backbone |= inside("blocks", depth, block) | inside("cls_attn_blocks", 2, gammas(2, d) | plain)
        backbone |= layer("norm", d) | layer("pos_embeder.token_projection", d, 64, 1, 1)
    head = layer("mlp.0", 2048, d) | layer("mlp.2", 2048, 2048) | layer("mlp.4", 256, 2048)
    head |= {"last_layer.weight_g": (4096, 1), "last_layer.weight_v": (4096, 256)}
    return {f"backbone.{name}": shape for name, shape in backbone.items()} | {f"head.{n}": s for n, s in head.items()}


def empty_state(name: str) -> State:
    """An encoder's state with whatever is in memory: for names and shapes only."""
    with torch.device("meta"):
        state = build_encoder(name).state_dict()
    return {key: torch.empty_like(tensor, device="cpu") for key, tensor in state.items()}


def fill(state: State, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator)
        if tensor.is_floating_point()
        else torch.randint(1, 99, tensor.shape, generator=generator)
        for name, tensor in state.items()
    }


@pytest.fixture(scope="module")
def nano() -> State:
    return fill(empty_state(NANO), seed=0)


@pytest.fixture(scope="module")
def head() -> State:
    return fill(DinoHead(128, 16, hidden_dim=8, bottleneck_dim=4).state_dict(), seed=1)


@pytest.fixture
def teacher(nano: State, head: State) -> State:
    return facebook.teacher_state(nano, head)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[object], Path]:
    def save(content: object) -> Path:
        torch.save(content, tmp_path / "original.pth")
        return tmp_path / "original.pth"

    return save


def same(found: State | None, expected: State) -> bool:
    assert found is not None
    same_types = all(found[name].dtype == expected[name].dtype for name in expected)
    return found.keys() == expected.keys() and same_types and all(torch.equal(found[k], expected[k]) for k in expected)


def prefixed(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def bare(state: State) -> State:
    return {name.removeprefix("backbone."): t for name, t in state.items() if name.startswith("backbone.")}


def main_dino(student: State, teacher: State) -> dict[str, Any]:
    """What ``main_dino.py`` saves, with the types it has there: schedules' numpy scalars, submitit's Path."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = np.linspace(0, 5e-4, 5)[3]
    options = {"arch": "xcit_nano_12_p16", "patch_size": 16, "local_crops_scale": (0.05, 0.4), "use_fp16": True}
    return {
        "student": student,
        "teacher": teacher,
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "args": argparse.Namespace(**options, output_dir=Path("/checkpoint/me")),
        "dino_loss": {"center": torch.zeros(1, 16)},
        "fp16_scaler": {"scale": 65536.0, "growth_interval": 2000},
    }


@pytest.mark.parametrize(("name", "sizes", "count"), [
    (NANO, (128, 12, 4), 389), (MEDIUM, (512, 24, 8), 713), (VIT, (384, 12, None), 158),
])  # fmt: skip
def test_names_shapes_and_order_are_the_originals(name: str, sizes: tuple[int, int, int | None], count: int) -> None:
    backbone = empty_state(name)
    dino = DinoHead(sizes[0], 4096)
    state = facebook.teacher_state(backbone, dino.state_dict())
    assert [(key, tuple(tensor.shape)) for key, tensor in state.items()] == list(original_shapes(*sizes).items())
    assert len(state) == count


@pytest.mark.parametrize("name", [NANO, VIT])
def test_round_trips_are_bit_exact(name: str) -> None:
    ours = fill(empty_state(name), seed=2)
    theirs = facebook.to_original(ours)
    back = facebook.from_original(theirs)
    assert same(back, ours)
    assert same(facebook.to_original(back), theirs)
    build_encoder(name).load_state_dict(back)
    for state in (theirs, back):
        assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in state.values())
        assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == len(state)


def test_what_differs_is_renamed_and_joined_in_order(nano: State) -> None:
    found = facebook.to_original(nano)
    for kind in ("weight", "bias"):
        parts = [nano[f"cls_attn_blocks.1.attn.{part}.{kind}"] for part in ("q", "k", "v")]
        assert torch.equal(found[f"{QKV}.{kind}"], torch.cat(parts))
        theirs, ours = f"pos_embeder.token_projection.{kind}", f"pos_embed.token_projection.{kind}"
        assert torch.equal(found[theirs], nano[ours])
    others = {name for name in nano if "cls_attn_blocks" not in name and "pos_embed" not in name}
    assert all(torch.equal(found[name], nano[name]) for name in others)


def test_class_attention_computes_the_same_from_qkv(nano: State) -> None:
    encoder = build_encoder(NANO).eval()
    encoder.load_state_dict(
        {name: tensor * 0.05 if tensor.is_floating_point() else tensor for name, tensor in nano.items()}
    )
    attention = encoder.get_submodule("cls_attn_blocks.1.attn")
    theirs = facebook.to_original(encoder.state_dict())
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(3))
    # Touvron et al. 2021 (CaiT), section 3: (B, N, 3, heads, D / heads), the query of the first token only.
    q, k, v = (x @ theirs[f"{QKV}.weight"].T + theirs[f"{QKV}.bias"]).view(2, 5, 3, 4, 32).permute(2, 0, 3, 1, 4)
    weights = (q[:, :, :1] @ k.transpose(-2, -1) * 32**-0.5).softmax(dim=-1)
    token = (weights @ v).transpose(1, 2).reshape(2, 1, 128)
    projection = (theirs[f"cls_attn_blocks.1.attn.proj.{kind}"] for kind in ("weight", "bias"))
    with torch.no_grad():
        assert torch.allclose(attention(x), torch.nn.functional.linear(token, *projection), atol=1e-6)
    assert weights.std() > 0.05  # an attention that sees q and k


LAYOUTS: dict[str, Callable[[State, State], object]] = {
    "main_dino, all under DDP": lambda t, s: main_dino(prefixed("module.", s), prefixed("module.", t)),
    "main_dino, teacher bare": lambda t, s: main_dino(prefixed("module.", s), t),
    "teacher only": lambda t, s: {"teacher": t},
    "teacher only, under DDP": lambda t, s: {"teacher": prefixed("module.", t)},
    "teacher without head": lambda t, s: {"teacher": {name: v for name, v in t.items() if "head." not in name}},
    "teacher without backbone.": lambda t, s: {"teacher": {k.removeprefix("backbone."): v for k, v in t.items()}},
    "bare backbone": lambda t, s: bare(t),
    "bare backbone, under DDP": lambda t, s: prefixed("module.", bare(t)),
    "bare wrapper": lambda t, s: t,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read(
    layout: str, nano: State, head: State, teacher: State, saved: Callable[[object], Path]
) -> None:
    student = fill(teacher, seed=4)
    found = facebook.read_original(saved(LAYOUTS[layout](teacher, student)))
    assert same(found.backbone, nano)
    if "without head" in layout or "bare backbone" in layout:
        assert found.head is None
    else:
        assert same(found.head, head)
        DinoHead(128, 16, 8, 4).load_state_dict(found.head or {})
    assert facebook.timm_name(found) == NANO
    if "main_dino" in layout:
        assert found.arch == "xcit_nano_12_p16"
        assert found.args["patch_size"] == 16
        assert found.args["local_crops_scale"] == (0.05, 0.4)
        assert str(found.args["output_dir"]) == "/checkpoint/me"
    else:
        assert found.arch is None
        assert found.args == {}
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_numpy_scalars_of_numpy_1_are_read(teacher: State, nano: State, saved: Callable[[object], Path]) -> None:
    path = saved(main_dino(teacher, teacher))
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))
    assert members[pickled].count(b"cnumpy._core.multiarray\n") == 1
    members[pickled] = members[pickled].replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    assert same(facebook.read_original(path).backbone, nano)


def test_what_is_written_loads_as_partners_do(teacher: State, saved: Callable[[object], Path]) -> None:
    path = saved({"teacher": teacher})
    assert same(torch.load(path, weights_only=True)["teacher"], teacher)
    content = sum(tensor.numel() * tensor.element_size() for tensor in teacher.values())
    assert path.stat().st_size < content + 512 * len(teacher)  # no tensor drags another's memory along


class Runs:
    """Unpickled by anything that runs what it reads, it makes a file."""

    def __init__(self, what: Callable[..., object], *arguments: object) -> None:
        self.what, self.arguments = what, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.what, self.arguments


@pytest.mark.parametrize(("run", "named"), [
    (lambda trace: Runs(os.system, f"touch {trace}"), f"'{os.name}.system'"),
    (lambda trace: Runs(os.mkdir, str(trace)), f"'{os.name}.mkdir'"),
    (lambda trace: Runs(exec, f"open({str(trace)!r}, 'w').close()"), "'exec'"),
    (lambda trace: Runs(zipfile.ZipFile, str(trace), "w"), "'zipfile.ZipFile'"),
], ids=["system", "mkdir", "exec", "class"])  # fmt: skip
def test_nothing_is_ever_run(
    run: Callable[[Path], Runs], named: str, teacher: State, saved: Callable[[object], Path], tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    path = saved({"teacher": teacher, "args": run(trace)})
    with pytest.raises(CheckpointError, match=f"wants {named} to be run") as caught:
        facebook.read_original(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    path.write_bytes(pickle.dumps({"teacher": run(trace)}))  # of a protocol that torch.save never uses
    with pytest.raises(CheckpointError, match="damaged"):
        facebook.read_original(path)
    assert not trace.exists()
    what, arguments = run(trace).__reduce__()
    what(*arguments)  # as one that runs what it reads would have
    assert trace.exists()


def test_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.pth", tmp_path):
        with pytest.raises(UsageError, match="is no file"):
            facebook.read_original(path)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99, "text"])
def test_damaged_files(keep: float | str, teacher: State, saved: Callable[[object], Path]) -> None:
    path = saved({"teacher": teacher})
    whole = path.read_bytes()
    size = keep if isinstance(keep, int) else int(len(whole) * float(keep)) if keep != "text" else 0
    path.write_bytes(whole[:size] if keep != "text" else b"a text\n" * 100)
    with pytest.raises(CheckpointError, match=r"original.pth: is no file of torch.save, or is damaged"):
        facebook.read_original(path)


WRONG: dict[str, tuple[Callable[[State], object], str]] = {
    "student only": (lambda t: {"student": t, "epoch": 3}, r"has no teacher.*epoch.*student"),
    "teacher is a number": (lambda t: {"teacher": 3}, "has no teacher"),
    "teacher is empty": (lambda t: {"teacher": {}}, "has no teacher"),
    "nothing": (lambda t: {}, "has no teacher"),
    "list": (lambda t: list(t.values()), "has no teacher"),
    "not a tensor": (lambda t: {"teacher": t | {"backbone.norm.bias": [0.0]}}, "'backbone.norm.bias' is a list"),
    "sparse": (lambda t: {"teacher": t | {"head.x": torch.eye(2).to_sparse()}}, "'head.x' is a Tensor, no dense"),
    "number as name": (lambda t: {"teacher": {**t, 3: torch.ones(1)}}, "3 is a Tensor"),
    "twice": (lambda t: {"teacher": t | prefixed("module.", t)}, "twice"),
    "unknown in the backbone": (lambda t: bare(t) | {"fc.weight": torch.ones(1)}, r"holds 'fc.weight' \(1 such"),
    "classifier": (lambda t: bare(t) | {"head.weight": torch.ones(1)}, "holds 'head.weight'"),
    "head with BatchNorm": (
        lambda t: {"teacher": t | {"head.mlp.1.running_var": torch.ones(1)}},
        "'head.mlp.1.running_var'",
    ),
    "another network": (lambda t: {"conv1.weight": torch.ones(1)}, "holds 'conv1.weight'"),
    "timm's names": (lambda t: facebook.from_original(bare(t)), r"cls_attn_blocks.0.attn.k.bias"),
    "lacks a tensor": (
        lambda t: {k: v for k, v in t.items() if k != "backbone.blocks.3.gamma2"},
        "lacks 'blocks.3.gamma2'",
    ),
    "lacks a bias": (lambda t: {k: v for k, v in t.items() if k != f"backbone.{QKV}.bias"}, f"lacks '{QKV}.bias'"),
    "half a head": (lambda t: {k: v for k, v in t.items() if k != "head.mlp.0.bias"}, "lacks 'head.mlp.0.bias'"),
    "head alone": (lambda t: {"teacher": {k: v for k, v in t.items() if "head." in k}}, "lacks 'cls_token'"),
    "qkv of no three": (lambda t: t | {f"backbone.{QKV}.bias": torch.ones(385)}, r"\(385,\): its rows are not q, k"),
    "qkv a number": (lambda t: t | {f"backbone.{QKV}.bias": torch.tensor(1.0)}, r"\(\): its rows are not q, k"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_content(wrong: str, teacher: State, saved: Callable[[object], Path]) -> None:
    make, message = WRONG[wrong]
    path = saved(make(teacher))
    with pytest.raises(CheckpointError, match=message) as caught:
        facebook.read_original(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).endswith("; use an XCiT or a plain ViT, as the original DINO code has them")
    assert len(str(caught.value).splitlines()) == 1


def test_states_of_another_kind_are_not_renamed(nano: State, head: State) -> None:
    k = "cls_attn_blocks.0.attn.k"
    for lost in (f"{k}.weight", f"{k}.bias", "pos_embed.token_projection.bias", "norm.weight"):
        with pytest.raises(CheckpointError, match=f"lacks '{lost}'"):
            facebook.to_original({name: tensor for name, tensor in nano.items() if name != lost})
    with pytest.raises(CheckpointError, match=r"\(64,\), \(128,\)\], not one"):
        facebook.to_original(nano | {f"{k}.bias": torch.ones(64)})
    with pytest.raises(CheckpointError, match=r"holds 'blocks.0.ls1.gamma' \(24 such names\), unlike timm's"):
        facebook.to_original(empty_state("vit_small_patch14_dinov2"))
    with pytest.raises(CheckpointError, match=r"holds 'backbone\.\S+ \(381 such names\), unlike the original's"):
        facebook.from_original(prefixed("backbone.", facebook.to_original(nano)))
    with pytest.raises(CheckpointError, match=r"holds 'head.head.last_layer.weight_g' \(8 such names\)"):
        facebook.teacher_state(nano, prefixed("head.", head))


def checkpoint(state: State) -> facebook.OriginalCheckpoint:
    return facebook.OriginalCheckpoint(state, None, None, {})


@pytest.mark.parametrize("name", [
    NANO, "xcit_tiny_24_p16_224", "xcit_small_12_p8_224", MEDIUM, "xcit_large_24_p8_224",
    "vit_tiny_patch16_224", "vit_small_patch8_224", VIT, "vit_base_patch16_224",
])  # fmt: skip
def test_timm_name_by_shapes(name: str) -> None:
    assert facebook.timm_name(checkpoint(empty_state(name))) == name


@pytest.mark.parametrize(("name", "changes", "message"), [
    (NANO, {"cls_token": torch.ones(1, 1, 100)}, "timm has no xcit of width 100, depth 12, patch 16 px, 2 class"),
    (VIT, {"patch_embed.proj.weight": torch.ones(384, 3, 7, 7)}, "timm has no vit of width 384, depth 12, patch 7 px"),
    (VIT, {"patch_embed.proj.weight": torch.tensor(1.0)}, "timm has no vit"),
    (VIT, {"pos_embed": torch.ones(1, 577, 384)}, r"pos_embed is \(1, 577, 384\), in timm's \S+ \(1, 197, 384\)"),
    (NANO, {"blocks.2.attn.temperature": torch.ones(8, 1, 1)}, r"attn.temperature is \(8, 1, 1\), in .* \(4, 1, 1\)"),
    (VIT, {"blocks.12.norm1.weight": torch.ones(384)}, r"depth 13.*blocks.12.norm1.weight is \(384,\), in .* missing"),
])  # fmt: skip
def test_timm_name_refuses_other_shapes(name: str, changes: State, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        facebook.timm_name(checkpoint(empty_state(name) | changes))


def test_strict_loading_gives_the_same_network(nano: State, teacher: State, saved: Callable[[object], Path]) -> None:
    one = build_encoder(NANO).eval()
    tame = {k: v.abs() * 0.1 + 0.1 if v.is_floating_point() else v for k, v in nano.items()}
    one.load_state_dict(tame)
    found = facebook.read_original(saved(facebook.to_original(tame)))
    other = build_encoder(facebook.timm_name(found)).eval()
    other.load_state_dict(found.backbone)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert torch.equal(one(images), other(images))
    assert width(other) == 128
