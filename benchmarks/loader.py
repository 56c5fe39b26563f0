"""From a store to augmented batches: each step alone and all of them overlapped; ends with one line of JSON.

Steps, in ms per tile: order, reading and decoding with 1 and 2 threads, the copy to the device, the views (1 global and
5 locals). They take turns on the same tiles; figures are medians of the clock and of the CPU, which says more on a busy
machine. Overlapped is what a training run gets that does nothing else. Beside them stand pure decode of the same JPEG
bytes from memory, and what a training step at 2,000 samples/s (XCiT-M24 on an H200, by its memory traffic) asks of the
loader. Runs on a GPU where there is one.

An epoch's order is built for as many tiles and slides as the reference run has, shuffled over all and by shards.
"""

import argparse
import json
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from itertools import islice
from pathlib import Path

# This file's folder stands first, where ``import tiling`` would find benchmarks/tiling.py.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.index_scale import SLIDES_OF_ALL, TILES_OF_ALL
from benchmarks.store_read import make_stores, medians, pure_decode
from pipeline.config import PANDA_MEAN, PANDA_STD, ViewsConfig
from pipeline.data.augment import make_views
from pipeline.data.loader import Batch, Loader
from pipeline.data.order import Order, shard_permutation, shard_starts
from pipeline.data.randomness import permutation
from pipeline.data.views import colour_spec, view_specs
from pipeline.runtime import one_device
from tiling.store import TileStore

THREADS, SAMPLES_PER_S = (1, 2), 2000
# Tiles of a rank's micro-batch and of an optimizer step of the reference run: 24 GPUs, 4 micro-batches.
LOADED, LARGE_STEP = 100, 9600
Views = Callable[[Batch], None]


def views_on(device: torch.device) -> Views:
    """Makes a batch's views, and waits until they are there."""
    views = ViewsConfig()
    specs = view_specs(
        views.global_crops, views.local_crops, views.global_size, views.local_size, views.global_scale,
        views.local_scale, views.preset,
    )  # fmt: skip
    colour = colour_spec(views.preset)

    def make(batch: Batch) -> None:
        make_views(batch.tiles, batch.ids, batch.epochs, specs, colour, 0, PANDA_MEAN, PANDA_STD)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return make


def steps_alone(path: Path, device: torch.device, batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Step -> ms per tile of the clock ("wall") and of the CPU ("cpu"); pure decode among them."""
    stores = {threads: TileStore(path, threads) for threads in THREADS}
    first = stores[THREADS[0]]
    floors = {threads: pure_decode(store, threads) for threads, store in stores.items()}
    order, views = Order(0, len(first)), views_on(device)
    host = torch.empty((batch, first.tile_px, first.tile_px, 3), dtype=torch.uint8, pin_memory=device.type == "cuda")
    taken: dict[str, list[tuple[float, float]]] = {}

    def clock(step: str, work: Callable[..., object], *values: object) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        work(*values)
        figures = (time.perf_counter() - wall) / batch, (time.process_time() - cpu) / batch
        taken.setdefault(step, []).append(figures)

    def copy() -> None:
        host.to(device, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    for number in range(rounds + 1):
        if number == 1:  # the first round has warmed up
            taken.clear()
        ids, epochs = order.at(number * batch, batch)
        clock("order", order.at, number * batch, batch)
        for threads in THREADS if number % 2 else reversed(THREADS):
            clock(f"pure decode, threads {threads}", floors[threads], ids)
            clock(f"read, threads {threads}", stores[threads].read, ids, host.numpy())
        clock("copy", copy)
        clock("views", views, Batch(ids, epochs, host.to(device)))
    for store in stores.values():
        store.close()
    return {step: medians(figures) for step, figures in taken.items()}


def overlapped(path: Path, threads: int, device: torch.device, batch: int, batches: int) -> dict[str, float]:
    """The loader reads ahead while views are made."""
    views = views_on(device)
    with TileStore(path, threads) as store:
        loader = Loader(store, 0, batch, 0, 1, 0, device)
        views(next(loader))
        waited, wall, cpu = loader.waited_s, time.perf_counter(), time.process_time()
        for served in islice(loader, batches):
            views(served)
        seconds, cpu = time.perf_counter() - wall, time.process_time() - cpu
        loader.close()
    return {
        "ms_per_tile": 1000 * seconds / (batches * batch),
        "cpu_ms_per_tile": 1000 * cpu / (batches * batch),
        "samples_per_s": batches * batch / seconds,
        "waited_share": (loader.waited_s - waited) / seconds,
    }


def epoch_orders(slides: int, tiles: int) -> dict[str, dict[str, float]]:
    """Seconds and memory of building an epoch's order in both modes, and how many slides stand together in it."""
    shares = np.random.default_rng(0).gamma(2.0, 1.0, slides)
    ends = np.round(np.cumsum(shares) / shares.sum() * tiles).astype(int)
    slide_of_row = np.repeat(np.arange(slides, dtype=np.int32), np.diff(ends, prepend=0))
    starts = shard_starts(slide_of_row)
    builders = {
        "global": lambda: permutation(0, 1, tiles),
        "shards": lambda: shard_permutation(0, 1, starts),
    }  # fmt: skip
    result = {}
    for name, build in builders.items():
        start = time.perf_counter()
        build()
        seconds = time.perf_counter() - start
        tracemalloc.start()
        order = build()
        held, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        result[name] = {"seconds": seconds, "held_mb": held / 1e6, "peak_mb": peak / 1e6}
        for length in (LOADED, LARGE_STEP):
            runs = np.array_split(slide_of_row[order], max(tiles // length, 1))
            result[name][f"slides_in_{length}"] = float(np.mean([len(np.unique(run)) for run in runs]))
    return result


def rounded(values: object) -> object:
    if isinstance(values, dict):
        return {name: rounded(value) for name, value in values.items()}
    return float(f"{values:.4g}") if isinstance(values, float) else values


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stores", type=Path, help="folder of store_read.py's stores made earlier (made when missing)")
    parser.add_argument("--batch", type=int, default=LOADED)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="few rounds and slides, to see that it runs")
    args = parser.parse_args()
    device, rounds = one_device(), 2 if args.quick else args.rounds
    print(f"{device.type}, {torch.get_num_threads()} threads of torch")
    with tempfile.TemporaryDirectory() as temporary:
        root = args.stores or Path(temporary)
        if not (root / "zstd").exists():
            make_stores(root, 1 if args.quick else 8)
        alone = steps_alone(root / "jpeg", device, args.batch, rounds)
        together = {threads: overlapped(root / "jpeg", threads, device, args.batch, 2 * rounds) for threads in THREADS}
    orders = epoch_orders(*((300, 50_000) if args.quick else (SLIDES_OF_ALL, TILES_OF_ALL)))
    report = summary(alone, together)
    about = {"device": device.type, "batch": args.batch, "torch_threads": torch.get_num_threads()}
    print(json.dumps(rounded({"benchmark": "loader", **about, **report, "epoch_order": orders})))


def summary(alone: dict[str, dict[str, float]], together: dict[int, dict[str, float]]) -> dict[str, object]:
    """Print the steps; what one line says of them."""
    steps = {name: alone[name]["wall"] for name in ("order", "read, threads 1", "copy", "views")}
    shares = {name: value / sum(steps.values()) for name, value in steps.items()}
    for name, value in alone.items():
        share = f"; {shares[name]:.1%} of the steps" if name in shares else ""
        print(f"{name}: {value['wall']:.4f} ms a tile, CPU {value['cpu']:.4f}{share}")
    for threads, figures in together.items():
        parts = [alone[f"read, threads {threads}"], alone["views"]]
        figures["over_longest_step"] = figures["ms_per_tile"] / max(part["wall"] for part in parts)
        figures["cpu_over_steps"] = figures["cpu_ms_per_tile"] / sum(part["cpu"] for part in parts)
        print(
            f"overlapped, threads {threads}: {figures['ms_per_tile']:.3f} ms a tile, {figures['samples_per_s']:.0f} "
            f"samples/s, {figures['waited_share']:.1%} of the time waiting"
        )
    asked = {
        "reading_threads": SAMPLES_PER_S * alone["read, threads 1"]["cpu"] / 1000,
        "views_share_of_device": SAMPLES_PER_S * alone["views"]["wall"] / 1000,
    }
    print(f"{SAMPLES_PER_S} samples/s ask for {asked['reading_threads']:.2f} threads that read and decode")
    decode_over_read = {
        f"{threads}_{clock}": alone[f"pure decode, threads {threads}"][clock] / alone[f"read, threads {threads}"][clock]
        for threads in THREADS
        for clock in ("wall", "cpu")
    }
    return {
        "ms_per_tile": alone,
        "share": shares,
        "pure_decode_over_read": decode_over_read,
        "overlapped": together,
        f"for_{SAMPLES_PER_S}_samples_per_s": asked,
    }


if __name__ == "__main__":
    main()
