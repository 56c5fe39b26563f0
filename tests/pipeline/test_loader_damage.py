"""Damaged tiles are told by name, or left out and counted; never served. A failing file system is no damage."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import torch

from pipeline.data.loader import MOST_NAMED, Loader
from pipeline.data.order import Order
from tiling.errors import DamageError, StoreError
from tiling.store import TileStore

CPU = torch.device("cpu")


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


def test_a_failure_is_raised_again(copy: TileStore) -> None:
    flip(copy, range(len(copy)))
    loader = Loader(copy, 11, 4, 0, 1, 0, CPU)
    for _ in range(2):
        with pytest.raises(DamageError):
            next(iter(loader))
    loader.close()
    with pytest.raises(DamageError):
        next(loader)
