"""Checkpoints: tensors as safetensors, JSON beside them, COMPLETE with every sha256 last; verified before use.

A checkpoint holds no random state: what is random is a function of seed, step and sample (DESIGN.md, rule 3).
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn

from pipeline.boxes import CHECKPOINT
from tiling import atomic
from tiling.errors import CheckpointError
from tiling.progress import say

FOLDER, LATEST, STATE, WORK = "checkpoints", "latest", CHECKPOINT.file, "work"
OPTIMIZER, METHOD_STATE = "optimizer", "method"


@dataclass(frozen=True)
class Position:
    """Where a run stands: optimizer steps done, and samples that all ranks together have seen."""

    step: int
    samples_seen: int


def step_folder(run: Path, step: int) -> Path:
    """RUN/checkpoints/step-00001234."""
    return run / FOLDER / f"step-{step:08d}"


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as safetensors, readable for whoever the umask lets (``save_file`` would say 0600)."""
    path.write_bytes(to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Optimizer state as ``<parameter number>.<name>`` -> tensor."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": value for number, values in state.items() for name, value in values.items()}


def save(
    run: Path,
    position: Position,
    networks: Mapping[str, nn.Module],
    state: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    about: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write one checkpoint and make it the latest; older ones beyond ``keep`` are removed.

    Args:
        run: The RUN folder.
        position: Where the run stands.
        networks: Modules by name.
        state: The method's further tensors by name.
        optimizer: The optimizer.
        about: JSON values that say what it is: config, store, mpp, software.
        keep: How many of the newest stay.

    Returns:
        The checkpoint's folder.
    """
    final, work = step_folder(run, position.step), run / FOLDER / WORK
    shutil.rmtree(work, ignore_errors=True)  # what a killed save left
    atomic.stands(final, work)  # a damaged one was passed over when the run was continued from an older one
    with atomic.building(final, work) as folder:
        for name, network in networks.items():
            write_tensors(folder / f"{name}.safetensors", network.state_dict())
        write_tensors(folder / f"{METHOD_STATE}.safetensors", state)
        write_tensors(folder / f"{OPTIMIZER}.safetensors", _optimizer_tensors(optimizer))
        values = {"step": position.step, "samples_seen": position.samples_seen, **about}
        atomic.write_json(folder / STATE, CHECKPOINT.describe(values))
    atomic.write_bytes(run / FOLDER / LATEST, f"{final.name}\n".encode())
    # Newer ones are damaged, or this run would have been continued from them: they must not push sound ones out.
    for old in [folder for folder in list_checkpoints(run) if folder.name <= final.name][:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(run: Path) -> list[Path]:
    """All checkpoints of a run, sound or not, oldest first."""
    return sorted((run / FOLDER).glob("step-*"))


def newest_sound(run: Path) -> Path | None:
    """The newest checkpoint whose every file matches its checksum; damaged ones are named and passed over.

    Returns:
        Its folder, or None when the run has no checkpoint at all.

    Raises:
        CheckpointError: There are checkpoints, but not one is sound.
    """
    candidates = list_checkpoints(run)
    for folder in reversed(candidates):
        found = atomic.damaged_files(folder)
        if not found:
            return folder
        say(f"damaged checkpoint passed over: {found[0]}")
    if candidates:
        raise CheckpointError(
            f"none of {len(candidates)} checkpoints is sound", run, "start a new run in another --out folder"
        )
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, after every checksum is checked.

    Raises:
        DamageError: A file is damaged.
        CheckpointError: It is of another format version.
    """
    atomic.require_sound(folder)
    return CHECKPOINT.read(folder)


def _fitting(folder: Path, name: str, network: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of one network, all there and of its shapes."""
    path = folder / f"{name}.safetensors"
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"holds no {name}", folder) from error
    require_fitting(path, tensors, network)
    return tensors


def require_fitting(path: Path, tensors: Mapping[str, torch.Tensor], network: nn.Module) -> None:
    """Raise CheckpointError naming the first tensor of ``path`` that a network lacks or has in another shape."""
    own = network.state_dict()
    for key in (*own, *tensors):
        _require_shape(path, key, tensors.get(key), own.get(key))


def _require_shape(path: Path, key: str, theirs: torch.Tensor | None, ours: torch.Tensor | None) -> None:
    if ours is None or theirs is None or ours.shape != theirs.shape:
        shapes = [tuple(tensor.shape) if tensor is not None else "missing" for tensor in (theirs, ours)]
        raise CheckpointError(
            f"tensor {key} is {shapes[0]} in the checkpoint and {shapes[1]} in the model",
            path,
            "the checkpoint is of another architecture: use the config it was trained with",
        )


def load_network(folder: Path, name: str, network: nn.Module) -> None:
    """Fill one network from a checkpoint, strictly.

    Raises:
        CheckpointError: Names or shapes differ: the checkpoint is of another architecture; nothing was filled.
    """
    network.load_state_dict(_fitting(folder, name, network))


def _fitting_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> dict[int, dict[str, torch.Tensor]]:
    """Optimizer state by parameter number, of the parameters' shapes (or scalars)."""
    path = folder / f"{OPTIMIZER}.safetensors"
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(path).items():
        number, name = key.split(".", 1)
        own = parameters[int(number)] if int(number) < len(parameters) else None
        if own is None or tensor.ndim:
            _require_shape(path, key, tensor, own)
        state.setdefault(int(number), {})[name] = tensor
    return state


def load(
    folder: Path, networks: Mapping[str, nn.Module], state: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> Position:
    """Fill networks, method state and optimizer in place from a verified checkpoint: all of them, or none.

    Returns:
        Where the run stood.

    Raises:
        DamageError: A file is damaged.
        CheckpointError: It is of another format version or architecture.
    """
    about = read_state(folder)
    tensors = {name: _fitting(folder, name, network) for name, network in networks.items()}
    path = folder / f"{METHOD_STATE}.safetensors"
    saved = load_file(path)
    for name, tensor in state.items():
        _require_shape(path, name, saved.get(name), tensor)
    moments = _fitting_optimizer(folder, optimizer)
    for name, network in networks.items():
        network.load_state_dict(tensors[name])
    for name, tensor in state.items():
        tensor.copy_(saved[name])
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return Position(int(about["step"]), int(about["samples_seen"]))
