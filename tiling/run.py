"""One plan, run over worker processes: every slide is tiled, quarantined with a reason, or found complete."""

import multiprocessing
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import cv2

from tiling.datasets import Dataset, Source
from tiling.errors import BonyError, UsageError
from tiling.index import build_index, slide_folders
from tiling.progress import progress, say
from tiling.quarantine import entry, update_quarantine
from tiling.settings import TileSettings
from tiling.store import DESCRIPTION, Description, prepare
from tiling.write import Outcome, write_source


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Args:
        store: The store.
        outcomes: One per source, by slide id.
        quarantined: Ids of the sources that quarantine.jsonl lists: left out, or damaged in part, now or earlier.
        seconds: How long it took.
    """

    store: Path
    outcomes: tuple[Outcome, ...]
    quarantined: tuple[str, ...]
    seconds: float


def tile(dataset: Dataset, store: Path, settings: TileSettings, workers: int = 1) -> Summary:
    """Tile every source of a data set into a store, then index it.

    Complete slides are skipped. A slide that cannot be tiled is quarantined; the others are not touched by it.

    Args:
        dataset: What to tile.
        store: New folder, or a store with the same settings.
        settings: What decides the store's content.
        workers: Processes; each takes one slide at a time.

    Returns:
        The summary; the caller turns quarantined slides into exit code 3.

    Raises:
        StoreError: The store exists with other settings.
        BonyError: Not one slide could be tiled; a store made by this call is removed again.
    """
    if workers < 1:
        raise UsageError(f"--workers is {workers}, must be at least 1")
    if not dataset.sources:
        raise UsageError("no slide to tile")
    start = time.monotonic()
    is_new = not (store / DESCRIPTION).exists()
    prepare(store, Description(settings, dataset.name, dataset.class_names))
    for remark in dataset.remarks:
        say(f"{dataset.name}: {remark}")
    outcomes = []
    with progress("tiling", len(dataset.sources), "slides") as advance:
        for outcome in _outcomes(dataset, store, settings, workers):
            outcomes.append(outcome)
            advance(note=outcome.slide_id)
            if outcome.problem or outcome.remark:
                say(f"{outcome.slide_id}: {outcome.problem or outcome.remark}")
    outcomes.sort(key=lambda outcome: outcome.slide_id)
    if is_new and not slide_folders(store):
        shutil.rmtree(store)
        raise BonyError(f"no slide could be tiled; the first one: {outcomes[0].problem}", do="no store was left")
    problems = [entry(one.slide_id, not one.written, one.problem) for one in outcomes if one.problem]
    lines = update_quarantine(store, problems, {one.slide_id for one in outcomes if not one.skipped})
    listed = {line["slide_id"] for line in lines}
    build_index(store)
    quarantined = tuple(outcome.slide_id for outcome in outcomes if outcome.slide_id in listed)
    return Summary(store, tuple(outcomes), quarantined, time.monotonic() - start)


def _outcomes(dataset: Dataset, store: Path, settings: TileSettings, workers: int) -> Iterator[Outcome]:
    """Outcomes as they come."""
    jobs = [(store, source, settings, dataset.class_names) for source in dataset.sources]
    if workers == 1:
        yield from (attempt(*job) for job in jobs)
        return
    # spawn: forked children would inherit threads and locks of imagecodecs and OpenCV.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:
        try:
            for future in as_completed([pool.submit(attempt, *job) for job in jobs]):
                yield future.result()
        except BrokenProcessPool as error:
            raise BonyError(
                "a worker process died (killed, or out of memory)",
                store,
                "run the same command again: finished slides are kept; use fewer --workers if memory was short",
            ) from error


def _one_thread() -> None:
    """Workers share the machine by processes, so OpenCV's own threads would only get in each other's way."""
    cv2.setNumThreads(1)


def attempt(store: Path, source: Source, settings: TileSettings, class_names: tuple[str, ...]) -> Outcome:
    """``write_source``, with an error turned into a quarantined outcome."""
    try:
        return write_source(store, source, settings, class_names)
    except BonyError as error:
        return Outcome(source.slide_id, problem=str(error), written=False)
