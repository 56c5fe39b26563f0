"""Reading a TileStore: Bony, zarr-python, zarrs and pure decode side by side; ends with one line of JSON.

Random batches of 256 tiles and whole slides, JPEG and zstd, 1 and 2 threads. Every number of threads has a process of
its own, in which the contenders take turns; the figures are medians, in ms per tile, of the clock and of the CPU.
All arrays of the peers are opened beforehand, and all shards are in the page cache. Pure decode has the same bytes in
memory already. zarrs (``pip install zarrs``) is measured where it is installed; it reads no JPEG.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import imagecodecs
import imagecodecs.zarr
import numpy as np
import pyarrow.parquet as pq
import zarr

# This file's folder stands first, where ``import tiling`` would find benchmarks/tiling.py.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiling import atomic, datasets, phantom
from tiling.index import METADATA_KEY, ROWS, build_index, slide_facts
from tiling.run import tile
from tiling.settings import TileSettings
from tiling.store import TileStore

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "panda_stitched"
CODECS, THREADS, BATCH = ("jpeg", "zstd"), (1, 2), 256
Read = Callable[[np.ndarray], object]


def make_stores(root: Path, copies: int) -> None:
    """root/jpeg and root/zstd: real pixels where they are there, made ones elsewhere; every slide ``copies`` times."""
    cohort = SHARED
    if not cohort.is_dir():
        cohort = root / "cohort"
        phantom.make_cohort(cohort)
    for codec in CODECS:
        store = root / codec
        tile(datasets.panda(cohort), store, TileSettings(codec=codec))
        for folder in sorted((store / "slides").iterdir()):
            for number in range(1, copies):
                copy_slide(folder, folder.with_name(f"{folder.name}-{number}"))
        build_index(store)


def copy_slide(folder: Path, copy: Path) -> None:
    """The same slide under another name, its shards linked: as many slides as a data set has, without its bytes."""
    shutil.copytree(folder, copy, copy_function=os.link)
    rows = pq.read_table(folder / ROWS)
    facts = json.dumps(slide_facts(rows) | {"slide_id": copy.name}, sort_keys=True).encode()
    for name in (ROWS, atomic.COMPLETE):
        (copy / name).unlink()
    pq.write_table(rows.replace_schema_metadata({METADATA_KEY: facts}), copy / ROWS)
    atomic.seal(copy)


def through_zarr(store: TileStore, pipeline: str, threads: int) -> Read:
    """zarr-python or zarrs, slide by slide."""
    zarr.config.set({
        "codec_pipeline.path": pipeline,
        "threading.max_workers": threads,
        "async.concurrency": threads,
    })  # fmt: skip
    arrays = [zarr.open_array(store.path / "slides" / name / "tiles.zarr", mode="r") for name in store.slide_ids]
    row_in_slide = store.index["row"].to_numpy()

    def read(rows: np.ndarray) -> np.ndarray:
        """Pixels of some rows, slide by slide."""
        out = np.empty((len(rows), store.tile_px, store.tile_px, 3), np.uint8)
        slides = store.slide_of_row[rows]
        for slide in np.unique(slides):
            places = np.flatnonzero(slides == slide)
            wanted = row_in_slide[rows[places]]
            array = arrays[slide]
            out[places] = array[:] if np.array_equal(wanted, np.arange(array.shape[0])) else array.oindex[wanted]
        return out

    return read


def pure_decode(store: TileStore, threads: int) -> Read:
    """The floor: the same bytes, in memory before the clock starts, decoded and thrown away."""
    encoded = dict(encoded_tiles(store))
    decode = imagecodecs.jpeg8_decode if store.description.settings.codec == "jpeg" else imagecodecs.zstd_decode
    pool = ThreadPoolExecutor(threads)

    def part(items: list[bytes]) -> None:
        for data in items:
            decode(data)

    def read(rows: np.ndarray) -> None:
        items = [encoded[row] for row in rows.tolist()]
        if threads == 1:
            part(items)
        else:
            list(pool.map(part, [items[first::threads] for first in range(threads)]))

    return read


def encoded_tiles(store: TileStore) -> Iterator[tuple[int, bytes]]:
    """Every row of the index and its bytes, found without Bony's reader; no slide here has a second shard."""
    row_in_slide = store.index["row"].to_numpy()
    for slide, name in enumerate(store.slide_ids):
        folder = store.path / "slides" / name / "tiles.zarr"
        most = json.loads((folder / "zarr.json").read_text())["chunk_grid"]["configuration"]["chunk_shape"][0]
        data = (folder / "c/0/0/0/0").read_bytes()
        index = np.frombuffer(data[-16 * most - 4 : -4], "<u8").reshape(most, 2).astype(int)
        for row in store.rows_of_slide(slide).tolist():
            at, length = index[row_in_slide[row]]
            yield row, data[at : at + length - 4]


def measure(store_path: Path, threads: int, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Kind of reading -> contender -> ms per tile ("wall", "cpu")."""
    store = TileStore(store_path, threads)
    out = np.empty((len(store), store.tile_px, store.tile_px, 3), np.uint8)  # as a loader that reuses its buffers

    def bony(rows: np.ndarray) -> np.ndarray:
        return store.read(rows, out[: len(rows)])

    contenders: dict[str, Read] = {"bony": bony, "pure_decode": pure_decode(store, threads)}
    contenders["zarr_python"] = through_zarr(store, "zarr.core.codec_pipeline.BatchedCodecPipeline", threads)
    if store.description.settings.codec == "zstd" and find_spec("zarrs"):
        contenders["zarrs"] = through_zarr(store, "zarrs.ZarrsCodecPipeline", threads)
    expected = store.read(np.arange(64))
    out[:] = 0
    rng = np.random.default_rng(0)
    taken: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, read in contenders.items():
        pixels = read(np.arange(64))
        assert pixels is None or np.array_equal(pixels, expected), name
    for number in range(rounds):
        some_slides = rng.permutation(len(store.slide_ids))[:6]
        work = {
            "random": rng.choice(len(store), BATCH, replace=len(store) < BATCH),
            "whole": np.concatenate([store.rows_of_slide(slide) for slide in some_slides]),
        }
        order = list(contenders.items())
        for kind, rows in work.items():
            for name, read in order[number % len(order) :] + order[: number % len(order)]:
                wall, cpu = time.perf_counter(), time.process_time()
                read(rows)
                figures = ((time.perf_counter() - wall) / len(rows), (time.process_time() - cpu) / len(rows))
                taken.setdefault(kind, {}).setdefault(name, []).append(figures)
    store.close()
    return {
        kind: {name: medians(figures) for name, figures in by_name.items()} for kind, by_name in taken.items()
    }  # fmt: skip


def medians(figures: list[tuple[float, float]]) -> dict[str, float]:
    return {
        name: round(1000 * statistics.median(values), 4)
        for name, values in zip(("wall", "cpu"), zip(*figures, strict=True), strict=True)
    }


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stores", type=Path, help="folder of stores jpeg/ and zstd/ made earlier (made when missing)")
    parser.add_argument("--copies", type=int, default=8, help="how many times each slide is in the store")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--one", nargs=2, metavar=("STORE", "THREADS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        warnings.simplefilter("ignore")  # zarr says of every peer's codec that it is no part of the specification
        imagecodecs.zarr.register_codecs()
        print(json.dumps(measure(Path(args.one[0]), int(args.one[1]), args.rounds)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        root = args.stores or Path(temporary)
        if not (root / "zstd").exists():
            make_stores(root, args.copies)
        result: dict[str, object] = {"benchmark": "store_read", "unit": "ms per tile", "batch": BATCH}
        if not find_spec("zarrs"):
            print("zarrs is not measured: it is not installed (pip install zarrs)")
        for codec in CODECS:
            for threads in THREADS:
                words = [
                    sys.executable,
                    __file__,
                    "--one",
                    str(root / codec),
                    str(threads),
                    "--rounds",
                    str(args.rounds),
                ]
                done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
                result[f"{codec}_{threads}"] = report(codec, threads, json.loads(done.stdout.splitlines()[-1]))
    print(json.dumps(result))


def report(codec: str, threads: int, figures: dict[str, dict[str, dict[str, float]]]) -> dict[str, object]:
    """Print a table; add, to each kind of reading, pure decode over Bony and every peer over Bony."""
    out: dict[str, object] = {}
    for kind, by_name in figures.items():
        ours = by_name["bony"]
        ratios = {
            f"{name}_over_bony_{clock}": round(values[clock] / ours[clock], 3)
            for name, values in by_name.items()
            for clock in ("wall", "cpu")
            if name != "bony"
        }
        out[kind] = by_name | {"ratios": ratios}
        for name, values in by_name.items():
            share = by_name["pure_decode"]["wall"] / values["wall"]
            print(
                f"{codec}, {threads} threads, {kind}: {name:12} {values['wall']:.3f} ms a tile, {share:.0%} of decode"
            )
    return out


if __name__ == "__main__":
    main()
