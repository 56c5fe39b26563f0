"""The loader: every tile once per epoch, whatever the ranks; a position is all it needs; damage is told, not served."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.loader import MOST_NAMED, PREFETCH, Batch, Loader
from pipeline.data.order import Order, shard_starts
from tiling.errors import DamageError, StoreError
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


@pytest.fixture(scope="module")
def tiles(store: Path) -> Iterator[TileStore]:
    with TileStore(store, threads=2) as opened:
        yield opened


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


# ---- damage ----------------------------------------------------------------------------------------------------------


def slide_folder(store: TileStore, row: int) -> Path:
    return Path(store.path) / "slides" / store.slide_ids[store.slide_of_row[row]] / "tiles.zarr"


def tile_number(store: TileStore, row: int) -> int:
    return int(store.index["row"].to_numpy()[row])


def change_shard(store: TileStore, row: int, change: Callable[[bytearray, np.ndarray, int], None]) -> None:
    """Change a tile's shard: its bytes, its index of (offset, size), and the tile's place there are given."""
    folder = slide_folder(store, row)
    count = json.loads((folder / "zarr.json").read_text())["chunk_grid"]["configuration"]["chunk_shape"][0]
    shard = folder / "c/0/0/0/0"
    data = bytearray(shard.read_bytes())
    index = np.frombuffer(data[-16 * count - 4 : -4], "<u8").reshape(count, 2).copy()
    change(data, index, tile_number(store, row))
    data[-16 * count - 4 :] = index.tobytes() + int(google_crc32c.value(index.tobytes())).to_bytes(4, "little")
    shard.write_bytes(data)


def flip(store: TileStore, rows: Sequence[int]) -> None:
    """One bit of each of these tiles."""

    def change(data: bytearray, index: np.ndarray, number: int) -> None:
        offset, size = index[number].tolist()
        data[offset + size // 2] ^= 1

    for row in rows:
        change_shard(store, row, change)


def make_absent(store: TileStore, rows: Sequence[int]) -> None:
    """Plain zarr would read these tiles as zeros."""

    def change(_: bytearray, index: np.ndarray, number: int) -> None:
        index[number] = 2**64 - 1

    for row in rows:
        change_shard(store, row, change)


def cut_in_the_middle_and_mend_the_index(store: TileStore, rows: Sequence[int]) -> None:
    """The file ends before these tiles, which are the last ones of their shard."""

    def change(data: bytearray, index: np.ndarray, number: int) -> None:
        tail = data[-16 * len(index) - 4 :]
        del data[int(index[number, 0]) :]
        data += tail

    change_shard(store, min(rows), change)


def lose_shard(store: TileStore, rows: Sequence[int]) -> None:
    (slide_folder(store, rows[0]) / "c/0/0/0/0").unlink()


def cut_shard(store: TileStore, rows: Sequence[int]) -> None:
    shard = slide_folder(store, rows[0]) / "c/0/0/0/0"
    shard.write_bytes(shard.read_bytes()[:-1])


def lose_metadata(store: TileStore, rows: Sequence[int]) -> None:
    (slide_folder(store, rows[0]) / "zarr.json").unlink()


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Iterator[TileStore]:
    """A copy of the store that a test may damage."""
    with TileStore(shutil.copytree(store, tmp_path / "store")) as opened:
        yield opened


def second_slide(store: TileStore) -> list[int]:
    rows: list[int] = store.rows_of_slide(1).tolist()
    return rows


@pytest.mark.parametrize("threads", [1, 2])
def test_damage_is_raised_where_training_runs_and_names_slide_and_tile(copy: TileStore, threads: int) -> None:
    bad = second_slide(copy)[-1]
    flip(copy, [bad])
    seed = next(seed for seed in range(99) if bad not in Order(seed, len(copy)).at(0, 8)[0])
    with TileStore(copy.path, threads) as opened:
        loader = Loader(opened, seed, 4, 0, 1, 0, CPU)
        served = []
        named = f"slide {copy.slide_ids[1]}, tile {tile_number(copy, bad)}"
        with pytest.raises(DamageError, match=named):  # noqa: PT012
            for batch in islice(loader, 20):
                served.append(batch.ids)
                assert bad not in batch.ids
        loader.close()
    expected = np.concatenate([Order(seed, len(copy)).at(4 * n, 4)[0] for n in range(len(served))])
    assert np.array_equal(np.concatenate(served), expected)  # all that came before it was served


def without(ids: np.ndarray, bad: Sequence[int]) -> list[int]:
    """A batch in which sound tiles, one after the other and again from the first, take the places of damaged ones."""
    sound = [row for row in ids.tolist() if row not in bad]
    stand_ins = iter(sound * len(ids))
    return [next(stand_ins) if row in bad else row for row in ids.tolist()]


DAMAGES = {
    flip: slice(-4, None, 2), make_absent: slice(0, 3), cut_in_the_middle_and_mend_the_index: slice(-3, None),
    lose_shard: slice(None), cut_shard: slice(None), lose_metadata: slice(None),
}  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_skipped_counted_and_named_once(
    tiles: TileStore,
    copy: TileStore,
    damage: Callable[[TileStore, Sequence[int]], None],
    threads: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = second_slide(copy)[DAMAGES[damage]]
    damage(copy, bad)
    order, batch, rounds = Order(11, len(copy)), 12, 8
    with TileStore(copy.path, threads) as opened:
        loader = Loader(opened, 11, batch, 0, 1, 0, CPU, damaged="skip")
        left_out = 0
        for number, served in enumerate(islice(loader, rounds)):
            planned, epochs = order.at(batch * number, batch)
            left_out += int(np.isin(planned, bad).sum())
            assert served.ids.tolist() == without(planned, bad)
            assert sorted(set(zip(served.ids, served.epochs, strict=True))) == sorted(
                {pair for pair in zip(planned, epochs, strict=True) if pair[0] not in bad}
            )
            assert np.array_equal(served.tiles.numpy(), tiles.read(served.ids))
            assert loader.skipped == left_out
        loader.close()
    assert left_out >= len(bad)
    lines = capsys.readouterr().err.splitlines()
    assert sorted(line.split(" is left out: ")[0] for line in lines) == sorted(f"row {row} of the index" for row in bad)
    assert all(f"slide {copy.slide_ids[1]}, " in line for line in lines)
    if damage is not lose_metadata:  # which is of no tile alone
        assert all(any(f"tile {tile_number(copy, row)}: " in line for line in lines) for row in bad)


def test_what_is_sound_is_read_once_and_named_never(
    tiles: TileStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read, sizes = tiles.read, []
    monkeypatch.setattr(tiles, "read", lambda rows, out: (sizes.append(len(rows)), read(rows, out))[1])
    loader = Loader(tiles, 11, 6, 0, 1, 0, CPU, damaged="skip")
    list(islice(loader, 3))
    loader.close()
    assert set(sizes) == {6}
    assert loader.skipped == 0
    assert not capsys.readouterr().err


def test_many_damaged_tiles_are_counted_and_some_named(copy: TileStore, capsys: pytest.CaptureFixture[str]) -> None:
    sound = [3, 20]
    flip(copy, [row for row in range(len(copy)) if row not in sound])
    loader = Loader(copy, 11, len(copy), 0, 1, 0, CPU, damaged="skip")
    assert [set(batch.ids.tolist()) for batch in islice(loader, 2)] == [set(sound)] * 2
    loader.close()
    assert loader.skipped == 2 * (len(copy) - 2) > MOST_NAMED
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == MOST_NAMED + 1
    assert "counted" in lines[-1]


def test_a_micro_batch_without_a_sound_tile_stops_the_run(copy: TileStore) -> None:
    flip(copy, range(len(copy)))
    loader = Loader(copy, 11, 4, 0, 1, 0, CPU, damaged="skip")
    with pytest.raises(DamageError, match=r"slide \w+, tile \d+: .*crc32c; all 4 tiles of its micro-batch"):
        next(loader)
    loader.close()


@pytest.mark.parametrize("damaged", ["stop", "skip"])
def test_a_file_system_that_fails_is_no_damage(copy: TileStore, damaged: str) -> None:
    for number in range(2):
        shard = slide_folder(copy, copy.rows_of_slide(number)[0]) / "c/0/0/0/0"
        shard.unlink()
        shard.mkdir()  # a real error of the system's: it can be opened, reading it fails
    loader = Loader(copy, 11, 4, 0, 1, 0, CPU, damaged=damaged)
    with pytest.raises(StoreError, match=r"slide \w+, tile \d+: .*Is a directory.*no damage of the tile"):
        next(loader)
    loader.close()
    assert loader.skipped == 0


def test_a_file_system_that_fails_is_found_beside_damage(copy: TileStore) -> None:
    flip(copy, copy.rows_of_slide(0)[:1].tolist())  # read first, and reported first
    shard = slide_folder(copy, second_slide(copy)[0]) / "c/0/0/0/0"
    shard.unlink()
    shard.mkdir()
    loader = Loader(copy, 11, len(copy), 0, 1, 0, CPU, damaged="skip")
    with pytest.raises(StoreError, match=f"slide {copy.slide_ids[1]}, tile .*Is a directory"):
        next(loader)
    loader.close()


def test_a_lost_shard_is_damage(copy: TileStore) -> None:
    for number in range(2):
        lose_shard(copy, copy.rows_of_slide(number).tolist())
    loader = Loader(copy, 11, 4, 0, 1, 0, CPU)
    with pytest.raises(DamageError, match=r"slide \w+, tile \d+.*missing"):
        next(loader)
    loader.close()


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


def test_a_failure_is_raised_again(copy: TileStore) -> None:
    flip(copy, range(len(copy)))
    loader = Loader(copy, 11, 4, 0, 1, 0, CPU)
    for _ in range(2):
        with pytest.raises(DamageError):
            next(iter(loader))
    loader.close()
    with pytest.raises(DamageError):
        next(loader)


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
