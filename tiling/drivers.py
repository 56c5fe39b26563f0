"""Who tiles the slides: this process, worker processes, or the ranks of an MPI world. All do the same to a slide.

A slide's failure stays with the slide: it becomes an outcome with the reason. Only what would fail every slide (a full
disk) ends a run.
"""

import errno
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import cast

import cv2

from tiling import claims
from tiling.datasets import Source
from tiling.errors import BonyError, UsageError
from tiling.identity import public_text
from tiling.store import WORK
from tiling.write import Job, Outcome, give_up, write_source

_STORE_FAILS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


Driver = Callable[[Job, Sequence[Source]], Iterator[Outcome]]


def attempt(job: Job, source: Source) -> Outcome:
    """``write_source``, with the slide's failure turned into an outcome.

    Raises:
        BonyError: The store cannot be written at all.
    """
    cv2.setNumThreads(1)  # slides run side by side: threads of OpenCV would only get in each other's way
    try:
        outcome = write_source(job, source)
        problem, remark = (public_text(text, source) for text in (outcome.problem, outcome.remark))
        return replace(outcome, problem=problem, remark=remark)
    except claims.HeldError as error:
        return Outcome(source.slide_id, problem=str(error), written=False, held=True)
    except BonyError as error:
        problem = str(error)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _STORE_FAILS:
            what, do = f"cannot be written ({error.strerror})", "make room, then run it again"
            raise BonyError(what, job.store, do) from error
        # Whatever a decoder trips over, the other slides must go on.
        problem = f"unexpected {type(error).__name__}: {error}"
    text = public_text(problem, source).removeprefix(f"{source.slide_id}: ")
    return Outcome(source.slide_id, problem=text, written=False)


def processes(count: int) -> Driver:
    """Tile in this process (1), or in ``count`` worker processes.

    Raises:
        UsageError: ``count`` is below 1.
    """
    if count < 1:
        raise UsageError(f"--workers is {count}, must be at least 1")

    return _here if count == 1 else partial(_in_pool, count)


def _here(job: Job, sources: Sequence[Source]) -> Iterator[Outcome]:
    yield from (attempt(job, source) for source in sources)


def _in_pool(count: int, job: Job, sources: Sequence[Source]) -> Iterator[Outcome]:
    """Outcomes as they come; when a worker dies, the slides go on without the one that killed it.

    Raises:
        BonyError: Workers die before they begin a slide.
    """
    waiting, idle = {source.slide_id: source for source in sources}, 0
    while waiting:
        before = len(waiting)
        yield from _until_a_worker_dies(job, waiting, count)
        # Its slide is among those whose claims are left; alone, only the one that kills its worker does so again.
        suspects = [name for name in waiting if claims.is_claimed(job.store / WORK, name)]
        for name in suspects:
            alone = {name: waiting.pop(name)}
            yield from _until_a_worker_dies(job, alone, 1)
            for dead in alone:
                give_up(job.store, dead)
                yield Outcome(dead, problem=_KILLS, written=False)
        idle = idle + 1 if len(waiting) == before else 0
        if idle == _IDLE_POOLS:
            raise BonyError("worker processes die before they begin a slide", do="use fewer --workers, or see dmesg")


_IDLE_POOLS = 3
_KILLS = "the process that wrote it died twice, the second time alone (a decoder's crash, or out of memory)"


def _until_a_worker_dies(job: Job, waiting: dict[str, Source], count: int) -> Iterator[Outcome]:
    """Outcomes as they come; each slide that is done leaves ``waiting``."""
    # spawn: forked children would inherit threads and locks of imagecodecs and OpenCV.
    with ProcessPoolExecutor(min(count, len(waiting)), mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            for outcome in _submitted(pool, job, list(waiting.values())):
                del waiting[outcome.slide_id]
                yield outcome
        except BrokenProcessPool:
            return


def _submitted(pool: Executor, job: Job, sources: Sequence[Source]) -> Iterator[Outcome]:
    futures = [pool.submit(attempt, job, source) for source in sources]
    try:
        for future in as_completed(futures):
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


@contextmanager
def mpi() -> Iterator[Driver | None]:
    """A driver for rank 0 of an MPI world, whose other ranks take slides from it; they are given None, at the end.

    Raises:
        UsageError: There is no MPI, or Slurm started several tasks that do not know of each other.
    """
    try:
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor
    except (ImportError, RuntimeError) as error:
        advice = "pip install 'bony[mpi]', or use --workers or --part"
        raise UsageError(f"--mpi needs mpi4py and an MPI library ({error})", do=advice) from error
    tasks = int(os.environ.get("SLURM_NTASKS", "1"))
    if tasks > 1 and MPI.COMM_WORLD.size == 1:
        what = f"Slurm started {tasks} tasks, but MPI sees a world of 1: each would tile everything"
        raise UsageError(what, do="start them with `srun --mpi=pmi2` (or mpiexec), or use --part")
    with MPICommExecutor(MPI.COMM_WORLD, root=0) as pool:
        given = cast(Executor | None, pool)  # its stubs say that it gives itself
        yield None if given is None else partial(_submitted, given)
