"""Tiling end to end, side by side in one run: tiles per CPU-second of Bony, its peers, and the limits.

    .venv/bin/python benchmarks/tiling.py [--quick] [--peers-dir DIR] [--work DIR] [--repeats N] [--json FILE]

One process, one thread each, warm cache; CPU time, not wall time, since machines are shared. The contenders take turns,
ratios are taken within a turn, and medians shown. Peers in their own environments are left out, with a word, where
``PEERS_DIR/NAME`` is absent; ``benchmarks/README.md`` says how to make them. The last line is JSON.
"""

import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

# Before this file's own folder, where ``import tiling`` would find this file itself.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2

from benchmarks import contenders
from benchmarks.contenders import Case, Contender
from benchmarks.fidelity import fidelity
from benchmarks.made_slide import cached_slide
from benchmarks.steps import REST, STEPS, timed_steps
from tiling.datasets import panda, slides

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
BONY, ZARR, CEILING, FLOOR = "Bony", "OpenSlide + zarr", "decode once (ceiling)", "decode once + encode (floor)"
OWN_PROCESS: dict[str, Contender] = {
    BONY: contenders.bony,
    ZARR: contenders.openslide_zarr,
    "OpenSlide + JPEG files": contenders.openslide_jpeg,
    CEILING: contenders.decode_once,
    FLOOR: contenders.decode_and_encode,
}
PEERS = {"HistoPrep": "histoprep", "hs2p": "hs2p"}
TARGETS = {"of_floor": 0.8, "of_openslide_zarr": 6.0, "bytes_ratio": 1.15, "psnr_db": 50.0}
LARGEST = "faa8152ba98c87d018ea66bb75d381b3"
SIDE, QUICK_SIDE = 20_480, 4096
FEW_TILES = 1000  # below which a turn is short, and three times as many are taken


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small slide, one turn: that it runs, no figure")
    parser.add_argument("--peers-dir", type=Path, default=Path("/tmp/bony_peers"), help="holds a venv for each peer")
    parser.add_argument("--work", type=Path, default=Path("/tmp/bony_bench"), help="made slides stay here")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="the last line into a file, too")
    chosen = parser.parse_args()
    cv2.setNumThreads(1)
    chosen.work.mkdir(parents=True, exist_ok=True)
    all_contenders = OWN_PROCESS | _peers(chosen.peers_dir)
    report: dict[str, Any] = {"benchmark": "tiling", "quick": chosen.quick, "targets": TARGETS}
    for case in _cases(chosen.work, chosen.quick):
        print(f"\n{case.name}: {len(case.kept)} tiles kept of {len(case.candidates)} candidates decoded", flush=True)
        found = _speed(case, all_contenders, 1 if chosen.quick else chosen.repeats)
        report[case.name] = found | {"fidelity": _fidelity(case, chosen.peers_dir)}
    for case in _fidelity_only(chosen.work):
        print(f"\n{case.name}: {len(case.kept)} tiles kept")
        report[case.name] = {"fidelity": _fidelity(case, chosen.peers_dir)}
    line = json.dumps(report)
    if chosen.json:
        chosen.json.write_text(line + "\n")
    print(f"\n{line}")


def _peers(folder: Path) -> dict[str, Contender]:
    """The peers whose environments are there."""
    found = {}
    for name, short in PEERS.items():
        if (folder / short / "bin" / "python").exists():
            found[name] = contenders.in_own_environment(short, folder)
        else:
            print(f"{name} left out: no environment in {folder / short}")
    return found


def _cases(work: Path, quick: bool) -> list[Case]:
    """The slides whose tiling is timed."""
    side = QUICK_SIDE if quick else SIDE
    made = slides([cached_slide(work, side)])
    cases = [Case(f"made {side:,} px", made.sources[0], (), work)]
    root = DATA / "panda_stitched"
    if not quick and root.is_dir():
        stitched = panda(root)
        with_mask = next(source for source in stitched.sources if source.slide_id == LARGEST)
        image = slides([with_mask.images[0]]).sources[0]
        cases.append(Case("panda_stitched, no mask", image, (), work))
        cases.append(Case("panda_stitched, mask", with_mask, stitched.class_names, work))
    return cases


def _fidelity_only(work: Path) -> list[Case]:
    svs = DATA / "wsi" / "CMU-1-Small-Region.svs"
    return [Case("CMU SVS", slides([svs]).sources[0], (), work)] if svs.is_file() else []


def _speed(case: Case, everyone: dict[str, Contender], turns: int) -> dict[str, Any]:
    """Every contender in turn; where there are several turns, one more comes first, to warm up."""
    if len(case.kept) < FEW_TILES:
        turns = turns * 3 if turns > 1 else 1
    rates: dict[str, list[float]] = defaultdict(list)
    tiles: dict[str, int] = {}
    steps: list[dict[str, float]] = []
    for turn in range(turns + (turns > 1)):
        results = {name: run(case) for name, run in everyone.items()}
        timed = _steps(case)
        if turn or turns == 1:
            steps.append(timed)
            for name, result in results.items():
                rates[name].append(result.rate)
                tiles[name] = result.tiles
    for name, several in rates.items():
        share = _ratio(rates, BONY, name)
        print(f"  {name:30} {statistics.median(several):8.0f} tiles/CPU-s   {tiles[name]:6} tiles   Bony {share:5.2f}x")
    middle = {step: statistics.median(one[step] for one in steps) for step in steps[0]}
    total = sum(middle.values())
    for step, spent in sorted(middle.items(), key=lambda part: -part[1]):
        print(f"    {step:24} {spent:7.0f} us/tile {spent / total:6.1%}")
    without = 1 / (1 / statistics.median(rates[BONY]) - middle["pictures"] / 1e6)
    print(f"    {'Bony without pictures':24} {without:7.0f} tiles/CPU-s")
    return {
        "tiles_per_cpu_s": {name: round(statistics.median(several), 1) for name, several in rates.items()},
        "tiles": tiles,
        "without_pictures": round(without, 1),
        "of_floor": round(_ratio(rates, BONY, FLOOR), 3),
        "of_openslide_zarr": round(_ratio(rates, BONY, ZARR), 2),
        "steps_us_per_tile": {step: round(spent, 1) for step, spent in middle.items()},
    }


def _ratio(rates: dict[str, list[float]], one: str, other: str) -> float:
    return statistics.median(a / b for a, b in zip(rates[one], rates[other], strict=True))


def _steps(case: Case) -> dict[str, float]:
    """CPU microseconds per kept tile of each step of Bony, measured apart from its rate: the timers cost a little."""
    with timed_steps() as seconds:
        result = contenders.bony(case)
    parts = {step: seconds[step] for step in STEPS}
    parts[REST] = result.cpu_s - sum(parts.values())
    return {step: spent / result.tiles * 1e6 for step, spent in parts.items()}


def _fidelity(case: Case, peers_dir: Path) -> dict[str, float]:
    found = fidelity(case, peers_dir)
    exact = f"{found['bytes_ratio']:.3f}x a coefficient-exact cut" if "bytes_ratio" in found else "jpeglib left out"
    print(f"    {found['stored_bytes']:.0f} bytes a tile, {exact}; {found['psnr_db']:.2f} dB to the source's pixels")
    return {name: round(value, 3) for name, value in found.items()}


if __name__ == "__main__":
    main()
