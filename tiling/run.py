"""One plan, run over worker processes: every slide is tiled, quarantined with a reason, or found complete."""

import json
import multiprocessing
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import cv2

from tiling import atomic
from tiling.datasets import Dataset, Source
from tiling.errors import BonyError, UsageError
from tiling.index import build_index, slide_folders
from tiling.progress import progress, say
from tiling.settings import TileSettings
from tiling.store import DESCRIPTION, Description, prepare
from tiling.write import Outcome, write_source

QUARANTINE = "quarantine.jsonl"


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
    listed = _record_quarantine(store, outcomes)
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


def _record_quarantine(store: Path, outcomes: list[Outcome]) -> set[str]:
    """Write STORE/quarantine.jsonl: the problems of this run, and older ones of slides it did not touch.

    Returns:
        The ids of all slides listed.
    """
    path = store / QUARANTINE
    older = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    redone = {outcome.slide_id for outcome in outcomes if not outcome.skipped}
    lines = [entry for entry in older if entry["slide_id"] not in redone]
    lines += [
        {"slide_id": outcome.slide_id, "left_out": not outcome.written, "reason": outcome.problem}
        for outcome in outcomes
        if outcome.problem
    ]
    lines.sort(key=lambda entry: entry["slide_id"])
    if lines or path.exists():
        atomic.write_bytes(path, "".join(json.dumps(entry) + "\n" for entry in lines).encode())
    return {entry["slide_id"] for entry in lines}
