"""A bundle at work on slides: scores of every tile, a heat map, regions for QuPath and a summary of each slide.

DIR/predictions.json          which bundle, classes and software
DIR/<slide_id>/               one sealed box per slide, whole or not there at all; what is there is skipped
    tiles.parquet             x, y, side (level-0 pixels) of every kept tile; its class and the probabilities, or,
                              without a decoder, its embeddings
    heatmap.png               with a decoder: classes over the slide
    regions.geojson           with a decoder: regions of one class, for QuPath, level-0 pixels
    summary.json              scale, tiles kept and rejected, area per class, highest grade
DIR/summary.csv               one row per slide, from all summary.json
DIR/quarantine.jsonl          slides that were left out, damaged in part, or not bright-field
"""

import csv
import io
import json
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.boxes import PREDICTIONS
from pipeline.bundle import Bundle
from pipeline.heatmap import heat_map
from pipeline.regions import ClassMap, areas_mm2, feature_collection
from pipeline.scoring import Score, TileTable, bundle_score, score_tiles
from tiling import atomic
from tiling.cut import DAMAGED, NOT_BRIGHTFIELD, Plan, cut_slide, plan_slide
from tiling.datasets import Dataset, Source
from tiling.errors import BonyError, DamageError, GridError, UsageError
from tiling.grid import to_level0
from tiling.limits import DEFAULT_LIMITS, Limits
from tiling.progress import progress, say
from tiling.quarantine import entry, update_quarantine
from tiling.slide import Slide, open_slide

TABLE = "summary.csv"
TILES, HEAT_MAP, REGIONS, SUMMARY = "tiles.parquet", "heatmap.png", "regions.geojson", "summary.json"
# No slide id begins with a dot.
WORK = ".work"
NOTE = "For research use, not a diagnosis"
_GRADE = "gleason"


@dataclass(frozen=True)
class Predictions:
    """What a call of ``predict`` did.

    Args:
        out: The folder.
        summaries: Of the slides asked for that stand there now, by slide id.
        quarantined: Lines of quarantine.jsonl on the slides asked for.
    """

    out: Path
    summaries: tuple[dict[str, Any], ...]
    quarantined: tuple[dict[str, Any], ...]


def predict(
    slides: Dataset,
    bundle: Bundle,
    out: Path,
    slide_mpp: float | None = None,
    batch: int = 64,
    score: Score | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Predictions:
    """Score every slide by a bundle, at the bundle's scale; finished slides are skipped.

    Args:
        slides: Slide files.
        bundle: The bundle.
        out: New folder, or one with predictions of the same bundle.
        slide_mpp: um per level-0 pixel of every slide, overriding what the files say; recorded.
        batch: Tiles per forward pass.
        score: Instead of the bundle's own networks.
        limits: What a slide's header may claim.

    Returns:
        What stands there; the caller turns quarantined slides into exit code 3.

    Raises:
        UsageError: ``out`` is something else, of another bundle, or holds one of the slides predicted otherwise.
        BonyError: There is not one slide that could be predicted; nothing is left.
    """
    if batch < 1:
        raise UsageError(f"--batch is {batch}, must be at least 1")
    if out.resolve().is_relative_to(bundle.path.resolve()):
        raise UsageError("lies inside the bundle, which must not change", out, "choose another --out")
    bundle = replace(bundle, tiling=replace(bundle.tiling, slide_mpp=slide_mpp))
    score = score or bundle_score(bundle)
    for source in slides.sources:
        _refuse_another(out / source.slide_id, source, slide_mpp)
    _prepare(out, bundle)
    failed: dict[str, str] = {}
    for number, source in enumerate(slides.sources, start=1):
        folder = out / source.slide_id
        if atomic.stands(folder, out / WORK):
            continue
        try:
            with atomic.building(folder, out / WORK) as inside:
                title = f"{number}/{len(slides.sources)} {source.slide_id}"
                _predict_slide(inside, source, bundle, score, batch, title, limits)
        except BonyError as error:
            failed[source.slide_id] = str(error)
            say(f"{source.slide_id}: {error}")
    summaries = _summaries(out, failed)
    atomic.write_bytes(out / TABLE, _csv(summaries))
    quarantined = _record_quarantine(out, summaries, failed)
    asked = {source.slide_id for source in slides.sources}
    return Predictions(
        out,
        tuple(summary for summary in summaries if summary["slide_id"] in asked),
        tuple(entry for entry in quarantined if entry["slide_id"] in asked),
    )


def _summaries(out: Path, failed: dict[str, str]) -> list[dict[str, Any]]:
    """summary.json of every finished slide; if there is none, nothing is left."""
    folders = _slide_folders(out)
    if not folders:
        if [path.name for path in out.iterdir()] == [PREDICTIONS.file]:  # nobody else is at work in it
            shutil.rmtree(out)
        raise BonyError(f"no slide could be predicted; the first one: {next(iter(failed.values()))}")
    return [json.loads(atomic.read_listed(folder, SUMMARY)) for folder in folders]


def problems(path: Path) -> list[str]:
    """Everything wrong with a folder of predictions, one line each; empty when it is sound."""
    PREDICTIONS.read(path)
    return [line for folder in _slide_folders(path) for line in atomic.damaged_files(folder)]


def _slide_folders(out: Path) -> list[Path]:
    return sorted(folder for folder in out.iterdir() if folder.is_dir() and folder.name != WORK)


def _software() -> dict[str, str]:
    return {"bony": version("bony"), "torch": torch.__version__, "timm": version("timm")}


def _prepare(out: Path, bundle: Bundle) -> None:
    """Make a new folder, or check that an existing one is of the same bundle."""
    if (out / PREDICTIONS.file).exists():
        if PREDICTIONS.read(out).get("bundle_sha256") != bundle.sha256:
            raise UsageError("holds predictions of another bundle", out, "choose another --out")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError("exists and holds no predictions", out, "choose another --out")
    decoder = bundle.decoder
    about = {
        "bundle_sha256": bundle.sha256,
        "encoder": bundle.encoder.name,
        "encoder_sha256": bundle.encoder.sha256,
        "tap": decoder.tap if decoder else None,
        "class_names": list(decoder.class_names) if decoder else None,
        "colours": [list(colour) for colour in decoder.colours] if decoder else None,
        "mpp": bundle.tiling.mpp,
        "tile_px": bundle.tiling.tile_px,
        "software": _software(),
        "note": NOTE,
    }
    out.mkdir(parents=True, exist_ok=True)
    atomic.write_json(out / PREDICTIONS.file, PREDICTIONS.describe(about))


def _refuse_another(folder: Path, source: Source, slide_mpp: float | None) -> None:
    """A slide that stands there is skipped, so it must be the same file at the same scale.

    Raises:
        UsageError: It is not.
    """
    try:
        about = json.loads(atomic.read_listed(folder, SUMMARY))
    except DamageError:  # not there, or to be made again
        return
    advice = "choose another --out"
    if about["file_bytes"] != source.images[0].stat().st_size:
        raise UsageError(f"slide {source.slide_id} stands there already, of another file", source.images[0], advice)
    if slide_mpp not in (None, about["slide_mpp"]):
        was = f"slide {source.slide_id} stands there already, with {about['slide_mpp']:g} um per level-0 pixel"
        raise UsageError(f"{was}, not {slide_mpp:g}", source.images[0], advice)


def _plan(slide: Slide, bundle: Bundle) -> Plan:
    try:
        return plan_slide(slide, bundle.tiling)
    except GridError as error:
        advice = f"the bundle needs {bundle.tiling.mpp:g} um per pixel or finer; if the file is wrong, give --slide-mpp"
        raise GridError(error.what, slide.path, advice) from error


def _predict_slide(
    folder: Path, source: Source, bundle: Bundle, score: Score, batch: int, title: str, limits: Limits
) -> None:
    """Fill the folder of one slide.

    Raises:
        BonyError: It cannot be read, tiled or scored.
    """
    path = source.images[0]
    given = bundle.tiling.slide_mpp
    with open_slide(path, given, limits) as slide:
        stated = None if slide.stated_mpp is None else slide.stated_mpp[0]
        plan = _plan(slide, bundle)
        size = slide.levels[0].width, slide.levels[0].height
        facts: dict[str, Any] = {
            "slide_id": source.slide_id, "file": path.name, "file_bytes": path.stat().st_size,
            "width": size[0], "height": size[1], "tile_px": plan.cut.px, "tile_mpp": plan.cut.mpp,
            "slide_mpp": slide.mpp, "stated_mpp": stated, "slide_mpp_overridden": given not in (None, stated),
            "bundle_sha256": bundle.sha256, "encoder": bundle.encoder.name, "software": _software(), "note": NOTE,
        }  # fmt: skip
        side = round(plan.cut.span * plan.cut.level.downsample)
        with (
            TileTable(folder / TILES, bundle, side, facts) as table,
            progress(title, len(plan.corners), "tiles") as advance,
        ):
            reasons = score_tiles(cut_slide(slide, plan, bundle.tiling), score, batch, table, advance)
    # Both corners go to level 0, so that neighbours share edges even where a downsample is no whole number.
    corners = plan.corners[[reason == "" for reason in reasons]]
    boxes = np.concatenate([to_level0(corners + shift, plan.cut.level) for shift in (0, plan.cut.span)], axis=1)
    mpp = facts["slide_mpp"]
    facts |= _counts(plan, reasons) | {"tissue_area_mm2": round(float(areas_mm2(boxes, mpp).sum()), 6)}
    if bundle.decoder is not None:
        tiles = ClassMap(boxes, table.probabilities(), bundle.decoder.class_names, bundle.decoder.colours, mpp)
        facts |= _grading(tiles.per_class())
        (folder / HEAT_MAP).write_bytes(heat_map(plan.overview, size, tiles, source.slide_id, NOTE))
        (folder / REGIONS).write_text(json.dumps(feature_collection(tiles, source.slide_id)) + "\n")
    (folder / SUMMARY).write_text(json.dumps(facts, indent=1) + "\n")
    for line in (facts["problem"], facts["remark"]):
        if line:
            say(f"{source.slide_id}: {line}")


def _counts(plan: Plan, reasons: list[str]) -> dict[str, Any]:
    """Tiles by fate, what makes the figures doubtful, and what is odd."""
    rejected = Counter(reason for reason in reasons if reason)
    kept, damaged = reasons.count(""), rejected.pop(DAMAGED, 0)
    # An encoder of stained tissue says something about any picture: the reader must not miss that it is another kind.
    problems = (plan.damage(damaged), "" if plan.brightfield else NOT_BRIGHTFIELD)
    return {
        "tiles": {"kept": kept, "damaged": damaged, "rejected": dict(sorted(rejected.items()))},
        "problem": "; ".join(filter(None, problems)),
        "remark": "" if kept else "no tile kept" if reasons else "no tissue found",
    }


def _grading(classes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Figures per class, and of the highest Gleason class that any tile was given, where there are such classes."""
    grades = [name for name in classes if name.startswith(_GRADE)]
    found = [name for name in grades if classes[name]["tiles"]]
    highest = {"name": found[-1], **classes[found[-1]]} if found else None
    return {"classes": classes} | ({"highest_grade": highest} if grades else {})


def _csv(summaries: list[dict[str, Any]]) -> bytes:
    """The summaries as a table, one row per slide."""
    rows = []
    for summary in summaries:
        names = ("slide_id", "file", "slide_mpp", "slide_mpp_overridden", "tile_mpp", "tissue_area_mm2")
        row = {name: summary[name] for name in names}
        row |= {"tiles": summary["tiles"]["kept"], "damaged_tiles": summary["tiles"]["damaged"]}
        for name, found in summary.get("classes", {}).items():
            row |= {f"share_{name}": found["share"], f"area_mm2_{name}": found["area_mm2"]}
        if "highest_grade" in summary:
            highest = summary["highest_grade"] or {}
            row |= {"highest_grade": highest.get("name"), "highest_grade_share": highest.get("share")}
        rows.append(row | {name: summary[name] for name in ("problem", "remark")})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _record_quarantine(out: Path, summaries: list[dict[str, Any]], failed: dict[str, str]) -> list[dict[str, Any]]:
    """Write what is doubtful in finished slides, and slides left out, now or earlier; returns all lines."""
    problems = [entry(name, True, reason) for name, reason in failed.items()]
    problems += [entry(summary["slide_id"], False, summary["problem"]) for summary in summaries if summary["problem"]]
    return update_quarantine(out, problems, {summary["slide_id"] for summary in summaries} | failed.keys())
