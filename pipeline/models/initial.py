"""Weights that a run begins with: of a RUN, a bundle, the original DINO code, or timm."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers.pos_embed import resample_abs_pos_embed

from pipeline import checkpoint
from pipeline.boxes import is_bundle
from pipeline.bundle import open_bundle
from pipeline.models import facebook
from pipeline.models.encoders import build_encoder
from pipeline.models.frozen import encoder_of, resolve_checkpoint
from pipeline.models.heads import sizes_of_head
from tiling import atomic
from tiling.errors import CheckpointError, UsageError

State = dict[str, torch.Tensor]
_CPU = torch.device("cpu")
# Names that only the original code has; timm's have none of them.
_ORIGINAL = re.compile(r"backbone\.|head\.(mlp|last_layer)\.|pos_embeder\.|cls_attn_blocks\.\d+\.attn\.qkv\.")
# Classifiers of timm's and of the original's supervised models.
_CLASSIFIER = re.compile(r"(head|fc|head_dist)\.(weight|bias)$")


@dataclass(frozen=True)
class InitialWeights:
    """What student and teacher both begin with.

    Args:
        backbone: State dict for ``build_encoder``, in its sizes.
        head: State dict for ``DinoHead``; None where it begins anew.
        sha256: Identity of the weights.
        what: What they are, in words for the log.
    """

    backbone: State
    head: State | None
    sha256: str
    what: str


@dataclass(frozen=True)
class _Found:
    """What a source holds; ``name`` is its architecture, where it is known."""

    backbone: State
    head: State | None
    sha256: str
    what: str
    name: str | None = None


def initial_weights(path: Path, name: str, head_sizes: Mapping[str, int] | None) -> InitialWeights:
    """Read weights to begin a run with.

    Args:
        path: A RUN or one of its checkpoints, or a bundle (their teachers); a .pth of the original DINO code (its
            teacher, or a published backbone); a timm model's state dict as .safetensors or .pth.
        name: timm's name of the run's architecture; a ViT's positions may be of another input size.
        head_sizes: ``out_dim``, ``hidden_dim`` and ``bottleneck_dim`` of the run's DINO head; None where it has none.

    Raises:
        UsageError: There is nothing, or something else, at ``path``.
        DamageError: A file of the checkpoint or the bundle is damaged.
        CheckpointError: The file is damaged, or of another architecture; names the first tensor that does not fit.
    """
    found = _read(path)
    with torch.device("meta"):
        encoder = build_encoder(name)
    backbone = _resampled(found.backbone, encoder)
    try:
        checkpoint.require_fitting(path, backbone, encoder)
    except CheckpointError as error:
        other = found.name or _name_by_shapes(found.backbone)
        hint = f"these are of {other}: set model.name to it" if other and other != name else "set model.name to theirs"
        raise CheckpointError(error.what, path, hint) from error
    head, of_head = _fitting_head(found.head, head_sizes)
    return InitialWeights(backbone, head, found.sha256, f"{found.what}{of_head}")


def _read(path: Path) -> _Found:
    if is_bundle(path):
        encoder, what = open_bundle(path, _CPU).encoder, f"teacher of bundle {path}"
    elif path.is_dir():
        folder = resolve_checkpoint(path)
        state = checkpoint.read_state(folder)
        encoder, what = encoder_of(folder, state, _CPU), f"teacher of step {state['step']} of {path}"
    elif path.is_file():
        return _read_file(path)
    else:
        raise UsageError(
            "does not exist", path, "model.init_from is a RUN, a bundle, or a .pth or .safetensors of weights"
        )
    head = encoder.head.state_dict() if encoder.head is not None else None
    return _Found(encoder.backbone.state_dict(), head, encoder.sha256, what, encoder.name)


def _read_file(path: Path) -> _Found:
    """Of the original DINO code where it has a teacher or the original's names, else of timm."""
    sha256 = atomic.sha256_file(path)
    content = _tensors_of_safetensors(path) if path.suffix == ".safetensors" else facebook.load_content(path)
    try:
        if isinstance(content, Mapping) and "teacher" in content:
            original = facebook.parse_original(content)
            return _Found(original.backbone, original.head, sha256, f"teacher of {path} (original DINO code)")
        state = _bare(content)
        if any(_ORIGINAL.match(name) for name in state):
            original = facebook.parse_original(state)
            return _Found(original.backbone, original.head, sha256, f"weights of {path} (original names)")
    except CheckpointError as error:
        raise CheckpointError(error.what, path, error.do) from error
    return _Found(state, None, sha256, f"weights of {path} (timm's names)")


def _tensors_of_safetensors(path: Path) -> State:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"is damaged or cut short ({error})", path, "fetch it again") from error


def _bare(content: object) -> State:
    """A state dict out of its wrappers, without classifier."""
    for wrapper in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError("holds no weights by name", do="give a state dict of a timm model")
    state = {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{name!r:.80} is a {type(value).__name__}, no tensor", do="give a state dict")
        state[name.removeprefix("module.")] = value
    return {name: tensor for name, tensor in state.items() if not _CLASSIFIER.match(name)}


def _resampled(backbone: State, encoder: Any) -> State:
    """A ViT's positions of a square grid brought to the encoder's grid, as timm does it; the rest as it is."""
    own, theirs = getattr(encoder, "pos_embed", None), backbone.get("pos_embed")
    if not isinstance(own, torch.Tensor) or theirs is None or theirs.ndim != 3 or theirs.shape[2] != own.shape[2]:
        return backbone
    prefix = 0 if getattr(encoder, "no_embed_class", False) else encoder.num_prefix_tokens
    tokens = theirs.shape[1] - prefix
    if theirs.shape == own.shape or tokens < 1 or math.isqrt(tokens) ** 2 != tokens:
        return backbone
    grid = list(encoder.patch_embed.grid_size)
    return backbone | {"pos_embed": resample_abs_pos_embed(theirs, new_size=grid, num_prefix_tokens=prefix)}


def _name_by_shapes(backbone: State) -> str | None:
    """The architecture that the original DINO code has with these tensors; None where it has none."""
    try:
        return facebook.timm_name(facebook.OriginalCheckpoint(backbone, None, None, {}))
    except (CheckpointError, KeyError):
        return None


def _fitting_head(head: State | None, sizes: Mapping[str, int] | None) -> tuple[State | None, str]:
    """The head where its sizes are the run's, and what is to be said of it."""
    if sizes is None:
        return None, ""
    if head is None:
        return None, ", without a head: it begins anew"
    theirs = sizes_of_head(head)
    if theirs == dict(sizes):
        return head, ", with its head"
    apart = ", ".join(f"{key} {theirs[key]} there, {sizes[key]} here" for key in sizes if theirs[key] != sizes[key])
    return None, f", its head begins anew ({apart})"
