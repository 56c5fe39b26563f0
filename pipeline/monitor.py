"""What a run reports: RUN/metrics.jsonl, one line per logged step, and TensorBoard beside it."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from tiling import atomic

METRICS = "metrics.jsonl"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All whole lines of RUN/metrics.jsonl; a last line that a kill cut short is left out."""
    path = run / METRICS
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


class Monitor:
    """Averages figures between logged steps and writes them.

    Args:
        run: The RUN folder.
        step: Step that the run continues from; later lines of an earlier attempt are dropped.
        every: Steps between lines.
        constants: Figures that stay the same, written into each line.
    """

    def __init__(self, run: Path, step: int, every: int, constants: Mapping[str, float]) -> None:
        kept = [line for line in read_metrics(run) if line["step"] <= step]
        atomic.write_bytes(run / METRICS, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = (run / METRICS).open("a")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self._every, self._constants = every, dict(constants)
        self._sums: dict[str, torch.Tensor] = {}
        self._steps, self._samples = 0, 0
        self._since = time.monotonic()

    def add(self, figures: Mapping[str, torch.Tensor], samples: int) -> None:
        """Take in one step's figures; nothing is copied from the device."""
        for name, value in figures.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._steps += 1
        self._samples += samples

    def log(self, step: int, last: bool, values: Mapping[str, float]) -> dict[str, float] | None:
        """Write a line when ``step`` is due; returns it, or None when it is not due."""
        if step % self._every and not last:
            return None
        now = time.monotonic()
        line: dict[str, float] = {"step": step}
        line |= {name: float(total) / self._steps for name, total in self._sums.items()}
        line |= {**values, **self._constants, "samples_per_s": self._samples / max(now - self._since, 1e-9)}
        self._file.write(json.dumps({k: v if math.isfinite(v) else None for k, v in line.items()}) + "\n")
        self._file.flush()
        for name, value in line.items():
            if name != "step":
                self._board.add_scalar(name, value, step)
        self._sums, self._steps, self._samples, self._since = {}, 0, 0, now
        return line

    def close(self) -> None:
        """Flush everything."""
        self._file.close()
        self._board.close()
