"""Peak memory of one tiling worker: ``bony tile`` as a process of its own, on slides whose size should not matter.

    .venv/bin/python benchmarks/tiling_memory.py [--quick] [--work DIR]

A 60,000 x 60,000 px slide as it is, the same with one level only, and a 20,480 px one resampled to 1 um/px. The peak is
the kernel's, of the process and all its libraries. The last line is JSON.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

# Before this file's own folder, where ``import tiling`` would find tiling.py beside it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.made_slide import cached_slide

ROOT = Path(__file__).resolve().parents[1]
LIMIT_MB = 1000.0
LARGE, MIDDLE, QUICK = 60_000, 20_480, 4096


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small slides: that it runs, no figure")
    parser.add_argument("--work", type=Path, default=Path("/tmp/bony_bench"), help="made slides stay here")
    chosen = parser.parse_args()
    large, middle = (QUICK, QUICK) if chosen.quick else (LARGE, MIDDLE)
    runs = {
        f"{large:,} px": (cached_slide(chosen.work, large), []),
        f"{large:,} px, one level": (cached_slide(chosen.work, large, levels=1), []),
        f"{middle:,} px at 1 um/px": (cached_slide(chosen.work, middle), ["--mpp", "1.0"]),
    }
    report = {"benchmark": "tiling_memory", "quick": chosen.quick, "limit_mb": LIMIT_MB}
    for name, (slide, options) in runs.items():
        report[name] = measured(slide, chosen.work / "memory-store", options)
        print(f"{name:28} {report[name]}", flush=True)
    report["within_limit"] = all(report[name]["peak_mb"] <= LIMIT_MB for name in runs)
    print(json.dumps(report))


def measured(slide: Path, store: Path, options: list[str]) -> dict[str, float]:
    """Tile a slide with one worker.

    Returns:
        ``peak_mb`` (10^6 bytes resident), ``cpu_s`` and ``wall_s`` of the whole command, ``tiles`` in the store.
    """
    shutil.rmtree(store, ignore_errors=True)
    bony_tile = [sys.executable, "-m", "pipeline.cli", "tile", str(slide), "--out", str(store), "--workers", "1"]
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, *bony_tile, *options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    wall = time.monotonic() - start
    if done.returncode:
        raise RuntimeError(f"bony tile failed: {done.stderr.strip().splitlines()[-1]}")
    used = json.loads(done.stdout.strip().splitlines()[-1])
    arrays = list(store.glob("slides/*/tiles.zarr/zarr.json"))
    tiles = sum(json.loads(path.read_text())["shape"][0] for path in arrays)
    shutil.rmtree(store)
    return {**used, "wall_s": round(wall, 1), "tiles": tiles}


# A parent with one child: what the kernel says of its children is that child's, and the children's of it.
_PEAK = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"peak_mb": round(used.ru_maxrss * 1024 / 1e6, 1), "cpu_s": round(used.ru_utime + used.ru_stime, 1)}))
sys.exit(done.returncode)
"""


if __name__ == "__main__":
    main()
