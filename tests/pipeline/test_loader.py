"""The loader: every tile once per epoch, whatever the ranks; a position is all it needs; damage is told, not served."""

import json
import shutil
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.loader import PREFETCH, Batch, Loader, Order
from tiling.errors import DamageError
from tiling.store import TileStore

CPU = torch.device("cpu")


class Numbered:
    """What the loader asks of a store: tiles that hold their own number."""

    tile_px = 2

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def read(self, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        out[...] = (rows % 256)[:, None, None, None]
        return out


def take(store: TileStore | Numbered, number: int, batch: int, rank: int, world: int, position: int = 0) -> list[Batch]:
    """The first batches of one rank."""
    loader = Loader(store, 11, batch, rank, world, position, CPU)
    try:
        return list(islice(loader, number))
    finally:
        loader.close()


@pytest.fixture(scope="module")
def tiles(store: Path) -> Iterator[TileStore]:
    with TileStore(store, threads=2) as opened:
        yield opened


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 40), batch=st.integers(1, 7), world=st.integers(1, 4), epochs=st.integers(1, 3))
def test_every_tile_once_per_epoch(count: int, batch: int, world: int, epochs: int) -> None:
    rounds = -(-count * epochs // (batch * world))
    ranks = [take(Numbered(count), rounds, batch, rank, world) for rank in range(world)]
    seen = [
        (int(e), int(i)) for one in zip(*ranks, strict=True) for b in one for e, i in zip(b.epochs, b.ids, strict=True)
    ]
    for epoch in range(epochs):
        part = seen[epoch * count : (epoch + 1) * count]
        assert {number for number, _ in part} == {epoch}
        assert sorted(sample for _, sample in part) == list(range(count))
    for b in (b for rank in ranks for b in rank):
        assert b.tiles.shape == (batch, 2, 2, 3)
        assert torch.equal(b.tiles[:, 0, 0, 0], torch.from_numpy(b.ids % 256).to(torch.uint8))


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 40), per_rank=st.integers(1, 4), factor=st.integers(1, 4), position=st.integers(0, 90))
def test_any_number_of_ranks_has_the_same_micro_batches(count: int, per_rank: int, factor: int, position: int) -> None:
    whole = take(Numbered(count), 3, per_rank * factor, 0, 1, position)
    ranks = [take(Numbered(count), 3, per_rank, rank, factor, position) for rank in range(factor)]
    for micro, expected in enumerate(whole):
        assert np.array_equal(np.concatenate([rank[micro].ids for rank in ranks]), expected.ids)
        assert np.array_equal(np.concatenate([rank[micro].epochs for rank in ranks]), expected.epochs)


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 40), batch=st.integers(1, 5), world=st.integers(1, 3), done=st.integers(0, 12))
def test_a_position_is_all_a_resume_needs(count: int, batch: int, world: int, done: int) -> None:
    rank = world - 1
    straight = take(Numbered(count), done + 3, batch, rank, world)
    resumed = take(Numbered(count), 3, batch, rank, world, position=done * batch * world)
    for one, other in zip(straight[done:], resumed, strict=True):
        assert np.array_equal(one.ids, other.ids)
        assert np.array_equal(one.epochs, other.epochs)


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    orders = [tuple(Order(seed, 50).at(epoch * 50, 50)[0]) for seed in (0, 1) for epoch in (0, 1)]
    assert len({*orders, tuple(range(50))}) == 5


def test_pixels_are_the_stores(tiles: TileStore) -> None:
    for batch in take(tiles, 3, 5, 1, 2):
        assert batch.tiles.dtype == torch.uint8
        assert np.array_equal(batch.tiles.numpy(), tiles.read(batch.ids))
        assert batch.tiles.float().std() > 1


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(store: Path, tmp_path: Path) -> tuple[Path, str]:
    """A copy of the store with one bit flipped in the last tile of its second slide; and how errors call that tile."""
    copy = shutil.copytree(store, tmp_path / "store")
    with TileStore(copy) as opened:
        slide, row = opened.slide_ids[1], int(opened.index["row"].to_numpy()[opened.slide_of_row == 1].max())
    shard = copy / "slides" / slide / "tiles.zarr/c/0/0/0/0"
    data = bytearray(shard.read_bytes())
    items = json.loads((copy / "slides" / slide / "tiles.zarr/zarr.json").read_text())["chunk_grid"]
    count = items["configuration"]["chunk_shape"][0]
    offset, size = np.frombuffer(data[-16 * count - 4 : -4], "<u8").reshape(count, 2)[row]
    data[offset + size // 2] ^= 1
    shard.write_bytes(data)
    return copy, f"slide {slide}, tile {row}"


@pytest.mark.parametrize("threads", [1, 2])
def test_damage_is_raised_where_training_runs_and_names_slide_and_tile(damaged: tuple[Path, str], threads: int) -> None:
    path, named = damaged
    with TileStore(path, threads) as opened:
        bad = int(np.flatnonzero(opened.slide_of_row == 1).max())
        count = len(opened.slide_of_row)
        seed = next(seed for seed in range(99) if bad not in Order(seed, count).at(0, 8)[0])
        loader = Loader(opened, seed, 4, 0, 1, 0, CPU)
        served = []
        with pytest.raises(DamageError, match=named):  # noqa: PT012
            for batch in islice(loader, 20):
                served.append(batch.ids)
                assert bad not in batch.ids
        loader.close()
    expected = np.concatenate([Order(seed, count).at(4 * n, 4)[0] for n in range(len(served))])
    assert np.array_equal(np.concatenate(served), expected)  # all that came before it was served


# ---- closing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", [0, 1, 2 * PREFETCH])
def test_closes_at_once_whether_full_or_empty(tiles: TileStore, taken: int) -> None:
    loader = Loader(tiles, 0, 4, 0, 1, 0, CPU)
    assert len(list(islice(loader, taken))) == taken
    time.sleep(0.2)  # until it waits for room
    start = time.monotonic()
    loader.close()
    loader.close()
    assert time.monotonic() - start < 2
    assert not loader._thread.is_alive()


def test_reads_ahead_a_few_batches_and_no_more() -> None:
    reads = []

    class Counted(Numbered):
        def read(self, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
            reads.append(len(rows))
            return out

    loader = Loader(Counted(10), 0, 4, 0, 1, 0, CPU)
    time.sleep(0.3)
    loader.close()
    assert reads == [4] * (PREFETCH + 1)


def test_a_lost_shard_is_damage_too(damaged: tuple[Path, str]) -> None:
    path, _ = damaged
    with TileStore(path) as opened:
        for shard in path.rglob("tiles.zarr/c/*/0/0/0"):
            shard.unlink()
        loader = Loader(opened, 11, 4, 0, 1, 0, CPU)
        with pytest.raises(DamageError, match=r"slide \w+, tile \d+.*missing"):
            next(iter(loader))
        loader.close()
