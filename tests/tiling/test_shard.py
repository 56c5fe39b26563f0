import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from tiling import codec
from tiling.byte_ranges import LocalRanges
from tiling.errors import DamageError
from tiling.shard import MAX_SHARD_ITEMS, ArrayWriter, ShardedArray


def write(folder: Path, items: np.ndarray, most: int, name: str = "zstd") -> None:
    writer = ArrayWriter(folder, most, items.shape[1:], name)
    for item in items:
        writer.append(codec.encode(item, name, None))
    writer.close()


def read_all(folder: Path, name: str = "zstd") -> np.ndarray:
    array, files = ShardedArray(folder, name), LocalRanges()
    out = np.empty(array.shape, np.uint8)
    array.read(range(array.shape[0]), list(out), files)
    files.close()
    return out


def shards(folder: Path) -> int:
    return sum(1 for path in (folder / "c").rglob("*") if path.is_file()) if (folder / "c").exists() else 0


@settings(max_examples=40)
@given(
    count=st.integers(0, 30),
    most=st.integers(0, 30),
    shape=st.sampled_from([(1, 1), (3, 5), (4, 4, 3)]),
    seed=st.integers(0, 9),
)
def test_roundtrip(count: int, most: int, shape: tuple[int, ...], seed: int) -> None:
    items = np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        array = Path(folder) / "items.zarr"
        write(array, items, most)
        assert shards(array) == -(-count // max(most, 1))
        assert (read_all(array) == items).all()
        plain = zarr.open_array(array, mode="r")
        assert plain.shape == items.shape
        assert (plain[:] == items).all()


@pytest.mark.parametrize("count", [0, 1, 6, 7, 12, 13])
def test_counts_around_a_full_shard(count: int, tmp_path: Path) -> None:
    items = np.arange(count * 12, dtype=np.uint8).reshape(count, 2, 2, 3)
    write(tmp_path / "items.zarr", items, 6)
    assert shards(tmp_path / "items.zarr") == -(-count // 6)
    assert (read_all(tmp_path / "items.zarr") == items).all()
    assert (zarr.open_array(tmp_path / "items.zarr", mode="r")[:] == items).all()


@pytest.mark.parametrize("count", [MAX_SHARD_ITEMS, MAX_SHARD_ITEMS + 1, 2 * MAX_SHARD_ITEMS + 5])
def test_more_items_than_a_shard_holds(count: int, tmp_path: Path) -> None:
    items = np.random.default_rng(0).integers(0, 256, (count, 2, 2), np.uint8)
    write(tmp_path / "items.zarr", items, count)
    assert shards(tmp_path / "items.zarr") == -(-count // MAX_SHARD_ITEMS)
    assert (read_all(tmp_path / "items.zarr") == items).all()
    assert (zarr.open_array(tmp_path / "items.zarr", mode="r")[:] == items).all()


def test_metadata_of_another_codec(tmp_path: Path) -> None:
    write(tmp_path / "items.zarr", np.zeros((2, 8, 8, 3), np.uint8), 2)
    with pytest.raises(DamageError, match="array metadata is not that of a jpeg store"):
        ShardedArray(tmp_path / "items.zarr", "jpeg")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"shape": [], "chunk_grid": 3}', '{"shape": 5}'])
def test_metadata_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    write(tmp_path / "items.zarr", np.zeros((2, 8, 8, 3), np.uint8), 2)
    (tmp_path / "items.zarr" / "zarr.json").write_text(text)
    with pytest.raises(DamageError, match=r"items\.zarr: array metadata cannot be read"):
        ShardedArray(tmp_path / "items.zarr", "zstd")
    (tmp_path / "items.zarr" / "zarr.json").unlink()
    with pytest.raises(DamageError, match=r"items\.zarr: array metadata cannot be read"):
        ShardedArray(tmp_path / "items.zarr", "zstd")


def test_every_bit_of_a_small_shard_counts(tmp_path: Path) -> None:
    items = np.random.default_rng(1).integers(0, 256, (2, 2, 2), np.uint8)
    write(tmp_path / "items.zarr", items, 3)
    path = tmp_path / "items.zarr" / "c" / "0" / "0" / "0"
    sound = path.read_bytes()
    for bit in range(8 * len(sound)):
        data = bytearray(sound)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(DamageError):
            read_all(tmp_path / "items.zarr")


def test_an_item_that_was_never_written(tmp_path: Path) -> None:
    """Zarr would fill it with zeros."""
    write(tmp_path / "items.zarr", np.ones((2, 4, 4), np.uint8), 3)
    metadata = json.loads((tmp_path / "items.zarr" / "zarr.json").read_text())
    metadata["shape"][0] = 3
    (tmp_path / "items.zarr" / "zarr.json").write_text(json.dumps(metadata))
    assert not zarr.open_array(tmp_path / "items.zarr", mode="r")[2].any()
    with pytest.raises(DamageError, match="is absent from its shard"):
        read_all(tmp_path / "items.zarr")
