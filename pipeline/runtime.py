"""Ranks and devices. One process needs nothing; under torchrun the process group comes from its environment."""

import ctypes
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from tiling.errors import BonyError

# A GPU's collectives wait a little longer than those between hosts, whose error says more.
_GPU_PATIENCE_SECONDS = 60
_TIMEOUT_SECONDS = 600
_PR_SET_PDEATHSIG = 1
_RANKS_LOST = re.compile(r"gloo|nccl|connection|timed out|timeout", re.IGNORECASE)


@dataclass(frozen=True)
class Runtime:
    """This process among all.

    Args:
        rank: Number of this process.
        world: Number of processes.
        device: Where it computes.
        control: Group of all ranks for what hosts tell each other without their GPUs; None for one rank.
    """

    rank: int
    world: int
    device: torch.device
    control: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and shows progress."""
        return self.rank == 0

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks; ``value`` itself is left alone."""
        if self.world == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total

    def largest(self, number: int) -> int:
        """The largest of all ranks' numbers; hosts wait for each other, devices do not."""
        if self.world == 1:
            return number
        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.control)
        return int(value)

    def barrier(self) -> None:
        """Wait for all ranks' hosts."""
        if self.world > 1:
            dist.barrier(group=self.control)

    def first_decides(self, decide: Callable[[], Any]) -> Any:
        """What ``decide`` gives on the first rank, a JSON value, on all ranks; an error there is raised on all.

        Raises:
            BonyError: What ``decide`` raised, on other ranks with the same text and exit code.
        """
        if self.world == 1:
            return decide()
        if not self.is_first:
            return self._told()
        try:
            value = decide()
        except BonyError as error:
            self._tell({"error": str(error), "exit_code": error.exit_code})
            raise
        self._tell({"value": value})
        return value

    def _tell(self, said: dict[str, Any]) -> None:
        data = torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)
        dist.broadcast(torch.tensor(len(data)), 0, group=self.control)
        dist.broadcast(data, 0, group=self.control)

    def _told(self) -> Any:
        length = torch.tensor(0)
        dist.broadcast(length, 0, group=self.control)
        data = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, 0, group=self.control)
        said = json.loads(data.numpy().tobytes())
        if "error" in said:
            error = BonyError(said["error"])
            error.exit_code = said["exit_code"]
            raise error
        return said["value"]


def die_with_parent() -> None:
    """Be killed when torchrun's agent dies, which would else leave its ranks running on their own."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise BonyError(f"prctl(PR_SET_PDEATHSIG) failed: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:  # it died a moment before
        raise BonyError("torchrun's agent has died")


@contextmanager
def joined(timeout: float = _TIMEOUT_SECONDS) -> Iterator[Runtime]:
    """Join torchrun's process group where there is one (NCCL on GPUs, gloo on CPUs), and leave it at the end.

    Args:
        timeout: Seconds that a rank waits for the others.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    die_with_parent()
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    control = None
    if world > 1:
        on_gpu = device.type == "cuda"
        patience = timedelta(seconds=timeout + _GPU_PATIENCE_SECONDS * on_gpu)
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=patience, device_id=device if on_gpu else None)
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        control = group if isinstance(group, dist.ProcessGroup) else None  # it is one: every rank is a member
    yield Runtime(rank, world, device, control)
    # Not on an error: leaving would wait for ranks that wait for this one; torchrun ends them.
    if world > 1:
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """Exit; at once after an error amid the others, since taking the process group down in order may wait for them."""
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def ranks_lost(error: RuntimeError) -> bool:
    """Whether an error of PyTorch means that other ranks did not answer."""
    return bool(_RANKS_LOST.search(str(error))) and not isinstance(error, torch.OutOfMemoryError)


def one_device() -> torch.device:
    """Where a command of one process computes: the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def half_precision(device: torch.device, precision: str) -> torch.dtype | None:
    """The type of a mixed-precision forward pass, None for full precision; ``auto`` is bf16 on a GPU."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else None
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)


def autocast(device: torch.device, half: torch.dtype | None) -> AbstractContextManager[object]:
    """Mixed precision for a forward pass."""
    return nullcontext() if half is None else torch.autocast(device.type, half)
