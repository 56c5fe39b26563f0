"""Claims on real files, by real processes: of many writers one wins, and the dead lose by the stated rule."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tiling import claims
from tiling.claims import HeldError, claimed

HOLD = """
import sys, time
from pathlib import Path
from tiling.claims import claimed
with claimed(Path(sys.argv[1]), sys.argv[2]):
    print("held", flush=True)
    time.sleep(600)
"""


def hold(work: Path, name: str) -> "subprocess.Popen[str]":
    """A process that holds a claim."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(work), name], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def stop(process: "subprocess.Popen[str]", by: int = signal.SIGKILL) -> None:
    process.send_signal(by)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def count_up(work: Path, counter: Path, times: int) -> None:
    """Read, wait, write one more: loses counts unless it is alone."""
    for _ in range(times):
        with claimed(work, "counter", wait=60):
            value = int(counter.read_text())
            time.sleep(0.002)
            counter.write_text(str(value + 1))


def test_nothing_is_left_when_all_is_done(tmp_path: Path) -> None:
    work = tmp_path / "work"
    with claimed(work, "a") as first, claimed(work, "b") as second:
        assert first.token != second.token
        assert claims.is_claimed(work, "a")
    assert not work.exists()


def test_other_things_in_the_work_folder_stay(tmp_path: Path) -> None:
    work = tmp_path / "work"
    with claimed(work, "a"):
        (work / "a.half").mkdir()
    assert [path.name for path in work.iterdir()] == ["a.half"]


def test_a_living_owner_is_named_at_once(tmp_path: Path) -> None:
    other = hold(tmp_path, "a")
    start = time.monotonic()
    with pytest.raises(HeldError, match=rf"a: is being written by process {other.pid} on "), claimed(tmp_path, "a"):
        pytest.fail("two owners")
    assert time.monotonic() - start < 5
    with claimed(tmp_path, "b"):
        pass
    stop(other)


def test_a_stopped_process_still_lives(tmp_path: Path) -> None:
    other = hold(tmp_path, "a")
    other.send_signal(signal.SIGSTOP)
    with pytest.raises(HeldError), claimed(tmp_path, "a"):
        pytest.fail("two owners")
    stop(other)


def test_killed_owners_lose_it_and_are_counted(tmp_path: Path) -> None:
    for dead in range(3):
        process = hold(tmp_path, "a")
        assert len(list((tmp_path / "claims" / "a").iterdir())) == dead + 1
        stop(process)
    with claimed(tmp_path, "a") as claim:
        assert len(set(claim.dead)) == 3
    assert not (tmp_path / "claims").exists()


def test_a_zombie_is_dead(tmp_path: Path) -> None:
    process = hold(tmp_path, "a")
    process.kill()
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    with claimed(tmp_path, "a") as claim:
        assert len(claim.dead) == 1
    stop(process)


def test_a_pid_that_came_again_is_another_process(tmp_path: Path) -> None:
    us = claims._self()
    (tmp_path / "claims" / "a").mkdir(parents=True)
    (tmp_path / "claims" / "a" / "0").write_text(json.dumps(asdict(replace(us, started=us.started - 1))))
    with claimed(tmp_path, "a") as claim:
        assert claim.dead == (us.token,)


@pytest.mark.parametrize("content", ["elsewhere", "half"])
def test_owners_elsewhere_are_judged_by_their_heartbeat(tmp_path: Path, content: str) -> None:
    path = tmp_path / "claims" / "a" / "0"
    path.parent.mkdir(parents=True)
    text = json.dumps(asdict(replace(claims._self(), host="node7", machine="another boot", job="12_3")))
    path.write_text(text if content == "elsewhere" else text[:20])
    named = "on node7, Slurm job 12_3" if content == "elsewhere" else "another process"
    with pytest.raises(HeldError, match=named), claimed(tmp_path, "a"):
        pytest.fail("two owners")
    os.utime(path, (time.time() - claims.STALE_SECONDS - 2,) * 2)
    with claimed(tmp_path, "a"):
        pass


def test_the_heart_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.05)
    with claimed(tmp_path, "a"):
        path = tmp_path / "claims" / "a" / "0"
        os.utime(path, (0, 0))
        time.sleep(0.5)
        assert path.stat().st_mtime > time.time() - 5


def test_who_slept_through_a_takeover_may_not_go_on(tmp_path: Path) -> None:
    with claimed(tmp_path, "a") as claim:
        claim.require_held()
        (tmp_path / "claims" / "a" / "1").write_text("")
        with pytest.raises(HeldError, match="taken over"):
            claim.require_held()
    assert (tmp_path / "claims" / "a" / "1").exists(), "the successor's claim must stay"


def test_who_has_looked_at_owners_that_are_gone_looks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop(hold(tmp_path, "a"))
    lives, began = claims._lives, []

    def slow_look(*claim: object) -> bool:
        found = lives(*claim)  # type: ignore[arg-type]
        monkeypatch.setattr(claims, "_lives", lives)
        with claimed(tmp_path, "a"):
            """Taken over from the dead one, and given up."""
        began.append(hold(tmp_path, "a"))
        return found

    monkeypatch.setattr(claims, "_lives", slow_look)
    with pytest.raises(HeldError) as error, claimed(tmp_path, "a"):
        pytest.fail("two owners")
    assert f"process {began[0].pid} on " in str(error.value)
    stop(began[0])


def test_what_a_dead_owner_left_amid_removing_goes(tmp_path: Path) -> None:
    left = tmp_path / "work" / "claims" / ".a.0123456789abcdef"
    left.mkdir(parents=True)
    (left / "0").write_text("")
    with claimed(tmp_path / "work", "a"):
        assert not left.exists()
    assert not (tmp_path / "work").exists()


def test_many_processes_never_hold_it_together(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=count_up, args=(tmp_path / "work", counter, 25)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert counter.read_text() == "100"
    assert not (tmp_path / "work").exists()
