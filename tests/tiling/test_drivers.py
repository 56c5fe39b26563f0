"""Three drivers, one store, byte for byte; killed, doubled and crashed ones too. Real processes, real MPI."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cli import main
from tiling import datasets, phantom
from tiling.audit import store_problems
from tiling.datasets import Source
from tiling.index import slide_folders
from tiling.plan import largest_first, share
from tiling.write import MOST_DEATHS

BONY = Path(sys.executable).with_name("bony")
MPIEXEC = Path(sys.executable).with_name("mpiexec")

Files = Callable[[Path], dict[str, str]]


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides that take long enough to be killed in."""
    root = tmp_path_factory.mktemp("big")
    rows = ["image_id,data_provider,isup_grade,gleason_score"]
    for seed in range(3):
        slide = phantom.make_slide(seed + 50, "4", "radboud", (3072, 3072))
        phantom.write_slide(slide, root)
        rows.append(f"{slide.image_id},radboud,{slide.isup_grade},{slide.gleason_score}")
    (root / "train.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="module")
def reference(big: Path, tmp_path_factory: pytest.TempPathFactory, files: Files) -> dict[str, str]:
    """The files of an uninterrupted run."""
    store = tmp_path_factory.mktemp("reference") / "store"
    assert main([str(word) for word in words(big, store)][1:]) == 0
    return files(store)


def words(root: Path, store: Path, *more: str) -> list[str]:
    return [str(BONY), "tile", "--dataset", "panda", "--root", str(root), "--out", str(store), *more]


@contextmanager
def running(command: list[str]) -> Iterator["subprocess.Popen[str]"]:
    """A command in a process group of its own; nothing of it is left behind."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def half_made(store: Path) -> list[Path]:
    """Folders of slides that are being written; os.walk minds no folder that goes meanwhile."""
    _, folders, others = next(os.walk(store / "work"), ("", [], []))
    return [store / "work" / name for name in (*folders, *others) if name != "claims"]


def shards_begun(store: Path, but: Collection[Path] = ()) -> bool:
    begun = (folder / "tiles.zarr/c" for folder in half_made(store) if folder not in but)
    return any(files for chunks in begun for _, _, files in os.walk(chunks))


def kill_amid_a_slide(command: list[str], store: Path) -> None:
    """Start a run, and kill all of it once it has begun another shard."""
    left = half_made(store)
    with running(command) as run:
        wait_for(lambda: shards_begun(store, but=left))
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()


def test_three_drivers_make_the_same_bytes(big: Path, reference: dict[str, str], tmp_path: Path, files: Files) -> None:
    commands = {
        "workers": [words(big, tmp_path / "workers", "--workers", "2")],
        "mpi": [[str(MPIEXEC), "-n", "3", *words(big, tmp_path / "mpi", "--mpi")]],
        "parts": [words(big, tmp_path / "parts", "--part", f"{part}/3") for part in (1, 2, 3)],
    }
    for name, runs in commands.items():
        for command in runs:
            run = subprocess.run(command, check=False, capture_output=True, text=True)
            assert run.returncode == 0, run.stderr
        assert files(tmp_path / name) == reference, name
        assert store_problems(tmp_path / name) == []


def test_parts_at_the_same_time(big: Path, reference: dict[str, str], tmp_path: Path, files: Files) -> None:
    """An array's tasks start together: one of them makes the store, the last one its index."""
    store = tmp_path / "store"
    runs = [subprocess.Popen(words(big, store, "--part", f"{part}/4"), stderr=subprocess.PIPE) for part in (1, 2, 3, 4)]
    said = [run.communicate(timeout=120)[1] for run in runs]
    assert [run.returncode for run in runs] == [0] * 4, said
    assert files(store) == reference


def test_a_part_that_is_not_the_last_makes_no_index(big: Path, tmp_path: Path) -> None:
    run = subprocess.run(words(big, tmp_path / "s", "--part", "1/3"), check=False, capture_output=True, text=True)
    assert run.returncode == 0
    assert "2 slides are still to come" in run.stdout
    assert not (tmp_path / "s" / "index.parquet").exists()


@pytest.mark.parametrize("part", ["0/3", "4/3", "1", "a/b", "1/0"])
def test_a_part_that_is_none(big: Path, tmp_path: Path, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(big, tmp_path / "store", "--part", part)[1:]) == 2
    assert "--part: is" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_two_jobs_on_one_slide(big: Path, reference: dict[str, str], tmp_path: Path, files: Files) -> None:
    """F12: one wins, the other says who holds it within 5 s; the result is a single writer's."""
    store, slide = tmp_path / "store", min((big / "train_images").iterdir())
    command = words(big, store)
    with running([*command, str(slide)]) as first:
        wait_for(lambda: shards_begun(store))
        first.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        second = subprocess.run([*command, str(slide)], check=False, capture_output=True, text=True)
        assert time.monotonic() - start < 5 + 5, "5 s, and the start of an interpreter on a busy machine"
        first.send_signal(signal.SIGCONT)
        assert second.returncode == 3
        assert f"{slide.stem}: is being written by process " in second.stderr
        assert first.wait(60) == 0
    third = subprocess.run(command, check=False, capture_output=True, text=True)
    assert third.returncode == 0
    assert files(store) == reference


def test_a_dead_owner_s_slide_is_taken_over(big: Path, reference: dict[str, str], tmp_path: Path, files: Files) -> None:
    """F12 and F13: killed and run again three times."""
    store, command = tmp_path / "store", words(big, tmp_path / "store", "--part", "1/1")
    for _ in range(3):
        kill_amid_a_slide(command, store)
        assert half_made(store)
    last = subprocess.run(command, check=False, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    assert files(store) == reference
    assert not (store / "work").exists()


def test_a_slide_that_always_kills_its_writer(big: Path, tmp_path: Path) -> None:
    """By the fifth time somebody else is to blame: the others are tiled."""
    store, command = tmp_path / "store", words(big, tmp_path / "store")
    for _ in range(MOST_DEATHS):
        kill_amid_a_slide(command, store)
    last = subprocess.run(command, check=False, capture_output=True, text=True)
    assert last.returncode == 3
    assert f"{MOST_DEATHS} processes that wrote it died" in last.stderr
    assert len(slide_folders(store)) == 2
    assert not half_made(store)


def test_a_killed_worker_process_costs_nothing(
    big: Path, reference: dict[str, str], tmp_path: Path, files: Files
) -> None:
    store = tmp_path / "store"
    with running(words(big, store, "--workers", "2")) as run:
        wait_for(lambda: shards_begun(store))
        os.kill(workers_of(run.pid)[0], signal.SIGKILL)
        assert run.wait(120) == 0
    assert files(store) == reference


def test_a_slide_that_crashes_its_worker_is_left_out(big: Path, tmp_path: Path) -> None:
    """The worker is killed whenever it is at this slide."""
    store, victim = tmp_path / "store", max((big / "train_images").iterdir()).stem
    with running(words(big, store, "--workers", "2")) as run:
        deaths = 0
        while run.poll() is None:
            if any(path.name.startswith(f"{victim}.") for path in half_made(store)):
                for worker in workers_of(run.pid):
                    with suppress(ProcessLookupError):
                        os.kill(worker, signal.SIGKILL)
                        deaths += 1
            time.sleep(0.002)
        assert run.returncode == 3
    assert deaths >= 2
    assert {folder.name for folder in slide_folders(store)} == {
        path.stem for path in (big / "train_images").iterdir()
    } - {victim}
    assert "the process that wrote it died twice" in (store / "quarantine.jsonl").read_text()
    assert not (store / "work").exists()


def workers_of(pid: int) -> list[int]:
    """Spawned workers of a process: its children but multiprocessing's resource tracker."""
    workers = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has gone meanwhile
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                workers.append(int(child))
    return workers


def test_a_killed_mpi_worker(big: Path, reference: dict[str, str], tmp_path: Path, files: Files) -> None:
    """F17: non-zero exit; the rerun writes only what is missing."""
    store = tmp_path / "store"
    command = [str(MPIEXEC), "-n", "2", *words(big, store, "--mpi")]
    with running(command) as run:
        wait_for(lambda: len(slide_folders(store)) == 1 and shards_begun(store))
        (writer,) = {int(path.name) for path in Path("/proc").glob("[0-9]*") if writes_under(path, store / "work")}
        os.kill(writer, signal.SIGKILL)
        assert run.wait(60) != 0
    (done,) = slide_folders(store)
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*")}
    again = subprocess.run(command, check=False, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in done.rglob("*")} == before
    assert files(store) == reference


def writes_under(process: Path, folder: Path) -> bool:
    try:
        return any(path.readlink().is_relative_to(folder) for path in (process / "fd").iterdir())
    except OSError:
        return False


def test_a_corrupt_slide_under_mpi(big: Path, tmp_path: Path) -> None:
    """A worker's failure stays with its slide; exit code 3 comes through mpiexec."""
    root = Path(shutil.copytree(big, tmp_path / "root"))
    victim = min((root / "train_images").iterdir())
    victim.write_bytes(victim.read_bytes()[:5000])
    command = [str(MPIEXEC), "-n", "3", *words(root, tmp_path / "store", "--mpi")]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert run.returncode == 3, run.stderr
    assert len(slide_folders(tmp_path / "store")) == 2
    assert victim.stem in (tmp_path / "store" / "quarantine.jsonl").read_text()


def test_slurm_tasks_that_do_not_know_of_each_other(big: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "SLURM_NTASKS": "4"}
    run = subprocess.run(
        words(big, tmp_path / "store", "--mpi"), check=False, capture_output=True, text=True, env=environment
    )
    assert run.returncode == 2
    assert "Slurm started 4 tasks, but MPI sees a world of 1" in run.stderr
    assert not (tmp_path / "store").exists()


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40), st.integers(1, 6))
def test_shares_are_balanced(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], parts: int) -> None:
    folder = tmp_path_factory.mktemp("plan")
    sources = []
    for number, size in enumerate(sizes):
        (folder / str(number)).write_bytes(bytes(size))
        sources.append(Source(f"s{number:02}", (folder / str(number),)))
    size_of = {source.slide_id: size for size, source in largest_first(sources)}
    shares = [share(sources, part, parts) for part in range(1, parts + 1)]
    assert sorted(source.slide_id for one in shares for source in one) == sorted(size_of)
    loads = [sum(size_of[source.slide_id] for source in one) for one in shares]
    assert max(loads) <= sum(sizes) / parts + max(sizes)
    assert [share(list(reversed(sources)), part, parts) for part in range(1, parts + 1)] == shares


def test_a_full_disk_ends_the_run(big: Path, tmp_path: Path) -> None:
    """Not a fault of the slides: none is quarantined, and the line says what to do."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here (needs root)")
    try:
        run = subprocess.run(words(big, mount / "store"), check=False, capture_output=True, text=True)
        assert run.returncode == 1
        assert "cannot be written (No space left on device); make room" in run.stderr.splitlines()[-1]
        assert not (mount / "store" / "quarantine.jsonl").exists()
        assert not half_made(mount / "store")
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_datasets_are_planned_whole(big: Path) -> None:
    """Every task plans over all slides, so that all agree on the shares."""
    sources = datasets.panda(big).sources
    found = sorted(one.slide_id for part in (1, 2) for one in share(sources, part, 2))
    assert found == [one.slide_id for one in sources]
