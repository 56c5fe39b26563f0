"""What the trainer's tests share: a small real store, a tiny run's options, real ranks."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.methods import dino
from tiling import datasets, phantom
from tiling.run import tile
from tiling.settings import TileSettings
from tiling.store import TileStore

Words = Callable[..., list[str]]
Ranks = Callable[..., None]

TINY = {
    "model.name": "xcit_nano_12_p16_224",
    "model.drop_path": 0.0,
    "method.out_dim": 64,
    "method.hidden_dim": 32,
    "method.bottleneck_dim": 16,
    "method.freeze_last_layer_epochs": 0.3,
    "views.global_crops": 1,
    "views.local_crops": 2,
    "views.global_size": 64,
    "views.local_size": 32,
    "optim.lr": 0.064,
    "optim.warmup_steps": 0,
    "train.batch_per_rank": 2,
    "train.accumulate": 2,
    "train.steps": 4,
    "train.threads": 1,
    "train.log_every": 1,
    "checkpoint.every": 2,
}


def _make_store(root: Path, seeds: tuple[int, ...]) -> Path:
    for seed, grade in zip(seeds, ("benign", "4"), strict=False):
        phantom.write_slide(phantom.make_slide(seed, grade, size=(1344, 1344)), root)
    tile(datasets.slides([root / "train_images"]), root / "store", TileSettings())
    return root / "store"


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two phantom slides, 33 tiles of 224 px: read only."""
    return _make_store(tmp_path_factory.mktemp("store"), (0, 1))


@pytest.fixture(scope="module")
def tiles(store: Path) -> Iterator[TileStore]:
    """The two slides' store, opened."""
    with TileStore(store, threads=2) as opened:
        yield opened


@pytest.fixture(scope="session")
def other_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One other slide."""
    return _make_store(tmp_path_factory.mktemp("other"), (2,))


@pytest.fixture(scope="session")
def words(store: Path) -> Words:
    """Options of ``bony pretrain`` for a run of seconds: words(out, {"train.steps": 3})."""

    def build(out: Path, changes: Mapping[str, object] | None = None, data: Path = store) -> list[str]:
        values = {"data": data, "out": out, **TINY, **(changes or {})}
        return [word for key, value in values.items() for word in (f"--{key}", str(value))]

    return build


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The ranks of a test share two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def double(one_thread: None) -> Iterator[None]:
    """Networks, centre and views in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class TinyBackbone(nn.Module):
    """A fast encoder, where it does not matter which one it is."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, self.num_features)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(images.mean((2, 3))))


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """DINO's networks are tiny."""
    monkeypatch.setattr(dino, "build_encoder", lambda *_: TinyBackbone())


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """For child processes: one thread each, and nothing of a process group we may be in."""
    group = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {key: value for key, value in os.environ.items() if key not in group} | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def ranks(environment: dict[str, str]) -> Ranks:
    """Run a script as the ranks of one gloo group: ranks(script, world, *arguments); each must exit with 0."""

    def run(script: str, world: int, *arguments: object, seconds: float = 120) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(world)}
        command = [sys.executable, "-W", "error", script, *map(str, arguments)]
        members = [
            subprocess.Popen(command, env=environment | group | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
            for rank in range(world)
        ]
        try:
            end = time.monotonic() + seconds
            while time.monotonic() < end and any(member.poll() is None for member in members):
                if any(member.returncode for member in members):  # the others would wait for it
                    break
                time.sleep(0.02)
        finally:
            for member in members:
                member.kill()
        said = [member.communicate()[1] for member in members]
        codes = [member.returncode for member in members]
        assert codes == [0] * world, f"exit codes {codes}\n" + "\n".join(said)

    return run


class Job:
    """Ranks of one run.

    Attributes:
        pids: Process of each rank.
    """

    def __init__(self, warm: "Warm", pids: list[int], log: Path) -> None:
        self._warm, self.pids, self._log = warm, pids, log

    def kill(self, number: int = signal.SIGKILL, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all; those that have ended are left out."""
        for pid in self.pids if rank is None else [self.pids[rank]]:
            if pid not in self._warm.codes:
                os.kill(pid, number)

    @property
    def running(self) -> bool:
        """Whether some rank still runs."""
        self._warm.listen(0)
        return any(pid not in self._warm.codes for pid in self.pids)

    def end(self, seconds: float = 240) -> list[int]:
        """Wait for all ranks; their exit codes, negative for signals. Kills them when time is up."""
        until = time.monotonic() + seconds
        while self.running and time.monotonic() < until:
            self._warm.listen(0.1)
        late = self.running
        self.kill()
        while self.running:
            self._warm.listen(0.1)
        assert not late, f"still running after {seconds} s\n{self.said}"
        return [self._warm.codes[pid] for pid in self.pids]

    @property
    def said(self) -> str:
        """What the ranks have written so far."""
        return self._log.read_text()


class Warm:
    """Starts runs by forking a process that has everything imported.

    Args:
        environment: Of that process.
        folder: For logs.
    """

    def __init__(self, environment: Mapping[str, str], folder: Path) -> None:
        self._folder, self._jobs = folder, 0
        self._unread = b""
        self.codes: dict[int, int] = {}
        command = [sys.executable, "-W", "error", str(Path(__file__).with_name("warm_parent.py"))]
        self._parent = subprocess.Popen(command, env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def start(self, words: Sequence[str], ranks: int = 1, environment: Mapping[str, str] | None = None) -> Job:
        """Run ``bony pretrain WORDS`` as so many ranks."""
        self._jobs += 1
        log = self._folder / f"job{self._jobs}.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        job = {"words": list(words), "ranks": ranks, "port": port, "log": str(log), "env": dict(environment or {})}
        self._parent.stdin.write((json.dumps(job) + "\n").encode())
        self._parent.stdin.flush()
        answer = None
        while answer is None:
            answer = self.listen(60)
        return Job(self, answer, log)

    def listen(self, seconds: float) -> list[int] | None:
        """Take in one thing that the parent says: the ranks of the job that was asked for, or None."""
        if b"\n" not in self._unread:
            if not select.select([self._parent.stdout], [], [], seconds)[0]:
                assert self._parent.poll() is None, "the warm parent has died"
                return None
            self._unread += os.read(self._parent.stdout.fileno(), 65536)
        line, end, rest = self._unread.partition(b"\n")
        if not end:
            return None
        self._unread = rest
        said = json.loads(line)
        if "pid" in said:
            self.codes[said["pid"]] = said["code"]
        return said.get("pids")

    def close(self) -> None:
        """End the parent, and with it what it started."""
        self._parent.kill()
        self._parent.communicate()


@pytest.fixture(scope="session")
def warm(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """Starts runs without the seconds that importing takes."""
    parent = Warm(environment, tmp_path_factory.mktemp("warm"))
    yield parent
    parent.close()
