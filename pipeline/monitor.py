"""What a run reports: RUN/metrics.jsonl, one line per logged step, and TensorBoard beside it.

A line holds the means of the steps since the line before. A run that is judged by a probe (``pipeline.probe``) begins
with a line of step 0, which holds what the encoder is worth before the first step and has no loss.
"""

import json
import math
import resource
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from pipeline import alarms
from pipeline.config import PretrainConfig
from pipeline.flops import flops_per_sample, peak
from pipeline.methods.protocol import Method
from pipeline.probe import Probe
from pipeline.rankme import RecentFeatures
from pipeline.runtime import Runtime
from pipeline.trainer import Step, global_batch
from tiling import atomic
from tiling.progress import say
from tiling.store import TileStore

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


def peak_memory_gib(device: torch.device) -> float:
    """The most memory that was in use at once: by tensors on a GPU, by the process on a CPU; GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Monitor:
    """What the first rank measures, judges and writes while the run goes on.

    Args:
        config: The run.
        runtime: This rank.
        method: What is trained.
        store: What it is trained on.
        first_step: Step that the run continues from; later lines of an earlier attempt are dropped.
        probe: Judges the encoder every ``monitor.probe_every`` steps; None does not.
    """

    def __init__(
        self,
        config: PretrainConfig,
        runtime: Runtime,
        method: Method,
        store: TileStore,
        first_step: int,
        probe: Probe | None = None,
    ) -> None:
        run = config.out or Path()
        kept = [line for line in read_metrics(run) if line["step"] <= first_step]
        atomic.write_bytes(run / METRICS, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = (run / METRICS).open("a")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)
        self._config, self._runtime, self._method, self._probe = config, runtime, method, probe
        self._lines = deque(kept, maxlen=alarms.LINES_NEEDED)
        self._usage = self._measure_usage(store)
        self._features = RecentFeatures()
        self._sums: dict[str, torch.Tensor] = {}
        self._schedules: dict[str, float] = {}
        self._steps, self._samples, self._waited_s = 0, 0, 0.0
        self._skipped_before = kept[-1].get("skipped_tiles", 0) if kept else 0
        self._since = time.monotonic()

    def _measure_usage(self, store: TileStore) -> dict[str, float]:
        """GFLOP per tile, and TFLOP/s that all ranks could reach together; empty where the first cannot be known."""
        runtime = self._runtime
        try:
            flops = flops_per_sample(self._config, store)
        except RuntimeError as error:  # a figure keeps no run from training
            say(f"no mfu: the arithmetic cannot be counted ({' '.join(str(error).split())[:200]})")
            return {}
        best = peak(runtime.device, self._config.train.precision)
        how = "measured" if best.measured else "from its data sheet"
        say(f"{flops / 1e9:.4g} GFLOP a tile; mfu is of {best.flops / 1e12:.4g} TFLOP/s a rank ({best.of}, {how})")
        return {
            "gflop_per_tile": flops / 1e9,
            "peak_tflops": best.flops * runtime.world / 1e12,
            "peak_is_measured": float(best.measured),
        }

    def judge_first(self) -> None:
        """Before the first step of a new run: the line of step 0, where there is a probe."""
        if self._probe is not None and not self._lines:
            self._write({"step": 0, "epoch": 0.0, **self._judged(self._probe, 0)})
            self._since = time.monotonic()

    def add(self, step: Step, samples: int) -> None:
        """Take in one step's figures, of so many tiles on all ranks; nothing is copied from the device."""
        for name, value in step.figures.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._features.add(step.features)
        self._schedules = step.schedules
        self._steps += 1
        self._samples += samples

    def log(
        self, step: int, last: bool, epoch: float, waited_s: float = 0.0, skipped: int = 0
    ) -> dict[str, Any] | None:
        """Write a line when one is due.

        Args:
            step: Steps done.
            last: Whether the run ends here, so that a line is due in any case.
            epoch: Passes over the data so far.
            waited_s: Seconds that this rank has waited for tiles since it began.
            skipped: Damaged tiles that this rank has left out since it began.

        Returns:
            The line; None when none is due.
        """
        judged = self._probe is not None and (
            step % self._config.monitor.probe_every == 0 or step == self._config.train.steps
        )
        if not (judged or last or step % self._config.train.log_every == 0):
            return None
        line: dict[str, Any] = {"step": step}
        line |= {name: float(total) / self._steps for name, total in self._sums.items()}  # waits for the device
        seconds = max(time.monotonic() - self._since, 1e-9)
        line |= {"rankme": self._features.rankme(), **self._schedules, "epoch": epoch, **self._method.constants}
        line |= self._speed(seconds, waited_s)
        line |= self._damage(step, skipped)
        if judged and self._probe is not None:
            line |= self._judged(self._probe, step)
        self._sums, self._steps, self._samples, self._waited_s = {}, 0, 0, waited_s
        self._since = time.monotonic()
        return self._write(line)

    def _speed(self, seconds: float, waited_s: float) -> dict[str, float]:
        """Of the steps since the last line."""
        rate = self._samples / seconds
        found = {
            "samples_per_s": rate,
            "data_wait_share": (waited_s - self._waited_s) / seconds,
            "memory_gib": peak_memory_gib(self._runtime.device),
            **self._usage,
        }
        if self._usage:
            found["mfu"] = rate * self._usage["gflop_per_tile"] / (1000 * self._usage["peak_tflops"])
        return found

    def _damage(self, step: int, skipped: int) -> dict[str, float]:
        """Damaged tiles that this rank has left out since step 0, and as a share of the tiles it was given."""
        total = self._skipped_before + skipped
        given = step * global_batch(self._config, self._runtime.world) / self._runtime.world
        return {"skipped_tiles": total, "skipped_share": total / given}

    def _judged(self, probe: Probe, step: int) -> dict[str, float]:
        start = time.monotonic()
        found = probe.judge(self._method.encoder)
        seconds = time.monotonic() - start
        say(f"step {step}: knn {found['knn']:.3f} (chance {found['knn_chance']:.3f}), judged in {seconds:.1f} s")
        return found

    def _write(self, line: dict[str, Any]) -> dict[str, Any]:
        """Add the alarms, say which begin and end, write."""
        finite: dict[str, Any] = {key: value if math.isfinite(value) else None for key, value in line.items()}
        before: list[str] = self._lines[-1].get("alarms", []) if self._lines else []
        standing = alarms.standing([*self._lines, finite], self._config.optim.warmup_steps)
        names = [alarm.name for alarm in standing]
        for alarm in standing:
            if alarm.name not in before:
                say(f"alarm {alarm.name} at step {line['step']}: {alarm}")
                self._board.add_text("alarms", f"{alarm.name}: {alarm}", line["step"])
        for name in before:
            if name not in names:
                say(f"alarm {name} is over at step {line['step']}")
        finite["alarms"] = names
        self._lines.append(finite)
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        for name, value in line.items():
            if name != "step":
                self._board.add_scalar(name, value, line["step"])
        return line

    def close(self) -> None:
        """Flush everything."""
        self._file.close()
        self._board.close()
