"""Faults made for real (FAULTS.md F1 to F4, F7, F14, F15): ranks killed, stopped, preempted, and what is left then."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pipeline.checkpoint import list_checkpoints, newest_sound
from pipeline.monitor import read_metrics

Words = Callable[..., list[str]]
STEPS, EVERY = 12, 3
# 4 samples a step in 2 micro-batches, of 33 tiles: an epoch ends amid the ninth step.
RUN = {
    "train.steps": STEPS, "train.batch_per_rank": 1, "model.drop_path": 0.1,
    "checkpoint.every": EVERY, "checkpoint.keep": 99,
}  # fmt: skip


def wait_for(run: Path, step: int, alive: Callable[[], bool], seconds: float = 200) -> None:
    """Until RUN's figures of ``step`` are written."""
    until = time.monotonic() + seconds
    while not any(line["step"] >= step for line in read_metrics(run)):
        assert alive()
        assert time.monotonic() < until
        time.sleep(0.005)


def require_same_end(straight: Path, other: Path) -> None:
    """Difference 0 in every tensor of the last checkpoint, and every figure of every step, once."""
    ends = [newest_sound(run) for run in (straight, other)]
    assert [end.name for end in ends] == [f"step-{STEPS:08d}"] * 2
    files = sorted(path.name for path in ends[0].glob("*.safetensors"))
    assert files == ["method.safetensors", "optimizer.safetensors", "student.safetensors", "teacher.safetensors"]
    for name in files:
        one, two = (load_file(end / name) for end in ends)
        assert one.keys() == two.keys()
        assert [key for key, value in one.items() if not value.equal(two[key])] == [], name
    lines = [read_metrics(run) for run in (straight, other)]
    assert [line["step"] for line in lines[1]] == list(range(1, STEPS + 1))
    assert [figures(line) for line in lines[0]] == [figures(line) for line in lines[1]]


def figures(line: dict[str, Any]) -> dict[str, Any]:
    """What follows from the run alone, not from the machine."""
    return {key: line[key] for key in ("step", "loss", "teacher_entropy", "kl", "centre_norm", "grad_norm", "lr")}


@pytest.fixture(scope="module")
def straight(warm: Any, words: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, not disturbed."""
    run = tmp_path_factory.mktemp("straight") / "run"
    job = warm.start(words(run, RUN), ranks=2)
    assert job.end() == [0, 0], job.said
    return run


# ---- a rank is killed or asked to stop -------------------------------------------------------------------------------


def test_killed_ranks_lose_one_interval_and_continue_to_the_same_end(
    warm: Any, words: Words, straight: Path, tmp_path: Path
) -> None:
    """F1 and F14: in mid-epoch, with accumulation; the epoch ends after the kill."""
    run = tmp_path / "run"
    job = warm.start(words(run, RUN), ranks=2)
    wait_for(run, 5, lambda: job.running)
    killed = time.monotonic()
    job.kill(rank=1)
    codes = job.end(30)
    assert time.monotonic() - killed < 30
    assert codes == [1, -signal.SIGKILL]
    assert re.search(r"rank 0 waits in vain for the others: no sign of life from rank 1 \(", job.said)
    last = read_metrics(run)[-1]["step"]
    assert not (run / "PREEMPTED").exists()
    again = warm.start(words(run, RUN), ranks=2)
    assert again.end() == [0, 0], again.said
    (at,) = re.findall(r"continuing from \S+ at step (\d+)", again.said)
    assert int(at) > 0
    assert last - EVERY <= int(at) <= last
    require_same_end(straight, run)


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGTERM, 0), (signal.SIGUSR2, 1), (signal.SIGUSR1, 1)])
def test_a_signal_to_one_rank_stops_all_at_one_saved_step(
    number: signal.Signals, rank: int, warm: Any, words: Words, straight: Path, tmp_path: Path
) -> None:
    """F2: the checkpoint is out of turn, and nothing is lost."""
    run = tmp_path / "run"
    job = warm.start(words(run, RUN), ranks=2)
    wait_for(run, 4, lambda: job.running)
    job.kill(number, rank)
    assert job.end(60) == [128 + number] * 2, job.said
    marker = json.loads((run / "PREEMPTED").read_text())
    assert marker["signal"] == number.name
    assert newest_sound(run).name == f"step-{marker['step']:08d}"
    assert [line["step"] for line in read_metrics(run)] == list(range(1, marker["step"] + 1))
    assert f"stopped by {number.name} after step {marker['step']}, which is saved" in job.said
    assert not (run / "heartbeats").exists()
    assert not (run / "work").exists()
    again = warm.start(words(run, RUN), ranks=2)
    assert again.end() == [0, 0], again.said
    assert not (run / "PREEMPTED").exists()
    require_same_end(straight, run)


def test_ctrl_c_saves_and_a_second_one_does_not_wait(warm: Any, words: Words, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = words(run, RUN | {"train.steps": 400, "checkpoint.every": 400})
    job = warm.start(options)
    wait_for(run, 2, lambda: job.running)
    job.kill(signal.SIGINT)
    assert job.end(30) == [128 + signal.SIGINT]
    assert newest_sound(run) is not None
    saved = len(list_checkpoints(run))
    job = warm.start(options)
    wait_for(run, json.loads((newest_sound(run) / "state.json").read_text())["step"] + 2, lambda: job.running)
    os.kill(job.pids[0], signal.SIGSTOP)  # so that both are there before it moves
    job.kill(signal.SIGINT)
    job.kill(signal.SIGUSR1)
    os.kill(job.pids[0], signal.SIGCONT)
    assert job.end(30)[0] in (128 + signal.SIGINT, 128 + signal.SIGUSR1)
    assert len(list_checkpoints(run)) == saved + 1


def test_a_second_job_on_a_run_is_told_who_holds_it(warm: Any, words: Words, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = words(run, RUN | {"train.steps": 400})
    first = warm.start(options)
    try:
        wait_for(run, 1, lambda: first.running)
        second = warm.start(options)
        assert second.end(30) == [1]
        assert f"{run}: is being written by process {first.pids[0]} on " in second.said
        assert first.running
    finally:
        first.kill()
    first.end()
    third = warm.start(words(run, RUN | {"train.steps": 400}))  # a dead owner is taken over from at once
    try:
        wait_for(run, len(read_metrics(run)) + 1, lambda: third.running)
    finally:
        third.kill()
        third.end()


@pytest.mark.slow
def test_the_trainer_killed_around_saves_resumes_from_a_sound_checkpoint(
    warm: Any, words: Words, tmp_path: Path
) -> None:
    """F7, whole trainer: killed three times at random moments while it saves after every step."""
    run, seed = tmp_path / "run", random.randrange(1 << 30)
    print(f"seed {seed}")
    draw = random.Random(seed)
    options = words(run, RUN | {"checkpoint.every": 1, "checkpoint.keep": 2, "train.batch_per_rank": 2})
    for kill in range(3):
        done = len(read_metrics(run))
        job = warm.start(options)
        wait_for(run, min(done + 2, STEPS), lambda job=job: job.running)
        time.sleep(draw.uniform(0, 0.5))
        job.kill()
        job.end()
        assert newest_sound(run) is not None, kill
    job = warm.start(options)
    assert job.end() == [0], job.said
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith("step")]
    alone = warm.start(words(tmp_path / "alone", RUN | {"train.batch_per_rank": 2}))
    assert alone.end() == [0]
    require_same_end(tmp_path / "alone", run)


# ---- another number of ranks -----------------------------------------------------------------------------------------


def test_four_ranks_continued_by_two_see_the_same_samples_and_losses(warm: Any, words: Words, tmp_path: Path) -> None:
    """F15: ranks x batch_per_rank x accumulate stays; batches of micro-batches too, for BatchNorm."""
    four = {"train.steps": 6, "train.batch_per_rank": 1, "checkpoint.every": 3, "checkpoint.keep": 9}
    job = warm.start(words(tmp_path / "four", four), ranks=4)
    assert job.end() == [0] * 4, job.said
    shutil.copytree(tmp_path / "four", tmp_path / "two")
    shutil.rmtree(tmp_path / "two/checkpoints/step-00000006")
    job = warm.start(words(tmp_path / "two", four | {"train.batch_per_rank": 2}), ranks=2)
    assert job.end() == [0] * 2, job.said
    assert "at step 3" in job.said
    assert "micro-batches" not in job.said
    straight, other = (read_metrics(tmp_path / name) for name in ("four", "two"))
    assert [line["step"] for line in other] == [1, 2, 3, 4, 5, 6]
    for one, two in zip(straight, other, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["epoch"] == one["epoch"]
    states = [json.loads((newest_sound(tmp_path / name) / "state.json").read_text()) for name in ("four", "two")]
    assert [state["samples_seen"] for state in states] == [48, 48]

    shutil.rmtree(tmp_path / "two/checkpoints/step-00000006")
    spread = four | {"train.batch_per_rank": 1, "train.accumulate": 4}
    job = warm.start(words(tmp_path / "two", spread), ranks=2)
    assert job.end() == [0] * 2, job.said
    assert "BatchNorm sees micro-batches of 2 tiles, not of 4 as before" in job.said

    job = warm.start(words(tmp_path / "two", four | {"train.batch_per_rank": 1}), ranks=2)
    assert job.end() == [2] * 2
    assert "run was started with 8 samples a step, not 4" in job.said


# ---- torchrun --------------------------------------------------------------------------------------------------------


class Torchrun:
    """Two ranks under torchrun, in mid-training."""

    def __init__(self, words: list[str], run: Path, environment: dict[str, str], log: Path, *options: str) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
        with log.open("wb") as out:
            self.agent = subprocess.Popen(
                [*command, "-m", "pipeline.pretrain", *words], env=environment, stdout=out, stderr=out
            )
        self._log = log
        wait_for(run, 2, lambda: self.agent.poll() is None)
        self.ranks = [
            int(child)
            for task in Path(f"/proc/{self.agent.pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
        assert len(self.ranks) == 2

    def end(self, seconds: float) -> int:
        """Its exit code, if it ends in time."""
        return self.agent.wait(seconds)

    @property
    def said(self) -> str:
        return self._log.read_text()

    @property
    def living(self) -> list[int]:
        """Ranks that still live; where nobody reads their exit status they may be listed, as zombies."""
        return [pid for pid in self.ranks if alive(pid)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def torchrun(
    words: Words, environment: dict[str, str], tmp_path: Path
) -> Iterator[Callable[..., tuple[Torchrun, Path]]]:
    """Start one: torchrun(changes, *options of torchrun)."""
    made: list[Torchrun] = []

    def start(changes: dict[str, object], *options: str) -> tuple[Torchrun, Path]:
        run = tmp_path / "run"
        settings = RUN | {"train.steps": 10_000, "checkpoint.every": 10_000, **changes}
        made.append(Torchrun(words(run, settings), run, environment, tmp_path / "log", *options))
        return made[-1], run

    yield start
    for job in made:
        for pid in (job.agent.pid, *job.ranks):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        job.agent.wait()


HANDLED = ("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "options"), [(signal.SIGTERM, ()), (signal.SIGUSR2, HANDLED)])
def test_a_signal_to_torchrun_is_saved_before_it_ends(
    number: signal.Signals, options: tuple[str, ...], torchrun: Callable[..., tuple[Torchrun, Path]]
) -> None:
    """F2: the agent exits with 1 whatever its ranks do; the marker tells."""
    job, run = torchrun({}, *options)
    job.agent.send_signal(number)
    assert job.end(40) != 0
    assert job.living == []
    marker = json.loads((run / "PREEMPTED").read_text())
    assert newest_sound(run).name == f"step-{marker['step']:08d}"
    assert marker["step"] == read_metrics(run)[-1]["step"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGKILL])
def test_ranks_die_with_torchrun(number: signal.Signals, torchrun: Callable[..., tuple[Torchrun, Path]]) -> None:
    """F3: SIGUSR1, not handled, ends the agent, which then ends nobody."""
    job, _ = torchrun({})
    job.agent.send_signal(number)
    assert job.end(10) == -number
    until = time.monotonic() + 5
    while job.living and time.monotonic() < until:
        time.sleep(0.05)
    assert job.living == []


@pytest.mark.slow
def test_one_killed_rank_ends_torchrun(torchrun: Callable[..., tuple[Torchrun, Path]]) -> None:
    """F1: within 30 s, without orphans."""
    job, _ = torchrun({})
    os.kill(job.ranks[1], signal.SIGKILL)
    assert job.end(30) != 0
    assert job.living == []


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_the_job_ends(torchrun: Callable[..., tuple[Torchrun, Path]]) -> None:
    """F4: within the timeout and the 30 s that torchrun gives its ranks, and some for the processes to end."""
    job, run = torchrun({"train.timeout": 20})
    os.kill(job.ranks[1], signal.SIGSTOP)
    assert job.end(20 + 30 + 15) != 0
    assert job.living == []
    (named,) = set(re.findall(r"no sign of life from rank \d \(\S+ process (\d+);", job.said))
    assert int(named) in job.ranks
    assert re.search(r"warning: rank \d .*has given no sign of life for \d+ s", job.said)
    stopped = json.loads((run / f"heartbeats/rank-{job.ranks.index(int(named)):05d}.json").read_text())
    assert stopped["pid"] == int(named) == job.ranks[1]
