"""The section of predictions: figures per slide, and the heat maps of some."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.boxes import PREDICTIONS
from pipeline.report.page import Link, Note, Part, Picture, Row, Section, Table
from pipeline.report.text import DASH, count, counted, decimal, facts, identity, software
from tiling import atomic
from tiling.quarantine import read_quarantine

MOST_ROWS, _PICTURED = 40, 4
_SHRINKS_TO = 0.6


def predictions_section(path: Path) -> Section:
    """What was predicted on which slides.

    Raises:
        UsageError: They are of another format version.
        DamageError: A slide's files are damaged.
    """
    about = PREDICTIONS.read(path)
    folders = sorted(folder for folder in path.iterdir() if (folder / atomic.COMPLETE).is_file())
    summaries = [json.loads(atomic.read_listed(folder, "summary.json")) for folder in folders]
    tiles = sum(summary["tiles"]["kept"] for summary in summaries)
    made: dict[str, str | Link] = {
        "bundle": identity(about["bundle_sha256"]),
        "encoder": about["encoder"],
        "scale": f"{about['mpp']:.3g} um/px, tiles of {about['tile_px']} px",
        "made by": software(about["software"]),
    }
    parts: list[Part] = [facts("Made with", made), _slides(summaries), Note(f"{about['note']}.")]
    if about["class_names"]:
        parts.append(Row([_heat_map(folder) for folder in folders[:_PICTURED]]))
    summary = f"{counted(len(folders), 'slide')}, {counted(tiles, 'tile')}"
    return Section("Predictions", parts, _warnings(path, summaries), summary)


def _heat_map(folder: Path) -> Picture:
    caption = f"{folder.name}: class of every tile"
    return Picture(atomic.read_listed(folder, "heatmap.png"), caption, shrinks_to=_SHRINKS_TO)


def _slides(summaries: Sequence[dict[str, Any]]) -> Table:
    """One row per slide: tissue, share of each class, highest grade."""
    classes = list(summaries[0].get("classes", {})) if summaries else []
    graded = any("highest_grade" in summary for summary in summaries)
    rows = []
    for summary in summaries[:MOST_ROWS]:
        shares = [_percent(found["share"]) for found in summary.get("classes", {}).values()]
        highest = summary.get("highest_grade")
        grade = [f"{highest['name']}, {_percent(highest['share'])}" if highest else DASH] if graded else []
        area = decimal(summary["tissue_area_mm2"], 2)
        rows.append((summary["slide_id"], count(summary["tiles"]["kept"]), area, *shares, *grade))
    more = len(summaries) - MOST_ROWS
    caption = "Slides" + (f", and {count(more)} more" if more > 0 else "")
    return Table(caption, ("slide", "tiles", "mm2", *classes, *(["highest grade"] if graded else [])), rows)


def _percent(share: float | None) -> str:
    return DASH if share is None else f"{100 * share:.1f} %"


def _warnings(path: Path, summaries: Sequence[dict[str, Any]]) -> list[str]:
    overridden = [
        f"{summary['slide_id']}: its scale was given by hand ({summary['slide_mpp']:.3g} um/px)"
        for summary in summaries
        if summary["slide_mpp_overridden"]
    ]
    return [f"{line['slide_id']}: {line['reason']}" for line in read_quarantine(path)] + overridden
