"""Checkpoints: tensors as safetensors, JSON beside them, COMPLETE with every sha256 last; verified before use.

A checkpoint holds no random state: what is random is a function of seed, step and sample (DESIGN.md, rule 3).
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn

from tiling import atomic
from tiling.errors import CheckpointError
from tiling.progress import say

FOLDER, LATEST, STATE = "checkpoints", "latest", "state.json"
OPTIMIZER, METHOD_STATE = "optimizer", "method"
FORMAT_VERSION = 1


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
    final = step_folder(run, position.step)
    with atomic.building(final, run / FOLDER / "work") as folder:
        for name, network in networks.items():
            write_tensors(folder / f"{name}.safetensors", network.state_dict())
        write_tensors(folder / f"{METHOD_STATE}.safetensors", state)
        write_tensors(folder / f"{OPTIMIZER}.safetensors", _optimizer_tensors(optimizer))
        description = {
            "format": "bony-checkpoint",
            "format_version": FORMAT_VERSION,
            "step": position.step,
            "samples_seen": position.samples_seen,
            **about,
        }
        atomic.write_json(folder / STATE, description)
    atomic.write_bytes(run / FOLDER / LATEST, f"{final.name}\n".encode())
    for old in list_checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(run: Path) -> list[Path]:
    """All checkpoints of a run that look finished, oldest first."""
    return sorted(folder for folder in (run / FOLDER).glob("step-*") if (folder / atomic.COMPLETE).is_file())


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
    value: dict[str, Any] = json.loads((folder / STATE).read_bytes())
    if value.get("format") != "bony-checkpoint" or value.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"format version {value.get('format_version')}, this software reads {FORMAT_VERSION}",
            folder,
            "use the version of bony that wrote it",
        )
    return value


def load_network(folder: Path, name: str, network: nn.Module) -> None:
    """Fill one network from a checkpoint, strictly.

    Raises:
        CheckpointError: Names or shapes differ: the checkpoint is of another architecture.
    """
    path = folder / f"{name}.safetensors"
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"holds no {name}", folder) from error
    own = network.state_dict()
    for key in (*own, *tensors):
        ours, theirs = own.get(key), tensors.get(key)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            shapes = [tuple(t.shape) if t is not None else "missing" for t in (theirs, ours)]
            raise CheckpointError(
                f"tensor {key} is {shapes[0]} in the checkpoint and {shapes[1]} in the model",
                path,
                "the checkpoint is of another architecture: use the config it was trained with",
            )
    network.load_state_dict(tensors)


def load(
    folder: Path, networks: Mapping[str, nn.Module], state: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> Position:
    """Fill networks, method state and optimizer in place from a verified checkpoint.

    Returns:
        Where the run stood.

    Raises:
        DamageError: A file is damaged.
        CheckpointError: It is of another format version or architecture.
    """
    about = read_state(folder)
    for name, network in networks.items():
        load_network(folder, name, network)
    saved = load_file(folder / f"{METHOD_STATE}.safetensors")
    for name, tensor in state.items():
        if name not in saved or saved[name].shape != tensor.shape:
            raise CheckpointError(f"holds no fitting {name!r} of the method", folder)
        tensor.copy_(saved[name])
    by_number: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(folder / f"{OPTIMIZER}.safetensors").items():
        number, name = key.split(".", 1)
        by_number.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": by_number, "param_groups": optimizer.state_dict()["param_groups"]})
    return Position(int(about["step"]), int(about["samples_seen"]))
