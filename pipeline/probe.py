"""The encoder judged while it trains: are the nearest neighbours of labelled tiles, on other slides, of their class?

Neighbours vote as in the original DINO's ``eval_knn.py`` (after Wu et al. 2018, "Unsupervised feature learning via
non-parametric instance discrimination"): the 20 most alike by cosine, each with exp(cosine / 0.07). A tile's own slide
has no vote: tiles of one slide are alike whatever they show.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from pipeline.config import PretrainConfig
from pipeline.data.randomness import uniforms
from pipeline.models.frozen import encoded
from pipeline.rankme import rankme
from pipeline.runtime import Runtime, autocast, half_precision
from tiling.errors import UsageError
from tiling.grid import MPP_TOLERANCE
from tiling.progress import say
from tiling.store import TileStore

NEIGHBOURS, TEMPERATURE = 20, 0.07
_STREAM_PROBE = -1  # no view's and no method's
_ASKED_AT_ONCE = 1024
_BACKGROUND = "background"


class Probe:
    """Labelled tiles, held in memory, so that a run of days does not end with a file that has gone.

    Args:
        path: The labelled TileStore, cut as the tiles that are trained on.
        config: The run.
        store: What it trains on.
        device: Where the encoder is.

    Raises:
        UsageError: Its tiles are of another size or scale, or there are not two classes on two slides each.
        StoreError: It is no store.
        DamageError: One of the chosen tiles is damaged.
    """

    def __init__(self, path: Path, config: PretrainConfig, store: TileStore, device: torch.device) -> None:
        self._config, self._device = config, device
        with TileStore(path, config.train.threads) as labelled:
            _require_alike(path, labelled, store)
            rows, names = _judged_rows(path, labelled)
            label, slide = labelled.labels(), labelled.slide_of_row
            most = config.monitor.probe_tiles
            if most < 2 * len(np.unique(label[rows])):  # no neighbour of its class on another slide
                raise UsageError(f"monitor.probe_tiles is {most}, must be 2 or more for each class")
            rows = rows[spread(label[rows], slide[rows], rows, most, config.train.seed)]
            self._tiles = labelled.read(rows)
        self._names, self._label = names, label[rows]
        self._classes = np.unique(self._label)
        self._slide = slide[rows]

    def about(self) -> str:
        """What judges, in one line."""
        names = ", ".join(self._names[number] for number in self._classes)
        slides = len(np.unique(self._slide))
        return f"probe: {len(self._label)} tiles of {slides} slides, {len(self._classes)} classes ({names})"

    def judge(self, encoder: nn.Module) -> dict[str, float]:
        """Encode the tiles, and let neighbours on other slides tell their classes.

        The encoder is in eval mode meanwhile; nothing of it, and no random state, is different afterwards.

        Args:
            encoder: Normalised images (B, 3, S, S) -> features (B, D), on the device.

        Returns:
            ``knn``: balanced accuracy; ``knn_chance``: that of guessing; ``probe_rankme``: RankMe of the features. All
            NaN where features are not finite.

        Raises:
            UsageError: The encoder takes no tiles of this size.
        """
        features = self._encode(encoder)
        chance, rank = 1 / len(self._classes), rankme(features)
        if math.isnan(rank):
            return {"knn": math.nan, "knn_chance": chance, "probe_rankme": rank}
        label = torch.from_numpy(np.searchsorted(self._classes, self._label)).to(self._device)
        slide = torch.from_numpy(self._slide).to(self._device)
        right = (neighbours_say(features, label, slide) == label).cpu().numpy()
        recalls = [right[self._label == number].mean() for number in self._classes]
        return {"knn": float(np.mean(recalls)), "knn_chance": chance, "probe_rankme": rank}

    @torch.no_grad()
    def _encode(self, encoder: nn.Module) -> torch.Tensor:
        """Features of all tiles, float32, shape (N, D), in the run's precision."""
        views, train = self._config.views, self._config.train
        half = half_precision(self._device, train.precision)
        found = []
        with _judging(encoder), autocast(self._device, half):
            for first in range(0, len(self._tiles), train.batch_per_rank):
                tiles = torch.from_numpy(self._tiles[first : first + train.batch_per_rank]).to(self._device)
                found.append(encoded(encoder, tiles, views.input, views.mean, views.std).float())
        return torch.cat(found)


def open_probe(config: PretrainConfig, runtime: Runtime, store: TileStore) -> Probe | None:
    """The probe that the config asks for, on the first rank; None on others, and where it asks for none.

    To be called by all ranks: an error of the first is raised on all. See ``Probe`` for which.
    """
    path, made = config.monitor.probe, list[Probe]()
    if path is not None:
        runtime.first_decides(lambda: made.append(Probe(path, config, store, runtime.device)))
    if made:
        say(made[0].about())
    return made[0] if made else None


@contextmanager
def _judging(encoder: nn.Module) -> Iterator[None]:
    """In eval mode for the block; then each part in the mode that it was in."""
    training = {part: part.training for part in encoder.modules()}
    encoder.eval()
    try:
        yield
    finally:
        for part, mode in training.items():
            part.training = mode


def neighbours_say(features: torch.Tensor, label: torch.Tensor, slide: torch.Tensor) -> torch.Tensor:
    """The class that each tile's nearest neighbours on other slides vote for.

    Args:
        features: Shape (N, D).
        label: Classes, counted from 0, int64, shape (N,).
        slide: Slide of each tile, integer, shape (N,).

    Returns:
        int64, shape (N,).
    """
    unit = functional.normalize(features.float(), dim=1)
    found = []
    for first in range(0, len(unit), _ASKED_AT_ONCE):
        asked, own = (values[first : first + _ASKED_AT_ONCE] for values in (unit, slide))
        alike = (asked @ unit.T).masked_fill(own[:, None] == slide, -math.inf)
        cosine, nearest = alike.topk(min(NEIGHBOURS, len(unit)), dim=1)
        votes = torch.zeros(len(asked), int(label.max()) + 1, device=unit.device)
        votes.scatter_add_(1, label[nearest], (cosine / TEMPERATURE).exp())  # exp(-inf): tiles of its own slide
        found.append(votes.argmax(dim=1))
    return torch.cat(found)


def spread(label: np.ndarray, slide: np.ndarray, ids: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Choose tiles evenly over classes, and in each class over its slides; a function of the tiles and the seed.

    Classes take turns, and in its turn a class its slides; where one has no more, the others go on.

    Args:
        label: Class of each tile, int64, shape (N,).
        slide: Slide of each tile, int64, shape (N,).
        ids: Identity of each tile, int64, shape (N,).
        most: At most so many.
        seed: Decides which.

    Returns:
        Their places, ascending, int64, shape (min(N, most),).
    """
    chance = uniforms(seed, np.zeros_like(ids), ids, _STREAM_PROBE, 1)[:, 0]
    _, group = np.unique(np.stack([label, slide]), axis=1, return_inverse=True)
    turn_in_slide = _turns(group, chance)
    turn_in_class = _turns(label, np.lexsort((chance, turn_in_slide)).argsort())
    return np.sort(np.lexsort((chance, turn_in_class))[:most])


def _turns(group: np.ndarray, order: np.ndarray) -> np.ndarray:
    """When each member's turn comes in its group, from 0: shape (N,)."""
    by_group = np.lexsort((order, group))
    _, first, size = np.unique(group[by_group], return_index=True, return_counts=True)
    turns = np.empty(len(group), np.int64)
    turns[by_group] = np.arange(len(group)) - np.repeat(first, size)
    return turns


def _require_alike(path: Path, labelled: TileStore, store: TileStore) -> None:
    if labelled.tile_px != store.tile_px:
        raise UsageError(
            f"tiles have {labelled.tile_px} px, those that are trained on {store.tile_px}",
            path,
            "tile the labelled slides as those of --data",
        )
    theirs, ours = labelled.mpp, store.mpp  # nan where the scale of some tiles is not known
    if not abs(theirs / ours - 1) <= MPP_TOLERANCE and not (math.isnan(theirs) and math.isnan(ours)):
        raise UsageError(
            f"tiles have {theirs:.3g} um/px, those that are trained on {ours:.3g}",
            path,
            f"tile again with --mpp {ours:.3g}",
        )


def _judged_rows(path: Path, labelled: TileStore) -> tuple[np.ndarray, tuple[str, ...]]:
    """Index rows of the tiles whose class can be told from other slides, and the names of all classes."""
    names, label = labelled.description.class_names, labelled.labels()
    known = label >= (1 if names[:1] == (_BACKGROUND,) else 0)
    slides = [len(np.unique(labelled.slide_of_row[known & (label == number)])) for number in range(len(names))]
    alone = [name for name, number in zip(names, slides, strict=True) if number == 1]
    told = [number for number, found in enumerate(slides) if found > 1]
    if len(told) < 2:
        on = ", ".join(f"{name} on {number}" for name, number in zip(names, slides, strict=True) if number) or "none"
        raise UsageError(
            f"labelled tiles of two classes on two slides each are needed, there are: {on}",
            path,
            "label more slides (masks, annotations or class folders), or leave --monitor.probe out",
        )
    if alone:
        say(f"{path}: left out of the probe, for they are on one slide only: {', '.join(alone)}")
    return np.flatnonzero(np.isin(label, told)), names
