"""Checkpoints: tensors as safetensors, JSON beside them, COMPLETE with every sha256 last; verified before use.

A checkpoint holds no random state: what is random is a function of seed, step and sample (DESIGN.md, rule 3).
"""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from pipeline.boxes import CHECKPOINT
from pipeline.tensor_file import TensorFile
from tiling import atomic
from tiling.errors import CheckpointError
from tiling.progress import say

FOLDER, LATEST, STATE, WORK = "checkpoints", "latest", CHECKPOINT.file, "work"
OPTIMIZER, METHOD_STATE, SUFFIX = "optimizer", "method", ".safetensors"
_NAME = re.compile(r"step-(\d{8,})")


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
    file = TensorFile(tensors)
    file.fill(tensors)
    file.write(path)


def tensors_by_file(
    networks: Mapping[str, nn.Module], state: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Mapping[str, torch.Tensor]]:
    """The live tensors that a checkpoint holds, by the name of their file; the optimizer's as ``<number>.<name>``."""
    moments = optimizer.state_dict()["state"]
    return {
        **{f"{name}{SUFFIX}": network.state_dict() for name, network in networks.items()},
        f"{METHOD_STATE}{SUFFIX}": state,
        f"{OPTIMIZER}{SUFFIX}": {
            f"{number}.{name}": value for number, values in moments.items() for name, value in values.items()
        },
    }


def write(
    run: Path, position: Position, files: Mapping[str, TensorFile], about: Mapping[str, Any], keep: int, keep_every: int
) -> Path:
    """Write one checkpoint, make it the latest, and remove older ones that need not be kept.

    Args:
        run: The RUN folder.
        position: Where the run stands.
        files: The tensors, by the name of their file.
        about: JSON values that say what it is: config, store, mpp, software.
        keep: How many of the newest stay.
        keep_every: Those whose step is a multiple of this stay too; 0: none.

    Returns:
        The checkpoint's folder. A sound one that stands there already is left as it is.

    Raises:
        CheckpointError: It cannot be written, such as on a full disk; what stood before is as it was.
    """
    final, latest = step_folder(run, position.step), run / FOLDER / LATEST
    try:
        with _workplace(run) as work:
            # Written first, so that a full disk ends this before anything has its name.
            atomic.write_bytes(work / LATEST, f"{final.name}\n".encode())
            if not atomic.stands(final, work):  # a damaged one was passed over when the run was continued
                with atomic.building(final, work) as folder:
                    for name, file in files.items():
                        file.write(folder / name)
                    values = {"step": position.step, "samples_seen": position.samples_seen, **about}
                    atomic.write_json(folder / STATE, CHECKPOINT.describe(values))
            (work / LATEST).replace(latest)
            atomic.fsync_folder(latest.parent)
            _prune(run, work, position.step, keep, keep_every)
    except OSError as error:
        needed, free = sum(file.nbytes for file in files.values()), shutil.disk_usage(run).free
        raise CheckpointError(
            f"the checkpoint cannot be written ({error}): it needs {needed:,} bytes, {free:,} are free",
            final,
            "earlier checkpoints are as they were; make space, then continue the run",
        ) from error
    return final


@contextmanager
def _workplace(run: Path) -> Iterator[Path]:
    """A folder for what is unfinished: empty at first, whatever a killed saver left, and gone in the end."""
    work = run / FOLDER / WORK
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True, exist_ok=True)
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def superfluous(steps: Sequence[int], keep: int, keep_every: int) -> list[int]:
    """Those of ascending steps that are neither among the last ``keep`` nor multiples of ``keep_every`` (0: none is).

    >>> superfluous([10, 20, 30, 40, 50], keep=2, keep_every=20)
    [10, 30]
    """
    return [step for step in steps[:-keep] if not keep_every or step % keep_every]


def _prune(run: Path, work: Path, newest: int, keep: int, keep_every: int) -> None:
    """Move what need not be kept away at once, so that a kill leaves no half-removed checkpoint under its name."""
    # Newer ones are damaged, or this run would have been continued from them: they must not push sound ones out.
    steps = [step for step in map(step_of, list_checkpoints(run)) if step <= newest]
    for step in superfluous(steps, keep, keep_every):
        atomic.set_aside(step_folder(run, step), work)


def step_of(folder: Path) -> int:
    """Step of a checkpoint's folder, from its name.

    >>> step_of(Path("run/checkpoints/step-00001234"))
    1234
    """
    return int(folder.name.removeprefix("step-"))


def list_checkpoints(run: Path) -> list[Path]:
    """All checkpoints of a run, sound or not, oldest first."""
    folders = [path for path in (run / FOLDER).glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(folders, key=step_of)


def newest_sound(run: Path) -> Path | None:
    """The newest checkpoint whose every file matches its checksum; damaged ones are named and passed over.

    So is a ``latest`` that names a checkpoint which is not there: it is for readers, what stands decides.

    Returns:
        Its folder, or None when the run has no checkpoint at all.

    Raises:
        CheckpointError: There are checkpoints, but not one is sound; or there are none, and ``latest`` names one.
    """
    candidates, latest = list_checkpoints(run), run / FOLDER / LATEST
    named = latest.read_bytes() if latest.exists() else None
    if named is not None and named not in {f"{folder.name}\n".encode() for folder in candidates}:
        say(f"{latest}: names {named[:32]!r}, and no such checkpoint is there")
    for folder in reversed(candidates):
        found = atomic.damaged_files(folder)
        if not found:
            return folder
        say(f"damaged checkpoint passed over: {found[0]}")
    if candidates:
        what = f"none of {len(candidates)} checkpoints is sound"
    elif named is not None:
        what = "all checkpoints are gone"
    else:
        return None
    raise CheckpointError(what, run, "start a new run in another --out folder")


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
    path = folder / f"{name}{SUFFIX}"
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
    path = folder / f"{OPTIMIZER}{SUFFIX}"
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
    path = folder / f"{METHOD_STATE}{SUFFIX}"
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
