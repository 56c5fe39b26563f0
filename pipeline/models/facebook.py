"""The original DINO's names and checkpoints in timm's names, and back.

Sources: facebookresearch/dino (``main_dino.py`` saves, ``utils.MultiCropWrapper`` joins backbone and head) and
facebookresearch/xcit (``xcit.py``). XCiT's ``pos_embeder`` is timm's ``pos_embed``; its class attention's ``qkv`` is
timm's ``q``, ``k`` and ``v``, one below the other. All other names are the same.

Both compute the same to rounding, but for a ViT at another size than its own: timm interpolates its positions with
antialiasing, the original without.
"""

import argparse
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import timm
import torch

from pipeline.models.encoders import build_encoder
from tiling.errors import CheckpointError, UsageError

State = Mapping[str, torch.Tensor]
_KNOWN = "use an XCiT or a plain ViT, as the original DINO code has them"


def _both(*layers: str) -> list[str]:
    return [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]


# Names inside one layer or block, and of the head, in the order of the original's state dicts.
_BATCH_NORM = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
_VIT_BLOCK = _both("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
_CLASS_BLOCK = ["gamma1", "gamma2", *_VIT_BLOCK]
_XCIT_BLOCK = [
    *("gamma1", "gamma2", "gamma3", *_both("norm1"), "attn.temperature", *_both("attn.qkv", "attn.proj", "norm2")),
    *_both("mlp.fc1", "mlp.fc2", "norm3", "local_mp.conv1"),
    *(*(f"local_mp.bn.{name}" for name in _BATCH_NORM), *_both("local_mp.conv2")),
]
_HEAD = [*_both("head.mlp.0", "head.mlp.2", "head.mlp.4"), "head.last_layer.weight_g", "head.last_layer.weight_v"]
_XCIT_SIZE = {128: "nano", 192: "tiny", 384: "small", 512: "medium", 768: "large"}  # timm's words for widths
_VIT_SIZE = {192: "tiny", 384: "small", 768: "base"}


def _count(names: Collection[str], folder: str) -> int:
    """How many members ``folder`` (``blocks.``) has."""
    return len({name.removeprefix(folder).split(".")[0] for name in names if name.startswith(folder)})


def _table(names: Collection[str]) -> dict[str, list[str]]:
    """Backbone of the original, name by name -> timm's name, or its three; ``names``, of either, tell what it is."""
    depth, class_depth = _count(names, "blocks."), _count(names, "cls_attn_blocks.")
    blocks = [f"blocks.{n}.{name}" for n in range(depth) for name in (_XCIT_BLOCK if class_depth else _VIT_BLOCK)]
    if not class_depth:
        return {n: [n] for n in ("cls_token", "pos_embed", *_both("patch_embed.proj"), *blocks, *_both("norm"))}
    stem = [
        f"patch_embed.proj.{n}.{name}"
        for n in range(0, 2 * _count(names, "patch_embed.proj."), 2)  # GELUs are the odd ones
        for name in ("0.weight", *(f"1.{name}" for name in _BATCH_NORM))
    ]
    last = [f"cls_attn_blocks.{n}.{name}" for n in range(class_depth) for name in _CLASS_BLOCK]
    table = {name: [name] for name in ("cls_token", *stem, *blocks, *last, *_both("norm"))}
    table |= {name: [name.replace(".qkv.", f".{part}.") for part in "qkv"] for name in last if ".qkv." in name}
    return table | {name: [name.replace("embeder", "embed")] for name in _both("pos_embeder.token_projection")}


def _require_names(found: Collection[str], expected: Collection[str], owner: str) -> None:
    for verb, names in (("holds", set(found) - set(expected)), ("lacks", set(expected) - set(found))):
        if names:
            raise CheckpointError(f"{verb} {min(names)!r:.80} ({len(names)} such names), unlike {owner}", do=_KNOWN)


def to_original(backbone: State) -> dict[str, torch.Tensor]:
    """A backbone in the original's names and order; the inverse of ``from_original``, bit by bit.

    Args:
        backbone: State dict of timm's XCiT or ViT without classifier; class attention's q, k, v are (D, D) and (D,).

    Returns:
        State dict of the original, contiguous; class attention's qkv is (3 D, D) and (3 D,).

    Raises:
        CheckpointError: A name is missing or unknown, or q, k and v differ in shape.
    """
    table = _table(backbone)
    _require_names(backbone, [part for parts in table.values() for part in parts], "timm's XCiT or ViT")
    found = {}
    for name, parts in table.items():
        tensors = [backbone[part].detach() for part in parts]
        if len(shapes := {tuple(tensor.shape) for tensor in tensors}) > 1:
            raise CheckpointError(f"q, k and v of {name} have shapes {sorted(shapes)}, not one", do=_KNOWN)
        found[name] = torch.cat(tensors) if len(tensors) > 1 else tensors[0].contiguous()
    return found


def from_original(backbone: State) -> dict[str, torch.Tensor]:
    """A backbone in timm's names; the inverse of ``to_original``, bit by bit.

    Args:
        backbone: State dict of the original XCiT or ViT, names without ``module.`` and ``backbone.``.

    Returns:
        State dict of timm's model without classifier, contiguous.

    Raises:
        CheckpointError: A name is missing or unknown, or the rows of a qkv are not three equal parts.
    """
    table = _table(backbone)
    _require_names(backbone, table, "the original's XCiT or ViT")
    found = {}
    for name, parts in table.items():
        rows = backbone[name].detach()
        if len(parts) == 1:
            found[parts[0]] = rows.contiguous()
        elif rows.ndim and rows.shape[0] % 3 == 0:
            # Copies: torch.save would write all three for every view.
            found |= {part: third.contiguous().clone() for part, third in zip(parts, rows.tensor_split(3), strict=True)}
        else:
            raise CheckpointError(f"{name} is {tuple(rows.shape)}: its rows are not q, k and v", do=_KNOWN)
    return found


def teacher_state(backbone: State, head: State) -> dict[str, torch.Tensor]:
    """What the original's bare ``MultiCropWrapper`` loads strictly: ``backbone.*`` and ``head.*``, on the CPU.

    Args:
        backbone: State dict of timm's XCiT or ViT without classifier.
        head: State dict of ``pipeline.models.heads.DinoHead``, which has the original's names.

    Raises:
        CheckpointError: A name is missing or unknown, or q, k and v differ in shape.
    """
    named = {f"head.{name}": tensor.detach().cpu().contiguous() for name, tensor in head.items()}
    _require_names(named, _HEAD, "the DINO head")
    return {f"backbone.{name}": tensor.cpu() for name, tensor in to_original(backbone).items()} | named


@dataclass(frozen=True)
class OriginalCheckpoint:
    """The teacher of a checkpoint of the original code.

    Args:
        backbone: State dict in timm's names.
        head: State dict for ``DinoHead``; None when the file has only a backbone.
        arch: The original's name of the architecture, ``args.arch`` (``xcit_medium_24_p16``), if the file says.
        args: All options of the training by name; empty when the file has none.
    """

    backbone: dict[str, torch.Tensor]
    head: dict[str, torch.Tensor] | None
    arch: str | None
    args: dict[str, Any]


class _Unread:
    """In the place of a value that nobody needs, whatever it is made from."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


# Real checkpoints hold more than args: the optimizer's lr and weight decay are numpy scalars, as they come from the
# schedules' arrays, and args.output_dir is a Path under submitit. The stand-ins run nothing of numpy and open no file.
_SAFE: list[Any] = [
    argparse.Namespace,
    *((_Unread, name) for name in ("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")),
    *((PurePosixPath, name) for name in ("pathlib.PosixPath", "pathlib._local.PosixPath")),
]


def parse_original(content: object) -> OriginalCheckpoint:
    """The teacher in what a file of the original DINO code holds; see ``read_original``.

    Raises:
        CheckpointError: There is no teacher, or it has names that the original has not.
    """
    content = content if isinstance(content, Mapping) else {}
    # The published *_pretrain.pth are a backbone's tensors and nothing else.
    bare = all(isinstance(value, torch.Tensor) for value in content.values())
    teacher = content if bare else content.get("teacher")
    if not isinstance(teacher, Mapping) or not teacher:
        raise CheckpointError(f"has no teacher, its keys are {sorted(map(str, content))!r:.120}", do=_KNOWN)
    for name, value in teacher.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise CheckpointError(f"teacher: {name!r:.80} is a {type(value).__name__}, no dense tensor", do=_KNOWN)
    state = {re.sub(r"^(module\.)?(backbone\.)?", "", name): tensor.detach() for name, tensor in teacher.items()}
    if len(state) < len(teacher):
        raise CheckpointError("has tensors twice, with and without module. or backbone.", do=_KNOWN)
    backbone = from_original({name: tensor for name, tensor in state.items() if not name.startswith("head.")})
    if head := {name: tensor for name, tensor in state.items() if name.startswith("head.")}:
        _require_names(head, _HEAD, "a DINO head of 3 layers without BatchNorm")
    bare_head = {name.removeprefix("head."): tensor.contiguous() for name, tensor in head.items()} or None
    args = dict(vars(given)) if isinstance(given := content.get("args"), argparse.Namespace) else {}
    arch = args.get("arch")
    return OriginalCheckpoint(backbone, bare_head, arch if isinstance(arch, str) else None, args)


def read_original(path: Path) -> OriginalCheckpoint:
    """Read the teacher of a checkpoint of the original DINO code; nothing in the file is run.

    Accepted: what ``main_dino.py`` saves, a dict with only ``teacher``, or a bare backbone (the published
    ``*_pretrain.pth``); names with or without ``module.`` and ``backbone.``.

    Raises:
        UsageError: There is no such file.
        CheckpointError: It is damaged, wants something to be run, or has no teacher or names that the original has not.
    """
    content = load_content(path)
    try:
        return parse_original(content)
    except CheckpointError as error:
        raise CheckpointError(error.what, path, error.do) from error


def load_content(path: Path) -> object:
    """What a file of ``torch.save`` holds, with stand-ins for values that nobody needs; nothing in it is run.

    Raises:
        UsageError: There is no such file.
        CheckpointError: It is damaged, or wants something to be run.
    """
    if not path.is_file():
        raise UsageError("is no file", path, "give a .pth file of the original DINO code")
    try:
        # Warnings are of formats that are refused right after.
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(_SAFE):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise anything
        if wanted := re.search(r"GLOBAL (\S+) (?:was not|whose module)", str(error)):
            what = f"wants {wanted[1]!r:.80} to be run, which no checkpoint of DINO needs; nothing was run"
            raise CheckpointError(what, path, "ask for a file of tensors only") from error
        raise CheckpointError("is no file of torch.save, or is damaged or cut short", path, "fetch it again") from error


def timm_name(checkpoint: OriginalCheckpoint) -> str:
    """timm's name of the architecture whose every tensor has the checkpoint's shape; ``args`` are not asked.

    A ViT's number of heads shows in no shape: width / 64 as in the original.

    Raises:
        CheckpointError: There is none; says what was found.
    """
    backbone = checkpoint.backbone
    width, depth = backbone["cls_token"].numel(), _count(backbone, "blocks.")
    if class_depth := _count(backbone, "cls_attn_blocks."):
        patch = 2 ** _count(backbone, "patch_embed.proj.")  # each convolution halves
        name = f"xcit_{_XCIT_SIZE.get(width)}_{depth}_p{patch}_224"
    else:
        patch = backbone["patch_embed.proj.weight"].shape[3:].numel()
        name = f"vit_{_VIT_SIZE.get(width)}_patch{patch}_224"
    found = f"width {width}, depth {depth}, patch {patch} px, {class_depth} class-attention blocks"
    if not timm.is_model(name):
        raise CheckpointError(f"timm has no {name.split('_')[0]} of {found}", do=_KNOWN)
    with torch.device("meta"):
        own = {key: tuple(tensor.shape) for key, tensor in build_encoder(name).state_dict().items()}
    theirs = {key: tuple(tensor.shape) for key, tensor in backbone.items()}
    for key in own | theirs:
        if own.get(key) != theirs.get(key):
            shapes = f"{key} is {theirs.get(key, 'missing')}, in timm's {name} {own.get(key, 'missing')}"
            raise CheckpointError(f"has {found}, but {shapes}", do=_KNOWN)
    return name
