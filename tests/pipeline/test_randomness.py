"""Stateless randomness: pure functions of their arguments, uniform, and pinned for ever."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data import randomness
from pipeline.data.randomness import derive_seed, permutation, uniforms

any_int64 = st.integers(-(2**63), 2**63 - 1)


def draw(seed: int = 0, epoch: int = 0, ids: int | np.ndarray = 0, stream: int = 0, n: int = 4) -> np.ndarray:
    ids = np.atleast_1d(np.asarray(ids, dtype=np.int64))
    return uniforms(seed, np.full(ids.shape, epoch, dtype=np.int64), ids, stream, n)


def ks_distance(values: np.ndarray) -> float:
    """Kolmogorov-Smirnov distance of a sample from the uniform distribution."""
    ordered = np.sort(values)
    ranks = np.arange(1, len(ordered) + 1) / len(ordered)
    return float(np.max(np.maximum(ranks - ordered, ordered - ranks + 1 / len(ordered))))


def test_finaliser_gives_the_published_splitmix64_sequence() -> None:
    # First outputs of splitmix64.c from state 1234567.
    state = np.array([[1234567]], dtype=np.uint64)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert randomness._counted(state, 4)[0].tolist() == expected


def test_numbers_are_pinned() -> None:
    # A change here changes every run that is resumed with a newer Bony: raise the format version instead.
    assert draw(1, 2, 3, 4, n=2)[0].tolist() == [0.08185178826179507, 0.9936965062467391]
    assert permutation(1, 2, 6).tolist() == [0, 2, 4, 1, 3, 5]
    assert permutation(1, 2, 6, 1, 0).tolist() == [3, 5, 2, 4, 0, 1]
    assert derive_seed(1, 2, 3) == 4497040447297661170


@given(any_int64, any_int64, st.lists(any_int64, min_size=1, max_size=8), any_int64, st.integers(1, 9), st.data())
def test_a_row_depends_on_its_own_sample_only(
    seed: int, epoch: int, ids: list[int], stream: int, n: int, data: st.DataObject
) -> None:
    batch = draw(seed, epoch, np.array(ids), stream, n)
    order = np.array(data.draw(st.permutations(range(len(ids)))))
    assert (batch >= 0).all()
    assert (batch < 1).all()
    assert np.array_equal(draw(seed, epoch, np.array(ids)[order], stream, n), batch[order])
    assert np.array_equal(draw(seed, epoch, ids[-1], stream, n + 3)[0, :n], batch[-1])


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}, {"ids": 1}, {"stream": 1}])
def test_every_argument_counts(change: dict[str, int]) -> None:
    assert not (draw(n=64) == draw(n=64, **change)).any()


def test_arguments_do_not_stand_in_for_each_other() -> None:
    keys = [
        (seed, epoch, sample, stream)
        for seed in range(4)
        for epoch in range(4)
        for sample in range(4)
        for stream in range(4)
    ]
    firsts = {draw(*key, n=1)[0, 0] for key in keys}
    assert len(firsts) == len(keys)


def test_marginals_are_uniform() -> None:
    n = 20_000
    over_ids = draw(621, 3, np.arange(n), 2, 4)
    over_epochs = uniforms(621, np.arange(n), np.full(n, 5), 2, 4)
    over_columns = draw(621, 3, 5, 2, n)
    limit = 1.95 / np.sqrt(n)  # alpha = 0.001
    for column in (*over_ids.T, *over_epochs.T, over_columns[0]):
        assert ks_distance(column) < limit


def test_neighbours_are_uncorrelated() -> None:
    n = 20_000
    numbers = draw(621, 3, np.arange(n), 2, 6)
    other_epoch, other_stream = draw(621, 4, np.arange(n), 2, 6), draw(621, 3, np.arange(n), 3, 6)
    columns = np.concatenate([numbers, other_epoch, other_stream, np.roll(numbers, 1, axis=0)], axis=1)
    correlations = np.corrcoef(columns.T)[np.triu_indices(columns.shape[1], k=1)]
    assert np.abs(correlations).max() < 4.5 / np.sqrt(n)


def test_shapes_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match=r"epochs \(2,\) and ids \(3,\)"):
        uniforms(0, np.zeros(2, np.int64), np.zeros(3, np.int64), 0, 1)


@given(any_int64, st.integers(0, 10**6), st.integers(0, 300))
def test_permutation_is_one_and_is_repeatable(seed: int, epoch: int, n: int) -> None:
    order = permutation(seed, epoch, n)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))
    assert np.array_equal(order, permutation(seed, epoch, n))


def test_permutation_changes_with_every_argument_and_moves_every_place() -> None:
    n = 1000
    whiches = [(), (0,), (1,), (0, 0), (0, 1)]
    orders = [permutation(seed, epoch, n, *which) for seed in (0, 1) for epoch in (0, 1) for which in whiches]
    agreements = [(a == b).sum() for i, a in enumerate(orders) for b in orders[:i]]
    assert max(agreements) < 10  # one agreement is expected
    first_places = np.array([permutation(0, epoch, 10)[0] for epoch in range(2000)])
    assert np.abs(np.bincount(first_places, minlength=10) - 200).max() < 60


@given(st.lists(any_int64, max_size=5))
def test_derived_seeds_fit_torch(parts: list[int]) -> None:
    seed = derive_seed(*parts)
    assert 0 <= seed < 2**63
    assert seed == derive_seed(*parts)
    assert seed != derive_seed(*parts, 0)
