"""An index as large as the data set's: 10,616 slides, 2,852,703 tiles. Ends with one line of JSON.

The slides' folders hold rows and COMPLETE, as `bony tile` writes them, but no pixels: what building and opening an
index reads. Each step has a fresh process, whose peak of memory is that of the step and of what it imports; seconds
are of the step itself, and beside them the CPU seconds of the imports.
"""

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# This file's folder stands first, where ``import tiling`` would find benchmarks/tiling.py.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tiling import atomic, datasets, phantom
from tiling.index import METADATA_KEY, ROWS, SLIDES, build_index, slide_facts
from tiling.run import tile
from tiling.settings import TileSettings
from tiling.store import Description, TileStore, prepare

SLIDES_OF_ALL, TILES_OF_ALL = 10_616, 2_852_703
LIMITS = {"seconds": 3.0, "peak_mb": 1000.0}
BATCH = 256


def make_folders(store: Path, work: Path, slides: int, tiles: int) -> None:
    """Slides of about as many kept tiles each; their rows are drawn from those of one made slide."""
    phantom.make_cohort(work / "cohort", slides_per_grade=1, size=(1024, 1536), karolinska=0)
    tile(datasets.panda(work / "cohort"), work / "one", TileSettings())
    folder = sorted((work / "one" / SLIDES).iterdir())[0]
    rows = pq.read_table(folder / ROWS)
    kept, facts = rows.filter(rows["kept"]), slide_facts(rows)
    prepare(store, Description(TileSettings(), "made", ()))
    rng = np.random.default_rng(0)
    shares = rng.gamma(2.0, 1.0, slides)
    ends = np.round(np.cumsum(shares) / shares.sum() * tiles).astype(int)
    for number, count in enumerate(np.diff(ends, prepend=0)):
        slide_id = hashlib.md5(str(number).encode()).hexdigest()
        own = facts | {
            "slide_id": slide_id,
            "provider": ("radboud", "karolinska")[number % 2],
            "isup_grade": int(rng.integers(6)),
            "mpp": (0.4546, 0.4797, 0.486, 0.503)[number % 4],
        }
        table = kept.take(rng.integers(0, len(kept), count))
        corner = [pa.array(rng.integers(0, 400, count) * 224, pa.int64()) for _ in "xy"]
        for name, values in zip("xy", corner, strict=True):
            table = table.set_column(table.column_names.index(name), name, values)
        write_folder(store / SLIDES / slide_id, table, own)


def write_folder(folder: Path, rows: pa.Table, facts: dict[str, object]) -> None:
    folder.mkdir()
    path = folder / ROWS
    metadata = {METADATA_KEY: json.dumps(facts, sort_keys=True).encode()}
    pq.write_table(rows.replace_schema_metadata(metadata), path, compression="zstd")
    (folder / atomic.COMPLETE).write_text(f"{atomic.sha256_file(path)}  {ROWS}\n")  # without seal's fsyncs


def step_build(store: Path) -> dict[str, float]:
    start = time.perf_counter()
    rows = len(build_index(store))
    return {"seconds": time.perf_counter() - start, "rows": rows}


def step_open(store: Path) -> dict[str, float]:
    """What a training run does before its first batch: the store is opened, the first samples are known."""
    from pipeline.data.order import Order

    imported = time.process_time()
    start = time.perf_counter()
    with TileStore(store) as opened:
        open_seconds = time.perf_counter() - start
        ids, _ = Order(0, len(opened)).at(0, BATCH)
        slides = len(set(opened.slide_of_row[ids].tolist()))
        seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "open_seconds": open_seconds,
            "import_cpu_seconds": imported,
            "slides": len(opened.slide_ids),
            "rows": len(opened),
            "slides_in_batch": slides,
        }


def step_columns(store: Path) -> dict[str, float]:
    """All columns of all rows, which no training asks for."""
    start = time.perf_counter()
    with TileStore(store) as opened:
        megabytes = opened.index.nbytes / 1e6
        return {"seconds": time.perf_counter() - start, "table_mb": megabytes}


STEPS = {"build": step_build, "open": step_open, "columns": step_columns}


def in_fresh_process(step: str, store: Path) -> dict[str, float]:
    words = [sys.executable, __file__, "--step", step, str(store)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{step}: " + ", ".join(f"{name} {value:,g}" for name, value in figures.items()))
    return figures


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="keep the folders here, and take them from here the next time")
    parser.add_argument("--slides", type=int, default=SLIDES_OF_ALL)
    parser.add_argument("--tiles", type=int, default=TILES_OF_ALL)
    parser.add_argument("--step", nargs=2, metavar=("STEP", "STORE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        figures = STEPS[args.step[0]](Path(args.step[1]))
        figures["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({name: round(value, 3) for name, value in figures.items()}))
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        store = work / "store"
        if not store.exists():
            make_folders(store, work, args.slides, args.tiles)
        result = {step: in_fresh_process(step, store) for step in STEPS}
        size = (store / "index.parquet").stat().st_size / 1e6
    ratios = {name: round(result["open"][name] / limit, 3) for name, limit in LIMITS.items()}
    print(json.dumps({"benchmark": "index_scale", "index_mb": size, **result, "limits": LIMITS, "of_limit": ratios}))


if __name__ == "__main__":
    main()
