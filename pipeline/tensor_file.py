"""A safetensors file laid out in host memory: filled by copies of tensors, written in one go.

The library's ``save`` holds Python's lock while it copies all: a training loop beside it stands still (0.26 s for
336 MB); its ``save_file`` leaves files that nobody but their owner may read. Here the file's bytes are the buffer that
tensors are copied into: writing needs no further copy and no lock, and the size is known before. The bytes are those of
the library.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

# The names that safetensors has for types, in the order in which its files keep tensors of them.
TYPES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_RANKS = {dtype: rank for rank, dtype in enumerate(TYPES)}

Layout = list[tuple[str, torch.dtype, torch.Size, bool]]


def _layout(tensors: Mapping[str, torch.Tensor]) -> Layout:
    """Name, type, shape and whether it is on a GPU, in the order of the file: wide types first, so all are aligned."""
    entries = [(name, tensor.dtype, tensor.shape, tensor.is_cuda) for name, tensor in tensors.items()]
    return sorted(entries, key=lambda entry: (_RANKS[entry[1]], entry[0]))


class TensorFile:
    """The bytes of a safetensors file that holds tensors like the given ones; ``fill`` puts values in.

    The memory is pinned where a tensor is on a GPU, so that ``fill`` need not wait for the copies.

    Args:
        tensors: Tensors, of ``TYPES``, whose names and shapes the file has; their values are not read.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._layout = _layout(tensors)
        header: dict[str, dict[str, Any]] = {}
        end = 0
        for name, dtype, shape, _ in self._layout:
            begin, end = end, end + shape.numel() * dtype.itemsize
            header[name] = {"dtype": TYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        start = len(text).to_bytes(8, "little") + text
        pinned = any(on_gpu for *_, on_gpu in self._layout)
        # Written to here, so that the kernel gives the memory now, which takes longer than to fill it.
        self._bytes = torch.empty(len(start) + end, dtype=torch.uint8, pin_memory=pinned).zero_()
        self._bytes[: len(start)] = torch.frombuffer(bytearray(start), dtype=torch.uint8)
        data = self._bytes[len(start) :]
        self._views = {
            name: data[slice(*header[name]["data_offsets"])].view(dtype).view(shape)
            for name, dtype, shape, _ in self._layout
        }

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self._bytes)

    def fits(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether the tensors have this file's names, types, shapes and kind of device."""
        return _layout(tensors) == self._layout

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy the values of tensors that fit in; from a GPU the copies are queued on its current stream only."""
        for name, view in self._views.items():
            view.copy_(tensors[name], non_blocking=self._bytes.is_pinned())

    def write(self, path: Path) -> None:
        """Write the file; Python's lock is free meanwhile."""
        path.write_bytes(self._bytes.numpy())
