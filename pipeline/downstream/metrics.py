"""Figures of merit of a classifier, with the absent classes named instead of counted as zero."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from tiling.errors import EvaluationError


def classification(y_true: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Judge class probabilities by their highest entry (the first of equals).

    Args:
        y_true: True class per row, int, shape (N,).
        probabilities: Score per row and class, finite, shape (N, C); only their order within a row counts.
        class_names: C names, indexed by class.

    Returns:
        JSON-able dict: ``n``; ``accuracy``; ``balanced_accuracy``, the mean recall over the classes present
        in ``y_true`` (the thesis' "mean per-class accuracy"); ``macro_f1``, the mean F1 over the classes
        present in ``y_true`` or predicted, where a class predicted but not present counts as 0;
        ``confusion``, C lists of C counts, rows are the truth; ``per_class``, a dict per class of ``name``,
        ``support`` (its true rows), ``precision`` (None where it was never predicted), ``recall`` (None
        without support) and ``f1`` (None without either); ``absent``, the names of the classes without
        support.

    Raises:
        EvaluationError: No rows, shapes that do not match, a label outside the classes, or scores that are
            not finite.
    """
    classes = len(class_names)
    _check(y_true, probabilities, classes)
    predicted = probabilities.argmax(axis=1)
    labels = np.arange(classes)
    confusion = confusion_matrix(y_true, predicted, labels=labels)  # (C, C)
    precision, recall, f1, support = precision_recall_fscore_support(
        y_true, predicted, labels=labels, zero_division=np.nan
    )
    per_class = [
        {
            "name": name,
            "support": int(support[index]),
            "precision": _number(precision[index]),
            "recall": _number(recall[index]),
            "f1": _number(f1[index]),
        }
        for index, name in enumerate(class_names)
    ]
    return {
        "n": len(y_true),
        "accuracy": float((predicted == y_true).mean()),
        "balanced_accuracy": float(recall[support > 0].mean()),
        "macro_f1": float(np.nanmean(f1)),
        "confusion": confusion.tolist(),
        "per_class": per_class,
        "absent": [name for index, name in enumerate(class_names) if not support[index]],
    }


def _check(y_true: np.ndarray, probabilities: np.ndarray, classes: int) -> None:
    if probabilities.shape != (len(y_true), classes) or y_true.ndim != 1:
        raise EvaluationError(
            f"probabilities {probabilities.shape} for labels {y_true.shape} and {classes} class names",
            do="pass one row per label and one column per class name",
        )
    if not len(y_true):
        raise EvaluationError("no rows to judge", do="check the labels and the split")
    outside = (y_true < 0) | (y_true >= classes)
    if outside.any():
        raise EvaluationError(
            f"label {y_true[outside][0]} outside the {classes} classes", do="check the class names and labels"
        )
    bad_rows = int((~np.isfinite(probabilities).all(axis=1)).sum())
    if bad_rows:
        raise EvaluationError(
            f"probabilities that are not finite in {bad_rows} of {len(y_true)} rows",
            do="check the decoder's training loss and the features",
        )


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
