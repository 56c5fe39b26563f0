"""From a TileStore to micro-batches of uint8 tiles on the device. The position in the data is one integer.

Samples form an endless sequence: epoch after epoch, each a permutation of all tiles by (seed, epoch). Position p is
epoch p // N, place p % N of its permutation, so a batch may reach into the next epoch and no tile is left out. A
micro-batch of all ranks is a run of consecutive positions, of which each rank takes its slice: the same samples are
together whatever the number of ranks.
"""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.data.randomness import permutation
from tiling.store import TileStore

PREFETCH = 3


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    Args:
        ids: Index rows in the store, int64, shape (B,): the samples' identities.
        epochs: Which pass over the data each is in, int64, shape (B,).
        tiles: Pixels on the device, uint8, shape (B, px, px, 3).
    """

    ids: np.ndarray
    epochs: np.ndarray
    tiles: torch.Tensor


class Order:
    """The endless sequence of samples.

    Args:
        seed: The run's seed.
        count: Number of samples in the store.
    """

    def __init__(self, seed: int, count: int) -> None:
        self._seed, self._count = seed, count
        self._epochs: dict[int, np.ndarray] = {}

    def at(self, first: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """ids and epochs of ``number`` consecutive positions from ``first``, int64, shape (number,)."""
        positions = np.arange(first, first + number, dtype=np.int64)
        epochs, places = np.divmod(positions, self._count)
        ids = np.empty(number, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = self._permutation(int(epoch))[places[here]]
        return ids, epochs

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            self._epochs = {old: order for old, order in self._epochs.items() if old == epoch - 1}
            self._epochs[epoch] = permutation(self._seed, epoch, self._count)
        return self._epochs[epoch]


class Loader:
    """Reads ahead in a background thread; iterating gives this rank's micro-batches, for ever.

    Args:
        store: Where tiles come from; its threads decode.
        seed: The run's seed.
        batch: Tiles per rank and micro-batch.
        rank: This rank.
        world: Number of ranks.
        position: Samples that all ranks together have seen.
        device: Where tiles are put.
    """

    def __init__(
        self, store: TileStore, seed: int, batch: int, rank: int, world: int, position: int, device: torch.device
    ) -> None:
        self._store, self._batch, self._device = store, batch, device
        self._order = Order(seed, len(store))
        self._next = position + rank * batch
        self._stride = batch * world
        self._ready: queue.Queue[Any] = queue.Queue(PREFETCH)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="loader", daemon=True)
        self._thread.start()

    def _read(self, position: int) -> Batch:
        ids, epochs = self._order.at(position, self._batch)
        px = self._store.tile_px
        tiles = torch.empty((self._batch, px, px, 3), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        self._store.read(ids, out=tiles.numpy())
        return Batch(ids, epochs, tiles)

    def _produce(self) -> None:
        position = self._next
        while not self._stop.is_set():
            item: Batch | BaseException
            try:
                item = self._read(position)
            except BaseException as error:
                item = error  # raised again in the thread that trains
            while not self._stop.is_set():
                try:
                    self._ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            position += self._stride

    def __iter__(self) -> Iterator[Batch]:
        while True:
            item = self._ready.get()
            if isinstance(item, BaseException):
                raise item
            yield Batch(item.ids, item.epochs, item.tiles.to(self._device, non_blocking=True))

    def close(self) -> None:
        """Stop reading ahead."""
        self._stop.set()
        self._thread.join()
