"""Does it learn? xcit_nano by DINO on real tiles, judged on slides that it never saw; ends with one line of JSON.

Slides are held out by a list that was committed before any result was seen (``learn_held_out.txt``; ``--draw`` prints
how it came about). Their tiles are sorted into benign, Gleason 3 and Gleason 4 (``learn_judged.py`` says how): by the
pretrained teacher's features, by those of the network it began as, and by mean colours. A run that was interrupted goes
on where it was: give the same --out. Several processes may train one seed each into one --out; the last says
``--seeds 0 1 2``.
"""

import argparse
import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

# This file's folder stands first, where ``import tiling`` would find benchmarks/tiling.py.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.learn_judged import JUDGES, Interval, Tiles, judged
from pipeline.config import (
    CheckpointConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    TrainConfig,
    ViewsConfig,
    flatten,
)
from pipeline.data.randomness import derive_seed
from pipeline.models.frozen import FrozenEncoder, head_sizes, load_encoder, networks
from pipeline.monitor import read_metrics
from pipeline.pretrain import pretrain
from pipeline.rankme import rankme
from tiling import atomic, patches
from tiling.labels import UNLABELLED
from tiling.run import tile
from tiling.settings import TileSettings
from tiling.store import TileStore

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "panda_gleason_tiles"
HELD_OUT = Path(__file__).with_name("learn_held_out.txt")
# Folders of the tiles that are judged. Gleason 5 has 8 tiles: its slides are pretrained on, never asked about.
CLASSES = {"0": "benign", "1": "Gleason 3", "2": "Gleason 4"}
SLIDES_SHARE, TILES_SHARE = 0.3, (0.25, 0.4)
STEPS = 3000  # 72 epochs of 671 tiles


def draw_held_out(manifest: Path) -> tuple[int, list[str]]:
    """The seed and the slides: 30 % of the slides of each class, with 25 to 40 % of its tiles; the first seed's so.

    Every slide has one class, and 1 to 176 tiles: a draw that heeds slides alone may leave a class with four tiles, or
    all of a class's tiles, on either side.
    """
    with manifest.open(newline="") as file:
        tiles = Counter((row["label"], row["slide_id"]) for row in csv.DictReader(file))
    of_class = {label: sorted(slide for known, slide in tiles if known == label) for label in CLASSES}
    for seed in count():
        drawn = {label: some(slides, seed) for label, slides in of_class.items()}
        shares = [
            sum(tiles[label, slide] for slide in drawn[label]) / sum(tiles[label, slide] for slide in of_class[label])
            for label in CLASSES
        ]
        if all(TILES_SHARE[0] <= share <= TILES_SHARE[1] for share in shares):
            return seed, sorted(slide for slides in drawn.values() for slide in slides)
    raise AssertionError("unreachable")


def some(slides: Sequence[str], seed: int) -> list[str]:
    """A share of some slides; raw PCG64 words stay the same in every version of NumPy."""
    order = np.argsort(np.random.PCG64(seed).random_raw(len(slides)), kind="stable")
    return [slides[number] for number in order[: round(SLIDES_SHARE * len(slides))]]


def config(store: Path, run: Path, seed: int, steps: int) -> PretrainConfig:
    """Settings found on the slides that are not held out (RESULTS.md tells what was tried)."""
    return PretrainConfig(
        data=store,
        out=run,
        model=ModelConfig("xcit_nano_12_p16_224", drop_path=0.0),
        # Untrained, the network tells hardly any tile from another: at 0.04 from the start its teacher stays even long.
        method=MethodConfig(
            out_dim=1024, hidden_dim=512, bottleneck_dim=128, teacher_temp=0.04, teacher_temp_start=0.03,
            teacher_temp_warmup_epochs=20, ema_start=0.99, freeze_last_layer_epochs=1,
        ),
        # Small views of about the tiles' own scale: a third of the time that 224 and 96 px take.
        views=ViewsConfig(
            local_crops=4, global_size=128, local_size=64, global_scale=(0.25, 0.6), local_scale=(0.05, 0.2),
            preset="original",
        ),
        optim=OptimConfig(lr=8e-3, lr_end=1e-5, warmup_steps=min(300, steps - 1)),
        train=TrainConfig(
            batch_per_rank=16, accumulate=1, steps=steps, seed=seed, precision="bf16", threads=1
        ),
        checkpoint=CheckpointConfig(every=200, keep=1),
    )  # fmt: skip


def make_stores(data: Path, out: Path, held_out: Sequence[str], each: int | None) -> None:
    """out/all, and out/pretraining without the slides that are held out; at most ``each`` tiles a slide."""
    found = patches.tile_folders(data / "tiles", data / "manifest.csv")
    sources = [
        replace(source, images=source.images[:each], image_labels=(source.image_labels or ())[:each])
        for source in found.sources
    ]
    absent = {*held_out} - {source.slide_id for source in sources}
    assert not absent, f"held out, and not there: {absent}"
    kept = [source for source in sources if source.slide_id not in held_out]
    for name, some_sources in (("all", sources), ("pretraining", kept)):
        tile(replace(found, sources=tuple(some_sources)), out / name, TileSettings())


def untrained(settings: PretrainConfig, mpp: float) -> FrozenEncoder:
    """What ``pretrain`` begins with, its BatchNorm without statistics."""
    torch.manual_seed(derive_seed(settings.train.seed, 1))
    values = flatten(asdict(settings))
    parts = networks(settings.model.name, head_sizes(values))
    views = settings.views
    return FrozenEncoder(settings.model.name, parts["backbone"], parts["head"], views.mean, views.std, mpp, "", "")


def encode(encoder: FrozenEncoder, store: TileStore, batch: int = 64) -> dict[str, np.ndarray]:
    """Features of all tiles of a store, by tap."""
    chunks = np.array_split(np.arange(len(store)), range(batch, len(store), batch))
    parts = [encoder.features(torch.from_numpy(store.read(rows))) for rows in chunks]
    return {tap: torch.cat([part[tap] for part in parts]).numpy() for tap in parts[0]}


def encoded_once(path: Path, encoder: FrozenEncoder, store: TileStore) -> dict[str, np.ndarray]:
    """The same, from a file where it was done before."""
    if not path.exists():
        data, features = io.BytesIO(), encode(encoder, store)
        np.savez(data, cls=features["cls"], head=features["head"])
        atomic.write_bytes(path, data.getvalue())
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def colours(store: TileStore) -> np.ndarray:
    """Mean and standard deviation of each channel of every tile, shape (N, 6), each column standardised.

    Colours are positive, so their angles hardly differ, and those are all that cosine neighbours go by.
    """
    tiles = (store.read(np.array([row])) / 255 for row in range(len(store)))
    found = np.concatenate([np.hstack([tile.mean(axis=(1, 2)), tile.std(axis=(1, 2))]) for tile in tiles])
    return np.asarray((found - found.mean(axis=0)) / found.std(axis=0))


def learn(out: Path, seed: int, steps: int, store: TileStore) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Train a seed, or what is left of it; features of all tiles by contender, and how the training went."""
    run = out / f"seed-{seed}"
    settings = config(out / "pretraining", run, seed, steps)
    pretrain(settings)
    (out / "features").mkdir(exist_ok=True)
    encoders = {"pretrained": load_encoder(run, torch.device("cpu")), "random": untrained(settings, store.mpp)}
    features, went = {}, how_it_went(run)
    for name, encoder in encoders.items():
        file = out / "features" / f"{name}-{seed}-{encoder.sha256[:12]}.npz"
        for tap, values in encoded_once(file, encoder, store).items():
            features[f"{name}, {tap}"] = values
            went[f"RankMe, {name}, {tap}"] = rankme(torch.from_numpy(values))
    return features, went


def how_it_went(run: Path) -> dict[str, float]:
    """What tells of a collapse: the loss against ln K, how sharp the teacher became, how much the outputs differ."""
    lines = read_metrics(run)
    losses, entropies = ([line[key] for line in lines] for key in ("loss", "teacher_entropy"))
    return {
        "ln K": lines[-1]["ln_k"], "loss, first": losses[0], "loss, highest": max(losses), "loss, last": losses[-1],
        "teacher entropy, lowest": min(entropies), "teacher entropy, last": entropies[-1],
        "spread of the student's outputs, last": lines[-1]["feature_std"],
    }  # fmt: skip


def markdown(title: str, columns: Sequence[str], rows: dict[str, list[str]]) -> str:
    lines = [[title, *columns], ["---"] * (len(columns) + 1), *([name, *cells] for name, cells in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(name: str, value: Interval) -> str:
    point, low, high = value
    return f"{point:+.3f} [{low:+.3f}, {high:+.3f}]" if " - " in name else f"{point:.3f} [{low:.3f}, {high:.3f}]"


def report(
    tables: dict[str, dict[str, list[Interval]]], went: dict[str, dict[str, float]], about: dict[str, Any]
) -> None:
    """Tables for RESULTS.md, and one line of JSON."""
    seeds = list(went)
    for judge, table in tables.items():
        cells = {name: [shown(name, value) for value in values] for name, values in table.items()}
        print(markdown(f"balanced accuracy: {judge}", [*seeds, "mean of the seeds"], cells), end="\n\n")
    names = went[seeds[0]]
    print(markdown("training", seeds, {name: [f"{went[seed][name]:.2f}" for seed in seeds] for name in names}))
    print(json.dumps({"benchmark": "does_it_learn", **about, "balanced_accuracy": tables, "training": went}))


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps a seed (default: {STEPS})")
    parser.add_argument("--data", type=Path, default=SHARED, help="folder of panda_gleason_tiles")
    parser.add_argument("--out", type=Path, default=Path("out/does_it_learn"), help="stores, runs and features")
    parser.add_argument("--quick", action="store_true", help="one tile a slide, 2 steps: to see that it runs")
    parser.add_argument("--draw", action="store_true", help="print the slides to hold out, and end")
    args = parser.parse_args()
    if args.draw:
        seed, drawn = draw_held_out(args.data / "manifest.csv")
        print(*drawn, f"drawn with seed {seed}", sep="\n")
        return
    torch.set_num_threads(1)  # so that the figures can be repeated, and seeds trained side by side
    held_out_slides = HELD_OUT.read_text().split()
    make_stores(args.data, args.out, held_out_slides, each=1 if args.quick else None)
    steps = 2 if args.quick else args.steps
    with TileStore(args.out / "all") as store:
        colour, slides = colours(store), store.slide_of_row
        labels = np.where(store.labels() < len(CLASSES), store.labels(), UNLABELLED)
        tiles = Tiles(labels, slides, np.isin(np.array(store.slide_ids)[slides], held_out_slides))
        contenders, went = [], {}
        for seed in args.seeds:
            features, went[f"seed {seed}"] = learn(args.out, seed, steps, store)
            contenders.append(features | {"mean colour": colour[:, :3], "mean and spread of colour": colour})
    asked = tiles.asked()
    about = {
        "steps": steps, "seeds": args.seeds, "tiles": len(asked), "slides": len(np.unique(slides[asked])),
    }  # fmt: skip
    report({name: judged(contenders, tiles, judge) for name, judge in JUDGES.items()}, went, about)


if __name__ == "__main__":
    main()
