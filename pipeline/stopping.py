"""Stopping on a signal: noted by the rank that gets it, agreed by all at the end of a step, saved, marked.

RUN/PREEMPTED says that a run was stopped this way, at which step. A job script requeues on it, because torchrun exits
with 1 after SIGTERM even when all ranks leave with 0.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from pipeline.runtime import Runtime
from tiling import atomic
from tiling.errors import BonyError

MARKER = "PREEMPTED"
# Preemption and time limits of schedulers, their early warnings, and Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class Stopped(BonyError):
    """The run was asked to stop; everything is saved. The exit code is a shell's for this signal."""

    def __init__(self, number: int, step: int, run: Path) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name} after step {step}, which is saved",
            run,
            "run the same command again to go on",
        )
        self.exit_code = 128 + number


class Stopping:
    """Notes signals for the length of ``listening``.

    Args:
        runtime: This rank.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime, self._noted = runtime, 0

    @contextmanager
    def listening(self) -> "Iterator[Stopping]":
        """Take the signals; what handled them before does so again afterwards."""
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: now
        self._noted = number
        # Not by print: a handler that runs amid another print would raise, and lose what it came to save.
        os.write(2, f"{signal.Signals(number).name}: stopping after this step\n".encode())

    def agreed(self) -> int:
        """The signal that some rank has got, 0 for none; to be called by all ranks after each step."""
        return self._runtime.largest(self._noted)


def mark(run: Path, number: int, step: int) -> None:
    """Write RUN/PREEMPTED, once the checkpoint of ``step`` stands."""
    said = {"signal": signal.Signals(number).name, "step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    atomic.write_json(run / MARKER, said)


def unmark(run: Path) -> None:
    """Remove RUN/PREEMPTED: the run goes on."""
    (run / MARKER).unlink(missing_ok=True)
