"""One run of tiling: every slide of a plan is tiled, quarantined with a reason, or found complete; then the index.

Whoever tiles (processes, MPI ranks, the tasks of a Slurm array), the store is the same, byte for byte.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiling import claims
from tiling.datasets import Dataset, Source
from tiling.drivers import Driver, processes
from tiling.errors import BonyError, UsageError
from tiling.index import SLIDES, build_index
from tiling.limits import DEFAULT_LIMITS, Limits
from tiling.plan import share
from tiling.progress import progress, say
from tiling.quarantine import entry, update_quarantine
from tiling.settings import TileSettings
from tiling.store import DESCRIPTION, WORK, Description, prepare
from tiling.summary import StoreSummary, summarise, write_page
from tiling.write import Job, Outcome

# No slide id begins with it.
_STORE_CLAIM = "+store"
_WAIT_SECONDS = 600.0


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Args:
        store: The store.
        outcomes: One per source of this run, by slide id.
        quarantined: Ids of these sources that quarantine.jsonl lists: left out, or damaged in part, now or earlier.
        missing: How many slides of the data set are neither in the store nor left out: other tasks' or jobs'.
        seconds: How long it took.
        totals: What the whole store holds now.
    """

    store: Path
    outcomes: tuple[Outcome, ...]
    quarantined: tuple[str, ...]
    missing: int
    seconds: float
    totals: StoreSummary

    @property
    def held(self) -> tuple[Outcome, ...]:
        """Slides that another job was writing."""
        return tuple(outcome for outcome in self.outcomes if outcome.held)


def tile(
    dataset: Dataset,
    store: Path,
    settings: TileSettings,
    driver: Driver | None = None,
    part: tuple[int, int] = (1, 1),
    limits: Limits = DEFAULT_LIMITS,
) -> Summary:
    """Tile every source of a data set, or one part of them, into a store; then index it, if nothing is missing.

    Complete slides are skipped. A slide that cannot be tiled is quarantined; the others are not touched by it.

    Args:
        dataset: What to tile: all of it, whatever the part.
        store: New folder, or a store with the same settings.
        settings: What decides the store's content.
        driver: Who tiles; this process, if not given.
        part: Which of how many shares, counted from 1: of a Slurm array.
        limits: What a slide's header may claim.

    Returns:
        The summary; the caller turns quarantined slides into exit code 3.

    Raises:
        StoreError: The store exists with other settings.
        BonyError: Not one slide could be tiled; a store made by this call is removed again.
    """
    if not dataset.sources:
        raise UsageError("no slide to tile")
    if not 1 <= part[0] <= part[1]:
        raise UsageError(f"--part is {part[0]}/{part[1]}, must be I/N with I from 1 to N")
    start = time.monotonic()
    is_new = not (store / DESCRIPTION).exists()
    class_map = dataset.scheme.to_json() if dataset.scheme else None
    prepare(store, Description(settings, dataset.name, dataset.class_names, class_map, dataset.ids))
    for remark in dataset.remarks:
        say(f"{dataset.name}: {remark}")
    sources = share(dataset.sources, *part)
    outcomes = _outcomes(Job(store, settings, dataset.class_names, limits), sources, driver or processes(1))
    with claims.claimed(store / WORK, _STORE_CLAIM, wait=_WAIT_SECONDS):
        looked_at = {one.slide_id for one in outcomes if not one.skipped and not one.held}
        told = [one for one in outcomes if one.problem and not one.held]
        problems = [entry(one.slide_id, not one.written, one.problem) for one in told]
        lines = update_quarantine(store, problems, looked_at)
        left_out = {line["slide_id"] for line in lines if line["left_out"]}
        totals = summarise(store)
        present = {path.name for path in (store / SLIDES).iterdir()}
        missing = {source.slide_id for source in dataset.sources} - present - left_out
        if present and (not missing or part == (1, 1)):
            build_index(store)
            write_page(store, totals)
    if not present and not missing:
        raise _nothing_tiled(store, lines, remove=is_new and part == (1, 1))
    listed = {line["slide_id"] for line in lines}
    quarantined = tuple(outcome.slide_id for outcome in outcomes if outcome.slide_id in listed)
    return Summary(store, tuple(outcomes), quarantined, len(missing), time.monotonic() - start, totals)


def _nothing_tiled(store: Path, lines: list[dict[str, Any]], remove: bool) -> BonyError:
    """The error for a store without a slide, which is removed if this run made it."""
    first = next(line for line in lines if line["left_out"])
    what = f"no slide could be tiled; the first one: {first['slide_id']}: {first['reason']}"
    if not remove:
        return BonyError(what, store)
    shutil.rmtree(store)
    return BonyError(what, do="no store was left")


def _outcomes(job: Job, sources: list[Source], driver: Driver) -> list[Outcome]:
    """Outcomes of all sources, by slide id."""
    outcomes = []
    with progress("tiling", len(sources), "slides") as advance:
        for outcome in driver(job, sources):
            outcomes.append(outcome)
            advance(note=outcome.slide_id)
            if outcome.problem or outcome.remark:
                say(f"{outcome.slide_id}: {outcome.problem or outcome.remark}")
    return sorted(outcomes, key=lambda outcome: outcome.slide_id)
