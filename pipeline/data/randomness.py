"""Stateless randomness (DESIGN.md section 4, rule 3): numbers are a function of what they are for.

There is no generator to save, restore or keep in step between ranks: ask again with the same seed, epoch,
sample and stream and the same numbers come back, on any machine and with any version of NumPy (nothing here uses
its generators, whose streams may change between versions, NEP 19).

The hash is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014;
constants from Sebastiano Vigna's public-domain ``splitmix64.c``): a state that advances by the golden ratio and
a 64-bit finaliser of the MurmurHash3 kind, which is a bijection. Arguments are absorbed one by one.
"""

from collections.abc import Sequence

import numpy as np

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
# Each purpose starts from its own state, so that a shuffle never reuses the numbers of a view.
_UNIFORMS, _PERMUTATION, _SEED = 1, 2, 3


def uniforms(seed: int, epochs: np.ndarray, ids: np.ndarray, stream: int, n: int) -> np.ndarray:
    """Uniform numbers that belong to a sample, not to a batch.

    Row i depends on ``(seed, epochs[i], ids[i], stream)`` alone, and the first columns do not depend on n.

    Args:
        seed: The run's seed; any integer, taken modulo 2**64.
        epochs: Pass over the data in which each sample is seen, int64, shape (B,).
        ids: Identity of each sample in the whole data set, int64, shape (B,).
        stream: What the numbers are for: one per view, mask or other independent use.
        n: Numbers per sample.

    Returns:
        float64, shape (B, n), in [0, 1), multiples of 2**-53.

    >>> ids, epochs = np.array([7, 8]), np.array([0, 0])
    >>> both = uniforms(1, epochs, ids, stream=0, n=3)
    >>> bool((both[1:] == uniforms(1, epochs[1:], ids[1:], stream=0, n=3)).all())
    True
    """
    if epochs.shape != ids.shape or ids.ndim != 1:
        raise ValueError(f"epochs {epochs.shape} and ids {ids.shape} must both have shape (B,)")
    state = np.full(ids.shape, _chain((_UNIFORMS, seed, stream)), dtype=np.uint64)
    for part in (epochs, ids):
        state = _mix((state ^ part.astype(np.int64).view(np.uint64)) + np.uint64(_GOLDEN))
    return (_counted(state[:, None], n) >> np.uint64(11)) * 2.0**-53  # the top 53 bits fill a float64 exactly


def permutation(seed: int, epoch: int, n: int, *which: int) -> np.ndarray:
    """A shuffle of one epoch: indices 0 to n - 1 ordered by a 64-bit hash each.

    Args:
        seed: The run's seed.
        epoch: Pass over the data.
        n: How many.
        which: Which shuffle, where an epoch has several; without it, that of all samples.

    Returns:
        int64, shape (n,).

    >>> sorted(permutation(0, 3, 5).tolist())
    [0, 1, 2, 3, 4]
    """
    start = np.array([[_chain((_PERMUTATION, seed, epoch, *which))]], dtype=np.uint64)
    return np.argsort(_counted(start, n)[0], kind="stable").astype(np.int64)


def derive_seed(*parts: int) -> int:
    """Seed for a generator that is not ours, e.g. ``torch.manual_seed`` before a step with drop path.

    Args:
        parts: What the seed is for, e.g. run seed, step, rank; order and number matter.

    Returns:
        An integer in [0, 2**63).

    >>> derive_seed(0, 1) == derive_seed(0, 1) != derive_seed(1, 0)
    True
    """
    return _chain((_SEED, len(parts), *parts)) >> 1


def _chain(parts: Sequence[int]) -> int:
    """Absorb integers one after another into one 64-bit state."""
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        state = _mix((state ^ np.uint64(part & _MASK)) + np.uint64(_GOLDEN))
    return int(state[0])


def _counted(state: np.ndarray, n: int) -> np.ndarray:
    """The next n outputs of SplitMix64 from each state, uint64: (B, 1) -> (B, n)."""
    counter = np.arange(1, n + 1, dtype=np.uint64)
    return _mix(state + counter * np.uint64(_GOLDEN))


def _mix(state: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, a bijection of 64 bits; arrays only, as NumPy warns when scalars overflow."""
    mixed: np.ndarray = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed
