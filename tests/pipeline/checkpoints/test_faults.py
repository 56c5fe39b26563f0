"""F6, F7 and F8 of FAULTS.md: a full disk, kills around a save, damage on the disk. Each is made for real."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.checkpoint import list_checkpoints, newest_sound, step_folder
from pipeline.saver import Saver
from tiling import atomic
from tiling.errors import CheckpointError, DamageError

FILES = ("student.safetensors", "teacher.safetensors", "method.safetensors", "optimizer.safetensors", "state.json")
MakeModel = Callable[..., Any]
KILLS, SEED = 100, 5


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def box_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- F6: disk full ---------------------------------------------------------------------------------------------------


def require_named(error: CheckpointError, run: Path, step: int) -> tuple[int, int]:
    """Bytes needed and free, from a message that names the path, says why, and is one line."""
    said = str(error)
    assert str(step_folder(run, step)) in said
    assert "\n" not in said
    found = re.search(r"\((.*)\): it needs ([\d,]+) bytes, ([\d,]+) are free; .*make space", said)
    assert found, said
    assert "No space left" in found[1] or "File too large" in found[1]
    return int(found[2].replace(",", "")), int(found[3].replace(",", ""))


def error_of(model: Any, saver: Saver, step: int) -> CheckpointError | None:
    try:
        model.write(saver, step)
    except CheckpointError as error:
        return error
    return None


def fill_the_disk(disk: Path) -> None:
    """In a file system of 1 MB: leave ever more pages free until a save fits, and look after each that does not."""
    from conftest import Model

    run, ballast, page = disk / "run", disk / "ballast", 4096
    model = Model(2, width=600)
    first = box_bytes(Model(1, width=600).save(run, 1))
    size = sum(len(data) for name, data in first.items() if name.endswith(".safetensors"))
    with Saver(run, keep=3) as saver:
        for pages in range(200):
            ballast.write_bytes(bytes(shutil.disk_usage(disk).free - pages * page))
            assert shutil.disk_usage(disk).free == pages * page
            error = error_of(model, saver, 2)
            if error is None:
                break
            assert require_named(error, run, 2) == (size, pages * page)
            assert names(run / "checkpoints") == {"step-00000001", "latest"}
            assert (run / "checkpoints/latest").read_text() == "step-00000001\n"
            assert box_bytes(step_folder(run, 1)) == first
            assert newest_sound(run) == step_folder(run, 1)
            ballast.unlink()
        assert pages > size / page  # every file has met the full disk
        assert newest_sound(run) == step_folder(run, 2)
        other = Model(3, width=600)
        other.load(step_folder(run, 2))
        assert other.equals(model.tensors())
        ballast.unlink()
        left = run / "checkpoints/work/step-00000003.4242/student.safetensors"
        left.parent.mkdir(parents=True)
        left.write_bytes(bytes(shutil.disk_usage(disk).free))
        model.write(saver, 3)  # what a killed saver left makes room before anything is written
        print(f"disk full {pages} times, then {size} bytes written")


def test_a_full_file_system_at_any_byte_of_a_save(tmp_path: Path, environment: dict[str, str]) -> None:
    """A small tmpfs in a mount namespace of its own, which a user may make; what is checked is in ``fill_the_disk``."""
    probe = ["unshare", "-rm", "true"]
    if not shutil.which("unshare") or subprocess.run(probe, check=False, capture_output=True).returncode:
        pytest.skip("no user namespaces here, so no small file system can be mounted")
    mount = 'mount -t tmpfs -o size=1m tmpfs "$1" && exec "$2" -W error "$3" full "$1"'
    command = ["unshare", "-rm", "sh", "-c", mount, "sh", str(tmp_path), sys.executable, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(re.search(r"disk full (\d+) times", done.stdout)[1]) > 20


@contextmanager
def files_stay_below(size: int) -> Iterator[None]:
    """The kernel refuses to let any file of this process grow further."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_size_limit_is_named_leaves_the_earlier_one_and_the_next_save_succeeds(
    tmp_path: Path, model: MakeModel
) -> None:
    before = box_bytes(model(1).save(tmp_path, 1))
    with Saver(tmp_path, keep=3) as saver:
        with pytest.raises(CheckpointError) as caught, files_stay_below(600):
            model(2).write(saver, 2)
        needed, _ = require_named(caught.value, tmp_path, 2)
        assert needed == sum(len(data) for name, data in before.items() if name.endswith(".safetensors"))
        assert names(tmp_path / "checkpoints") == {"step-00000001", "latest"}
        assert box_bytes(step_folder(tmp_path, 1)) == before
        assert newest_sound(tmp_path) == step_folder(tmp_path, 1)
        model(2).begin(saver, 2)
    assert newest_sound(tmp_path) == step_folder(tmp_path, 2)


# ---- F7: kills -------------------------------------------------------------------------------------------------------


def kill_savers(folder: Path) -> None:
    """Fork a saver, kill it at a random moment, look; over and over."""
    from conftest import Model

    torch.set_num_threads(1)
    dice = random.Random(SEED)
    trained, loaded, run = Model(0, width=4000), Model(1, width=4000), folder / "run"
    start = time.monotonic()
    save_marked(trained, run, 0)
    took, last, finished, leftovers = time.monotonic() - start, 0, 0, 0
    for step in range(1, KILLS + 1):
        child = os.fork()
        if child == 0:
            save_marked(trained, run, step)
            os._exit(0)
        time.sleep(dice.uniform(0, 1.5 * took))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = newest_sound(run)
        position = loaded.load(found)
        assert position.step in (step, last), (position, step, last)
        trained.centre.fill_(position.step)
        assert loaded.equals(trained.tensors()), position
        assert not [line for other in list_checkpoints(run) for line in atomic.damaged_files(other)]
        finished += position.step == step
        leftovers += (run / "checkpoints/work").exists()
        took *= 0.9 if position.step == step else 1.1  # the machine's pace changes; half of the saves are to be cut off
        last = position.step
    save_marked(trained, run, KILLS + 1)
    assert newest_sound(run) == step_folder(run, KILLS + 1)
    assert names(run / "checkpoints") == {"latest", *(path.name for path in list_checkpoints(run))}
    print(json.dumps({"seed": SEED, "kills": KILLS, "finished": finished, "leftovers": leftovers}))


def save_marked(model: Any, run: Path, step: int) -> None:
    """Save with the step in every value of the centre, and go on training while it is written."""
    model.centre.fill_(step)
    with Saver(run, keep=3) as saver:
        model.begin(saver, step)
        for value in model.live().values() if step else ():
            value.mul_(0)


def test_100_killed_savers_each_leave_a_sound_checkpoint(tmp_path: Path, environment: dict[str, str]) -> None:
    """Forked in a child, which has no threads; what is checked is in ``kill_savers``."""
    # In memory where that is possible: a kill leaves the same there, and 100 saves need not wait for the disk.
    memory = Path("/dev/shm")
    folder = memory / f"bony-kills-{os.getpid()}" if memory.is_dir() else tmp_path
    folder.mkdir(exist_ok=True)
    try:
        command = [sys.executable, "-W", "error", __file__, "kills", str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)
    finally:
        shutil.rmtree(folder)
    assert done.returncode == 0, f"seed {SEED}\n{done.stderr}"
    print(done.stdout)
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["finished"] > 10  # some saves were finished in time,
    assert outcome["finished"] < 90  # and some were cut off, or nothing has been tried;
    assert outcome["leftovers"] > 10  # what these had begun was left for the next


def test_half_written_folder_is_never_taken_for_a_checkpoint_and_goes_with_the_next_save(
    run: Path, model: MakeModel
) -> None:
    half = run / "checkpoints/work/step-00000006.4242"
    shutil.copytree(run / "checkpoints/step-00000004", half)
    truncate(half / "student.safetensors")
    (half / "COMPLETE").unlink()
    assert newest_sound(run) == run / "checkpoints/step-00000004"
    assert len(list_checkpoints(run)) == 2
    model(5).save(run, 6)
    assert newest_sound(run) == run / "checkpoints/step-00000006"
    assert not half.exists()


# ---- F8: damage ------------------------------------------------------------------------------------------------------


def flip(path: Path, place: float) -> None:
    """Change one bit, ``place`` of the way through the file."""
    data = bytearray(path.read_bytes())
    bit = int(place * 8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def truncate(path: Path, place: float = 0.5) -> None:
    os.truncate(path, int(place * path.stat().st_size))


HARMS = {"cut": truncate, "flip": lambda path: flip(path, 0.37), "gone": Path.unlink}


@pytest.mark.parametrize("name", [*FILES, "COMPLETE"])
@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS.keys())
def test_damaged_newest_is_named_passed_over_and_replaced_when_the_run_comes_there_again(
    run: Path, model: MakeModel, name: str, harm: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    harm(run / "checkpoints/step-00000004" / name)
    folder = newest_sound(run)
    assert folder == run / "checkpoints/step-00000002"
    said = capsys.readouterr().err
    # A changed COMPLETE that can still be read lists another digest: the file that has not got it is named.
    assert str(run / "checkpoints/step-00000004" / ("" if name == "COMPLETE" else name)) in said
    assert said.count("\n") == 1
    loaded = model(3)
    assert loaded.load(folder).step == 2
    assert loaded.equals(model(1).tensors())
    model(5).save(run, 3, keep=1)  # a damaged newer one pushes no sound one out
    assert newest_sound(run) == run / "checkpoints/step-00000003"
    model(6).save(run, 4)
    assert newest_sound(run) == run / "checkpoints/step-00000004"
    loaded.load(run / "checkpoints/step-00000004")
    assert loaded.equals(model(6).tensors())
    assert names(run / "checkpoints") == {"step-00000003", "step-00000004", "latest"}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from([*FILES, "COMPLETE", "latest"]),
    harm=st.sampled_from([flip, truncate]),
    place=st.floats(0, 1, exclude_max=True),
)
@example(name="COMPLETE", harm=truncate, place=0.0)
@example(name="latest", harm=truncate, place=0.99)
@example(name="latest", harm=flip, place=0.95)
def test_any_one_bit_and_any_cut_is_noticed(
    run: Path,
    model: MakeModel,
    capsys: pytest.CaptureFixture[str],
    name: str,
    harm: Callable[[Path, float], None],
    place: float,
) -> None:
    newest = run / "checkpoints/step-00000004"
    path = run / "checkpoints" / name if name == "latest" else newest / name
    before = path.read_bytes()
    harm(path, place)
    try:
        found, said = newest_sound(run), capsys.readouterr().err
        if name == "latest":  # it is for readers: what stands decides
            assert found == newest
            assert str(path) in said
        else:
            assert found == run / "checkpoints/step-00000002"
            assert str(newest) in said
            with pytest.raises(DamageError, match=r"step-00000004"):
                model(3).load(newest)
    finally:
        path.write_bytes(before)
    assert newest_sound(run) == newest
    assert not capsys.readouterr().err


def test_all_damaged_is_an_error_not_a_fresh_start(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truncate(run / "checkpoints/step-00000002/student.safetensors")
    (run / "checkpoints/step-00000004/COMPLETE").unlink()
    with pytest.raises(CheckpointError, match="none of 2 checkpoints is sound"):
        newest_sound(run)
    said = capsys.readouterr().err
    assert "step-00000004/COMPLETE" in said
    assert "step-00000002/student.safetensors" in said


def test_latest_of_a_folder_that_is_gone_is_said_and_the_next_save_puts_it_right(
    run: Path, model: MakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "checkpoints/step-00000004")
    assert newest_sound(run) == run / "checkpoints/step-00000002"
    assert re.fullmatch(r".*/checkpoints/latest: names .*step-00000004.*\n", capsys.readouterr().err)
    model(5).save(run, 3)
    assert newest_sound(run) == run / "checkpoints/step-00000003"
    assert not capsys.readouterr().err


def test_all_gone_but_latest_is_an_error_not_a_fresh_start(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in list_checkpoints(run):
        shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="all checkpoints are gone"):
        newest_sound(run)
    assert "step-00000004" in capsys.readouterr().err


if __name__ == "__main__":
    {"full": fill_the_disk, "kills": kill_savers}[sys.argv[1]](Path(sys.argv[2]))
