"""Progress that suits where it is seen: a bar with rate and time left on a terminal, plain lines in a batch log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 10.0


class Advance(Protocol):
    """Called with how much was done and, optionally, a short note."""

    def __call__(self, amount: int = 1, note: str = "") -> None:
        """Report progress."""


def say(text: str) -> None:
    """One line for the reader, on standard error: standard output is for results."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, total: int, unit: str, shown: bool = True) -> Iterator[Advance]:
    """Show the progress of ``total`` units of work on standard error.

    Args:
        title: What is being done.
        total: Units of work.
        unit: Name of a unit, in the plural.
        shown: False on ranks other than the first.
    """
    if not shown:
        yield lambda amount=1, note="": None
    elif sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total, rate="", note="")
            start = time.monotonic()

            def advance(amount: int = 1, note: str = "") -> None:
                done = bar.tasks[0].completed + amount
                rate = done / max(time.monotonic() - start, 1e-9)
                bar.update(task, advance=amount, rate=f"{rate:.1f} {unit}/s", note=note)

            yield advance
    else:
        yield _PlainLines(title, total, unit)


class _PlainLines:
    """A line every SECONDS_BETWEEN_LINES, and one at the end."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._done = 0
        self._start = time.monotonic()
        self._last = self._start

    def __call__(self, amount: int = 1, note: str = "") -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._last < SECONDS_BETWEEN_LINES and self._done < self._total:
            return
        self._last = now
        rate = self._done / max(now - self._start, 1e-9)
        left = (self._total - self._done) / max(rate, 1e-9)
        end = f", {left:.0f} s left" if self._done < self._total else f" in {now - self._start:.1f} s"
        say(
            f"{self._title}: {self._done}/{self._total} {self._unit}, {rate:.2f} {self._unit}/s{end}"
            + (f"  {note}" if note else "")
        )
