"""From a TileStore to micro-batches of uint8 tiles on the device. The position in the data is one integer.

Samples form an endless sequence (``pipeline.data.order``), so a batch may reach into the next epoch and no tile is left
out. A micro-batch of all ranks is a run of consecutive positions, of which each rank takes its slice: the same samples
are together whatever the number of ranks.

Every batch has a buffer of its own and stays valid as long as it is kept. Using buffers again would be no faster: page
faults take about 1 % of the time of reading and decoding, and pinned memory is kept by torch for the next buffer.
"""

import queue
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.data.order import Order, shard_starts
from tiling.errors import DamageError, StoreError
from tiling.progress import say
from tiling.store import TileStore

PREFETCH = 3
# Damaged tiles that are named; `bony verify` names all.
MOST_NAMED = 30


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


class Loader:
    """Reads ahead in a background thread; an iterator of this rank's micro-batches, for ever.

    Args:
        store: Where tiles come from; its threads decode.
        seed: The run's seed.
        batch: Tiles per rank and micro-batch.
        rank: This rank.
        world: Number of ranks.
        position: Samples that all ranks together have seen.
        device: Where tiles are put.
        shuffle: global, or shards (``pipeline.data.order``).
        damaged: What a damaged tile does: stop, or skip. Skipped, its place in the batch is taken by a sound tile of
            the same batch: the same damage gives the same batches.

    Attributes:
        skipped: Damaged tiles left out of the batches served so far.
        waited_s: Seconds that iterating has waited for batches so far.

    Raises:
        DamageError: While iterating: a tile is damaged, or, where these are skipped, a whole micro-batch is.
        StoreError: While iterating: a file cannot be read, which is skipped in no case.
    """

    def __init__(
        self,
        store: TileStore,
        seed: int,
        batch: int,
        rank: int,
        world: int,
        position: int,
        device: torch.device,
        shuffle: str = "global",
        damaged: str = "stop",
    ) -> None:
        self.skipped, self.waited_s = 0, 0.0
        self._store, self._batch, self._device, self._skips = store, batch, device, damaged == "skip"
        self._order = Order(seed, len(store), shard_starts(store.slide_of_row) if shuffle == "shards" else None)
        self._next = position + rank * batch
        self._stride = batch * world
        self._named: set[int] = set()
        self._ready: queue.Queue[tuple[Batch, int] | BaseException] = queue.Queue(PREFETCH)
        self._failure: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="loader", daemon=True)
        self._thread.start()

    def _buffer(self) -> torch.Tensor:
        px = self._store.tile_px
        return torch.empty((self._batch, px, px, 3), dtype=torch.uint8, pin_memory=self._device.type == "cuda")

    def _read(self, position: int) -> tuple[Batch, int]:
        """The micro-batch at a position, and how many of its tiles are damaged and left out."""
        (ids, epochs), tiles = self._order.at(position, self._batch), self._buffer()
        try:
            self._store.read(ids, out=tiles.numpy())
        except DamageError as error:
            _require_readable(error)
            if not self._skips:
                raise
            return self._read_singly(ids, epochs)
        return Batch(ids, epochs, tiles), 0

    def _read_singly(self, ids: np.ndarray, epochs: np.ndarray) -> tuple[Batch, int]:
        """Tile by tile; sound ones, one after the other, take the places of damaged ones."""
        tiles = self._buffer()  # the store's threads may still be writing into the first
        pixels = tiles.numpy()
        errors: dict[int, DamageError] = {}
        for place in range(len(ids)):
            try:
                self._store.read(ids[place : place + 1], out=pixels[place : place + 1])
            except DamageError as error:
                _require_readable(error)
                self._name(int(ids[place]), error)
                errors[place] = error
        bad = np.array([*errors], np.int64)
        sound = np.setdiff1d(np.arange(len(ids)), bad)
        if not len(sound):
            what = f"{errors[0].what}; all {len(ids)} tiles of its micro-batch are damaged, so none can take its place"
            raise DamageError(what, errors[0].where, errors[0].do)
        stand_ins = np.resize(sound, len(bad))  # repeats them where they do not suffice
        for values in (ids, epochs, pixels):
            values[bad] = values[stand_ins]
        return Batch(ids, epochs, tiles), len(bad)

    def _name(self, row: int, error: DamageError) -> None:
        """Say once that a tile is left out."""
        if row in self._named or len(self._named) == MOST_NAMED:
            return
        self._named.add(row)
        say(f"row {row} of the index is left out: {error}")
        if len(self._named) == MOST_NAMED:
            say("further damaged tiles are left out and counted, not named; `bony verify` names all")

    def _produce(self) -> None:
        position = self._next
        while not self._stop.is_set():
            item: tuple[Batch, int] | BaseException
            try:
                item = self._read(position)
            except BaseException as error:
                item = error  # raised again in the thread that trains
            self._ready.put(item)
            if isinstance(item, BaseException):
                return
            position += self._stride

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        if self._failure is not None:  # nothing is read any more
            raise self._failure
        start = time.monotonic()
        item = self._ready.get()
        self.waited_s += time.monotonic() - start
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        batch, skipped = item
        self.skipped += skipped
        return Batch(batch.ids, batch.epochs, batch.tiles.to(self._device, non_blocking=True))

    def close(self) -> None:
        """Stop reading ahead; from any thread, at any time, more than once. Iterating then raises RuntimeError."""
        self._stop.set()
        with suppress(queue.Empty):  # the thread may wait for room
            while True:
                self._ready.get_nowait()
        self._thread.join()
        closed = RuntimeError("the loader is closed")
        self._failure = self._failure or closed
        with suppress(queue.Full):  # a thread that waits for a batch waits no longer
            self._ready.put_nowait(closed)


def _require_readable(error: DamageError) -> None:
    """Tell a file that the system does not give, whose tiles may be sound, from bytes that are wrong or missing.

    Raises:
        StoreError: The file cannot be read.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__
    if cause is not None and not isinstance(cause, FileNotFoundError):
        do = "this is no damage of the tile: look after the file system, then continue the run"
        raise StoreError(error.what, error.where, do) from error
