import io
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.report import figures

NAMES = ("background", "healthy", "Gleason 3", "Gleason 4", "Gleason 5")


def check_png(data: bytes) -> Image.Image:
    """The image, after checking that it is a whole PNG of a size that fits the page and is not blank."""
    Image.open(io.BytesIO(data)).verify()
    image = Image.open(io.BytesIO(data))
    assert image.format == "PNG"
    assert 300 <= image.width <= figures.PAGE_PX
    assert 150 <= image.height <= 2000
    assert np.asarray(image.convert("L")).std() > 1
    return image.convert("RGB")


@pytest.mark.parametrize(
    ("counts", "names"),
    [
        ([[9, 1, 0, 0, 0], [2, 12_000, 3, 0, 1], [0] * 5, [0] * 5, [0, 0, 0, 1, 4]], NAMES),
        ([[0, 0], [0, 0]], ("$a$", "b_{c}")),
        (np.eye(8, dtype=np.int64) * 7, ["a class name that is far too long to be shown whole"] * 8),
        (np.ones((20, 20), np.int64), [str(number) for number in range(20)]),
    ],
)
def test_confusion_matrix(counts: Any, names: Any) -> None:
    check_png(figures.confusion_matrix(counts, names, "PANDA, test part: 100 % $not$ math"))


def test_confusion_matrix_refuses_a_wrong_shape() -> None:
    with pytest.raises(ValueError, match="reshape"):
        figures.confusion_matrix([[1, 2], [3, 4]], NAMES)


def records(count: int) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [{"step": step, "loss": 8.3 - step / 1e3, "knn": None} for step in range(count)]
    for line in lines[::50]:
        line["knn"] = 0.5
    if count > 20:
        lines[10]["loss"] = math.nan
        lines[11]["loss"] = math.inf
        del lines[12]["loss"]
    return lines


@pytest.mark.parametrize("count", [0, 1, 3, 60, 900])
@pytest.mark.parametrize("panels", [1, 2, 5])
def test_training_curves(count: int, panels: int) -> None:
    keys = [("loss", "loss"), ("knn", "kNN accuracy"), ("entropy", "not logged")] * 2
    levels: dict[str, figures.Level] = {"loss": (math.log(4096), "ln K"), "knn": 0.2, "entropy": 1.0}
    check_png(figures.training_curves(records(count), keys[:panels], "a run", levels))


def test_training_curves_without_keys_or_lines() -> None:
    assert figures.training_curves([], [])[:4] == b"\x89PNG"
    check_png(figures.training_curves(records(5), [("loss", "loss")]))


@pytest.mark.parametrize("lengths", [(), (0, 0), (1,), (1, 60), (900, 3, 0), (30,) * 16])
def test_overlaid_curves(lengths: tuple[int, ...]) -> None:
    runs = {f"experiments/$a$/run-{number}": records(length) for number, length in enumerate(lengths)}
    check_png(figures.overlaid_curves(runs, "loss", "Losses"))
    check_png(figures.overlaid_curves(runs, "never logged"))


def test_decoder_curves() -> None:
    history = [
        {"epoch": e, "train_loss": 1 / e, "val_loss": 1.1 / e, "val_accuracy": 0.5, "val_balanced_accuracy": 0.4}
        for e in range(1, 41)
    ]
    check_png(figures.decoder_curves(history, 40, "PANDA decoder"))
    check_png(figures.decoder_curves(history[:1]))
    check_png(figures.decoder_curves([]))


def test_class_bars() -> None:
    check_png(figures.class_bars(dict(zip(NAMES, (0, 120_000, 33, 1, 9_000), strict=True)), "train"))
    check_png(figures.class_bars({"a": 0, "b": 0}))
    check_png(figures.class_bars({}))


def test_the_same_figure_is_the_same_bytes() -> None:
    counts = {"benign": 3, "cancer": 4}
    assert figures.class_bars(counts, "t") == figures.class_bars(counts, "t")


def test_pyplot_is_not_loaded() -> None:
    code = "import sys, pipeline.report.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_the_running_mean_stays_out_of_gaps() -> None:
    y = np.array([1.0, 3.0, math.nan, 5.0, 7.0])
    np.testing.assert_allclose(figures._running_mean(y, 1), [2.0, 2.0, math.nan, 6.0, 6.0])
