"""The section of a result, and several results compared. Nothing here loads torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.boxes import RESULT
from pipeline.report import figures
from pipeline.report.features import feature_identity, provenance
from pipeline.report.page import Fold, Link, Note, Part, Picture, Row, Section, Stack, Table
from pipeline.report.text import DASH, count, counted, decimal, facts, share, software
from tiling import atomic

_SCORES = ("accuracy", "balanced_accuracy", "macro_f1")
_SCORE_HEADS = ("accuracy", "balanced accuracy", "macro F1")
_PARTS = ("train", "val", "test")
_CLASS_COLUMNS = ("class", *_PARTS, "precision", "recall", "F1")


def _read_result(path: Path) -> dict[str, Any]:
    result = RESULT.read(path)
    atomic.read_listed(path, RESULT.file)  # refuses what was changed since
    return result


def result_section(path: Path) -> Section:
    """How a decoder was trained and judged.

    Raises:
        EvaluationError: It is no result of this format version.
        DamageError: It was changed since it was written.
    """
    result = _read_result(path)
    test, history, kept = result["metrics"]["test"], result["history"], result["best_epoch"]
    names = result["class_names"]
    confusion = figures.confusion_matrix(test["confusion"], names)
    tap = Link(f"tap {result['tap']}", feature_identity(result["features"]))
    features = {"features": tap, **provenance(result["features"])}
    fit = {key: str(value) for key, value in result["fit"].items()} | {"made by": software(result["software"])}
    parts: list[Part] = [
        Row([Stack([_score_table(result), Note(_baseline(result))]), facts("Features", features)]),
        Row([
            Picture(confusion, "Confusion matrix of the test part.", _confusion_text(test, names)),
            _class_table(result),
        ]),
        Picture(figures.decoder_curves(history, kept), f"Training of the decoder; epoch {kept} was kept."),
        Fold("Settings of the decoder", [facts("Training", fit)]),
    ]  # fmt: skip
    task = f"{result['task']}, {result['protocol']} protocol"
    summary = f"{task}, balanced accuracy {decimal(test['balanced_accuracy'])}"
    return Section(f"Decoder: {task}", parts, result["warnings"], summary, [atomic.box_digest(path)])


def _score_table(result: Mapping[str, Any]) -> Table:
    """Tiles, slides and scores of each part; the train part is not scored."""
    rows = []
    for part in _PARTS:
        counts, scores = result["counts"][part], result["metrics"].get(part, {})
        rows.append(
            (part, count(counts["tiles"]), count(counts["slides"]), *(decimal(scores.get(key)) for key in _SCORES))
        )
    return Table("Scores", ("part", "tiles", "slides", *_SCORE_HEADS), rows)


def _class_table(result: Mapping[str, Any]) -> Table:
    """Tiles of each class in each part, and how its test tiles were told."""
    rows = []
    for judged in result["metrics"]["test"]["per_class"]:
        name = judged["name"]
        tiles = (count(result["counts"][part]["per_class"][name]) for part in _PARTS)
        rows.append((name, *tiles, *(decimal(judged[key]) for key in ("precision", "recall", "f1"))))
    return Table("Tiles per class, and how those of test were told", _CLASS_COLUMNS, rows)


def _baseline(result: Mapping[str, Any]) -> str:
    """What knowing nothing would score, and what was not judged."""
    test, counts = result["metrics"]["test"], result["counts"]
    most = max(test["per_class"], key=lambda judged: judged["support"])
    present = sum(judged["support"] > 0 for judged in test["per_class"])
    return (
        f"Always answering {most['name']} would have accuracy {decimal(most['support'] / test['n'])} and balanced "
        f"accuracy {decimal(1 / present)}. {count(counts['unlabelled'])} of {counted(counts['tiles'], 'tile')} have no "
        "label and take no part."
    )


def _confusion_text(test: Mapping[str, Any], names: Sequence[str]) -> str:
    """The confusion matrix in words: the share that was told right, by class."""
    right = [
        f"{name} {share(row[number], sum(row)) if sum(row) else 'no rows'}"
        for number, (name, row) in enumerate(zip(names, test["confusion"], strict=True))
    ]
    return f"Confusion matrix of the test part; told right: {', '.join(right)}"


def compare_results(paths: Mapping[str, Path]) -> Section:
    """One row per result, by name."""
    rows = []
    for name, path in paths.items():
        result = _read_result(path)
        test, counts = result["metrics"]["test"], result["counts"]["test"]
        rows.append(
            (
                Link(name, str(path)),
                result["task"],
                result["protocol"],
                result["features"]["encoder"],
                result["tap"],
                count(counts["tiles"]),
                count(counts["slides"]),
                *(decimal(test[key]) for key in _SCORES),
                count(len(result["warnings"])) if result["warnings"] else DASH,
            )
        )
    columns = (
        "result", "task", "protocol", "encoder", "tap", "test tiles", "test slides", *_SCORE_HEADS, "warnings",
    )  # fmt: skip
    note = Note("Rows are comparable where task, protocol, seed and tiles are the same.")
    return Section("Results compared", [Table("Scores on the test parts", columns, rows), note])
