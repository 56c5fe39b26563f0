"""Does pretraining learn? xcit_nano by DINO on real tiles, judged on slides that it never saw; ends with a line of JSON.

Slides are held out by a list that was committed before any result was seen (``learn_held_out.txt``; ``--draw`` prints
how it came about). Their tiles are sorted into benign, Gleason 3 and Gleason 4 by their nearest neighbours among the
tiles of the other slides: by the pretrained teacher's features, by those of the network it began as, and by mean
colours. A run that was interrupted goes on where it was: give the same --out. Several processes may train one seed
each into one --out; the last says ``--seeds 0 1 2``.
"""

import argparse
import csv
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import torch

# This file's folder stands first, where ``import tiling`` would find benchmarks/tiling.py.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiling import patches

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "panda_gleason_tiles"
HELD_OUT = Path(__file__).with_name("learn_held_out.txt")
# Folders of the tiles that are judged. Gleason 5 has 8 tiles: its slides are pretrained on, never asked about.
CLASSES = {"0": "benign", "1": "Gleason 3", "2": "Gleason 4"}
SLIDES_SHARE, TILES_SHARE = 0.3, (0.25, 0.4)


def draw_held_out(manifest: Path) -> tuple[int, list[str]]:
    """The seed and the slides: 30 % of the slides of each class, with 25 to 40 % of its tiles; the first seed's so.

    Every slide has one class, and 1 to 176 tiles: a draw that heeds slides alone may leave a class with four tiles, or
    with one slide only, on either side.
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
