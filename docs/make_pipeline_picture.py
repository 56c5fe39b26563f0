"""Draw docs/pipeline.png from a finished demo: python docs/make_pipeline_picture.py demo docs/pipeline.png"""

import io
import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from PIL import Image

from pipeline.report.figures import confusion_matrix, training_curves
from tiling.index import slide_folders
from tiling.store import TileStore
from tiling.write import THUMBNAIL

INK, ACCENT = "#1c2330", "#0072b2"
BOXES = ("slides", "TileStore", "RUN", "FeatureStore", "RESULT", "a new slide")
ARROWS = ("bony tile", "bony pretrain", "bony embed", "bony evaluate", "bony export predict")


def tiles_mosaic(store_path: Path, side: int = 5) -> np.ndarray:
    """A square of tiles from all over a store."""
    with TileStore(store_path) as store:
        rows = np.linspace(0, len(store) - 1, side * side).astype(int)
        tiles = store.read(rows)
    framed = np.pad(tiles, ((0, 0), (6, 6), (6, 6), (0, 0)), constant_values=255)
    grid = framed.reshape(side, side, *framed.shape[1:])
    return np.concatenate([np.concatenate(list(row), axis=1) for row in grid], axis=0)


def feature_image(features: Path) -> np.ndarray:
    """CLS features of some tiles of four slides, standardised, a row each."""
    import zarr

    parts = [zarr.open_array(array, mode="r")[:12, :40] for array in sorted(features.rglob("cls.zarr"))[:4]]
    values = np.concatenate(parts)
    return (values - values.mean(0)) / values.std(0)


def draw(demo: Path) -> Figure:
    """The boxes of a demo in a row, with the commands between them."""
    store, run, result = demo / "store", demo / "run", json.loads((demo / "result/results.json").read_text())
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    thumbnail = Image.open(slide_folders(store)[5] / THUMBNAIL)
    curves = training_curves(metrics, [("loss", "DINO loss")], "", {"loss": (metrics[-1]["ln_k"], "ln K")})
    matrix = confusion_matrix(result["metrics"]["test"]["confusion"], result["class_names"])
    pictures = [
        np.asarray(thumbnail.crop((0, 38, *thumbnail.size))),
        tiles_mosaic(store),
        np.asarray(Image.open(io.BytesIO(curves))),
        feature_image(demo / "features"),
        np.asarray(Image.open(io.BytesIO(matrix))),
        np.asarray(Image.open(next((demo / "predictions").glob("*/heatmap.png")))),
    ]
    figure = Figure(figsize=(18, 3.6), dpi=100)
    FigureCanvasAgg(figure)
    width, gap = 0.118, 0.0555
    for number, (name, picture) in enumerate(zip(BOXES, pictures, strict=True)):
        left = 0.008 + number * (width + gap)
        axes = figure.add_axes((left, 0.06, width, 0.72))
        axes.imshow(picture, aspect="auto" if picture.ndim == 2 else "equal", cmap="RdBu_r", vmin=-2.5, vmax=2.5)
        axes.set_axis_off()
        figure.text(left + width / 2, 0.9, name, ha="center", fontsize=15, color=INK, fontweight="bold")
        if number < len(ARROWS):
            start, end = left + width + 0.004, left + width + gap - 0.004
            arrow = FancyArrowPatch(
                (start, 0.42), (end, 0.42), transform=figure.transFigure, arrowstyle="-|>", mutation_scale=22,
                color=ACCENT, linewidth=2.5,
            )  # fmt: skip
            figure.add_artist(arrow)
            word = ARROWS[number].replace(" ", "\n")
            figure.text((start + end) / 2, 0.49, word, ha="center", fontsize=10.5, color=ACCENT, family="monospace")
    return figure


if __name__ == "__main__":
    draw(Path(sys.argv[1])).savefig(sys.argv[2], facecolor="white", metadata={"Software": None})
