"""A warm parent of ranks, run as a script by the fixture ``warm``: importing torch takes seconds, a fork does not.

It reads jobs as JSON lines, forks their ranks, each a ``bony pretrain`` of its own, and answers with their process ids;
when one ends it says so. It computes nothing itself, so that its children begin without anybody's threads.
"""

import json
import os
import select
import signal
import socket


def _become_rank(job: dict, rank: int) -> None:
    """In a forked child: be one rank, as torchrun would have started it."""
    out = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"]), "WORLD_SIZE": str(job["ranks"])}
    os.environ |= {**group, "RANK": str(rank), "TORCHELASTIC_RUN_ID": "warm", **job["env"]}
    from pipeline import cli, runtime

    runtime.leave(cli.main(["pretrain", *job["words"]]))


def _serve() -> None:
    import torch

    import pipeline.pretrain  # noqa: F401

    torch.set_num_threads(1)
    wake, woken = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    unread = b""
    while True:
        ready = select.select([0, woken], [], [])[0]
        if woken in ready:
            woken.recv(4096)
        while _reap():
            pass
        if 0 not in ready:
            continue
        data = os.read(0, 65536)
        if not data:
            return
        *lines, unread = (unread + data).split(b"\n")
        for line in lines:
            job = json.loads(line)
            pids = []
            for rank in range(job["ranks"]):
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    _become_rank(job, rank)
                pids.append(pid)
            _answer({"pids": pids})


def _reap() -> bool:
    """Say which child has ended, if one has."""
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return False
    if pid:
        _answer({"pid": pid, "code": os.waitstatus_to_exitcode(status)})
    return pid != 0


def _answer(value: dict) -> None:
    os.write(1, (json.dumps(value) + "\n").encode())


if __name__ == "__main__":
    _serve()
