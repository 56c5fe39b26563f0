"""Alarms: none on runs that learned, one on each that collapsed, and each rule at its limit.

``recorded_runs.json`` holds figures of real runs of xcit_nano: those that learned, and those made to collapse.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.alarms import BEFORE, LINES_NEEDED, WINDOW, episodes, standing
from pipeline.commands.parser import pretrain_config
from pipeline.monitor import read_metrics
from pipeline.pretrain import pretrain

LN_K = math.log(4096)
RECORDED = json.loads(Path(__file__).with_name("recorded_runs.json").read_text())


def recorded(name: str) -> tuple[list[dict[str, Any]], int]:
    run = RECORDED["runs"][name]
    lines = [dict(zip(RECORDED["columns"], line, strict=True)) | {"ln_k": run["ln_k"]} for line in run["lines"]]
    return lines, run["warmup_steps"]


@pytest.mark.parametrize("name", ["demo", "demo near ln K", "real tiles", "real tiles, seed 0"])
def test_a_run_that_learned_has_no_alarm(name: str) -> None:
    lines, warmup_steps = recorded(name)
    assert len(lines) >= 50
    assert episodes(lines, warmup_steps) == []


@pytest.mark.parametrize(
    ("name", "alarm", "latest"),
    [
        ("no sharpening", "uniform_teacher", 40),
        ("no centring", "one_prototype", 40),
        ("too sharp", "one_prototype", 40),
        ("large steps", "same_outputs", 40),
        ("large steps", "same_features", 90),
        ("large steps", "uniform_teacher", 90),
        ("small crops", "uniform_teacher", 100),
    ],
)
def test_a_run_that_collapsed_has_one(name: str, alarm: str, latest: int) -> None:
    lines, warmup_steps = recorded(name)
    found = [one for one in episodes(lines, warmup_steps) if one.alarm.name == alarm]
    assert found
    assert warmup_steps + WINDOW < found[0].first_step <= latest
    if name != "too sharp":  # which went on to other ills
        assert found[-1].last_step == lines[-1]["step"]


@pytest.mark.usefixtures("_tiny")
def test_a_run_that_is_made_to_collapse_says_so(
    tmp_path: Path, words: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Without sharpening, really trained."""
    changes = {"train.steps": 40, "checkpoint.every": 40, "method.teacher_temp": 1, "method.teacher_temp_start": 1}
    pretrain(pretrain_config(words(tmp_path / "run", changes)))
    lines = read_metrics(tmp_path / "run")
    assert "uniform_teacher" in lines[-1]["alarms"]
    assert "alarm uniform_teacher at step" in capsys.readouterr().err
    again = {line["step"]: [alarm.name for alarm in standing(lines[: line["step"]], 0)] for line in lines}
    assert again == {line["step"]: line["alarms"] for line in lines}  # the report finds what the run said


# ---- each rule at its limit ------------------------------------------------------------------------------------------


def line(step: int, **figures: float | None) -> dict[str, Any]:
    sound = {
        "loss": 6.0, "teacher_entropy": 5.0, "ln_k": LN_K, "feature_std": 0.5, "rankme": 40.0, "grad_norm": 1.0,
        "data_wait_share": 0.05, "loss_scale": 4096.0, "skipped_tiles": 0, "skipped_share": 0.0,
    }  # fmt: skip
    return {"step": step, **sound, **figures}


def names(lines: list[dict[str, Any]], warmup_steps: int = 0) -> list[str]:
    return [alarm.name for alarm in standing(lines, warmup_steps)]


AT_ITS_LIMIT = [
    ("teacher_entropy", 0.9959 * LN_K, 0.9961 * LN_K, "uniform_teacher"),
    ("teacher_entropy", 0.0101 * LN_K, 0.0099 * LN_K, "one_prototype"),
    ("feature_std", 0.0051, 0.0049, "same_outputs"),
    ("rankme", 2.01, 1.99, "same_features"),
    ("data_wait_share", 0.199, 0.201, "starved"),
    ("loss_scale", 65.0, 63.0, "falling_loss_scale"),
    ("skipped_tiles", 0, 1, "damaged_tiles"),
    ("skipped_share", 0.0099, 0.0101, "many_damaged_tiles"),
]


@pytest.mark.parametrize(("key", "sound", "wrong", "name"), AT_ITS_LIMIT)
def test_each_at_its_limit(key: str, sound: float, wrong: float, name: str) -> None:
    assert names([line(step, **{key: sound}) for step in range(1, 31)]) == []
    found = standing([line(step, **{key: wrong}) for step in range(1, 31)], 0)
    assert [alarm.name for alarm in found] == [name]
    (alarm,) = found
    assert alarm.value == wrong
    assert (alarm.value > alarm.limit) == (wrong > sound)
    said, do = str(alarm).split("; ", 1)
    assert len(said) > 20
    assert len(do) > 20


@pytest.mark.parametrize(("key", "sound", "wrong", "name"), AT_ITS_LIMIT[:6])
def test_one_odd_line_is_no_alarm_and_one_good_line_no_end(key: str, sound: float, wrong: float, name: str) -> None:
    good, bad = ([line(step, **{key: value}) for step in range(1, 31)] for value in (sound, wrong))
    assert names([*good[:-1], bad[-1]]) == []
    assert names([*bad[:-1], good[-1]]) == [name]
    assert names(bad[: WINDOW - 1]) == []  # too few lines to judge by
    assert names(bad[:WINDOW]) == [name]
    lost = [one | {key: None} if one["step"] == 25 else one for one in bad]
    assert names(lost) == []  # what is not finite is told elsewhere


@pytest.mark.parametrize(("key", "wrong"), [(key, wrong) for key, _, wrong, _ in AT_ITS_LIMIT[:4]])
def test_collapse_is_not_judged_in_the_warm_up(key: str, wrong: float) -> None:
    bad = [line(step, **{key: wrong}) for step in range(1, 61)]
    assert names(bad[:49], warmup_steps=40) == []
    assert len(names(bad[:50], warmup_steps=40)) == 1


def test_starving_is_judged_in_the_warm_up() -> None:
    assert names([line(step, data_wait_share=0.5) for step in range(1, 11)], warmup_steps=40) == ["starved"]


def test_the_loss_may_be_at_ln_k_for_a_while() -> None:
    at_ln_k = [line(step, loss=0.999 * LN_K) for step in range(1, 41)]
    assert names(at_ln_k[: 2 * WINDOW - 1]) == []
    assert names(at_ln_k[: 2 * WINDOW]) == ["loss_at_ln_k"]
    learning = [line(step, loss=0.99 * LN_K) for step in range(1, 41)]
    assert names(learning) == []
    assert names([*learning[:20], *at_ln_k[20:30]]) == []
    assert names([*at_ln_k[:20], *learning[20:30]]) == []


def test_a_gradient_is_compared_with_what_it_was() -> None:
    before = [line(step, grad_norm=0.3) for step in range(1, 41)]
    for norm, expected in ((5.9, []), (6.1, ["exploding_gradient"])):
        now = [line(step, grad_norm=norm) for step in range(41, 51)]
        assert names([*before, *now]) == expected
        assert names([*before[-9:], *now]) == []  # nothing to compare with
    large = [line(step, grad_norm=400.0) for step in range(1, 51)]
    assert names(large) == []


def test_lines_of_other_methods_and_of_step_0_do_no_harm() -> None:
    assert names([]) == []
    assert names([{"step": 0, "knn": 0.3}]) == []
    assert names([{"step": step, "loss": 1.0, "samples_per_s": 9.0} for step in range(1, 99)]) == []
    judged = [{"step": 0, "knn": 0.3, "knn_chance": 0.5}, *(line(step, rankme=1.0) for step in range(1, 11))]
    assert names(judged) == ["same_features"]


def test_episodes_know_when_an_alarm_stood() -> None:
    waits = [0.5 if 20 <= step < 50 or step >= 80 else 0.0 for step in range(1, 101)]
    found = episodes([line(step, data_wait_share=wait) for step, wait in enumerate(waits, 1)], 0)
    assert [(one.alarm.name, one.first_step, one.last_step) for one in found] == [
        ("starved", 24, 54), ("starved", 84, 100),
    ]  # fmt: skip
    assert LINES_NEEDED == WINDOW + BEFORE


def test_torch_is_not_loaded() -> None:
    code = "import sys, pipeline.alarms, pipeline.report.runs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
