"""Figures as PNG bytes, as wide as the page's column at most, without pyplot and its global state.

Values that are not finite leave gaps, classes without rows are hatched grey, and a figure of nothing says
so: a report must not fail because a run was short.
"""

import io
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

PAGE_PX = 1180
Level = float | tuple[float, str]

_DPI = 100
_FONT = 11
# Okabe and Ito's colours, which colour-blind readers can tell apart.
_BLUE, _ORANGE = "#0072B2", "#D55E00"
_COLOURS = (_BLUE, _ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222")
_DASHES = ("-", "--", ":", "-.")
_INK, _GREY, _PALE = "#222222", "#8a8a8a", "#ececec"
_BLUES = LinearSegmentedColormap.from_list("bony", ["#ffffff", "#9cc9e3", _BLUE, "#003a5c"])
_ANNOTATED = 14  # more classes than this leave no room for numbers in the cells
_LONG = 200  # points; a longer curve is drawn pale, with its running mean on top
_PANELS_PER_ROW = 3
_CHARACTER = 0.09  # inches, of a tick label


def confusion_matrix(confusion: Sequence[Sequence[int]], class_names: Sequence[str], title: str = "") -> bytes:
    """Share of each true class (row) that was predicted as each class (column), with the counts.

    Args:
        confusion: Counts, shape (C, C), rows are the truth; rows without counts are hatched.
        class_names: C names.
        title: Text above the figure.

    Returns:
        A PNG.
    """
    classes = len(class_names)
    counts = np.asarray(confusion, np.int64).reshape(classes, classes)
    support = counts.sum(axis=1)
    shares = counts / np.maximum(support, 1)[:, None]  # (C, C)
    side = min(8.5, max(2.6, 0.8 * classes))
    shown = [_shorten(name) for name in class_names]
    names = _CHARACTER * max(map(len, shown), default=0)
    annotated = classes <= _ANNOTATED
    crowded = any(_CHARACTER * len(a + b) / 2 > side / classes for a, b in pairwise(shown))
    figure = _figure(side + names + (0.9 if annotated else 2.2), side + (min(names, 1.6) if crowded else 0.2) + 0.6)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap=_BLUES, vmin=0, vmax=1)
    for row in np.flatnonzero(support == 0):
        axes.add_patch(_hatched(-0.5, row - 0.5, classes, 1))
    if annotated:
        _annotate(axes, counts, shares)
    else:
        bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02, format=PercentFormatter(1.0, decimals=0))
        bar.set_label("share of the true class", fontsize=_FONT, color=_INK)
        bar.ax.tick_params(labelsize=_FONT - 1, colors=_INK, length=0)
        bar.outline.set_visible(False)
    turned: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axes.set_xticks(range(classes), shown, parse_math=False, **turned)
    rows = [f"{name}\nn = {count:,}" for name, count in zip(shown, support, strict=True)]
    axes.set_yticks(range(classes), rows, parse_math=False)
    axes.set_xticks(np.arange(classes + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(classes + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0, labelsize=_FONT, colors=_INK)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted", fontsize=_FONT, color=_INK)
    axes.set_ylabel("truth", fontsize=_FONT, color=_INK)
    return _png(figure, title)


def training_curves(
    metrics: Sequence[Mapping[str, Any]],
    keys: Sequence[tuple[str, str]],
    title: str = "",
    hlines: Mapping[str, Level] | None = None,
) -> bytes:
    """One panel per metric over the steps, for instance of ``metrics.jsonl``.

    Args:
        metrics: Records with ``step``; a value that is missing or None is passed over (it was not
            measured), one that is not finite leaves a gap.
        keys: (key in the records, title of its panel), in the order of the panels.
        title: Text above the figure.
        hlines: Key to the value of a dashed line in its panel, or to (value, its name), such as
            ``{"loss": (math.log(4096), "ln K")}``.

    Returns:
        A PNG.
    """
    columns = min(_PANELS_PER_ROW, max(1, len(keys)))
    rows = max(1, math.ceil(len(keys) / columns))
    figure = _figure((6.4, 9.6, PAGE_PX / _DPI)[columns - 1], 3.0 * rows + 0.3)
    panels = np.atleast_1d(figure.subplots(rows, columns, sharex=True, squeeze=False)).ravel()
    for axes, (key, label) in zip(panels, keys, strict=False):
        x, y = _series(metrics, "step", key)
        _style(axes, label)
        _curve(axes, x, y, _BLUE)
        if np.isfinite(y).any():
            _level(axes, (hlines or {}).get(key))
            if np.nanmin(y) >= 0 > axes.get_ylim()[0]:  # what cannot be below 0 has no room there
                axes.set_ylim(bottom=0)
    for axes in panels[len(keys) :]:
        axes.set_visible(False)
    for index in range(max(0, len(keys) - columns), len(keys)):
        panels[index].set_xlabel("step", fontsize=_FONT, color=_INK)
        panels[index].tick_params(labelbottom=True)
    for axes, (key, _) in zip(panels, keys, strict=False):
        if not np.isfinite(_series(metrics, "step", key)[1]).any():
            _nothing(axes, f"no values of {key}")
    return _png(figure, title)


def overlaid_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], key: str, title: str = "") -> bytes:
    """One metric of several runs over the steps, in one panel.

    Args:
        runs: Name of a run to its records, as for ``training_curves``.
        key: The metric.
        title: Text above the figure.

    Returns:
        A PNG.
    """
    figure = _figure(PAGE_PX / _DPI, max(4.0, 0.25 * len(runs) + 0.8))
    axes = figure.add_subplot()
    _style(axes, key)
    axes.set_xlabel("step", fontsize=_FONT, color=_INK)
    for number, (name, metrics) in enumerate(runs.items()):
        dashes, colour = divmod(number, len(_COLOURS))
        look = _COLOURS[colour], _shorten(name, 40), _DASHES[dashes % len(_DASHES)]
        _curve(axes, *_series(metrics, "step", key), *look)
    low, high = axes.dataLim.intervalx
    if not math.isfinite(low):
        _nothing(axes, f"no values of {key}")
        return _png(figure, title)
    margin = 0.03 * (high - low) or 1
    axes.set_xlim(low - margin, high + margin)
    legend = figure.legend(loc="outside right upper", fontsize=_FONT - 1, frameon=False, labelcolor=_INK)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return _png(figure, title)


def decoder_curves(history: Sequence[Mapping[str, Any]], best_epoch: int | None = None, title: str = "") -> bytes:
    """Loss and accuracies of ``FitResult.history`` over the epochs.

    Args:
        history: Records with ``epoch``, ``train_loss``, ``val_loss``, ``val_accuracy`` and
            ``val_balanced_accuracy``.
        best_epoch: The epoch whose weights were kept, marked by a line.
        title: Text above the figure.

    Returns:
        A PNG.
    """
    figure = _figure(11.0, 4.2)
    left, right = figure.subplots(1, 2)
    _style(left, "cross-entropy")
    _style(right, "accuracy on val")
    for axes, key, label, colour in (
        (left, "train_loss", "train", _BLUE),
        (left, "val_loss", "val", _ORANGE),
        (right, "val_accuracy", "all rows", _BLUE),
        (right, "val_balanced_accuracy", "mean over classes", _ORANGE),
    ):
        x, y = _series(history, "epoch", key)
        _curve(axes, x, y, colour, label)
    for axes in (left, right):
        axes.set_xlabel("epoch", fontsize=_FONT, color=_INK)
        if not history:
            _nothing(axes, "no epochs")
            continue
        if best_epoch is not None:
            axes.axvline(best_epoch, color=_GREY, linestyle="--", linewidth=1.2, label=f"kept: {best_epoch}")
        axes.legend(fontsize=_FONT - 1, frameon=False, labelcolor=_INK)
    right.set_ylim(-0.02, 1.02)
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return _png(figure, title)


def class_bars(counts: Mapping[str, int], title: str = "") -> bytes:
    """Rows per class, each bar with its count and share; classes without rows are hatched.

    Args:
        counts: Rows by class name, in the order of the bars from the top.
        title: Text above the figure.

    Returns:
        A PNG.
    """
    figure = _figure(6.8, 0.36 * max(3, len(counts)) + 0.6)
    axes = figure.add_subplot()
    total, longest = sum(counts.values()), max(counts.values(), default=0)
    for row, count in enumerate(counts.values()):
        if count:
            axes.barh(row, count, height=0.68, color=_BLUE)
            text = f" {count:,}  ({_percent(count / total)})"
        else:
            axes.add_patch(_hatched(0, row - 0.34, 0.012 * max(1, longest), 0.68))
            text = "   no rows"
        axes.text(count, row, text, va="center", color=_INK if count else _GREY, fontsize=_FONT)
    axes.set_yticks(range(len(counts)), [_shorten(name) for name in counts], parse_math=False)
    axes.set_ylim(max(1, len(counts)) - 0.5, -0.5)
    axes.set_xlim(0, 1.35 * max(1, longest))
    axes.set_xticks([])
    axes.tick_params(length=0, labelsize=_FONT, colors=_INK)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color(_GREY)
    if not counts:
        _nothing(axes, "no classes")
    return _png(figure, title)


def _figure(width: float, height: float) -> Figure:
    """A figure of so many hundreds of pixels, no wider than the page."""
    figure = Figure(figsize=(min(width, PAGE_PX / _DPI), height), dpi=_DPI)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1, wspace=0.02, hspace=0.02)
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure, title: str) -> bytes:
    if title:
        figure.suptitle(title, fontsize=_FONT + 2, color=_INK, fontweight="bold", parse_math=False)
    buffer = io.BytesIO()
    # Without the software's version the same figure is the same bytes.
    figure.savefig(buffer, format="png", facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _style(axes: Axes, label: str) -> None:
    axes.set_title(label, fontsize=_FONT + 1, color=_INK, loc="left", parse_math=False)
    axes.grid(axis="y", color=_PALE, linewidth=1)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GREY)
    axes.tick_params(labelsize=_FONT - 1, colors=_INK, length=3)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))


def _series(records: Sequence[Mapping[str, Any]], x_key: str, y_key: str) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the records that have both, float64, shape (N,) each; y is NaN where not finite."""
    pairs = [(record.get(x_key), record.get(y_key)) for record in records]
    x, y = np.array([pair for pair in pairs if None not in pair], np.float64).reshape(-1, 2).T
    return x, np.where(np.isfinite(y), y, math.nan)


def _curve(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, label: str | None = None, dashes: str = "-") -> None:
    if not len(x):
        return
    if x[0] == x[-1]:
        axes.set_xlim(x[0] - 1, x[0] + 1)  # one point: whole numbers on the axis, not fractions around it
    if len(x) <= _LONG:
        marker = "o" if len(x) <= 30 else ""
        axes.plot(x, y, dashes, color=colour, linewidth=1.8, marker=marker, markersize=4, label=label)
        return
    axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.3)
    axes.plot(x, _running_mean(y, len(y) // 50), dashes, color=colour, linewidth=2, label=label)


def _running_mean(y: np.ndarray, half: int) -> np.ndarray:
    """Mean of the finite values within ``half`` points to each side, NaN where y is; shape (N,)."""
    window = np.ones(2 * half + 1)
    padded = np.pad(y, half, constant_values=math.nan)
    sums = np.convolve(np.nan_to_num(padded), window, mode="valid")
    counts = np.convolve(np.isfinite(padded).astype(np.float64), window, mode="valid")
    return np.where(np.isfinite(y), sums / np.maximum(counts, 1), math.nan)


def _level(axes: Axes, level: Level | None) -> None:
    if level is None:
        return
    value, text = level if isinstance(level, tuple) else (level, "")
    axes.axhline(value, color=_ORANGE, linestyle="--", linewidth=1.2)
    label = f"{text} = {value:.4g}" if text else f"{value:.4g}"
    axes.set_title(f"- -  {label}", fontsize=_FONT - 1, color=_ORANGE, loc="right", parse_math=False)


def _annotate(axes: Axes, counts: np.ndarray, shares: np.ndarray) -> None:
    """Percent and count in each cell; "no rows" in the rows of absent classes."""
    size = _FONT if len(counts) <= 9 else _FONT - 3
    box = {"facecolor": "white", "edgecolor": "none", "pad": 2.5}
    for row in range(len(counts)):
        for column in np.flatnonzero(counts[row]).tolist():
            share = float(shares[row, column])
            text = f"{_percent(share)}\n{counts[row, column]:,}"
            colour = "white" if share > 0.45 else _INK
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=size)
        if not counts[row].any():
            middle = (len(counts) - 1) / 2
            axes.text(middle, row, "no rows", ha="center", va="center", fontsize=size, bbox=box)


def _hatched(x: float, y: float, width: float, height: float) -> Rectangle:
    return Rectangle((x, y), width, height, facecolor=_PALE, edgecolor=_GREY, hatch="///", linewidth=0)


def _nothing(axes: Axes, text: str) -> None:
    # Not set_xticks([]): panels may share their axes.
    axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
    axes.grid(visible=False)
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=_GREY, fontsize=_FONT)


def _percent(share: float) -> str:
    """At most three digits, and never 0 % or 100 % of something that is neither.

    >>> _percent(0.0004), _percent(0.256), _percent(0.9999), _percent(1.0)
    ('<1 %', '26 %', '>99 %', '100 %')
    """
    if 0 < share < 0.005:
        return "<1 %"
    if 0.995 < share < 1:
        return ">99 %"
    return f"{100 * share:.0f} %"


def _shorten(name: str, limit: int = 28) -> str:
    """Names differ at either end, so the middle goes.

    >>> _shorten("carcinoma, acinar type, grade 4", 20)
    'carcinoma…e, grade 4'
    """
    half = (limit - 1) // 2
    return name if len(name) <= limit else f"{name[:half]}…{name[half + 1 - limit :]}"
