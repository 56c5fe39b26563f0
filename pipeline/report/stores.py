"""The section of a TileStore: settings, counts, what was left out, pictures of some slides."""

import io
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from pipeline.report import figures
from pipeline.report.page import Note, Part, Picture, Row, Section, Table
from pipeline.report.text import DASH, count, counted, facts, share
from tiling import atomic
from tiling.cut import DAMAGED, FLAT
from tiling.errors import DamageError, StoreError
from tiling.filters import Thresholds
from tiling.index import ROWS, read_index, slide_facts, slide_folders
from tiling.labels import UNLABELLED
from tiling.progress import progress
from tiling.quarantine import read_quarantine
from tiling.store import DESCRIPTION, Description, read_description
from tiling.write import SHEET, THUMBNAIL

MOST_ROWS = 40
_PICTURED = 4
# So an overview and a contact sheet stand side by side, and their writing stays legible.
_OVERVIEW_PX, _SHEET_SHRINKS_TO = (520, 720), 0.6


@dataclass(frozen=True)
class _Slide:
    """One slide's counts: candidates by reason of rejection ("" for kept ones), kept tiles by label."""

    folder: Path
    facts: dict[str, Any]
    reasons: Counter[str]
    labels: Counter[int]

    @property
    def candidates(self) -> int:
        return self.reasons.total()

    @property
    def kept(self) -> int:
        return self.reasons[""]


def store_section(path: Path) -> Section:
    """What a TileStore holds.

    Raises:
        StoreError: It is no store of this format version.
        DamageError: The rows of a slide are damaged.
    """
    about = read_description(path)
    slides = _read_slides(path)
    entries = read_quarantine(path)
    identities, warnings = _identities(path)
    warnings += _warnings(slides, entries)
    kept = sum(slide.kept for slide in slides)
    software = json.loads((path / DESCRIPTION).read_bytes())["software"]
    settings = facts("Settings", _settings(about, slides) | {"made by": software})
    parts: list[Part] = [Note(_counts(slides)), Row([settings, *_class_bars(about, slides)])]
    parts += [Row([_rejections(about.settings.thresholds, slides), _per_provider(slides)])]
    if entries:
        parts.append(_quarantine_table(entries))
    parts.append(_slide_table(slides))
    pictures, damage = _pictures(slides)
    summary = f"{counted(len(slides), 'slide')}, {counted(kept, 'tile')} of {about.settings.tile_px} px"
    return Section("Tiles", [*parts, *pictures], [*warnings, *damage], summary, identities)


def _read_slides(store: Path) -> list[_Slide]:
    folders = slide_folders(store)
    slides = []
    with progress(f"reading {store}", len(folders), "slides") as advance:
        for folder in folders:
            rows = pq.ParquetFile(pa.BufferReader(atomic.read_listed(folder, ROWS))).read(["reason", "label"])
            kept = rows.filter(pc.equal(rows["reason"], ""))
            slides.append(_Slide(folder, slide_facts(rows), _tally(rows["reason"]), _tally(kept["label"])))
            advance()
    return slides


def _tally(column: pa.ChunkedArray) -> Counter[Any]:
    return Counter({entry["values"]: entry["counts"] for entry in pc.value_counts(column).to_pylist()})


def _identities(store: Path) -> tuple[list[str], list[str]]:
    """Fingerprint of the store as its index records it, and what is wrong with the index."""
    try:
        return [read_index(store)[1]["fingerprint"]], []
    except StoreError as error:
        return [], [str(error)]


def _warnings(slides: Sequence[_Slide], entries: Sequence[dict[str, Any]]) -> list[str]:
    found = []
    left_out = sum(entry["left_out"] for entry in entries)
    partly = len(entries) - left_out
    empty = sum(slide.kept == 0 for slide in slides)
    dark = sum(slide.facts.get("brightfield") is False for slide in slides)
    if left_out:
        found.append(f"{counted(left_out, 'slide')} could not be tiled and {_are(left_out)} left out")
    if partly:
        found.append(f"{counted(partly, 'slide')} {_are(partly)} damaged in part: some tiles are missing")
    if empty:
        found.append(f"{counted(empty, 'slide')} {_are(empty)} without a kept tile")
    if dark:
        found.append(f"{counted(dark, 'slide')} {_are(dark)} not bright-field by the look of the background")
    return found


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def _settings(about: Description, slides: Sequence[_Slide]) -> dict[str, str]:
    settings = about.settings
    scales = [slide.facts["mpp"] for slide in slides]
    target = "each slide's own level 0" if settings.mpp is None else f"{settings.mpp:g} um/px"
    low, high = (f"{scale:.3f}" for scale in (min(scales, default=math.nan), max(scales, default=math.nan)))
    found = {
        "data set": about.dataset,
        "tile": f"{settings.tile_px} x {settings.tile_px} px",
        "target scale": f"{target}, levels within {100 * settings.mpp_tolerance:g} % as they are",
        "true scale": f"{low if low == high else f'{low} to {high}'} um/px" if scales else DASH,
        "codec": settings.codec,
        "label": f"highest class that covers {100 * settings.min_label_share:g} % or more",
    }
    if settings.slide_mpp is not None:
        found["scale of slides"] = f"{settings.slide_mpp:g} um/px, overriding the files"
    return found


def _counts(slides: Sequence[_Slide]) -> str:
    kept, candidates = sum(slide.kept for slide in slides), sum(slide.candidates for slide in slides)
    if not slides:
        return "No slide is finished yet."
    per_slide = sorted(slide.kept for slide in slides)
    return (
        f"{counted(len(slides), 'slide')}, {counted(candidates, 'candidate')}, {count(kept)} of them kept "
        f"({share(kept, candidates)}). Tiles per slide: {count(per_slide[0])} to {count(per_slide[-1])}, "
        f"median {count(per_slide[len(per_slide) // 2])}."
    )


def _class_bars(about: Description, slides: Sequence[_Slide]) -> list[Picture]:
    if not about.class_names:
        return []
    labels = sum((slide.labels for slide in slides), Counter[int]())
    counts = {name: labels[number] for number, name in enumerate(about.class_names)}
    counts["unlabelled"] = labels[UNLABELLED]
    text = ", ".join(f"{name} {count(number)}" for name, number in counts.items())
    return [Picture(figures.class_bars(counts), "Kept tiles per class.", f"Kept tiles per class: {text}")]


def _rejections(limits: Thresholds | None, slides: Sequence[_Slide]) -> Table:
    """Candidates by fate."""
    reasons = sum((slide.reasons for slide in slides), Counter[str]())
    why = {"": "kept", DAMAGED: "on a damaged source segment", FLAT: "on segments compressed to nothing"}
    if limits is not None:
        why |= {
            "tissue": f"tissue on less than {limits.min_tissue:g} of the tile",
            "empty": f"near-white on more than {limits.max_empty:g}",
            "dark": f"black on more than {limits.max_dark:g}",
            "pen": f"ink of a pen on more than {limits.max_pen:g}",
            "edges": f"edges on less than {limits.min_edges:g}",
            "texture": f"local contrast below {limits.min_texture:g} grey levels",
            "blur": f"out of focus: sharpness below {limits.min_sharpness:g}",
        }
    total = reasons.total()
    rows = [
        (why.get(reason, reason), count(number), share(number, total))
        for reason, number in sorted(reasons.items(), key=lambda item: (item[0] != "", -item[1]))
    ]
    return Table("Candidates", ("fate", "tiles", "share"), rows)


def _per_provider(slides: Sequence[_Slide]) -> Table:
    """Slides, tiles and ISUP grades by provider."""
    grades = sorted({slide.facts["isup_grade"] for slide in slides} - {None})
    rows = []
    for provider in sorted({slide.facts["provider"] or "" for slide in slides}):
        own = [slide for slide in slides if (slide.facts["provider"] or "") == provider]
        per_grade = Counter(slide.facts["isup_grade"] for slide in own)
        rows.append(
            (
                provider or "not stated",
                count(len(own)),
                count(sum(slide.candidates for slide in own)),
                count(sum(slide.kept for slide in own)),
                *(count(per_grade[grade]) for grade in grades),
            )
        )
    columns = ("provider", "slides", "candidates", "kept", *(f"ISUP {grade}" for grade in grades))
    return Table("Slides by provider" + (" and ISUP grade" if grades else ""), columns, rows)


def _quarantine_table(entries: Sequence[dict[str, Any]]) -> Table:
    rows = [
        (entry["slide_id"], "left out" if entry["left_out"] else "damaged in part", entry["reason"])
        for entry in sorted(entries, key=lambda entry: (not entry["left_out"], entry["slide_id"]))
    ]
    return Table(_capped("Slides left out or damaged", len(rows)), ("slide", "what", "why"), rows[:MOST_ROWS])


def _slide_table(slides: Sequence[_Slide]) -> Table:
    """All slides, or those with the fewest tiles, which are the ones to look at."""
    shown, caption = slides, "Slides"
    if len(slides) > MOST_ROWS:
        shown = sorted(slides, key=lambda slide: slide.kept)[:MOST_ROWS]
        caption = _capped("Slides with the fewest tiles", len(slides))
    rows = [
        (
            slide.folder.name,
            slide.facts["provider"] or DASH,
            DASH if slide.facts["isup_grade"] is None else str(slide.facts["isup_grade"]),
            slide.facts["gleason_score"] or DASH,
            f"{slide.facts['mpp']:.3f}",
            count(slide.candidates),
            count(slide.kept),
            share(slide.kept, slide.candidates),
        )
        for slide in shown
    ]
    return Table(caption, ("slide", "provider", "ISUP", "Gleason", "um/px", "candidates", "kept", "share"), rows)


def _capped(caption: str, total: int) -> str:
    return f"{caption} ({MOST_ROWS} of {count(total)} are shown)" if total > MOST_ROWS else caption


def _pictures(slides: Sequence[_Slide]) -> tuple[list[Part], list[str]]:
    """Overviews and contact sheets of some slides, evenly chosen, and what is damaged among them."""
    most = min(_PICTURED, len(slides))
    chosen = [slides[number * (len(slides) - 1) // max(most - 1, 1)] for number in range(most)]
    parts: list[Part] = []
    damage = []
    for slide in chosen:
        pair = []
        try:
            if (slide.folder / THUMBNAIL).exists():  # a slide of tile images has none
                overview = _smaller(atomic.read_listed(slide.folder, THUMBNAIL))
                pair.append(Picture(overview, f"{slide.folder.name}: every candidate and its fate"))
            sheet = atomic.read_listed(slide.folder, SHEET)
            pair.append(Picture(sheet, f"{slide.folder.name}: some of its tiles", shrinks_to=_SHEET_SHRINKS_TO))
        except DamageError as error:
            damage.append(str(error))
        parts.append(Row(pair))
    return parts, damage


def _smaller(jpeg: bytes) -> bytes:
    """The picture within ``_OVERVIEW_PX``."""
    with Image.open(io.BytesIO(jpeg)) as image:
        image.thumbnail(_OVERVIEW_PX)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
