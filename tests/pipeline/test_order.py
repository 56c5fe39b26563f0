"""The order of samples: every one once per epoch, a function of the position, well mixed; some shards at a time."""

import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order import WINDOW, Order, shard_permutation, shard_starts
from pipeline.data.randomness import permutation
from tiling.store import TileStore

any_int64 = st.integers(-(2**63), 2**63 - 1)


@st.composite
def slides_of_rows(draw: st.DrawFn) -> np.ndarray:
    """Numbers of the slides of all rows: few or many slides, some with more than one shard."""
    slides, most = draw(st.integers(1, 3 * WINDOW)), draw(st.integers(1, 6))
    sizes = np.random.default_rng(draw(st.integers(0, 99))).integers(1, most + 1, slides)
    sizes[0] *= draw(st.sampled_from((1, 500)))
    return np.repeat(np.arange(slides, dtype=np.int32), sizes)


@given(slides_of_rows())
def test_shards_are_of_one_slide_and_of_1024_tiles_at_most(slide_of_row: np.ndarray) -> None:
    starts = shard_starts(slide_of_row)
    assert starts.dtype == np.int64
    assert (starts[0], starts[-1]) == (0, len(slide_of_row))
    for first, end in pairwise(starts.tolist()):
        assert 0 < end - first <= 1024
        assert slide_of_row[first] == slide_of_row[end - 1]
        # No shard could be longer.
        assert end - first == 1024 or end == len(slide_of_row) or slide_of_row[end] != slide_of_row[first]


def test_shards_of_a_real_store(store: Path) -> None:
    with TileStore(store) as opened:
        expected = [opened.rows_of_slide(0)[0], opened.rows_of_slide(1)[0], len(opened)]
        assert shard_starts(opened.slide_of_row).tolist() == expected


@settings(max_examples=40)
@given(any_int64, st.integers(0, 10**6), slides_of_rows())
def test_an_epoch_has_every_row_once_and_few_shards_at_a_time(seed: int, epoch: int, slide_of_row: np.ndarray) -> None:
    starts = shard_starts(slide_of_row)
    order = shard_permutation(seed, epoch, starts)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(len(slide_of_row)))
    shards = np.searchsorted(starts, order, side="right") - 1
    first_seen = np.unique(shards, return_index=True)[1]
    last_seen = len(order) - 1 - np.unique(shards[::-1], return_index=True)[1]
    places = np.arange(len(order))
    begun = np.searchsorted(np.sort(first_seen), places, side="right")
    ended = np.searchsorted(np.sort(last_seen), places, side="left")
    assert (begun - ended).max() <= WINDOW


@pytest.mark.parametrize("by_shards", [False, True])
@settings(max_examples=40)
@given(slide_of_row=slides_of_rows(), first=st.integers(0, 9000), number=st.integers(1, 3000))
def test_a_position_is_all_that_is_needed(slide_of_row: np.ndarray, first: int, number: int, by_shards: bool) -> None:
    starts = shard_starts(slide_of_row)
    n = len(slide_of_row)
    number = min(number, 5 * n)
    ids, epochs = Order(3, n, starts if by_shards else None).at(first, number)
    begin, end = first // n, (first + number - 1) // n
    parts = [
        shard_permutation(3, epoch, starts) if by_shards else permutation(3, epoch, n)
        for epoch in range(begin, end + 1)
    ]
    assert np.array_equal(ids, np.concatenate(parts)[first - begin * n :][:number])
    assert np.array_equal(epochs, np.arange(first, first + number) // n)


def test_an_order_can_be_asked_in_any_sequence() -> None:
    order = Order(3, 10)
    expected = {first: Order(3, 10).at(first, 7)[0].tolist() for first in range(0, 60, 7)}
    for first in [*expected, *reversed(expected)]:
        assert order.at(first, 7)[0].tolist() == expected[first]


@pytest.mark.parametrize("by_shards", [False, True])
def test_epochs_and_seeds_are_shuffled_differently(by_shards: bool) -> None:
    starts = shard_starts(np.repeat(np.arange(5), 10)) if by_shards else None
    orders = [tuple(Order(seed, 50, starts).at(epoch * 50, 50)[0]) for seed in (0, 1) for epoch in (0, 1)]
    assert len({*orders, tuple(range(50))}) == 5


def test_the_order_by_shards_is_pinned() -> None:
    # A change here changes every run that is resumed with a newer Bony: raise the format version instead.
    order = shard_permutation(1, 2, np.arange(0, 1203, 2))  # three windows
    assert (order[:4].tolist(), order[-4:].tolist()) == ([490, 934, 1004, 816], [426, 47, 541, 793])


# ---- how well it mixes -----------------------------------------------------------------------------------------------

SLIDES, TILES = 3 * WINDOW + 40, 50
EVEN = np.repeat(np.arange(SLIDES), TILES)


def test_tiles_of_a_window_are_mixed_wholly() -> None:
    slides = EVEN[shard_permutation(7, 0, shard_starts(EVEN))]
    # Four windows of nearly the same size, at most WINDOW: neighbours are of one slide as often as chance has it.
    window = SLIDES / 4
    assert (slides[1:] == slides[:-1]).mean() == pytest.approx(1 / window, rel=0.3)
    # And a batch of 256 has as many slides as 256 random tiles of a window.
    counts = [len(np.unique(slides[first : first + 256])) for first in range(0, len(slides) - 256, 256)]
    assert np.mean(counts) == pytest.approx(window * (1 - (1 - 1 / window) ** 256), rel=0.05)
    assert min(counts) > 100


def test_every_epoch_puts_other_slides_together() -> None:
    """Of the slides that share a slide's window, a quarter does so in the next epoch, as chance has it with four."""
    together = []
    for epoch in range(2):
        slides = EVEN[shard_permutation(7, epoch, shard_starts(EVEN))]
        edges = np.cumsum([len(part) for part in np.array_split(np.arange(SLIDES), 4)]) * TILES
        window_of_slide = np.empty(SLIDES, int)
        window_of_slide[slides] = np.searchsorted(edges, np.arange(len(slides)), side="right")
        together.append(window_of_slide[:, None] == window_of_slide[None])
    assert (together[0] & together[1]).sum() / together[0].sum() == pytest.approx(0.25, abs=0.02)


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_shards", [False, True])
def test_no_more_than_the_index_is_held(by_shards: bool) -> None:
    slide_of_row = np.repeat(np.arange(2000), 100)
    index = 8 * len(slide_of_row)
    order = Order(0, len(slide_of_row), shard_starts(slide_of_row) if by_shards else None)
    tracemalloc.start()
    for epoch in range(3):
        order.at(epoch * len(slide_of_row) + 5, 10)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    if by_shards:
        shard_permutation(0, 9, shard_starts(slide_of_row))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 1.1 * index
    assert peak - held < 2 * index  # a window's sorting beside the index that is made
