"""The loader: every tile once per epoch, whatever the ranks; a position is all it needs; it closes at any time."""

import threading
import time
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.loader import PREFETCH, Batch, Loader
from pipeline.data.order import Order, shard_starts
from tiling.store import TileStore

CPU = torch.device("cpu")
SHUFFLES = st.sampled_from(("global", "shards"))


class Numbered:
    """What the loader asks of a store: tiles that hold their own number; some seconds for every reading."""

    tile_px = 2

    def __init__(self, count: int, seconds: float = 0.0) -> None:
        self.count, self.seconds = count, seconds
        self.slide_of_row = np.arange(count) // 3

    def __len__(self) -> int:
        return self.count

    def read(self, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        time.sleep(self.seconds)
        out[...] = (rows % 256)[:, None, None, None]
        return out


def take(
    store: TileStore | Numbered,
    number: int,
    batch: int,
    rank: int,
    world: int,
    position: int = 0,
    shuffle: str = "global",
) -> list[Batch]:
    """The first batches of one rank."""
    loader = Loader(store, 11, batch, rank, world, position, CPU, shuffle)
    try:
        return list(islice(loader, number))
    finally:
        loader.close()


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 40),
    batch=st.integers(1, 7),
    world=st.integers(1, 4),
    epochs=st.integers(1, 3),
    shuffle=SHUFFLES,
)
def test_every_tile_once_per_epoch(count: int, batch: int, world: int, epochs: int, shuffle: str) -> None:
    rounds = -(-count * epochs // (batch * world))
    ranks = [take(Numbered(count), rounds, batch, rank, world, 0, shuffle) for rank in range(world)]
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
@given(
    count=st.integers(1, 40),
    per_rank=st.integers(1, 4),
    factor=st.integers(1, 4),
    position=st.integers(0, 90),
    shuffle=SHUFFLES,
)
def test_any_number_of_ranks_has_the_same_micro_batches(
    count: int, per_rank: int, factor: int, position: int, shuffle: str
) -> None:
    whole = take(Numbered(count), 3, per_rank * factor, 0, 1, position, shuffle)
    ranks = [take(Numbered(count), 3, per_rank, rank, factor, position, shuffle) for rank in range(factor)]
    for micro, expected in enumerate(whole):
        assert np.array_equal(np.concatenate([rank[micro].ids for rank in ranks]), expected.ids)
        assert np.array_equal(np.concatenate([rank[micro].epochs for rank in ranks]), expected.epochs)


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 40),
    batch=st.integers(1, 5),
    world=st.integers(1, 3),
    done=st.integers(0, 12),
    shuffle=SHUFFLES,
)
def test_a_position_is_all_a_resume_needs(count: int, batch: int, world: int, done: int, shuffle: str) -> None:
    rank = world - 1
    straight = take(Numbered(count), done + 3, batch, rank, world, 0, shuffle)
    resumed = take(Numbered(count), 3, batch, rank, world, done * batch * world, shuffle)
    for one, other in zip(straight[done:], resumed, strict=True):
        assert np.array_equal(one.ids, other.ids)
        assert np.array_equal(one.epochs, other.epochs)


@pytest.mark.parametrize("shuffle", ["global", "shards"])
def test_pixels_are_the_stores(tiles: TileStore, shuffle: str) -> None:
    starts = shard_starts(tiles.slide_of_row) if shuffle == "shards" else None
    order = Order(11, len(tiles), starts)
    for number, batch in enumerate(take(tiles, 3, 5, 1, 2, 0, shuffle)):
        assert np.array_equal(batch.ids, order.at(10 * number + 5, 5)[0])
        assert batch.tiles.dtype == torch.uint8
        assert np.array_equal(batch.tiles.numpy(), tiles.read(batch.ids))
        assert batch.tiles.float().std() > 1


# ---- waiting, failing, closing ---------------------------------------------------------------------------------------


def test_what_is_waited_for_is_measured() -> None:
    loader = Loader(Numbered(10, seconds=0.05), 0, 4, 0, 1, 0, CPU)
    start = time.monotonic()
    list(islice(loader, 6))
    assert 0.25 < loader.waited_s <= time.monotonic() - start
    waited = loader.waited_s
    for _ in range(3):
        time.sleep(0.3)  # as a training step: the next batch is there before
        next(loader)
    assert loader.waited_s - waited < 0.15
    loader.close()


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
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


def test_who_waits_for_a_batch_while_it_is_closed_waits_no_longer() -> None:
    for _ in range(20):  # who of the threads comes first is chance
        loader = Loader(Numbered(10, seconds=0.02), 0, 4, 0, 1, 0, CPU)
        failures: list[BaseException] = []

        def consume(loader: Loader = loader, failures: list[BaseException] = failures) -> None:
            try:
                list(loader)
            except RuntimeError as error:
                failures.append(error)

        consumer = threading.Thread(target=consume, daemon=True)
        consumer.start()
        time.sleep(0.01)
        loader.close()
        consumer.join(5)
        assert [str(failure) for failure in failures] == ["the loader is closed"]


def test_reads_ahead_a_few_batches_and_no_more() -> None:
    reads = []

    class Counted(Numbered):
        def read(self, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
            reads.append(len(rows))
            return out

    loader = Loader(Counted(10), 0, 4, 0, 1, 0, CPU)
    time.sleep(0.3)
    assert reads == [4] * (PREFETCH + 1)
    loader.close()
