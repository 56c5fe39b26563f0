"""Ranks, devices and seeds. One process needs nothing; under torchrun the process group comes from its environment."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Runtime:
    """This process among all.

    Args:
        rank: Number of this process.
        world: Number of processes.
        device: Where it computes.
    """

    rank: int
    world: int
    device: torch.device

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

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def joined() -> Iterator[Runtime]:
    """Join torchrun's process group where there is one (NCCL on GPUs, gloo on CPUs), and leave it at the end."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        bound = device if device.type == "cuda" else None
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT, device_id=bound)
    yield Runtime(rank, world, device)
    # Not on an error: leaving would wait for ranks that wait for this one; torchrun ends them.
    if world > 1:
        dist.destroy_process_group()


def one_device() -> torch.device:
    """Where a command of one process computes: the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Mixed precision for a forward pass: ``auto`` is bf16 on a GPU and fp32 on a CPU."""
    if precision == "bf16" or (precision == "auto" and device.type == "cuda"):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()
