"""The section of a pretraining run, and several runs compared. Nothing here loads torch."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import alarms
from pipeline.boxes import CHECKPOINT, RUN
from pipeline.config import PretrainConfig, flatten
from pipeline.report import figures
from pipeline.report.page import Cell, Fold, Link, Note, Part, Picture, Row, Section, Stack, Table
from pipeline.report.text import DASH, count, counted, decimal, duration, facts, identity, software
from tiling import atomic
from tiling.errors import DamageError

# As pipeline.monitor and checkpoint, which load torch, have them.
METRICS, CHECKPOINTS, TEACHER = "metrics.jsonl", "checkpoints", "teacher.safetensors"

_PANELS = (
    ("loss", "loss"), ("teacher_entropy", "teacher entropy"), ("kl", "KL(teacher, student)"),
    ("knn", "kNN accuracy"), ("rankme", "RankMe of features"), ("probe_rankme", "RankMe, probe's tiles"),
    ("feature_std", "spread of head output"), ("centre_norm", "centre norm"), ("grad_norm", "gradient norm"),
    ("samples_per_s", "tiles/s"), ("data_wait_share", "waiting for tiles (share)"), ("lr", "learning rate"),
    ("loss_scale", "loss scale (fp16)"),
)  # fmt: skip
_SPANS_NAMED = 3


@dataclass(frozen=True)
class _Checkpoint:
    """One checkpoint: its step, what it says of itself, sha256 of its teacher as COMPLETE states it."""

    step: int
    state: dict[str, Any]
    teacher: str


@dataclass(frozen=True)
class _Run:
    """What a RUN says of itself: as it was last continued, where it has a checkpoint."""

    about: dict[str, Any]
    metrics: list[dict[str, Any]]
    checkpoints: list[_Checkpoint]
    damage: list[str]

    @property
    def config(self) -> dict[str, Any]:
        values: dict[str, Any] = self.about["config"]
        return values

    @property
    def steps(self) -> int:
        """Steps that the config asks for."""
        return int(self.config["train.steps"])

    @property
    def done(self) -> int:
        """Steps that metrics or checkpoints know of."""
        logged = int(self.metrics[-1]["step"]) if self.metrics else 0
        return max(logged, self.checkpoints[-1].step if self.checkpoints else 0)

    @property
    def seconds(self) -> float:
        """Time spent in steps, from the logged rates."""
        total, before = 0.0, 0
        for line in self.metrics:
            rate = line.get("samples_per_s") or math.inf
            total += (line["step"] - before) * self.about["global_batch"] / rate
            before = line["step"]
        return total

    def last(self, key: str) -> float | None:
        """Mean of a figure over the last tenth of the lines that have it; None where it is finite in none."""
        lines = [line for line in self.metrics if key in line]
        values = [value for line in lines[-max(1, len(lines) // 10) :] if _finite(value := line[key])]
        return sum(values) / len(values) if values else None


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _read_run(path: Path) -> _Run:
    about = RUN.read(path)
    metrics, damage = _read_metrics(path)
    checkpoints = []
    for folder in sorted((path / CHECKPOINTS).glob("step-*")):
        try:
            checkpoints.append(_read_checkpoint(folder))
        except DamageError as error:
            damage.append(f"damaged checkpoint: {error}")
    return _Run(checkpoints[-1].state if checkpoints else about, metrics, checkpoints, damage)


def _read_checkpoint(folder: Path) -> _Checkpoint:
    """What a checkpoint says of itself; its tensors must be there, and are not read."""
    state = json.loads(atomic.read_listed(folder, CHECKPOINT.file))
    digests = atomic.read_listing(folder)
    for name in digests.keys() - atomic.box_files(folder):
        raise DamageError("missing", folder / name)
    return _Checkpoint(state["step"], state, digests[TEACHER])


def _read_metrics(run: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Lines of metrics.jsonl, and what is wrong with them; a last line that a kill cut short is nothing wrong."""
    path = run / METRICS
    lines = path.read_text().splitlines() if path.is_file() else []
    found, broken = [], 0
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError:
            broken += number < len(lines)
    return found, [f"{counted(broken, 'line')} of {METRICS} cannot be read"] if broken else []


def run_section(path: Path) -> Section:
    """How far a run came and what its figures say.

    Raises:
        CheckpointError: It is no run of this format version.
    """
    run = _read_run(path)
    parts: list[Part] = [Row([facts("The run", _facts(run)), *_checkpoints(run)])]
    if run.metrics:
        parts.append(_curves(run))
    parts.append(Fold("Configuration", [_config_table(run.config)]))
    name, method = run.config["model.name"], run.config["method.name"]
    summary = f"{name}, {method}, {count(run.done)} of {count(run.steps)} steps"
    teachers = [saved.teacher for saved in reversed(run.checkpoints)]
    return Section("Pretraining", parts, [*run.damage, *_warnings(run)], summary, teachers)


def _warnings(run: _Run) -> list[str]:
    found = []
    saved = run.checkpoints[-1].step if run.checkpoints else None
    if saved != run.steps:
        where = "there is no checkpoint yet" if saved is None else f"the newest checkpoint is of step {count(saved)}"
        found.append(f"not finished: {count(run.done)} of {count(run.steps)} steps, {where}")
    if not run.metrics:
        return [*found, "no figures are logged yet"]
    lost = sum(line.get("loss") is None for line in run.metrics if line["step"] > 0)
    if lost:
        found.append(f"the loss is not finite in {counted(lost, 'logged line')}")
    return [*found, *_alarms(run)]


def _alarms(run: _Run) -> list[str]:
    """Each alarm of the run once, with the steps at which it stood and what was seen last."""
    seen: dict[str, list[alarms.Episode]] = {}
    for episode in alarms.episodes(run.metrics, int(run.config["optim.warmup_steps"])):
        seen.setdefault(episode.alarm.name, []).append(episode)
    return [f"{_when(found, run.metrics[-1]['step'])}: {found[-1].alarm}" for found in seen.values()]


def _when(found: Sequence[alarms.Episode], last_step: int) -> str:
    """At which steps an alarm stood."""
    spans = [
        count(one.first_step) + (f" to {count(one.last_step)}" if one.last_step > one.first_step else "")
        for one in found[-_SPANS_NAMED:]
    ]
    more = f"{counted(len(found) - len(spans), 'time')} before and " if len(found) > len(spans) else ""
    over = "" if found[-1].last_step == last_step else ", over now"
    return f"alarm {found[0].alarm.name}, {more}at steps {', '.join(spans)}{over}"


def _facts(run: _Run) -> dict[str, str | Link]:
    about, config = run.about, run.config
    samples = run.done * about["global_batch"]
    rate = samples / run.seconds if run.seconds else None
    loss = run.last("loss")
    return {
        "encoder": config["model.name"],
        "method": config["method.name"],
        "steps": f"{count(run.done)} of {count(run.steps)} done",
        "trained on store": identity(about["store_fingerprint"]),
        "tiles": f"{count(about['tiles'])} of {counted(about['slides'], 'slide')} ({about['dataset']})",
        "scale": f"{about['mpp']:.3g} um/px, {about['tiling']['tile_px']} px",
        "tiles seen": f"{count(samples)} ({samples / max(about['tiles'], 1):.2f} epochs)",
        "batch": f"{count(about['global_batch'])} tiles a step on {counted(about['ranks'], 'rank')}",
        "loss": f"{loss:.3f} (last tenth)" if loss is not None else DASH,
        "time in steps": f"{duration(run.seconds)}, {decimal(rate, 1)} tiles/s",
        **_machine(run),
        **_judgement(run),
        **({"begins with": about["begins_with"]["what"]} if about["begins_with"] else {}),
        "made by": software(about["software"]),
    }


def _machine(run: _Run) -> dict[str, str]:
    """How much of the machine was used, where that was logged."""
    found = {}
    mfu, flops, limit, memory = (run.last(key) for key in ("mfu", "gflop_per_tile", "peak_tflops", "memory_gib"))
    if mfu is not None and flops is not None and limit is not None:
        how = "measured" if run.last("peak_is_measured") else "data sheet"
        said = f"{100 * mfu:.1f} % of {limit:.3g} TFLOP/s ({how}), at {flops:.4g} GFLOP a tile"
        found["model FLOPs utilisation"] = said
    if memory is not None:
        found["memory"] = f"{memory:.1f} GiB at most, on the first rank"
    return found


def _judgement(run: _Run) -> dict[str, str]:
    """What the probe said first and last; nothing where there was none."""
    judged = [(line["step"], line["knn"]) for line in run.metrics if _finite(line.get("knn"))]
    if not judged:
        return {}
    (first_step, first), (last_step, last) = judged[0], judged[-1]
    said = f"{last:.3f} at step {count(last_step)}, {first:.3f} at step {count(first_step)}"
    return {"kNN balanced accuracy": f"{said}, chance {decimal(run.last('knn_chance'))}"}


def _curves(run: _Run) -> Picture:
    panels = [panel for panel in _PANELS if panel[0] == "loss" or any(panel[0] in line for line in run.metrics)]
    ln_k, chance = run.last("ln_k"), run.last("knn_chance")
    levels: dict[str, figures.Level] = {}
    if ln_k is not None:
        levels |= {"loss": (ln_k, "ln K"), "teacher_entropy": (ln_k, "ln K")}
    if chance is not None:
        levels["knn"] = (chance, "chance")
    caption = "Figures of the run. A loss that stays at ln K, or a teacher entropy of 0 or ln K, means collapse."
    if chance is not None:
        caption += " kNN accuracy: balanced over classes, of nearest neighbours on other slides."
    return Picture(figures.training_curves(run.metrics, panels, hlines=levels), caption, "Curves of the run's figures")


def _checkpoints(run: _Run) -> list[Part]:
    rows = [
        (count(saved.step), count(saved.state["samples_seen"]), identity(saved.teacher))
        for saved in reversed(run.checkpoints)
    ]
    if not rows:
        return []
    unread = Note("Their tensors were not read here: `bony verify` checks them.")
    return [Stack([Table("Checkpoints, newest first", ("step", "tiles seen", "teacher"), rows), unread])]


def _config_table(config: dict[str, Any]) -> Table:
    defaults = flatten(asdict(PretrainConfig()))
    rows = [
        (key, _value(value), "" if defaults.get(key) == value else _value(defaults.get(key)))
        for key, value in sorted(config.items())
    ]
    return Table("Every key, with its default where that is another", ("key", "value", "default"), rows)


def _value(value: Any) -> str:
    """A config value: numbers in a list apart, None as a dash."""
    return " ".join(map(str, value)) if isinstance(value, list) else DASH if value is None else str(value)


def compare_runs(paths: Mapping[str, Path]) -> Section:
    """What differs between runs, by name, and their losses in one figure."""
    runs = {name: _read_run(path) for name, path in paths.items()}
    described = [_compared(run) for run in runs.values()]
    keys = dict.fromkeys(key for values in described for key in values)
    rows = [
        (key, *(values.get(key, DASH) for values in described))
        for key in keys
        if len({values.get(key) for values in described}) > 1
    ]
    heads: list[Cell] = ["", *(Link(name, str(path)) for name, path in paths.items())]
    lines = {name: run.metrics for name, run in runs.items()}
    losses = figures.overlaid_curves(lines, "loss")
    parts: list[Part] = [Table("What differs between the runs", heads, rows), Picture(losses, "Loss of the runs.")]
    if any("knn" in line for run in runs.values() for line in run.metrics):
        judged = figures.overlaid_curves(lines, "knn")
        parts.append(Picture(judged, "Balanced accuracy of nearest neighbours on other slides, of the runs' probes."))
    if len({run.config["method.out_dim"] for run in runs.values()}) > 1:
        parts.append(Note("Losses of different method.out_dim are not comparable."))
    return Section("Runs compared", parts)


def _compared(run: _Run) -> dict[str, str]:
    """What two runs may differ in; where they lie is no difference."""
    config = {key: _value(value) for key, value in run.config.items() if key not in ("data", "out", "monitor.probe")}
    figures_now = {key: decimal(run.last(key)) for key in ("loss", "teacher_entropy", "kl", "rankme", "knn", "mfu")}
    about = run.about
    return {
        "steps done": count(run.done), "time in steps": duration(run.seconds), **figures_now, **config,
        "store": about["store_fingerprint"][:12], "tiles": count(about["tiles"]), "um/px": f"{about['mpp']:.3g}",
        "global batch": count(about["global_batch"]), "ranks": str(about["ranks"]),
        "software": software(about["software"]),
    }  # fmt: skip
