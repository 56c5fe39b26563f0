"""What a checkpoint costs a training step: Bony's saver, a plain torch.save, and the floor; the last line is JSON.

    .venv/bin/python benchmarks/checkpoint.py [--quick] [--out DIR] [--turns N] [--device cuda]

Student and teacher (XCiT-M24/16, head of 4096 prototypes) and the two moments of AdamW. Every contender has processes
of its own, which take turns; each saves several times, the first time into files that were never there.

    saver        the step waits for a copy; a thread writes, fsyncs, hashes, renames, removes the one before
    torch_save   torch.save of the same, fsync, rename over the one before; the step waits for all; no checksum
    floor        as many bytes, in one piece: the step waits for their copy; they are written, fsynced and hashed

``waits_s``: until the step can go on (``waits_cpu_s``: the CPU time of that, which a busy machine does not lengthen).
``stands_s``: until the checkpoint has its name. ``beside``: how much longer a piece of work of the main thread (some
hundred tiny operations, as an eager step launches) takes while the thread writes.
``extra_mb``: peak of resident memory (10^6 bytes) above that of the networks and moments.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

# This file's folder stands first, where ``import tiling`` would find benchmarks/tiling.py.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.checkpoint import Position, step_folder, tensors_by_file
from pipeline.models.heads import DinoHead
from pipeline.saver import Saver

MODELS = {False: ("xcit_medium_24_p16_224", 4096), True: ("xcit_nano_12_p16_224", 64)}
CONTENDERS = ("saver", "torch_save", "floor")
LIMIT_S = 1.0
Parts = tuple[dict[str, nn.Module], dict[str, torch.Tensor], torch.optim.Optimizer]


def build(quick: bool, device: str) -> Parts:
    """Networks, centre, and an optimizer that has made its first step."""
    name, prototypes = MODELS[quick]
    networks = {}
    for role in ("student", "teacher"):
        backbone = timm.create_model(name, num_classes=0)
        head = DinoHead(backbone.num_features, prototypes)
        networks[role] = nn.ModuleDict({"backbone": backbone, "head": head}).to(device)
    optimizer = torch.optim.AdamW(networks["student"].parameters(), fused=device != "cpu")
    for parameter in networks["student"].parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return networks, {"centre": torch.zeros(prototypes, device=device)}, optimizer


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def small_work() -> float:
    """Seconds that a few hundred tiny operations take."""
    start, value = time.perf_counter(), torch.zeros(16)
    for _ in range(300):
        value = value + 1
    return time.perf_counter() - start


class Turn:
    """A step waits for ``save``; at the end of ``finish`` the checkpoint stands, after ``settle`` nothing runs on."""

    source_mb = 0.0  # memory taken in place of the networks and moments

    def __init__(self, run: Path, parts: Parts) -> None:
        self.run, self.parts = run, parts
        self.beside: list[float] = []

    def save(self) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        pass

    def settle(self) -> None:
        pass


class SaverTurn(Turn):
    """The saver, its memory prepared beforehand; the main thread goes on while it writes."""

    def __init__(self, run: Path, parts: Parts) -> None:
        super().__init__(run, parts)
        self._saver, self._step = Saver(run, keep=1), 0
        self._saver.prepare(*parts)
        self._saver.wait()

    def save(self) -> None:
        self._step += 1
        self._saver.save(Position(self._step, self._step), *self.parts, {})
        synchronize()

    def finish(self) -> None:
        while not step_folder(self.run, self._step).exists():
            self._saver.poll()
            self.beside.append(small_work())

    def settle(self) -> None:
        self._saver.wait()


class TorchSaveTurn(Turn):
    """torch.save, all of it while the step waits."""

    def save(self) -> None:
        """Save, and wait."""
        networks, state, optimizer = self.parts
        states = {name: network.state_dict() for name, network in networks.items()}
        temporary = self.run / "checkpoint.tmp"
        with temporary.open("wb") as file:
            torch.save({**states, "state": state, "optimizer": optimizer.state_dict()}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.run / "checkpoint.pth")


class FloorTurn(Turn):
    """One piece of memory, copied; then written, fsynced and hashed."""

    def __init__(self, run: Path, parts: Parts) -> None:
        super().__init__(run, parts)
        device = parts[1]["centre"].device
        self._source = torch.ones(size_of(parts), dtype=torch.uint8, device=device)
        self._copy = torch.empty(len(self._source), dtype=torch.uint8, pin_memory=device.type == "cuda").zero_()
        self.source_mb = len(self._source) / 1e6

    def save(self) -> None:
        self._copy.copy_(self._source, non_blocking=True)
        synchronize()

    def finish(self) -> None:
        """Write the copy, and read it for its sha256."""
        data = self._copy.numpy()
        with (self.run / "bytes").open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        hashlib.sha256(data).hexdigest()

    def settle(self) -> None:
        (self.run / "bytes").unlink()


TURNS: dict[str, type[Turn]] = dict(zip(CONTENDERS, (SaverTurn, TorchSaveTurn, FloorTurn), strict=True))


def size_of(parts: Parts) -> int:
    return sum(tensor.nbytes for tensors in tensors_by_file(*parts).values() for tensor in tensors.values())


def memory_mb(field: str) -> float:
    """VmRSS (now) or VmHWM (the peak) of this process, in 10^6 bytes."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(field))) * 1024 / 1e6


def take_turn(name: str, quick: bool, out: Path, device: str, saves: int) -> dict[str, Any]:
    """One contender in this process: seconds of every save, and the peak of memory."""
    parts = build(quick, device)
    alone = statistics.median(small_work() for _ in range(300))
    before = memory_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    turn = TURNS[name](out, parts)
    waits, waits_cpu, stands = [], [], []
    for _ in range(saves):
        start, start_cpu = time.perf_counter(), time.process_time()
        turn.save()
        waits_cpu.append(time.process_time() - start_cpu)
        waits.append(time.perf_counter() - start)
        turn.finish()
        stands.append(time.perf_counter() - start)
        turn.settle()
    seconds = {"waits": waits, "waits_cpu": waits_cpu, "stands": stands}
    figures = {**seconds, "extra_mb": memory_mb("VmHWM") - before - turn.source_mb, "bytes": size_of(parts)}
    return figures | ({"beside": statistics.median(turn.beside) / alone} if turn.beside else {})


def summary(turns: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over turns and saves; the first save of a process for itself."""
    median = statistics.median
    figures = {}
    for name in ("waits", "waits_cpu", "stands"):
        figures[f"{name}_s"] = median(seconds for turn in turns for seconds in turn[name][1:])
        figures[f"first_{name}_s"] = median(turn[name][0] for turn in turns)
    figures["extra_mb"] = median(turn["extra_mb"] for turn in turns)
    if "beside" in turns[0]:
        figures["beside"] = median(turn["beside"] for turn in turns)
    return {name: round(value, 4) for name, value in figures.items()}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small network, one turn: that it runs, no figure")
    parser.add_argument("--out", type=Path, help="where checkpoints are written (the system's temporary folder)")
    parser.add_argument("--turns", type=int, default=3, help="processes per contender")
    parser.add_argument("--saves", type=int, default=4, help="saves per process")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(take_turn(chosen.one, chosen.quick, chosen.out, chosen.device, chosen.saves)))
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    options = ["--device", chosen.device, "--saves", str(chosen.saves), *(["--quick"] if chosen.quick else [])]
    for _ in range(1 if chosen.quick else chosen.turns):
        for name in CONTENDERS:
            with tempfile.TemporaryDirectory(dir=chosen.out) as out:
                command = [sys.executable, __file__, "--one", name, "--out", out, *options]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    report(chosen, found)


def report(chosen: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> None:
    """Print a table, then the line of JSON."""
    figures = {name: summary(turns) for name, turns in found.items()}
    for name, values in figures.items():
        print(f"{name:12}", "  ".join(f"{key} {value:g}" for key, value in values.items()))
    ours, peer, floor = (figures[name] for name in CONTENDERS)
    result = {
        "benchmark": "checkpoint", "quick": chosen.quick, "model": MODELS[chosen.quick][0], "device": chosen.device,
        "bytes": found["saver"][0]["bytes"], **figures, "limit_s": LIMIT_S,
        "within_limit": max(ours["first_waits_s"], ours["waits_s"]) < LIMIT_S,
        "ratios": {
            "torch_save_waits_over_ours": round(peer["waits_s"] / ours["waits_s"], 2),
            "ours_waits_over_floor": round(ours["waits_s"] / floor["waits_s"], 2),
            "ours_waits_over_floor_cpu": round(ours["waits_cpu_s"] / floor["waits_cpu_s"], 2),
            "ours_stands_over_floor": round(ours["stands_s"] / floor["stands_s"], 2),
            "ours_stands_over_torch_save": round(ours["stands_s"] / peer["stands_s"], 2),
        },
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
