"""One writer at a time for a slide, or for a store's own files: claims, which a dead owner loses by a stated rule.

WORK/claims/<name>/0 is the first owner's claim, /1 that of the one who took over from it, and so on: the highest
number holds. A claim is made by exclusive creation of its file, so that of many only one succeeds. The last owner takes
the next number too, so that nobody can take over any more, and moves the folder away before it removes it: who has
looked into that folder sees that it is another one now, and looks again.

The rule: an owner on this machine, since the same boot, is dead when its process is gone. Any other is dead when it has
not touched its claim for STALE_SECONDS by the file system's clock; a living one does so every BEAT_SECONDS.
"""

import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread

from tiling.errors import BonyError

STALE_SECONDS, BEAT_SECONDS = 120.0, 15.0
_CLAIMS = "claims"
_POLL_SECONDS = 0.2
_LOST_RACES = 1000  # nobody is too late so often: something else is wrong
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class HeldError(BonyError):
    """Somebody else, who lives, holds what was asked for."""


@dataclass(frozen=True)
class Owner:
    """Who made a claim.

    Args:
        host: Name of the machine.
        machine: Boot and process namespace: where equal, ``pid`` can be asked after.
        pid: Process.
        started: When that process started, in the kernel's ticks: pids come again.
        job: Slurm's job, "" outside of one.
        token: Different for every claim ever made.
    """

    host: str
    machine: str
    pid: int
    started: int
    job: str
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f", Slurm job {self.job}" if self.job else "")


def _machine() -> str:
    try:
        return f"{_BOOT.read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # no /proc: owners are judged by their heartbeat alone
        return f"unknown {uuid.uuid4().hex}"


def _start_of(pid: int) -> int | None:
    """Start of a process in ticks since boot, None when there is none (or only its unread exit status)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _self() -> Owner:
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    task = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    job = f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID", "")
    pid = os.getpid()
    return Owner(socket.gethostname(), _machine(), pid, _start_of(pid) or 0, job, uuid.uuid4().hex[:16])


def _write(folder: int, number: int, owner: Owner) -> None:
    """Make a claim in a folder that is open; FileExistsError where somebody was quicker."""
    with os.fdopen(os.open(str(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=folder), "w") as file:
        file.write(json.dumps(asdict(owner)))


def _read(folder: int, number: int) -> Owner | None:
    """The owner, None where its writing was cut short or is under way."""
    try:
        with os.fdopen(os.open(str(number), os.O_RDONLY, dir_fd=folder), "rb") as file:
            return Owner(**json.loads(file.read()))
    except (OSError, ValueError, TypeError):
        return None


def _lives(folder: int, number: int, owner: Owner | None) -> bool:
    """Whether the owner of a claim is alive, by the rule above; FileNotFoundError where the claim is gone."""
    if owner is not None and owner.machine == _machine():
        return _start_of(owner.pid) == owner.started
    touched = os.stat(str(number), dir_fd=folder).st_mtime
    os.utime(folder)  # now, by the clock that set the other time: hosts' clocks differ
    return os.fstat(folder).st_mtime - touched < STALE_SECONDS


class Claim:
    """A claim that is held.

    Attributes:
        token: Different for every claim ever made.
        dead: Tokens of the owners that died before, oldest first.
    """

    def __init__(self, folder: Path, number: int, owner: Owner, dead: tuple[str, ...]) -> None:
        self.token, self.dead = owner.token, dead
        self._folder, self._number, self._owner = folder, number, owner
        self._ended = Event()
        self._heart = Thread(target=self._beat, name="claim", daemon=True)
        self._heart.start()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with suppress(OSError):
                os.utime(self._folder / str(self._number))

    def _require_held(self, folder: int) -> None:
        if _read(folder, self._number) != self._owner or self._number + 1 in _numbers(folder):
            raise HeldError("was taken over by another job, since this one did not move", self._folder.name)

    def require_held(self) -> None:
        """Raise HeldError where another took over, because this process slept for longer than STALE_SECONDS."""
        try:
            with _opened(self._folder) as folder:
                self._require_held(folder)
        except FileNotFoundError:
            raise HeldError("was taken over by another job, which has ended", self._folder.name) from None

    def release(self) -> None:
        """Give it up."""
        self._ended.set()
        self._heart.join()
        with suppress(HeldError, OSError), _opened(self._folder) as folder:
            self._require_held(folder)
            _write(folder, self._number + 1, self._owner)
            self._folder.rename(self._folder.with_name(f".{self._folder.name}.{self.token}"))
            _sweep(self._folder)
            self._folder.parent.rmdir()


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    """The folder of a name's claims; what is done through it meets that folder, wherever it is moved."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield handle
    finally:
        os.close(handle)


def _numbers(folder: int) -> list[int]:
    """Numbers of all claims in it, ascending."""
    return sorted(int(name) for name in os.listdir(folder))


def _sweep(folder: Path) -> None:
    """Remove folders that were moved away, those of owners among them who died amid removing."""
    for gone in folder.parent.iterdir():
        if gone.name.startswith(f".{folder.name}."):
            shutil.rmtree(gone, ignore_errors=True)


def _make(path: Path) -> Claim:
    """The claim, if nobody who lives holds it.

    Raises:
        HeldError: Somebody does.
        FileExistsError, FileNotFoundError: Somebody was quicker at this moment: look again.
    """
    path.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    with _opened(path) as folder:
        numbers = _numbers(folder)
        owners = [_read(folder, number) for number in numbers]
        if numbers and _lives(folder, numbers[-1], owners[-1]):
            raise HeldError(f"is being written by {owners[-1] or 'another process'}", path.name)
        us, number = _self(), numbers[-1] + 1 if numbers else 0
        _write(folder, number, us)
        if not os.path.samestat(os.fstat(folder), path.stat()):  # its last owner has moved it away
            os.unlink(str(number), dir_fd=folder)
            raise FileNotFoundError
    return Claim(path, number, us, tuple(owner.token for owner in owners if owner is not None))


def is_claimed(work: Path, name: str) -> bool:
    """Whether there is a claim on a name, of a living owner or of a dead one."""
    return (work / _CLAIMS / name).is_dir()


@contextmanager
def claimed(work: Path, name: str, wait: float = 0.0) -> Iterator[Claim]:
    """Hold a name for the block.

    Args:
        work: Where the store's temporary things are.
        name: Such as a slide id; no slash in it.
        wait: Seconds to wait for a living owner.

    Raises:
        HeldError: Somebody who lives holds it; the message says who.
        OSError: The folder of claims cannot be made.
    """
    folder, end, lost = work / _CLAIMS / name, time.monotonic() + wait, 0
    while True:
        try:
            claim = _make(folder)
            break
        except (FileExistsError, FileNotFoundError):
            lost += 1
            if lost == _LOST_RACES:
                raise
        except HeldError:
            if time.monotonic() >= end:
                raise
            time.sleep(_POLL_SECONDS)
    try:
        yield claim
    finally:
        claim.release()
        with suppress(OSError):  # others are still at work in it
            work.rmdir()
