"""Train, val and test parts of labelled rows: by slide (the default), or by tile as the report did.

Orders come from raw PCG64 words, which NumPy keeps stable between its versions (NEP 19), so a split can be
repeated years later from (rows, seed) alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tiling.errors import EvaluationError, UsageError

PARTS = ("train", "val", "test")
SHARES = (0.8, 0.1, 0.1)
MIN_SHARE = 0.1  # of a slide's rows, for a label to name the slide's class
_DONORS = (2, 1, 0)  # of equally full parts test gives up a slide first and train last


@dataclass(frozen=True)
class Split:
    """Row indices of the three parts.

    Args:
        train: Rows to learn from, int64, ascending, shape (N_train,).
        val: Rows to choose the epoch by, int64, ascending, shape (N_val,).
        test: Rows to report on, int64, ascending, shape (N_test,).
        warnings: What a reader of the figures must know about this split, one line each.
    """

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    warnings: tuple[str, ...] = ()

    def parts(self) -> dict[str, np.ndarray]:
        """The row indices by the part's name, in the order of ``PARTS``."""
        return dict(zip(PARTS, (self.train, self.val, self.test), strict=True))


def slide_classes(slide: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The class of each slide: the highest label that at least 10 % of its rows have.

    Labels of the grading tasks are ordered, and a slide is as bad as its worst tissue; the 10 % keep one
    stray tile from naming it. A slide without such a label (more than ten even classes) takes its most
    common one, the highest of equals.

    Args:
        slide: Slide (or patient) number per row, int, shape (N,).
        label: Class per row, int >= 0, shape (N,).

    Returns:
        Slide numbers, ascending, shape (S,), and their classes, int64, shape (S,).

    >>> slide_classes(np.array([7, 7, 3, 3]), np.array([0, 2, 1, 1]))
    (array([3, 7]), array([1, 2]))
    """
    slides, position = np.unique(slide, return_inverse=True)
    labels, label_position = np.unique(label, return_inverse=True)
    cell = position * len(labels) + label_position
    counts = np.bincount(cell, minlength=len(slides) * len(labels)).reshape(len(slides), len(labels))
    enough = counts >= MIN_SHARE * counts.sum(axis=1, keepdims=True) - 1e-9
    enough |= counts == counts.max(axis=1, keepdims=True)
    highest = len(labels) - 1 - np.argmax(enough[:, ::-1], axis=1)
    return slides, labels[highest].astype(np.int64)


def split_by_slide(
    slide: np.ndarray,
    label: np.ndarray,
    shares: Sequence[float] = SHARES,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
) -> Split:
    """Split rows by slide, stratified by the slides' classes (see ``slide_classes``).

    The shares are shares of *slides*, within each class. A class of three slides or more has at least one
    in each part; a class of two has one in train and one in test, a class of one has it in train, unless a
    part would stay empty. The split depends on the slide numbers, their labels and the seed, not on the
    order of the rows.

    Args:
        slide: Slide number per row, or the number of its patient where known, int, shape (N,).
        label: Class per row, int >= 0, shape (N,); rows without a label are left out by the caller.
        shares: Shares of train, val and test: positive, summing to 1.
        seed: Number >= 0 that picks one of the possible splits.
        class_names: Names for the warnings, indexed by label; the numbers where not given.

    Returns:
        The split. It warns of a class with fewer than three slides, and of a class without rows in a part.

    Raises:
        EvaluationError: Fewer than three slides, a negative label, or arrays of different length.
        UsageError: Impossible shares or seed.
    """
    _check_shares(shares, seed)
    if slide.shape != label.shape:
        raise EvaluationError(f"{slide.shape} slide numbers for {label.shape} labels", do="pass one of each per row")
    _check_labels(label)
    slides, classes = slide_classes(slide, label)
    if len(slides) < len(PARTS):
        raise EvaluationError(
            f"{len(slides)} slide(s) with labelled rows; a split by slide needs at least 3",
            do="label more slides, or use --protocol paper (tiles of one slide in train and test)",
        )
    order = _order(len(slides), seed)
    members: tuple[list[int], ...] = ([], [], [])  # positions in `slides`, by part
    rare: list[tuple[int, list[int]]] = []
    for value in np.unique(classes):
        own = order[classes[order] == value].tolist()
        if len(own) < len(PARTS):
            rare.append((len(own), own))
        else:
            _deal(own, _quota(len(own), shares), members)
    for count, own in sorted(rare, key=lambda item: -item[0]):
        _deal(own, (1, 0, count - 1), members)
    _fill_empty_parts(members)
    part_of_slide = np.empty(len(slides), np.int64)
    for part, positions in enumerate(members):
        part_of_slide[positions] = part
    part_of_row = part_of_slide[np.searchsorted(slides, slide)]
    warnings = _class_warnings(part_of_row, label, classes, class_names)
    return _split(part_of_row, tuple(warnings))


def split_by_tile(
    label: np.ndarray,
    shares: Sequence[float] = SHARES,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
) -> Split:
    """The report's split (REPRODUCTION.md, source A): rows at random, whatever slide they come from.

    Args:
        label: Class per row, int >= 0, shape (N,).
        shares: Shares of train, val and test: positive, summing to 1.
        seed: Number >= 0 that picks one of the possible splits.
        class_names: Names for the warnings, indexed by label; the numbers where not given.

    Returns:
        The split, always with a warning that it flatters the model.

    Raises:
        EvaluationError: Fewer than three rows, or a negative label.
        UsageError: Impossible shares or seed.
    """
    _check_shares(shares, seed)
    _check_labels(label)
    if len(label) < len(PARTS):
        raise EvaluationError(f"{len(label)} labelled row(s); a split needs at least 3", do="label more tiles")
    part_of_row = np.empty(len(label), np.int64)
    part_of_row[_order(len(label), seed)] = np.repeat(np.arange(3), _quota(len(label), shares))
    flattering = (
        "split by tile, as in the report: tiles of one slide stand in train and test, "
        "so the figures are higher than they would be on new slides"
    )
    missing = _class_warnings(part_of_row, label, np.empty(0, np.int64), class_names)
    return _split(part_of_row, (flattering, *missing))


def _check_shares(shares: Sequence[float], seed: int) -> None:
    positive = len(shares) == len(PARTS) and all(0 < share < 1 for share in shares)
    if not positive or abs(sum(shares) - 1) > 1e-6:
        raise UsageError(
            f"shares {tuple(shares)}",
            where="split",
            do="give train, val and test, each above 0, summing to 1",
        )
    if seed < 0:
        raise UsageError(f"seed {seed}", where="split", do="give a whole number >= 0")


def _check_labels(label: np.ndarray) -> None:
    if not np.issubdtype(label.dtype, np.integer) or label.ndim != 1:
        raise EvaluationError(f"labels of type {label.dtype} and shape {label.shape}", do="pass one int per row")
    negative = int((label < 0).sum())
    if negative:
        raise EvaluationError(f"{negative} of {len(label)} labels below 0", do="leave unlabelled rows out")


def _order(count: int, seed: int) -> np.ndarray:
    """A permutation of ``count`` that (count, seed) alone decide."""
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")


def _quota(count: int, shares: Sequence[float]) -> tuple[int, int, int]:
    """Whole numbers >= 1 near ``count * shares`` that sum to ``count`` (>= 3): largest remainders.

    >>> _quota(14, (0.8, 0.1, 0.1)), _quota(3, (0.8, 0.1, 0.1))
    ((11, 1, 2), (1, 1, 1))
    """
    exact = [count * share for share in shares]
    quota = [max(1, int(value + 1e-9)) for value in exact]
    while sum(quota) < count:
        # Equal remainders go to test: its figure is the one reported.
        quota[max(range(3), key=lambda part: (round(exact[part] - quota[part], 9), part))] += 1
    while sum(quota) > count:
        quota[quota.index(max(quota))] -= 1
    return quota[0], quota[1], quota[2]


def _deal(own: list[int], counts: Sequence[int], members: tuple[list[int], ...]) -> None:
    start = 0
    for part, count in enumerate(counts):
        members[part].extend(own[start : start + count])
        start += count


def _fill_empty_parts(members: tuple[list[int], ...]) -> None:
    """Move slides of rare classes, which were dealt last, until no part is empty."""
    for part in members:
        if not part:
            donor = max(_DONORS, key=lambda other: len(members[other]))
            part.append(members[donor].pop())


def _class_warnings(
    part_of_row: np.ndarray, label: np.ndarray, classes: np.ndarray, class_names: Sequence[str] | None
) -> list[str]:
    """One line per class that is short of slides (``classes``: class of each slide) or misses a part."""
    warnings = []
    for value in np.unique(label).tolist():
        name = class_names[value] if class_names is not None else str(value)
        slides = int((classes == value).sum())
        present = np.bincount(part_of_row[label == value], minlength=len(PARTS))
        missing = [part for part, rows in zip(PARTS, present, strict=True) if not rows]
        problems = []
        if 0 < slides < len(PARTS):
            problems.append(f"is the class of {slides} slide(s), 3 are needed for one in each part")
        if missing:
            problems.append(f"has no rows in {', '.join(missing)}")
        if problems:
            warnings.append(f"class {name} {' and '.join(problems)}")
    return warnings


def _split(part_of_row: np.ndarray, warnings: tuple[str, ...]) -> Split:
    train, val, test = (np.flatnonzero(part_of_row == part) for part in range(len(PARTS)))
    return Split(train, val, test, warnings)
