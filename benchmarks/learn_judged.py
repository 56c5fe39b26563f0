"""Are classes told from features? Three judges, and intervals by resampled slides, for ``does_it_learn.py``.

The first judge was fixed before there was any result. It said little: of 30 held-out slides 4 show Gleason 4, and one
of them has 79 of the 102 tiles. The other two were added then.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pipeline.probe import neighbours_say
from tiling.labels import UNLABELLED

PENALTY = 0.1  # C of the logistic regression on standardised features
RESAMPLES, LEVELS = 2000, (2.5, 97.5)
DIFFERENCES = (
    ("pretrained, cls", "random, cls"),
    ("pretrained, cls", "mean colour"),
    ("pretrained, cls", "mean and spread of colour"),
    ("pretrained, head", "random, head"),
)
Interval = tuple[float, float, float]  # the figure, and its bounds


@dataclass(frozen=True)
class Tiles:
    """What is known of all tiles.

    Args:
        label: Class, counted from 0, UNLABELLED where it does not count; int64, shape (N,).
        slide: Slide of each tile, int64, shape (N,).
        held_out: Whether that slide is held out; shape (N,).
    """

    label: np.ndarray
    slide: np.ndarray
    held_out: np.ndarray

    def known(self) -> np.ndarray:
        """Rows of the tiles whose class a judge of held-out slides may learn from."""
        return np.flatnonzero((self.label != UNLABELLED) & ~self.held_out)

    def asked(self) -> np.ndarray:
        """Rows of the tiles of held-out slides whose class is asked for."""
        return np.flatnonzero((self.label != UNLABELLED) & self.held_out)

    def labelled(self) -> np.ndarray:
        """Rows of both."""
        return np.flatnonzero(self.label != UNLABELLED)


@dataclass(frozen=True)
class Judge:
    """Who tells classes.

    Args:
        asked: Rows of the tiles that are asked for.
        told: From features of all tiles, shape (N, D): the classes of those.
    """

    asked: Callable[[Tiles], np.ndarray]
    told: Callable[[np.ndarray, Tiles], np.ndarray]


def by_neighbours(features: np.ndarray, tiles: Tiles) -> np.ndarray:
    """Classes of held-out slides' tiles, by the nearest tiles of the others: to the probe they are all one slide."""
    rows = tiles.labelled()
    slide = np.where(tiles.held_out, -1, tiles.slide)
    return probed(features[rows], tiles.label[rows], slide[rows])[tiles.held_out[rows]]


def by_regression(features: np.ndarray, tiles: Tiles) -> np.ndarray:
    """Classes of held-out slides' tiles, by logistic regression on the others."""
    known = tiles.known()
    model = make_pipeline(StandardScaler(), LogisticRegression(C=PENALTY, max_iter=5000, class_weight="balanced"))
    return np.asarray(model.fit(features[known], tiles.label[known]).predict(features[tiles.asked()]))


def by_other_slides(features: np.ndarray, tiles: Tiles) -> np.ndarray:
    """Classes of all tiles, by the nearest tiles of all other slides: the monitor's probe."""
    rows = tiles.labelled()
    return probed(features[rows], tiles.label[rows], tiles.slide[rows])


def probed(features: np.ndarray, label: np.ndarray, slide: np.ndarray) -> np.ndarray:
    """The class that each tile's nearest neighbours on other slides vote for; int64, shape (N,)."""
    return neighbours_say(*(torch.from_numpy(values) for values in (features, label, slide))).numpy()


JUDGES = {
    "kNN, held-out slides": Judge(Tiles.asked, by_neighbours),
    "logistic regression, held-out slides": Judge(Tiles.asked, by_regression),
    "kNN, every slide by all others": Judge(Tiles.labelled, by_other_slides),
}


def judged(contenders: Sequence[dict[str, np.ndarray]], tiles: Tiles, judge: Judge) -> dict[str, list[Interval]]:
    """Balanced accuracies and their differences with intervals: one per seed, and one of the seeds' mean.

    Args:
        contenders: Of each seed, features of all tiles by contender.
        tiles: What is known of them.
        judge: Who tells their classes.
    """
    rows = judge.asked(tiles)
    labels, slides = tiles.label[rows], tiles.slide[rows]
    rights = [
        {name: judge.told(values, tiles) == labels for name, values in features.items()} for features in contenders
    ]
    again: list[dict[str, Any]] = [resampled(hits, labels, slides) for hits in rights]
    points: list[dict[str, Any]] = [{name: balanced(hit, labels) for name, hit in hits.items()} for hits in rights]
    for group in (points, again):
        group.append({name: np.mean([one[name] for one in group], axis=0) for name in group[0]})
    table = {
        name: [interval(point[name], draws[name]) for point, draws in zip(points, again, strict=True)]
        for name in points[0]
    }
    for ours, theirs in DIFFERENCES:
        table[f"{ours} - {theirs}"] = [
            interval(point[ours] - point[theirs], draws[ours] - draws[theirs])
            for point, draws in zip(points, again, strict=True)
        ]
    return table


def balanced(right: np.ndarray, labels: np.ndarray) -> float:
    """Mean over classes of the share told right."""
    return float(np.mean([right[labels == label].mean() for label in np.unique(labels)]))


def interval(point: float, draws: np.ndarray) -> Interval:
    low, high = np.percentile(draws, LEVELS)
    return round(float(point), 4), round(float(low), 4), round(float(high), 4)


def resampled(hits: dict[str, np.ndarray], labels: np.ndarray, slides: np.ndarray) -> dict[str, np.ndarray]:
    """Balanced accuracy of each contender under resampled slides, the same ones for all; slides stay in their class.

    Args:
        hits: Whether each tile was told right, by contender; shape (N,).
        labels: Class of each tile, shape (N,).
        slides: Slide of each tile, shape (N,).

    Returns:
        By contender, shape (RESAMPLES,).
    """
    rng = np.random.default_rng(0)
    recalls: dict[str, list[np.ndarray]] = {name: [] for name in hits}
    for label in np.unique(labels):
        ids, number = np.unique(slides[labels == label], return_inverse=True)
        drawn = rng.integers(len(ids), size=(RESAMPLES, len(ids)))
        tiles = np.bincount(number)[drawn].sum(axis=1)
        for name, right in hits.items():
            recalls[name].append(np.bincount(number, right[labels == label])[drawn].sum(axis=1) / tiles)
    return {name: np.mean(values, axis=0) for name, values in recalls.items()}
