"""Multi-crop views of 1 global of 224 px and 5 locals of 96: Bony and the original DINO's pipeline side by side.

Both make the views of the same tiles with the same operations, probabilities and strengths (preset ``original``), one
thread, ms of CPU per sample; the contenders take turns, ratios are taken within a turn, medians are shown. The peer is
``DataAugmentationDINO`` of facebookresearch/dino, written anew with the transforms it uses, PIL's and torchvision's:
as it is (bicubic), and bilinear, as Bony resamples. The limit is bilinear sampling alone: crops of the same sizes out
of planes and at points that are ready. Where there is a CUDA device, Bony's views are timed there too, with events.
Ends with one line of JSON.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch.nn import functional
from torchvision import transforms
from torchvision.transforms import InterpolationMode

# This file's folder stands first, where ``import tiling`` would find benchmarks/tiling.py.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.data.augment import make_views
from pipeline.data.views import ViewSpec, colour_spec, draw, view_specs
from pipeline.models.frozen import IMAGENET_MEAN, IMAGENET_STD
from tiling.phantom import make_slide

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "panda_gleason_tiles" / "tiles"
PX, LOCALS, TARGET = 224, 5, 3.0
SIZES, SCALES = (224, 96), ((0.4, 1.0), (0.05, 0.4))
PRESETS = ("original", "histology")
Make = Callable[[int], object]  # all views of all tiles, for a number of a turn


def real_or_made_tiles(count: int) -> np.ndarray:
    """PANDA tiles spread over the shared data, cut to 224 px, or a made slide's: uint8 (count, 224, 224, 3)."""
    paths = sorted(SHARED.rglob("*.jpeg"))
    if paths:
        chosen = paths[:: max(1, len(paths) // count)]
        tiles = [np.asarray(Image.open(path).convert("RGB"))[:PX, :PX] for path in chosen]
    else:
        image = make_slide(0, "4").image
        tiles = [image[y : y + PX, x : x + PX] for y in range(0, 2464, PX) for x in range(0, 3360, PX)]
    return np.stack([tiles[i % len(tiles)] for i in range(count)])


def specs_of(preset: str) -> tuple[ViewSpec, ...]:
    return view_specs(1, LOCALS, *SIZES, *SCALES, preset)


def bony(tiles: torch.Tensor, preset: str, turn: int) -> list[torch.Tensor]:
    """Bony's views, another epoch each turn."""
    ids, epochs = np.arange(len(tiles)), np.full(len(tiles), turn)
    return make_views(
        tiles, ids, epochs, specs_of(preset), colour_spec(preset), 0, IMAGENET_MEAN, IMAGENET_STD
    )  # fmt: skip


def pil_blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def original_view(spec: ViewSpec, interpolation: InterpolationMode) -> transforms.Compose:
    """One view of the original code, of a PIL image."""
    jitter = transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    return transforms.Compose([
        transforms.RandomResizedCrop(spec.size, scale=spec.scale, interpolation=interpolation),
        transforms.RandomHorizontalFlip(p=0.5),
        transforms.RandomApply([jitter], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.RandomApply([transforms.Lambda(pil_blur)], p=spec.blur),
        transforms.RandomApply([transforms.Lambda(ImageOps.solarize)], p=spec.solarise),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ])  # fmt: skip


def original(tiles: np.ndarray, interpolation: InterpolationMode) -> Make:
    """The original code's views, one sample after another; it is given PIL images, and need not make batches."""
    images = [Image.fromarray(tile) for tile in tiles]
    views = [original_view(spec, interpolation) for spec in specs_of("original")]

    def make(turn: int) -> list[list[torch.Tensor]]:
        random.seed(turn)
        torch.manual_seed(turn)
        return [[view(image) for view in views] for image in images]

    return make


def sampling_alone(tiles: torch.Tensor, at_once: int) -> Make:
    """Some tiles at a time: what no way of making these views with bilinear sampling can leave out."""
    planes = tiles.permute(0, 3, 1, 2).float()
    zero, ids = np.zeros(len(tiles)), np.arange(len(tiles))
    grids = []
    for spec in specs_of("original"):
        params = draw(spec, colour_spec("original"), 0, np.zeros(len(tiles), int), ids, PX)
        y, x, height, width = params.box.T / PX
        theta = np.stack([width, zero, 2 * x + width - 1, zero, height, 2 * y + height - 1], axis=1)
        shape = [len(tiles), 3, spec.size, spec.size]
        grid = functional.affine_grid(torch.from_numpy(theta.reshape(-1, 2, 3)).float(), shape, align_corners=False)
        grids.append(grid.to(tiles.device))

    def make(_: int) -> None:
        for first in range(0, len(planes), at_once):
            part = slice(first, first + at_once)
            for grid in grids:
                functional.grid_sample(planes[part], grid[part], align_corners=False)

    return make


def take_turns(contenders: dict[str, Make], rounds: int, clock: Callable[[Make, int], float]) -> dict[str, list[float]]:
    """Seconds of every contender in every turn; the first turn warms up and does not count."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        order = list(contenders.items())
        for name, make in order[turn % len(order) :] + order[: turn % len(order)]:
            seconds = clock(make, turn)
            if turn:
                taken[name].append(seconds)
    return taken


def cpu_seconds(make: Make, turn: int) -> float:
    start = time.process_time()
    make(turn)
    return time.process_time() - start


def device_seconds(make: Make, turn: int) -> float:
    """On the device's own clock, from the first kernel's start to the last one's end, waits for the host included."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    make(turn)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def ratio(taken: dict[str, list[float]], over: str, under: str) -> float:
    return round(statistics.median(a / b for a, b in zip(taken[over], taken[under], strict=True)), 2)


def on_cpu(tiles: np.ndarray, rounds: int) -> dict[str, object]:
    """Median ms of CPU a sample, and ratios."""
    batch = torch.from_numpy(tiles)
    contenders: dict[str, Make] = {f"bony_{preset}": partial(bony, batch, preset) for preset in PRESETS}
    contenders["original_bicubic"] = original(tiles, InterpolationMode.BICUBIC)
    contenders["original_bilinear"] = original(tiles, InterpolationMode.BILINEAR)
    contenders["sampling_alone"] = sampling_alone(batch, 6)
    ours, theirs = contenders["bony_original"](0), contenders["original_bilinear"](0)
    for number, view in enumerate(ours):
        expected = torch.stack([views[number] for views in theirs])
        assert view.shape == expected.shape
        # The same brightness, but for what is random.
        assert abs(view.mean() - expected.mean()) < 3 / len(tiles) ** 0.5
    taken = take_turns(contenders, rounds, cpu_seconds)
    return {
        "ms_per_sample": {name: round(1000 * statistics.median(t) / len(tiles), 3) for name, t in taken.items()},
        "original_bicubic_over_bony": ratio(taken, "original_bicubic", "bony_original"),
        "original_bilinear_over_bony": ratio(taken, "original_bilinear", "bony_original"),
        "histology_over_original_preset": ratio(taken, "bony_histology", "bony_original"),
        "share_of_limit": ratio(taken, "sampling_alone", "bony_original"),
    }


def on_device(tiles: np.ndarray, rounds: int) -> dict[str, object]:
    """Median samples a second, and the share of sampling alone."""
    batch = torch.from_numpy(tiles).cuda()
    contenders: dict[str, Make] = {f"bony_{preset}": partial(bony, batch, preset) for preset in PRESETS}
    contenders["sampling_alone"] = sampling_alone(batch, len(batch))
    taken = take_turns(contenders, rounds, device_seconds)
    return {
        "device": torch.cuda.get_device_name(),
        "samples_per_s": {name: round(len(tiles) / statistics.median(t)) for name, t in taken.items()},
        "share_of_limit": ratio(taken, "sampling_alone", "bony_original"),
    }


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100, help="tiles in a batch")
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tiles = real_or_made_tiles(args.samples)
    result: dict[str, object] = {"benchmark": "augment", "samples": args.samples, "target": TARGET}
    result["cpu"] = on_cpu(tiles, args.rounds)
    result["gpu"] = on_device(tiles, args.rounds) if torch.cuda.is_available() else None
    for where in ("cpu", "gpu"):
        print(f"{where}: {json.dumps(result[where], indent=2)}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
