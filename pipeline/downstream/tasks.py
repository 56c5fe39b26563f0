"""Evaluation tasks: labels of a TileStore, features of a FeatureStore, a decoder between them, a RESULT folder."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.boxes import RESULT
from pipeline.checkpoint import write_tensors
from pipeline.downstream.fit import FitConfig, FitResult, fit_classifier, predict
from pipeline.downstream.metrics import classification
from pipeline.downstream.splits import Split, split_by_slide, split_by_tile
from pipeline.features import read_description, read_features
from pipeline.report import figures
from pipeline.runtime import one_device
from tiling import atomic
from tiling.errors import EvaluationError, UsageError
from tiling.index import COVERAGE
from tiling.labels import SCHEMES, UNLABELLED
from tiling.progress import progress, say
from tiling.store import TileStore

RESULTS, DECODER, PREDICTIONS, CONFUSION, CURVES = (
    RESULT.file, "decoder.safetensors", "predictions.parquet", "confusion.png", "curves.png",
)  # fmt: skip
TAP = "head"


@dataclass(frozen=True)
class Protocol:
    """How a task is judged.

    Args:
        by_slide: Split by slide; False splits tiles at random, as the report did.
        any_pixel: A single mask pixel decides a tile's grade, and a tile without one is background.
        class_weights: Weigh the loss by inverse class frequency.
        fit: The decoder's training.
    """

    by_slide: bool
    any_pixel: bool
    class_weights: bool
    fit: FitConfig


PROTOCOLS = {
    "default": Protocol(by_slide=True, any_pixel=False, class_weights=True, fit=FitConfig(epochs=30, patience=5)),
    "paper": Protocol(by_slide=False, any_pixel=True, class_weights=False, fit=FitConfig(epochs=20)),
}


def any_pixel_labels(store: TileStore) -> np.ndarray:
    """The report's labels: the highest class of which a single pixel is under the tile, else background.

    Tiles whose provider does not grade stay unlabelled. A store without masks keeps its own labels.

    Returns:
        int64, shape (N,).
    """
    scheme = SCHEMES["radboud"]
    names = [f"{COVERAGE}{value}" for value in scheme.values]
    if scheme.classes is None or any(name not in store.index.column_names for name in names):
        return store.labels()
    shares = np.stack([store.index[name].to_numpy() for name in names], axis=1)  # (N, values), NaN where not known
    classes = np.where(np.nan_to_num(shares) > 0, np.asarray(scheme.classes), 0).max(axis=1)
    graded = np.asarray(store.index["provider"].cast(pa.string()).to_pylist()) == "radboud"
    return np.where(graded & ~np.isnan(shares[:, 0]), classes, UNLABELLED).astype(np.int64)


def evaluate_panda(
    data: Path, features: Path, out: Path, protocol_name: str = "default", seed: int = 0
) -> dict[str, Any]:
    """The report's PANDA decoder on cached features: train, choose by the val part, judge on the test part.

    Args:
        data: The TileStore.
        features: Its FeatureStore.
        out: The RESULT folder to make.
        protocol_name: ``default`` or ``paper``.
        seed: Decides split, initial weights and order.

    Returns:
        What results.json holds.

    Raises:
        UsageError: ``out`` exists.
        FeatureError: The features are of another store.
        EvaluationError: Too few labelled tiles, slides or classes.
    """
    if out.exists():
        raise UsageError("exists already", out, "choose another --out, or remove it")
    if protocol_name not in PROTOCOLS:
        raise UsageError(f"protocol {protocol_name!r}, known are {', '.join(PROTOCOLS)}")
    protocol = PROTOCOLS[protocol_name]
    tiles = _load(data, features, protocol)
    split = _split(tiles, protocol, seed)
    warnings = [*split.warnings, *_provenance_warnings(features)]
    for warning in warnings:
        say(f"warning: {warning}")
    fit = _fit(tiles, split, protocol, seed)
    probabilities = predict(fit.model, tiles.features)
    judged = {
        part: classification(tiles.label[members], probabilities[members], tiles.class_names)
        for part, members in (("val", split.val), ("test", split.test))
    }
    values = {
        "task": "panda", "protocol": protocol_name, "class_names": list(tiles.class_names), "seed": seed, "tap": TAP,
        "features": read_description(features).to_json(), "counts": _counts(tiles, split), "metrics": judged,
        "warnings": warnings, "fit": asdict(protocol.fit) | {"seed": seed, "class_weights": protocol.class_weights},
        "best_epoch": fit.best_epoch, "history": fit.history,
        "software": {"bony": version("bony"), "torch": torch.__version__},
    }  # fmt: skip
    result = RESULT.describe(values)
    _write(out, result, fit, _predictions(tiles, probabilities, split))
    return result


@dataclass(frozen=True)
class _Labelled:
    """The labelled tiles of a store: features (N, D), label, slide and row in the slide (N,), and the names of both."""

    features: np.ndarray
    label: np.ndarray
    slide: np.ndarray
    row: np.ndarray
    slide_ids: Sequence[str]
    class_names: Sequence[str]
    unlabelled: int


def _load(data: Path, features: Path, protocol: Protocol) -> _Labelled:
    with TileStore(data) as store:
        values = read_features(features, store, TAP)
        label = any_pixel_labels(store) if protocol.any_pixel else store.labels()
        rows = np.flatnonzero(label != UNLABELLED)
        names = store.description.class_names
        if not len(rows) or not names:
            raise EvaluationError(
                "no labelled tile in this store", data, "tile slides that have masks or class folders"
            )
        row_in_slide = store.index["row"].to_numpy()[rows]
        return _Labelled(
            values[rows], label[rows], store.slide_of_row[rows], row_in_slide, store.slide_ids, names,
            unlabelled=len(label) - len(rows),
        )  # fmt: skip


def _split(tiles: _Labelled, protocol: Protocol, seed: int) -> Split:
    if protocol.by_slide:
        return split_by_slide(tiles.slide, tiles.label, seed=seed, class_names=tiles.class_names)
    return split_by_tile(tiles.label, seed=seed, class_names=tiles.class_names)


def _provenance_warnings(features: Path) -> list[str]:
    about = read_description(features)
    found = []
    if about.encoder_store_fingerprint == about.store_fingerprint:
        found.append("the encoder was pretrained on these very slides (without labels), the test part included")
    if about.mpp_override:
        found.append(f"tiles have {about.mpp:.3g} um/px, the encoder was trained at {about.encoder_mpp:.3g}")
    return found


def _fit(tiles: _Labelled, split: Split, protocol: Protocol, seed: int) -> FitResult:
    device = str(one_device())
    config = FitConfig(**asdict(protocol.fit) | {"seed": seed, "device": device})
    with progress("decoder", config.epochs, "epochs") as advance:
        return fit_classifier(
            tiles.features, tiles.label, split, len(tiles.class_names), config, protocol.class_weights,
            lambda epoch, epochs, record: advance(note=f"val loss {record['val_loss']:.3f}"),
        )  # fmt: skip


def _counts(tiles: _Labelled, split: Split) -> dict[str, Any]:
    """Tiles and slides per part and class."""
    parts = {
        part: {
            "tiles": len(members),
            "slides": len(np.unique(tiles.slide[members])),
            "per_class": {
                name: int((tiles.label[members] == number).sum()) for number, name in enumerate(tiles.class_names)
            },
        }
        for part, members in split.parts().items()
    }
    return {"tiles": len(tiles.label) + tiles.unlabelled, "unlabelled": tiles.unlabelled, **parts}


def _predictions(tiles: _Labelled, probabilities: np.ndarray, split: Split) -> pa.Table:
    """One row per labelled tile: slide, row, part, label, probability per class."""
    part = np.empty(len(tiles.label), dtype=object)
    for name, members in split.parts().items():
        part[members] = name
    columns = {
        "slide_id": [tiles.slide_ids[number] for number in tiles.slide],
        "row": tiles.row,
        "part": part.tolist(),
        "label": tiles.label,
    }
    return pa.table(columns | {f"p_{name}": probabilities[:, n] for n, name in enumerate(tiles.class_names)})


def _write(out: Path, result: dict[str, Any], fit: FitResult, predictions: pa.Table) -> None:
    """The RESULT folder, whole or not there at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    test = result["metrics"]["test"]
    with atomic.building(out, out.parent / f".{out.name}.work") as folder:
        (folder / RESULTS).write_text(json.dumps(result, indent=1) + "\n")
        write_tensors(folder / DECODER, fit.model.state_dict())
        pq.write_table(predictions, folder / PREDICTIONS, compression="zstd")
        title = f"PANDA, test part, {result['protocol']} protocol"
        (folder / CONFUSION).write_bytes(figures.confusion_matrix(test["confusion"], result["class_names"], title))
        (folder / CURVES).write_bytes(figures.decoder_curves(fit.history, fit.best_epoch, "PANDA decoder"))


def read_result(path: Path) -> dict[str, Any]:
    """What a RESULT's results.json holds, after every checksum is checked.

    Raises:
        UsageError: It is no result.
        DamageError: A file is damaged.
        EvaluationError: It is of another format version.
    """
    if not ((path / atomic.COMPLETE).exists() or (path / RESULTS).exists()):
        raise UsageError("is no result", path, "give a folder made by `bony evaluate`")
    atomic.require_sound(path)
    return RESULT.read(path)


TASKS = {"panda": evaluate_panda}


def evaluate(
    task: str, data: Path, features: Path, out: Path, protocol: str = "default", seed: int = 0
) -> dict[str, Any]:
    """Run one task by name; see the task's own function.

    Raises:
        UsageError: No task has that name, or ``out`` exists.
    """
    if task not in TASKS:
        raise UsageError(f"task {task!r}, known are {', '.join(TASKS)}")
    return TASKS[task](data, features, out, protocol, seed)
