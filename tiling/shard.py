"""Sharded Zarr v3 arrays of equal items, written and read directly.

A shard is its chunks' bytes, then a full-length index of (offset, nbytes) as little-endian u64, then the index's
crc32c (Zarr sharding codec v1.0, index at the end). A chunk is one item; an absent one is 2^64 - 1 twice. Each chunk
ends with its own crc32c. Plain zarr reads the arrays; writing through it would cost more than the encoding.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import numpy as np

from tiling import codec as tile_codec
from tiling.errors import DamageError

MAX_SHARD_ITEMS = 1024
_ABSENT = np.uint64(2**64 - 1)
_CRC_BYTES = 4


def _crc32c(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(_CRC_BYTES, "little")


def _shard_name(number: int, item_dims: int) -> str:
    return "/".join(["c", str(number), *["0"] * item_dims])


def array_metadata(count: int, item_shape: tuple[int, ...], codec: str, per_shard: int) -> dict[str, object]:
    """zarr.json of an array of ``count`` uint8 items of ``item_shape``, ``per_shard`` of them in a shard."""
    sharding = {
        "chunk_shape": [1, *item_shape],
        "codecs": tile_codec.zarr_codecs(codec),
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [count, *item_shape],
        "data_type": "uint8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [per_shard, *item_shape]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {},
    }


class ArrayWriter:
    """Writes an array of already encoded items, one after the other, shard by shard.

    Args:
        folder: Made here; part of a box that the caller seals.
        most: Number of items expected; a shard holds as many, up to MAX_SHARD_ITEMS. More go to further shards.
        item_shape: Shape of one decoded item.
        codec: Name of the item codec (``tiling.codec.CODECS``).
    """

    def __init__(self, folder: Path, most: int, item_shape: tuple[int, ...], codec: str) -> None:
        folder.mkdir(parents=True)
        self.folder, self.item_shape, self.codec = folder, item_shape, codec
        self.count = 0
        self._per_shard = min(MAX_SHARD_ITEMS, max(most, 1))
        self._file: BinaryIO | None = None
        self._index = np.full((self._per_shard, 2), _ABSENT, "<u8")
        self._offset = 0

    def append(self, data: bytes) -> None:
        """Add one encoded item."""
        if self._file is None:
            path = self.folder / _shard_name(self.count // self._per_shard, len(self.item_shape))
            path.parent.mkdir(parents=True)
            self._file = path.open("wb")
        self._file.write(data)
        self._file.write(_crc32c(data))
        self._index[self.count % self._per_shard] = self._offset, len(data) + _CRC_BYTES
        self._offset += len(data) + _CRC_BYTES
        self.count += 1
        if self.count % self._per_shard == 0:
            self._end_shard()

    def _end_shard(self) -> None:
        if self._file is not None:
            self._file.write(self._index.tobytes())
            self._file.write(_crc32c(self._index.tobytes()))
            self._file.close()
        self._file, self._offset = None, 0
        self._index[:] = _ABSENT

    def release(self) -> None:
        """Close the open shard as it is: for a slide that is given up."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def close(self) -> None:
        """Finish the last shard and write the metadata."""
        self._end_shard()
        metadata = array_metadata(self.count, self.item_shape, self.codec, self._per_shard)
        (self.folder / "zarr.json").write_text(json.dumps(metadata, indent=1))


class ShardedArray:
    """Reader of one array: ``pread`` of single items, every checksum checked. Safe to use from many threads.

    Args:
        folder: The array's folder.
        codec: Name of the item codec.

    Raises:
        DamageError: The metadata is missing, or is not what ``ArrayWriter`` writes for its shape and codec.
    """

    def __init__(self, folder: Path, codec: str) -> None:
        self.folder, self.codec = folder, codec
        try:
            metadata = json.loads((folder / "zarr.json").read_bytes())
            self.shape: tuple[int, ...] = tuple(metadata["shape"])
            self._per_shard = int(metadata["chunk_grid"]["configuration"]["chunk_shape"][0])
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise DamageError(f"array metadata cannot be read ({error})", folder) from error
        if metadata != array_metadata(self.shape[0], self.shape[1:], codec, self._per_shard):
            raise DamageError(f"array metadata is not that of a {codec} store", folder)
        self._indexes: dict[int, np.ndarray] = {}

    def _index(self, shard: int, descriptor: int) -> np.ndarray:
        """Offsets and sizes of a shard's items, (items, 2), checked and remembered."""
        known = self._indexes.get(shard)
        if known is None:
            length = self._per_shard * 16 + _CRC_BYTES
            start = os.fstat(descriptor).st_size - length
            data = os.pread(descriptor, length, start) if start >= 0 else b""
            if len(data) != length or _crc32c(data[:-_CRC_BYTES]) != data[-_CRC_BYTES:]:
                raise DamageError("shard index does not match its crc32c")
            known = self._indexes[shard] = np.frombuffer(data[:-_CRC_BYTES], "<u8").reshape(-1, 2)
        return known

    def read_raw(self, row: int, opener: Callable[[Path], int]) -> bytes:
        """Encoded bytes of one item, checked. ``opener`` gives a file descriptor for a shard's path.

        Raises:
            DamageError: The shard is missing or cut, the item is absent, or a checksum differs.
        """
        shard, slot = divmod(row, self._per_shard)
        path = self.folder / _shard_name(shard, len(self.shape) - 1)
        try:
            descriptor = opener(path)
            offset, length = self._index(shard, descriptor)[slot]
            if offset == _ABSENT:
                raise DamageError("is absent from its shard")
            data = os.pread(descriptor, int(length), int(offset))
        except FileNotFoundError as error:
            raise DamageError("its shard is missing", path) from error
        if len(data) != length or _crc32c(data[:-_CRC_BYTES]) != data[-_CRC_BYTES:]:
            raise DamageError("bytes do not match their crc32c", path)
        return data[:-_CRC_BYTES]

    def read(self, row: int, opener: Callable[[Path], int]) -> np.ndarray:
        """One decoded item, uint8, of shape ``self.shape[1:]``."""
        return tile_codec.decode(self.read_raw(row, opener), self.codec, self.shape[1:])
