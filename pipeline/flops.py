"""How much of the device a run uses: the method's arithmetic per tile, and what the device could do.

The model FLOPs utilisation of Chowdhery et al. 2022 ("PaLM", appendix B): what the method asks for, not what is done
beyond that, such as activations that are computed a second time.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pipeline.config import PretrainConfig
from pipeline.data.haar import input_side
from pipeline.methods import build_method
from pipeline.methods.protocol import MicroBatch, Moment
from pipeline.runtime import Runtime, half_precision
from tiling.store import TileStore

_TILES = 2  # with one alone, a loss that contrasts tiles has nothing to do
_MEASURED_SECONDS, _MEASURED_TIMES = 0.3, 5  # the first product sets things up, and may take a hundred times as long
_MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Floating-point operations, 2 per multiply and add, of what runs with and without gradient."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.with_gradient = self.without = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula: Callable[..., int] | None = flop_registry.get(func._overloadpacket)
        if formula is not None:
            flops: int = formula(*args, **(kwargs or {}), out_val=out)
            if torch.is_grad_enabled():
                self.with_gradient += flops
            else:
                self.without += flops
        return out


def flops_per_sample(config: PretrainConfig, store: TileStore) -> float:
    """Floating-point operations that one tile costs a method, counted on PyTorch's meta device, without computing any.

    What runs without gradient counts once, what runs with it three times: its backward pass takes a product for the
    inputs and one for the weights. (Counting the backward pass itself would be wrong: PyTorch's formula overrates that
    of depth-wise convolutions.)

    Args:
        config: The run.
        store: What it trains on.

    Raises:
        RuntimeError: The method does something that the meta device cannot.
    """
    meta = torch.device("meta")
    plain = replace(config, train=replace(config.train, recompute=False))
    with meta, Counter() as counter:
        method = build_method(plain, Runtime(0, 1, meta), store)
        for network in method.networks().values():
            network.eval()  # BatchNorm would ask the other ranks
        sides = [input_side(spec.size, config.views.input) for spec in method.views]
        views = [torch.empty(_TILES, 3, side, side) for side in sides]
        rows = np.arange(_TILES)
        method.loss(method.student, MicroBatch(views, rows, np.zeros_like(rows)), Moment(0, config.train.steps, 0.0))
    total: float = counter.without + 3 * counter.with_gradient
    return total / _TILES


@dataclass(frozen=True)
class Peak:
    """What a device could do.

    Args:
        flops: Floating-point operations per second.
        measured: By a matrix product, not from the maker's data sheet.
        of: What it is the peak of, for the reader.
    """

    flops: float
    measured: bool
    of: str


@dataclass(frozen=True)
class _Sheet:
    """Dense peaks of a GPU in TFLOP/s, None where it has no units for that."""

    fp16: float
    bf16: float | None
    tf32: float | None
    fp32: float


# NVIDIA's data sheets of each GPU, SXM where nothing else is said. Where they give figures with sparsity: half of them.
_SHEETS = {
    "V100-PCIE": _Sheet(112, None, None, 14), "V100": _Sheet(125, None, None, 15.7),
    "A100": _Sheet(312, 312, 156, 19.5),
    "L40S": _Sheet(362, 362, 183, 91.6),
    "H100 PCIe": _Sheet(756, 756, 378, 51), "H100 NVL": _Sheet(835, 835, 417, 60), "H100": _Sheet(989, 989, 494, 67),
    "GH200": _Sheet(989, 989, 494, 67),
    "H200 NVL": _Sheet(835, 835, 417, 60), "H200": _Sheet(989, 989, 494, 67),
    "GB200": _Sheet(2500, 2500, 1250, 80), "B200": _Sheet(2250, 2250, 1100, 75),
}  # fmt: skip


def known_peak(gpu: str, kind: str) -> float | None:
    """Peak of a GPU by name from NVIDIA's data sheets, FLOP/s; None where it is not known.

    Args:
        gpu: Its name as CUDA gives it; of a slice of one (MIG) nothing is known.
        kind: fp16, bf16, tf32 or fp32.

    >>> known_peak("NVIDIA H100 80GB HBM3", "bf16"), known_peak("NVIDIA A100-SXM4-40GB", "fp32")
    (989000000000000.0, 19500000000000.0)
    """
    name = next((name for name in _SHEETS if re.search(rf"\b{name}\b", gpu)), None)  # the longer names stand first
    value = getattr(_SHEETS[name], kind) if name is not None and "MIG" not in gpu else None
    return None if value is None else value * 1e12


def peak(device: torch.device, precision: str) -> Peak:
    """What a device could do in a run's precision: by its data sheet where it is known, else by a matrix product.

    Args:
        device: Where the run computes.
        precision: As in the config: auto, fp32, bf16, fp16.
    """
    half = half_precision(device, precision)
    kind = {torch.float16: "fp16", torch.bfloat16: "bf16", None: "fp32"}[half]
    if device.type != "cuda":
        return Peak(measured_flops(device, half or torch.float32), True, f"{device.type}, {kind}")
    if half is None and torch.get_float32_matmul_precision() != "highest":
        kind = "tf32"
    gpu = torch.cuda.get_device_name(device)
    known = known_peak(gpu, kind)
    flops = measured_flops(device, half or torch.float32) if known is None else known
    return Peak(flops, known is None, f"{gpu}, {kind}")


@torch.no_grad()
def measured_flops(device: torch.device, kind: torch.dtype) -> float:
    """What the fastest of some matrix products reaches, FLOP/s."""
    side = _MATMUL_SIDE[device.type]
    matrix = torch.ones(side, side, dtype=kind, device=device)
    took, end = list[float](), time.perf_counter() + _MEASURED_SECONDS
    while len(took) < _MEASURED_TIMES or time.perf_counter() < end:
        start = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # waits for the device
        took.append(time.perf_counter() - start)
    return 2 * side**3 / min(took)
