"""The order in which samples are seen: a pure function of (seed, epoch), so that a position is all a resume needs.

``shuffle: global`` mixes all tiles of an epoch. ``shuffle: shards`` is for parallel file systems, where opening a file
and asking for a few kB of it is what costs: shards come in random order, some at a time (a window), and the tiles of a
window are mixed wholly. Every epoch puts other shards together.
"""

from itertools import pairwise

import numpy as np

from pipeline.data.randomness import permutation
from tiling.shard import MAX_SHARD_ITEMS

# Shards in a window: as many files as a TileStore keeps open, so that each is opened once. With 270 tiles a slide, as
# in the reference run, these are 69,000 tiles: several optimizer steps of a large run, 1.4 GB, which a node can cache.
WINDOW = 256
_SHARDS, _WINDOW = 1, 2


def shard_starts(slide_of_row: np.ndarray) -> np.ndarray:
    """First row of every shard, and the number of rows at the end: int64, shape (shards + 1,).

    A store's rows stand together slide by slide; MAX_SHARD_ITEMS of a slide count as one shard.

    Args:
        slide_of_row: Number of every row's slide, ascending, shape (N,).

    >>> shard_starts(np.array([0, 0, 1, 1, 1])).tolist()
    [0, 2, 5]
    """
    bounds = [0, *(np.flatnonzero(np.diff(slide_of_row)) + 1).tolist(), len(slide_of_row)]
    starts = [start for first, end in pairwise(bounds) for start in range(first, end, MAX_SHARD_ITEMS)]
    return np.array([*starts, len(slide_of_row)], np.int64)


def shard_permutation(seed: int, epoch: int, starts: np.ndarray) -> np.ndarray:
    """The shuffle of one epoch that reads few shards at a time.

    Args:
        seed: The run's seed.
        epoch: Pass over the data.
        starts: As of ``shard_starts``, shape (shards + 1,).

    Returns:
        Every row once, int64, shape (starts[-1],).
    """
    shards = permutation(seed, epoch, len(starts) - 1, _SHARDS)
    order, end = np.empty(starts[-1], np.int64), 0
    # Windows of nearly the same size: a small one at the end would be of a few slides.
    for number, window in enumerate(np.array_split(shards, -(-len(shards) // WINDOW))):
        rows = np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in window.tolist()])
        first, end = end, end + len(rows)
        order[first:end] = rows[permutation(seed, epoch, len(rows), _WINDOW, number)]
    return order


class Order:
    """The endless sequence of samples: position p is epoch p // N, place p % N of the epoch's order.

    Args:
        seed: The run's seed.
        count: Number of samples in the store, N.
        starts: First row of every shard (``shard_starts``), for ``shuffle: shards``; None mixes all.
    """

    def __init__(self, seed: int, count: int, starts: np.ndarray | None = None) -> None:
        self._seed, self._count, self._starts = seed, count, starts
        self._epochs: dict[int, np.ndarray] = {}

    def at(self, first: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """ids and epochs of ``number`` consecutive positions from ``first``, int64, shape (number,)."""
        positions = np.arange(first, first + number, dtype=np.int64)
        epochs, places = np.divmod(positions, self._count)
        ids = np.empty(number, np.int64)
        wanted = np.unique(epochs).tolist()
        self._epochs = {epoch: order for epoch, order in self._epochs.items() if epoch in wanted}
        for epoch in wanted:
            here = epochs == epoch
            ids[here] = self._order(epoch)[places[here]]
        return ids, epochs

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            self._epochs[epoch] = (
                permutation(self._seed, epoch, self._count)
                if self._starts is None
                else shard_permutation(self._seed, epoch, self._starts)
            )
        return self._epochs[epoch]
