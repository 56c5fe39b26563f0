"""Alarms: what the lines of metrics.jsonl say is going wrong, and what to try. Nothing here loads torch.

The run says them while it lasts (``pipeline.monitor``), the report afterwards; both ask here. An alarm needs the median
of several lines beyond its limit, so that one odd line is none, and what speaks of collapse is not judged before the
learning rate's warm-up is over: in a sound run the loss first rises towards ln K, may stay near it for a while, and the
features of an untrained network hardly differ. The limits were set on runs that learned and on runs that were made to
collapse (``tests/pipeline/test_alarms.py``); they rather miss than disturb.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

Line = Mapping[str, Any]

WINDOW = 10  # lines that an alarm is judged by
BEFORE = 50  # lines before them, that a gradient norm is compared with
LINES_NEEDED = WINDOW + BEFORE

# Shares of ln K: how near to it the teacher's entropy or the loss, how small the entropy.
_UNIFORM, _ONE_PROTOTYPE, _AT_LN_K = 0.004, 0.01, 0.002
_LEAST_SPREAD, _LEAST_RANK = 0.005, 2.0  # the head's outputs of unrelated tiles have a spread of 1
_EXPLODED = 20.0  # times the gradient norm of before
_STARVED = 0.2  # share of the time
_LEAST_SCALE = 64.0  # ten halvings from where it starts
_MANY_DAMAGED = 0.01  # share of the tiles


@dataclass(frozen=True)
class Alarm:
    """Something that is wrong.

    Args:
        name: Its name in metrics.jsonl.
        value: What was seen.
        limit: What it is beyond.
        said: Both in words.
        do: What to try.
    """

    name: str
    value: float
    limit: float
    said: str
    do: str

    def __str__(self) -> str:
        return f"{self.said}; {self.do}"


@dataclass(frozen=True)
class Episode:
    """An alarm as it was seen last, and the first and last logged steps at which it stood."""

    alarm: Alarm
    first_step: int
    last_step: int


class _Recent:
    """The last lines: what figures are now, and what they were before."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self._now, self._before = lines[-WINDOW:], lines[-LINES_NEEDED:-WINDOW]

    def now(self, key: str) -> float | None:
        """Median over the window; None unless each line of a whole window has it."""
        return _median(self._now, key)

    def before(self, key: str) -> float | None:
        """Median over the lines before the window; None where there are few."""
        return _median(self._before, key)

    def last(self, key: str) -> float | None:
        """Of the last line."""
        return self._now[-1].get(key) if self._now else None


def _median(lines: Sequence[Line], key: str) -> float | None:
    values = [value for line in lines if (value := line.get(key)) is not None and math.isfinite(value)]
    return median(values) if len(values) == len(lines) >= WINDOW else None


def _teacher(recent: _Recent) -> Alarm | None:
    ln_k, entropy, loss = recent.now("ln_k"), recent.now("teacher_entropy"), recent.now("loss")
    if ln_k is None or entropy is None or loss is None:
        return None
    if entropy > (limit := (1 - _UNIFORM) * ln_k):
        return Alarm(
            "uniform_teacher", entropy, limit,
            f"the teacher's entropy {entropy:.3f} is at ln K = {ln_k:.3f}: its outputs are uniform (collapse)",
            "lower method.teacher_temp or optim.lr, or lengthen optim.warmup_steps",
        )  # fmt: skip
    if entropy < (limit := _ONE_PROTOTYPE * ln_k):
        return Alarm(
            "one_prototype", entropy, limit,
            f"the teacher's entropy {entropy:.3g} is at 0: one prototype takes all tiles (collapse)",
            "lower method.centre_momentum or optim.lr, or raise method.teacher_temp",
        )  # fmt: skip
    before = recent.before("loss")
    if before is not None and max(abs(loss - ln_k), abs(before - ln_k)) < _AT_LN_K * ln_k:
        return Alarm(
            "loss_at_ln_k", loss, _AT_LN_K * ln_k,
            f"the loss {loss:.3f} stays at ln K = {ln_k:.3f}: nothing is learned",
            "lower optim.lr, lengthen optim.warmup_steps, or lower method.out_dim",
        )  # fmt: skip
    return None


def _outputs(recent: _Recent) -> Alarm | None:
    spread = recent.now("feature_std")
    if spread is None or spread >= _LEAST_SPREAD:
        return None
    return Alarm(
        "same_outputs", spread, _LEAST_SPREAD,
        f"the head's outputs hardly differ between tiles (spread {spread:.2g}, unrelated ones have 1)",
        "lower optim.lr, or lengthen optim.warmup_steps",
    )  # fmt: skip


def _features(recent: _Recent) -> Alarm | None:
    rank = recent.now("rankme")
    if rank is None or rank >= _LEAST_RANK:
        return None
    return Alarm(
        "same_features", rank, _LEAST_RANK,
        f"the features use {rank:.2f} dimensions (RankMe): they hardly differ between tiles (collapse)",
        "lower optim.lr, or lengthen optim.warmup_steps",
    )  # fmt: skip


def _gradient(recent: _Recent) -> Alarm | None:
    norm, before = recent.now("grad_norm"), recent.before("grad_norm")
    if norm is None or before is None or norm <= _EXPLODED * before:
        return None
    return Alarm(
        "exploding_gradient", norm, _EXPLODED * before,
        f"the gradient norm {norm:.3g} is {norm / before:.0f} times what it was",
        "lower optim.lr or optim.lr_cap in another --out, which model.init_from may begin with an earlier checkpoint",
    )  # fmt: skip


def _loss_scale(recent: _Recent) -> Alarm | None:
    scale = recent.now("loss_scale")
    if scale is None or scale >= _LEAST_SCALE:
        return None
    return Alarm(
        "falling_loss_scale", scale, _LEAST_SCALE,
        f"fp16's loss scale fell to {scale:.3g}: gradients overflow again and again",
        "lower optim.lr, or train in bf16 or fp32 (train.precision)",
    )  # fmt: skip


def _waiting(recent: _Recent) -> Alarm | None:
    share = recent.now("data_wait_share")
    if share is None or share <= _STARVED:
        return None
    return Alarm(
        "starved", share, _STARVED,
        f"{100 * share:.0f} % of the time is spent waiting for tiles",
        "raise train.threads, set train.shuffle to shards, or put the store on a faster file system",
    )  # fmt: skip


def _damage(recent: _Recent) -> Alarm | None:
    skipped = recent.last("skipped_tiles")
    if not skipped:
        return None
    return Alarm(
        "damaged_tiles", skipped, 0,
        f"{skipped} damaged tile{'' if skipped == 1 else 's'} left out on the first rank",
        "run `bony verify` on the store, and tile the slides that it names again",
    )  # fmt: skip


def _much_damage(recent: _Recent) -> Alarm | None:
    share = recent.last("skipped_share")
    if share is None or share <= _MANY_DAMAGED:
        return None
    return Alarm(
        "many_damaged_tiles", share, _MANY_DAMAGED,
        f"{100 * share:.1f} % of the tiles are damaged and left out: others are seen too often",
        "stop, and repair the store first",
    )  # fmt: skip


_OF_LEARNING = (_teacher, _outputs, _features, _gradient)
_OF_THE_MACHINE = (_loss_scale, _waiting, _damage, _much_damage)


def standing(lines: Sequence[Line], warmup_steps: int) -> list[Alarm]:
    """The alarms that stand at the last of some lines.

    Args:
        lines: Of metrics.jsonl, in order; no more than the last ``LINES_NEEDED`` are looked at.
        warmup_steps: Of the learning rate.
    """
    logged = [line for line in lines[-LINES_NEEDED:] if line["step"] > 0]
    machine = _Recent(logged)
    learning = _Recent([line for line in logged if line["step"] > warmup_steps])
    found = [rule(learning) for rule in _OF_LEARNING] + [rule(machine) for rule in _OF_THE_MACHINE]
    return [alarm for alarm in found if alarm is not None]


def episodes(lines: Sequence[Line], warmup_steps: int) -> list[Episode]:
    """All alarms of a run, in the order in which they began; one that came twice is there twice."""
    running: dict[str, Episode] = {}
    ended: list[Episode] = []
    for end, line in enumerate(lines, 1):
        now = {alarm.name: alarm for alarm in standing(lines[max(0, end - LINES_NEEDED) : end], warmup_steps)}
        ended += [running.pop(name) for name in [*running] if name not in now]
        for name, alarm in now.items():
            first = running[name].first_step if name in running else line["step"]
            running[name] = Episode(alarm, first, line["step"])
    return sorted([*ended, *running.values()], key=lambda episode: episode.first_step)
