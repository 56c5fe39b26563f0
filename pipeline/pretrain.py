"""The training loop: short, method-agnostic. ``torchrun -m pipeline.pretrain`` and ``bony pretrain`` run it."""

import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pipeline import checkpoint
from pipeline.boxes import RUN
from pipeline.checkpoint import Position
from pipeline.config import PretrainConfig, fixed_values, flatten
from pipeline.data.loader import Loader
from pipeline.data.randomness import derive_seed
from pipeline.methods import build_method
from pipeline.monitor import Monitor
from pipeline.runtime import Runtime, joined
from pipeline.trainer import Trainer, global_batch
from tiling import atomic
from tiling.errors import StoreError, UsageError
from tiling.progress import progress, say
from tiling.store import TileStore

_STREAM_INIT = 1


def pretrain(config: PretrainConfig) -> Path:
    """Run, or continue, a pretraining run; under torchrun as one of its ranks.

    Returns:
        The RUN folder.

    Raises:
        UsageError: ``data`` or ``out`` is missing, or RUN was started with another config.
        StoreError: The store is unusable, empty, or not the one the run was started on.
        CheckpointError: RUN has checkpoints, and none is sound or fits.
        BonyError: The loss is no longer finite.
    """
    if config.data is None or config.out is None:
        raise UsageError(f"--{'data' if config.data is None else 'out'} is missing")
    with joined() as runtime, TileStore(config.data, config.train.threads) as store:
        if len(store) == 0:
            raise StoreError("no kept tile in this store", config.data)
        about = describe(config, runtime, store)
        _require_usable(config.out, about, config)
        torch.manual_seed(derive_seed(config.train.seed, _STREAM_INIT))
        trainer = Trainer(config, runtime, build_method(config, runtime.device))
        runtime.barrier()  # all ranks have looked at RUN before the first one makes it
        if runtime.is_first:
            _begin(config.out, about)
        position = _resume(config.out, trainer, runtime)
        if position.step < config.train.steps:
            _loop(trainer, store, position, about)
        elif runtime.is_first:
            say(f"{config.out}: all {config.train.steps} steps are done already")
        return config.out


def _loop(trainer: Trainer, store: TileStore, position: Position, about: dict[str, Any]) -> None:
    """From ``position`` to the last step, saving on the way."""
    config, runtime, method = trainer.config, trainer.runtime, trainer.method
    run, train = config.out or Path(), config.train
    batch, samples = global_batch(config, runtime.world), position.samples_seen
    loader = Loader(store, train.seed, train.batch_per_rank, runtime.rank, runtime.world, samples, runtime.device)
    monitor = Monitor(run, position.step, train.log_every, method.constants) if runtime.is_first else None
    batches = iter(loader)
    try:
        with progress("pretraining", train.steps - position.step, "steps", shown=runtime.is_first) as advance:
            for step in range(position.step, train.steps):
                figures, now = trainer.step(batches, step, epoch=samples / len(store))
                samples += batch
                done, note = step + 1, ""
                if monitor is not None:
                    monitor.add(figures, batch)
                    line = monitor.log(done, done == train.steps, {**now, "epoch": samples / len(store)})
                    note = f"loss {line['loss']:.3f}" if line else ""
                if done % config.checkpoint.every == 0 or done == train.steps:
                    _save(trainer, Position(done, samples), about)
                advance(note=note)
    finally:
        loader.close()
        if monitor is not None:
            monitor.close()


def describe(config: PretrainConfig, runtime: Runtime, store: TileStore) -> dict[str, Any]:
    """What RUN/run.json and every checkpoint say of the run; no patient data."""
    return {
        "config": flatten(asdict(config)),
        "global_batch": global_batch(config, runtime.world),
        "ranks": runtime.world,
        "store_fingerprint": store.fingerprint,
        "dataset": store.description.dataset,
        "slides": len(store.slide_ids),
        "tiles": len(store),
        "tiling": store.description.settings.to_json(),
        "mpp": store.mpp,
        "software": {"bony": version("bony"), "torch": torch.__version__, "timm": version("timm")},
    }


def _require_usable(run: Path, about: dict[str, Any], config: PretrainConfig) -> None:
    """RUN must be new, empty, or a run that may be continued with this config, these ranks and this store."""
    if (run / RUN.file).exists():
        _require_same(run, RUN.read(run), about, config)
    elif run.exists() and any(run.iterdir()):
        raise UsageError("exists and is no run", run, "choose another --out")


def _begin(run: Path, about: dict[str, Any]) -> None:
    """Make RUN, unless it is being continued, and say what is trained on."""
    if not (run / RUN.file).exists():
        run.mkdir(parents=True, exist_ok=True)
        atomic.write_json(run / RUN.file, RUN.describe(about))
    say(f"{run}: {about['tiles']} tiles, {about['global_batch']} per step, {about['ranks']} ranks")


def _require_same(run: Path, known: dict[str, Any], about: dict[str, Any], config: PretrainConfig) -> None:
    for key, value in fixed_values(config).items():
        if known["config"].get(key) != value:
            raise UsageError(
                f"run was started with {key} = {known['config'].get(key)}, not {value}",
                run,
                "continue with the same config, or choose another --out",
            )
    if known["global_batch"] != about["global_batch"]:
        raise UsageError(
            f"run was started with {known['global_batch']} samples a step, not {about['global_batch']}",
            run,
            "keep ranks x train.batch_per_rank x train.accumulate",
        )
    if known["store_fingerprint"] != about["store_fingerprint"]:
        raise StoreError("the store's content is not what this run was started on", config.data, "use that store")


def _resume(run: Path, trainer: Trainer, runtime: Runtime) -> Position:
    """Fill everything from the newest sound checkpoint, where there is one."""
    folder = checkpoint.newest_sound(run)
    if folder is None:
        if runtime.is_first:
            say(f"learning rate {trainer.lr:.3g} after the linear rule and its cap ({trainer.config.optim.lr_cap:.3g})")
        return Position(0, 0)
    position = checkpoint.load(folder, trainer.method.networks(), trainer.method.state(), trainer.optimizer)
    if runtime.is_first:
        say(f"continuing from {folder} at step {position.step}")
    return position


def _save(trainer: Trainer, position: Position, about: dict[str, Any]) -> None:
    if trainer.runtime.is_first:
        method, config = trainer.method, trainer.config
        run = config.out or Path()
        checkpoint.save(
            run, position, method.networks(), method.state(), trainer.optimizer, about, config.checkpoint.keep
        )
    trainer.runtime.barrier()


if __name__ == "__main__":
    from pipeline.cli import main

    sys.exit(main(["pretrain", *sys.argv[1:]]))
