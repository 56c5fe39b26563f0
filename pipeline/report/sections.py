"""Boxes on disk to sections of the page: a TileStore, a RUN, a RESULT."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.monitor import read_metrics
from pipeline.report import figures
from pipeline.report.page import Picture, Section, Table
from tiling.index import ROWS, slide_facts, slide_folders
from tiling.labels import UNLABELLED
from tiling.run import QUARANTINE
from tiling.store import read_description
from tiling.write import SHEET, THUMBNAIL


def store_section(store: Path, pictured: int = 4) -> Section:
    """Counts per slide and class, with the pictures of some slides, evenly chosen."""
    about = read_description(store)
    folders = slide_folders(store)
    rows, per_class, reasons = [], Counter[str](), Counter[str]()
    for folder in folders:
        table = pq.read_table(folder / ROWS, columns=["kept", "reason", "label"])
        facts, kept = slide_facts(table), table["kept"].to_pylist()
        labels = [label for label, is_kept in zip(table["label"].to_pylist(), kept, strict=True) if is_kept]
        per_class.update(
            "unlabelled" if label == UNLABELLED else about.class_names[label] for label in labels if about.class_names
        )
        reasons.update(reason for reason in table["reason"].to_pylist() if reason)
        grade = "" if facts["isup_grade"] is None else f"{facts['isup_grade']} ({facts['gleason_score']})"
        rows.append(
            (folder.name, facts["provider"] or "", grade, f"{facts['mpp']:.3g}", str(len(kept)), str(sum(kept)))
        )
    quarantine = store / QUARANTINE
    left_out = [json.loads(line) for line in quarantine.read_text().splitlines()] if quarantine.is_file() else []
    rejected = ", ".join(f"{count} by {reason}" for reason, count in reasons.most_common()) or "none"
    names = [*about.class_names, "unlabelled"] if about.class_names else []
    bars = [
        Picture(
            figures.class_bars({name: per_class[name] for name in names}, "Kept tiles per class"),
            "Kept tiles per class.",
        )
    ]
    chosen = [folders[round(n * (len(folders) - 1) / max(pictured - 1, 1))] for n in range(min(pictured, len(folders)))]
    pairs = [
        (
            Picture((folder / THUMBNAIL).read_bytes(), f"{folder.name}: kept and rejected candidates"),
            Picture((folder / SHEET).read_bytes(), f"{folder.name}: some of its tiles"),
        )
        for folder in chosen
        if (folder / THUMBNAIL).is_file()
    ]
    columns = ("slide", "provider", "ISUP (Gleason)", "um/px", "candidates", "kept")
    return Section(
        f"Tiles of {len(folders)} slides",
        warnings=[f"{entry['slide_id']}: {entry['reason']}" for entry in left_out],
        notes=[f"{sum(int(row[5]) for row in rows)} tiles kept; rejected: {rejected}."],
        tables=[Table(columns, rows)],
        pictures=bars,
        pairs=pairs,
    )


def run_section(run: Path) -> Section:
    """Loss and monitor curves of a pretraining run."""
    about: dict[str, Any] = json.loads((run / "run.json").read_bytes())
    metrics = read_metrics(run)
    ln_k = metrics[-1]["ln_k"] if metrics else 0.0
    panels = (
        ("loss", "DINO loss"), ("teacher_entropy", "teacher entropy"), ("kl", "KL(teacher, student)"),
        ("feature_std", "spread of head output"), ("grad_norm", "gradient norm"), ("samples_per_s", "samples/s"),
    )  # fmt: skip
    curves = figures.training_curves(
        metrics, panels, about["config"]["model.name"], {"loss": (ln_k, "ln K"), "teacher_entropy": (ln_k, "ln K")}
    )
    steps = metrics[-1]["step"] if metrics else 0
    return Section(
        "Pretraining",
        notes=[
            f"{about['config']['model.name']}, {about['tiles']} tiles at {about['mpp']:.3g} um/px, "
            f"{about['global_batch']} tiles a step, {steps} steps, {about['ranks']} ranks."
        ],
        pictures=[Picture(curves, "A loss that stays at ln K, or a teacher entropy of 0 or ln K, means collapse.")],
    )


def result_section(result_folder: Path) -> Section:
    """Scores, per-class table and confusion matrix of a result."""
    result: dict[str, Any] = json.loads((result_folder / "results.json").read_bytes())
    test, counts = result["metrics"]["test"], result["counts"]
    scores = Table(
        ("part", "tiles", "slides", "accuracy", "balanced accuracy", "macro F1"),
        [
            (
                part,
                str(counts[part]["tiles"]),
                str(counts[part]["slides"]),
                *(f"{result['metrics'][part][key]:.3f}" for key in ("accuracy", "balanced_accuracy", "macro_f1")),
            )
            for part in ("val", "test")
        ],
    )
    per_class = Table(
        ("class", "test tiles", "precision", "recall", "F1"),
        [
            (
                row["name"],
                str(row["support"]),
                *("-" if row[key] is None else f"{row[key]:.3f}" for key in ("precision", "recall", "f1")),
            )
            for row in test["per_class"]
        ],
    )
    return Section(
        f"Decoder: {result['task']}, {result['protocol']} protocol",
        warnings=result["warnings"],
        tables=[scores, per_class],
        pictures=[
            Picture((result_folder / name).read_bytes(), caption)
            for name, caption in (
                ("confusion.png", "Confusion matrix, test part."),
                ("curves.png", "Decoder training."),
            )
        ],
    )
