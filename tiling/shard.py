"""Sharded Zarr v3 arrays of equal items, written and read directly.

A shard is its chunks' bytes, then a full-length index of (offset, nbytes) as little-endian u64, then the index's
crc32c (Zarr sharding codec v1.0, index at the end). A chunk is one item; an absent one is 2^64 - 1 twice. Each chunk
ends with its own crc32c. Plain zarr reads the arrays; writing through it would cost more than the encoding.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import numpy as np

from tiling import codec as tile_codec
from tiling.byte_ranges import ByteRanges, Place
from tiling.errors import DamageError

MAX_SHARD_ITEMS = 1024
_ABSENT = 2**64 - 1
_CRC_BYTES = 4
_BUFFER_BYTES = 1 << 20
# The crc32c of any bytes that their own crc32c follows: so they are checked as they lie, without a copy.
_CRC_WITH_ITSELF = 0x48674BC7
# Neighbours are read in one go, up to as many bytes; on a shared file system each request has its price.
_MOST_AT_ONCE = 1 << 20


def _crc32c(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(_CRC_BYTES, "little")


def _sound(data: np.ndarray, length: int) -> bool:
    """Whether these are ``length`` bytes that end with the crc32c of those before."""
    return len(data) == length and google_crc32c.value(data) == _CRC_WITH_ITSELF


def _as_array(data: bytes) -> np.ndarray:
    """Slices of it are no copies."""
    return np.frombuffer(data, np.uint8)


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
            self._file = path.open("wb", buffering=_BUFFER_BYTES)
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
    """Reader of one array: every checksum is checked, what is absent is an error. Safe to use from many threads.

    Args:
        folder: The array's folder.
        codec: Name of the item codec.

    Raises:
        DamageError: The metadata is missing, or is not what ``ArrayWriter`` writes for its shape and codec.
    """

    def __init__(self, folder: Place, codec: str) -> None:
        self.folder, self.codec = folder, codec
        try:
            metadata = json.loads((folder / "zarr.json").read_bytes())
            self.shape: tuple[int, ...] = tuple(metadata["shape"])
            self._per_shard = int(metadata["chunk_grid"]["configuration"]["chunk_shape"][0])
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise DamageError(f"array metadata cannot be read ({error})", str(folder)) from error
        if metadata != array_metadata(self.shape[0], self.shape[1:], codec, self._per_shard):
            raise DamageError(f"array metadata is not that of a {codec} store", str(folder))
        self._shards: dict[int, tuple[str, np.ndarray]] = {}

    def _shard(self, number: int, files: ByteRanges) -> tuple[str, np.ndarray]:
        """A shard's path, and its items' offsets and sizes, (items, 2), checked and remembered."""
        known = self._shards.get(number)
        if known is None:
            path = str(self.folder / _shard_name(number, len(self.shape) - 1))
            length = self._per_shard * 16 + _CRC_BYTES
            data = _as_array(files.tail(path, length))
            if not _sound(data, length):
                raise DamageError(f"{path}: shard index does not match its crc32c")
            known = path, data[:-_CRC_BYTES].view("<u8").reshape(-1, 2)
            self._shards[number] = known
        return known

    def _run(self, rows: Sequence[int], files: ByteRanges) -> tuple[str, int, list[int]]:
        """Where the first rows lie that one read can fetch: path, offset, and the size of each."""
        number, slot = divmod(rows[0], self._per_shard)
        path, index = self._shard(number, files)
        start, size = index[slot].tolist()
        if start == _ABSENT:
            raise DamageError(f"{path}: is absent from its shard")
        end, sizes = start + size, [size]
        for row in rows[1:]:
            if row >= (number + 1) * self._per_shard:
                break
            offset, size = index[row - number * self._per_shard].tolist()
            if offset != end or end + size - start > _MOST_AT_ONCE:
                break
            end += size
            sizes.append(size)
        return path, start, sizes

    def read(self, rows: Sequence[int], out: Sequence[np.ndarray], files: ByteRanges) -> None:
        """Decode some items.

        Args:
            rows: Their numbers, ascending.
            out: Where each of them goes: uint8, contiguous, of shape ``self.shape[1:]``.
            files: Reads the bytes.

        Raises:
            DamageError: A shard is missing or cut, an item is absent, or a checksum differs; it names the first tile.
        """
        done, row = 0, -1
        try:
            while done < len(rows):
                row = rows[done]
                path, start, sizes = self._run(rows[done : done + MAX_SHARD_ITEMS], files)
                data = _as_array(files.read(path, start, sum(sizes)))
                end = 0
                for size in sizes:
                    row, begin, end = rows[done], end, end + size
                    item = data[begin:end]
                    if not _sound(item, size):
                        raise DamageError(f"{path}: bytes do not match their crc32c")
                    tile_codec.decode_into(item[:-_CRC_BYTES], self.codec, out[done])
                    done += 1
        except DamageError as error:
            raise DamageError(error.what, f"tile {row}") from error
        except FileNotFoundError as error:
            raise DamageError(f"its shard is missing in {self.folder}", f"tile {row}") from error
        except (OSError, OverflowError, MemoryError) as error:  # sizes of a forged index have no limit
            raise DamageError(f"cannot be read in {self.folder} ({error})", f"tile {row}") from error
