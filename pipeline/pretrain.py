"""The training loop: short, method-agnostic. ``torchrun -m pipeline.pretrain`` and ``bony pretrain`` run it."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from pipeline import checkpoint, run, stopping
from pipeline.checkpoint import Position
from pipeline.config import PretrainConfig
from pipeline.data.loader import Batch, Loader
from pipeline.data.randomness import derive_seed
from pipeline.heartbeat import Heartbeat
from pipeline.methods import build_method
from pipeline.methods.protocol import Moment
from pipeline.monitor import Monitor
from pipeline.probe import Probe, open_probe
from pipeline.runtime import joined, leave, ranks_lost
from pipeline.saver import Saver
from pipeline.trainer import Step, Trainer
from tiling.errors import BonyError, StoreError, UsageError
from tiling.progress import progress, say
from tiling.store import TileStore

_STREAM_INIT = 1


def pretrain(config: PretrainConfig) -> Path:
    """Run, or continue, a pretraining run; under torchrun as one of its ranks.

    Returns:
        The RUN folder.

    Raises:
        UsageError: ``data`` or ``out`` is missing, or RUN was started with another config.
        HeldError: Another job is writing to RUN.
        StoreError: The store is unusable, empty, or not the one the run was started on.
        CheckpointError: RUN has checkpoints, and none is sound or fits.
        Stopped: A signal asked the run to stop; everything is saved.
        BonyError: The loss is no longer finite, or other ranks do not answer.
    """
    if config.data is None or config.out is None:
        raise UsageError(f"--{'data' if config.data is None else 'out'} is missing")
    out, signal = config.out, 0
    with ExitStack() as block:
        runtime = block.enter_context(joined(config.train.timeout))
        store = block.enter_context(TileStore(config.data, config.train.threads))
        if len(store) == 0:
            raise StoreError("no kept tile in this store", config.data)
        about = run.describe(config, runtime, store)
        run.require_usable(out, about, config)
        probe = open_probe(config, runtime, store)
        torch.manual_seed(derive_seed(config.train.seed, _STREAM_INIT))
        trainer = Trainer(config, runtime, build_method(config, runtime, store))
        chosen = runtime.first_decides(lambda: _hold(block, out))
        position = _filled(trainer, Path(chosen) if chosen else None, about)
        if runtime.is_first:
            run.begin(out, about)
        if position.step < config.train.steps:
            signal, position = _train(trainer, store, position, about, probe)
        elif runtime.is_first:
            say(f"{out}: all {config.train.steps} steps are done already")
    if signal:
        raise stopping.Stopped(signal, position.step, out)
    return out


def _hold(block: ExitStack, out: Path) -> str | None:
    """On the first rank: hold RUN for the block, and choose the checkpoint to go on from."""
    block.enter_context(run.held(out))
    stopping.unmark(out)
    folder = checkpoint.newest_sound(out)
    return str(folder) if folder is not None else None


def _filled(trainer: Trainer, folder: Path | None, about: dict[str, Any]) -> Position:
    """Fill everything from a checkpoint, where there is one, else the networks from what the run begins with."""
    config, out = trainer.config, trainer.config.out or Path()
    position, said = Position(0, 0), []
    if folder is not None:
        position = checkpoint.load(folder, trainer.method.networks(), trainer.state(), trainer.optimizer)
        trainer.loaded()
        about["begins_with"] = run.begins_with(out)
        said.append(f"continuing from {folder} at step {position.step}")
    else:
        if config.model.init_from is not None:
            weights = trainer.method.begin_with(config.model.init_from)
            about["begins_with"] = {"what": weights.what, "sha256": weights.sha256}
            said.append(f"beginning with the {weights.what}")
        said.append(f"learning rate {trainer.lr:.3g} after the linear rule and its cap ({config.optim.lr_cap:.3g})")
    if trainer.runtime.is_first:
        for line in said:
            say(line)
    return position


def _train(
    trainer: Trainer, store: TileStore, position: Position, about: dict[str, Any], probe: Probe | None
) -> tuple[int, Position]:
    """From a position to the last step, or to a signal: which one (0 for none), and how far it came.

    Raises:
        BonyError: The loss is no longer finite, or other ranks do not answer.
    """
    out, train, runtime = trainer.config.out or Path(), trainer.config.train, trainer.runtime
    with closing(Heartbeat(out, runtime, train.timeout)) as heartbeat, ExitStack() as block:
        listener = block.enter_context(stopping.Stopping(runtime).listening())
        loader = Loader(
            store, train.seed, train.batch_per_rank, runtime.rank, runtime.world, position.samples_seen,
            runtime.device, train.shuffle, train.damaged,
        )  # fmt: skip
        block.enter_context(closing(loader))
        writer = (
            block.enter_context(_Writer(trainer, store, loader, probe, position, about)) if runtime.is_first else None
        )
        advance = block.enter_context(
            progress("pretraining", train.steps - position.step, "steps", shown=runtime.is_first)
        )
        try:
            batches, signal = _watched(loader, heartbeat), 0
            while position.step < train.steps and not signal:
                heartbeat.at(position.step, "training")
                done = trainer.step(batches, Moment(position.step, train.steps, position.samples_seen / len(store)))
                position = Position(position.step + 1, position.samples_seen + trainer.global_batch)
                signal = listener.agreed()
                last = position.step == train.steps or signal != 0
                if last or position.step % train.log_every == 0 or position.step % trainer.config.checkpoint.every == 0:
                    trainer.require_finite()
                if writer is not None:
                    heartbeat.doing("writing figures, judging or saving")
                    advance(note=writer.after(done, position, position.samples_seen / len(store), last))
            heartbeat.at(position.step, "waiting for the last checkpoint")
            if writer is not None:
                writer.finish(signal, position)
            runtime.barrier()  # torchrun ends all ranks when the first one leaves: not before all is written
            return signal, position
        except RuntimeError as error:
            if not ranks_lost(error):
                raise
            what = f"rank {runtime.rank} waits in vain for the others: {heartbeat.stuck()}"
            raise BonyError(what, out, "run the same command again to go on") from error


def _watched(loader: Loader, heartbeat: Heartbeat) -> Iterator[Batch]:
    """The loader's batches; heartbeats say when a rank waits for tiles."""
    batches = iter(loader)
    while True:
        heartbeat.doing("waiting for tiles")
        batch = next(batches)
        heartbeat.doing("training")
        yield batch


class _Writer:
    """What only the first rank does after a step: metrics and checkpoints.

    Args:
        trainer: The trainer.
        store: What it trains on.
        loader: Where its tiles come from.
        probe: Judges the encoder.
        position: Where the run continues.
        about: What checkpoints say of the run.
    """

    def __init__(
        self,
        trainer: Trainer,
        store: TileStore,
        loader: Loader,
        probe: Probe | None,
        position: Position,
        about: dict[str, Any],
    ) -> None:
        self._trainer, self._about = trainer, about
        self._out, self._settings = trainer.config.out or Path(), trainer.config.checkpoint
        self._loader = loader
        self._monitor = Monitor(trainer.config, trainer.runtime, trainer.method, store, position.step, probe)
        self._monitor.judge_first()
        self._saver = Saver(self._out, self._settings.keep, self._settings.keep_every)
        self._prepared = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Flush everything."""
        self._monitor.close()
        self._saver.__exit__(kind, error, at)

    def after(self, done: Step, position: Position, epoch: float, last: bool) -> str:
        """Take in a step, save where it is time; returns a note for the progress bar."""
        self._monitor.add(done, self._trainer.global_batch)
        line = self._monitor.log(position.step, last, epoch, self._loader.waited_s, self._loader.skipped)
        contents = self._trainer.method.networks(), self._trainer.state(), self._trainer.optimizer
        if not self._prepared:  # the optimizer has its moments now
            self._saver.prepare(*contents)
            self._prepared = True
        if last or position.step % self._settings.every == 0:
            self._saver.save(position, *contents, self._about)
        else:
            self._saver.poll()
        return f"loss {line['loss']:.3f}" if line else ""

    def finish(self, signal: int, position: Position) -> None:
        """Wait until the last checkpoint stands; mark the run where a signal was the reason."""
        self._saver.wait()
        if signal:
            stopping.mark(self._out, signal, position.step)


if __name__ == "__main__":
    from pipeline.cli import main

    leave(main(["pretrain", *sys.argv[1:]]))
