"""Heartbeats: what each rank is doing, in RUN/heartbeats/, so that one that is stuck can be named.

A thread of every rank writes its file every few seconds. A rank whose file no longer changes is stopped or gone; one
whose file does, at a step that others have left, is held up by what it says. Times are never compared between
machines: a reader goes by when it saw a file change.
"""

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Lock, Thread

from pipeline.runtime import Runtime
from tiling.progress import say

FOLDER = "heartbeats"
_BEAT_SECONDS, _BEATS_MISSED = 5.0, 3


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    rank: int
    host: str
    pid: int
    step: int
    doing: str
    count: int

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.pid}; step {self.step}, {self.doing})"


def _is_down(beat: Beat) -> bool:
    """Whether a rank of this machine is known to be stopped or gone; of other machines nothing is known."""
    if beat.host != socket.gethostname():
        return False
    try:
        stat = Path(f"/proc/{beat.pid}/stat").read_text()
    except OSError:
        return Path("/proc/self").exists()
    return stat.rpartition(")")[2].split()[0] in "TtZX"  # stopped, traced, unread exit status, dead


@dataclass
class _Seen:
    """A rank's last beat, and when it was first seen, and at that step, by this process's clock."""

    beat: Beat
    beat_at: float
    step_at: float


class Heartbeat:
    """This rank's heartbeat, and its watch over those of the others.

    Args:
        run: The RUN folder.
        runtime: This rank.
        timeout: Seconds after which ranks give up waiting for each other; a warning comes before.
    """

    def __init__(self, run: Path, runtime: Runtime, timeout: float) -> None:
        self._runtime, self._folder = runtime, run / FOLDER
        self._interval = min(_BEAT_SECONDS, timeout / 10)
        self._patience = min(timeout / 2, 60.0)
        self._step, self._doing, self._count = 0, "starting", 0
        self._seen: dict[int, _Seen] = {}
        self._warned: set[int] = set()
        self._lock = Lock()
        self._ended = Event()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write()
        self._thread = Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def at(self, step: int, doing: str) -> None:
        """Note at which step this rank is, and what it does; it is written with the next beat."""
        self._step, self._doing = step, doing

    def doing(self, what: str) -> None:
        """Note what this rank does now."""
        self._doing = what

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.json"

    def _write(self) -> None:
        self._count += 1
        beat = Beat(self._runtime.rank, socket.gethostname(), os.getpid(), self._step, self._doing, self._count)
        with suppress(OSError):  # a full disk is told by who must write, not by the heartbeat
            self._path(beat.rank).write_text(json.dumps(asdict(beat)))

    def _beat(self) -> None:
        while not self._ended.wait(self._interval):
            self._write()
            stuck = self._look()
            # One rank is enough to say it: the first of those that are not stuck.
            if stuck and self._runtime.rank == min(set(range(self._runtime.world)) - stuck.keys(), default=-1):
                for rank in stuck.keys() - self._warned:
                    say(f"warning: {stuck[rank]}")
            self._warned = set(stuck)

    def _look(self) -> dict[int, str]:
        """Read all beats; the ranks that have not moved for too long, and what is known of them."""
        now, found = time.monotonic(), {}
        with self._lock:
            for rank in range(self._runtime.world):
                with suppress(OSError, ValueError, TypeError):  # not there yet, or half written
                    beat = Beat(**json.loads(self._path(rank).read_text()))
                    last = self._seen.get(rank)
                    if last is None or last.beat.count != beat.count or last.beat.pid != beat.pid:
                        moved = last is None or (last.beat.step, last.beat.doing) != (beat.step, beat.doing)
                        self._seen[rank] = _Seen(beat, now, now if last is None or moved else last.step_at)
            furthest = max((seen.beat.step for seen in self._seen.values()), default=0)
            for rank, seen in self._seen.items():
                silent, still = now - seen.beat_at, now - seen.step_at
                if silent > max(self._patience, _BEATS_MISSED * self._interval):
                    found[rank] = f"{seen.beat} has given no sign of life for {silent:.0f} s"
                elif still > self._patience and seen.beat.step < furthest:
                    found[rank] = f"{seen.beat} has been at that for {still:.0f} s, others are at step {furthest}"
        return found

    def stuck(self) -> str:
        """Which ranks hold the others up, for an error's text; waits until some beats must have been missed."""
        silent = _BEATS_MISSED * self._interval
        end = time.monotonic() + silent + self._interval
        while True:
            with self._lock:
                seen = list(self._seen.values())
            now = time.monotonic()
            gone = [str(one.beat) for one in seen if now - one.beat_at > silent or _is_down(one.beat)]
            if gone:
                return f"no sign of life from {'; '.join(gone)}"
            if now > end:
                break
            time.sleep(0.1)
        least = min((one.beat.step for one in seen), default=0)
        behind = [str(one.beat) for one in seen if one.beat.step == least]
        everyone = len(behind) == len(seen)
        return "all ranks give signs of life at one step" if everyone else f"behind the others: {'; '.join(behind)}"

    def close(self) -> None:
        """Stop, and remove this rank's file."""
        self._ended.set()
        self._thread.join()
        self._path(self._runtime.rank).unlink(missing_ok=True)
        with suppress(OSError):  # others are still at work
            self._folder.rmdir()
