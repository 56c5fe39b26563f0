"""Checkpoints written behind the back of training: a step waits for a copy in memory, not for the disk."""

import copy
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from pipeline import checkpoint
from pipeline.checkpoint import Position
from pipeline.tensor_file import TensorFile
from tiling.progress import say


class Saver:
    """Saves a run's checkpoints, one at a time, from a thread of its own; the first rank of a run has one.

    The host memory that a checkpoint is copied to is taken once and used again.

    Args:
        run: The RUN folder.
        keep: How many of the newest checkpoints stay.
        keep_every: Those whose step is a multiple of this stay too; 0: none.
    """

    def __init__(self, run: Path, keep: int, keep_every: int = 0) -> None:
        self._run, self._keep, self._keep_every = run, keep, keep_every
        self._files: dict[str, TensorFile] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._writing: Future[object] | None = None

    def prepare(
        self, networks: Mapping[str, nn.Module], state: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        """Begin to take the memory for what a save of these will hold; without this the first save waits for it.

        The optimizer should have made a step, or have been filled from a checkpoint: before it has no moments.
        """
        self.wait()
        self._writing = self._thread.submit(self._take, checkpoint.tensors_by_file(networks, state, optimizer))

    def _take(self, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        self._files = {name: TensorFile(values) for name, values in tensors.items()}

    def save(
        self,
        position: Position,
        networks: Mapping[str, nn.Module],
        state: Mapping[str, torch.Tensor],
        optimizer: torch.optim.Optimizer,
        about: Mapping[str, Any],
    ) -> None:
        """Take everything as it is now, and begin to write it; waits for a save that is still being written.

        Tensors on a GPU are as they are when its current stream, on which training goes on, comes to this place.

        Args:
            position: Where the run stands.
            networks: Modules by name.
            state: The method's further tensors by name.
            optimizer: The optimizer.
            about: JSON values that say what it is: config, store, mpp, software.

        Raises:
            CheckpointError: The save before could not be written.
        """
        self.wait()
        tensors = checkpoint.tensors_by_file(networks, state, optimizer)
        self._files = {name: self._filled(name, values) for name, values in tensors.items()}
        gpus = {value.device for values in tensors.values() for value in values.values() if value.is_cuda}
        copied = [torch.cuda.current_stream(gpu).record_event() for gpu in gpus]
        self._writing = self._thread.submit(self._write, position, copy.deepcopy(dict(about)), copied)

    def _filled(self, name: str, tensors: Mapping[str, torch.Tensor]) -> TensorFile:
        """The file's memory of the last save, or new memory where it no longer fits: moments come with first steps."""
        file = self._files.get(name)
        if file is None or not file.fits(tensors):
            file = TensorFile(tensors)
        file.fill(tensors)
        return file

    def _write(self, position: Position, about: Mapping[str, Any], copied: list[torch.cuda.Event]) -> Path:
        for event in copied:
            event.synchronize()
        return checkpoint.write(self._run, position, self._files, about, self._keep, self._keep_every)

    def poll(self) -> None:
        """Raise what went wrong with the last save, if that is known by now; never waits.

        Raises:
            CheckpointError: It could not be written.
        """
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Return when all is written.

        Raises:
            CheckpointError: The last save could not be written; it is raised once.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """End the thread when all is written.

        Raises:
            CheckpointError: The last save could not be written.
        """
        self._thread.shutdown()
        self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close; where another error is on its way already, ours is said only."""
        try:
            self.close()
        except Exception as ours:
            if kind is None:
                raise
            say(str(ours))
