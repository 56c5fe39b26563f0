"""The RUN folder: what it says of itself, who may write to it, and whether it may be continued."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pipeline.boxes import RUN
from pipeline.config import PretrainConfig, fixed_values, flatten
from pipeline.runtime import Runtime
from pipeline.trainer import global_batch
from tiling import atomic, claims
from tiling.errors import StoreError, UsageError
from tiling.progress import say
from tiling.store import TileStore

WORK = "work"
# What may stand in a RUN that another job is just beginning.
_BEGUN = {WORK, "heartbeats"}


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Be the only job that writes to RUN for the block.

    A job that Slurm requeued may find its own dead predecessor on another node: it waits until that one counts as dead.

    Raises:
        HeldError: Another job that lives holds it; the message says who.
    """
    requeued = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
    wait = 1.5 * claims.STALE_SECONDS if requeued else 0.0
    try:
        with ExitStack() as block:
            try:
                block.enter_context(claims.claimed(run / WORK, "run", wait))
            except claims.HeldError as error:
                raise claims.HeldError(error.what, run, "wait for that job, or choose another --out") from None
            yield
    finally:
        with suppress(OSError):  # something is in it, as there should be
            run.rmdir()


def describe(config: PretrainConfig, runtime: Runtime, store: TileStore) -> dict[str, Any]:
    """What RUN/run.json and every checkpoint say of the run; no patient data."""
    return {
        "config": flatten(asdict(config)),
        "global_batch": global_batch(config, runtime.world),
        "micro_batch": config.train.batch_per_rank * runtime.world,
        "ranks": runtime.world,
        "begins_with": None,
        "store_fingerprint": store.fingerprint,
        "dataset": store.description.dataset,
        "slides": len(store.slide_ids),
        "tiles": len(store),
        "tiling": store.description.settings.to_json(),
        "mpp": store.mpp,
        "software": {"bony": version("bony"), "torch": torch.__version__, "timm": version("timm")},
    }


def require_usable(run: Path, about: dict[str, Any], config: PretrainConfig) -> None:
    """RUN must be new, empty, or a run that may be continued with this config, these ranks and this store.

    Raises:
        UsageError: It is none of these.
        StoreError: It was started on another store.
    """
    if (run / RUN.file).exists():
        _require_same(run, RUN.read(run), about, config)
    elif run.exists() and {path.name for path in run.iterdir()} - _BEGUN:
        raise UsageError("exists and is no run", run, "choose another --out")


def begin(run: Path, about: dict[str, Any]) -> None:
    """Write RUN/run.json, unless the run is being continued; say what is trained on."""
    say(f"{run}: {about['tiles']} tiles, {about['global_batch']} per step, {about['ranks']} ranks")
    if not (run / RUN.file).exists():
        atomic.write_json(run / RUN.file, RUN.describe(about))
        return
    before = RUN.read(run)["micro_batch"]
    if before != about["micro_batch"]:
        say(f"BatchNorm sees micro-batches of {about['micro_batch']} tiles, not of {before} as before")


def begins_with(run: Path) -> dict[str, str] | None:
    """What a run's first weights were, where they were not random ones."""
    known: dict[str, str] | None = RUN.read(run)["begins_with"]
    return known


def differing(known: dict[str, Any], config: PretrainConfig) -> Iterator[tuple[str, Any, Any]]:
    """Keys that must stay the same and do not: each with the value in ``known``, a run.json, and in ``config``."""
    defaults = fixed_values(PretrainConfig())  # for keys that Bony did not have when the run was started
    for key, now in fixed_values(config).items():
        before = known["config"].get(key, defaults[key])
        if before != now:
            yield key, before, now


def _require_same(run: Path, known: dict[str, Any], about: dict[str, Any], config: PretrainConfig) -> None:
    for key, before, now in differing(known, config):
        raise UsageError(
            f"run was started with {key} = {before}, not {now}",
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
