"""What a setting would keep, without writing a tile: OUT/preview.html, one page that needs no other file.

Every candidate of an even sample of slides is cut and measured as ``bony tile`` would. The page has, for each filter,
the histogram of its metric with the threshold in it and the tiles nearest to the threshold on both sides: what a
threshold should be is seen there.
"""

import base64
import shlex
from bisect import insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from tiling import atomic, pictures
from tiling.cut import DAMAGED, NO_TISSUE, NOT_BRIGHTFIELD, Candidate, cut_slide, plan_slide
from tiling.datasets import Dataset, Source, slides
from tiling.errors import BonyError, UsageError
from tiling.filters import METRICS, REASONS, Thresholds
from tiling.limits import DEFAULT_LIMITS, Limits
from tiling.pages import template
from tiling.progress import progress
from tiling.settings import TileSettings
from tiling.slide import open_slide
from tiling.store import PREVIEW

MOST_SLIDES = 12
BINS = 48
_NEAREST, _KEPT = 7, 30
_BARS = 90  # height of the highest bar, px


@dataclass
class _Shown:
    """The tiles with the smallest keys of all that were offered, as small JPEGs in data URIs."""

    most: int
    tiles: list[tuple[float, float, str]] = field(default_factory=list)

    def offer(self, key: float, value: float, tile: np.ndarray) -> None:
        """Take a tile whose metric is ``value`` if its key is among the smallest."""
        if len(self.tiles) < self.most or key < self.tiles[-1][0]:
            insort(self.tiles, (key, value, _data_uri(pictures.encoded(pictures.small(tile)))))
            del self.tiles[self.most :]


@dataclass(frozen=True)
class Filter:
    """One filter on the page.

    Args:
        reason: What it is told as, ``tissue`` or one of REASONS.
        option: Its option of ``bony tile``.
        limit: The threshold.
        most: Whether larger values are rejected.
    """

    reason: str
    option: str
    limit: float
    most: bool


@dataclass(frozen=True)
class SlideLook:
    """What became of one slide.

    Args:
        slide_id: The slide.
        fates: Candidates by reason, "" for kept ones.
        picture: Its overview with every candidate, a data URI; "" if it could not be read.
        problem: Why it could not be read, or what is odd about it.
    """

    slide_id: str
    fates: Counter[str] = field(default_factory=Counter)
    picture: str = ""
    problem: str = ""


class _Findings:
    """Metrics of all candidates, and the tiles that the page shows of them."""

    def __init__(self, filters: Sequence[Filter]) -> None:
        self.filters = filters
        self.tissue: list[float] = []
        self.metrics: list[np.ndarray] = []
        self.kept = _Shown(_KEPT)
        self.beyond = {one.reason: _Shown(_NEAREST) for one in filters}
        self.within = {one.reason: _Shown(_NEAREST) for one in filters}
        self._random = np.random.default_rng(0)  # random keys give a fair sample of the kept ones

    def add(self, candidate: Candidate) -> None:
        """Take a candidate."""
        self.tissue.append(candidate.tissue_fraction)
        if candidate.metrics is None or candidate.tile is None:
            return
        self.metrics.append(candidate.metrics)
        if not candidate.reason:
            self.kept.offer(self._random.random(), 0.0, candidate.tile)
        for one in self.filters:
            value = self._value(candidate, one)
            if candidate.reason in ("", one.reason):
                shown = self.within if not candidate.reason else self.beyond
                shown[one.reason].offer(abs(value - one.limit), value, candidate.tile)

    @staticmethod
    def _value(candidate: Candidate, one: Filter) -> float:
        if one.reason == NO_TISSUE or candidate.metrics is None:
            return candidate.tissue_fraction
        return float(candidate.metrics[REASONS.index(one.reason)])

    def values(self, one: Filter) -> np.ndarray:
        """The filter's metric of all candidates that have it, float32 (N,)."""
        if one.reason == NO_TISSUE:
            return np.array(self.tissue, np.float32)
        return np.array(self.metrics, np.float32).reshape(-1, len(METRICS))[:, REASONS.index(one.reason)]


def filters_of(limits: Thresholds) -> list[Filter]:
    """All filters in the order in which they are asked; each threshold is named after its metric."""
    named = {NO_TISSUE: NO_TISSUE} | dict(zip(REASONS, METRICS, strict=True))
    options = {one.name.partition("_")[2]: one.name for one in fields(Thresholds)}
    return [
        Filter(reason, _option(options[metric]), getattr(limits, options[metric]), options[metric].startswith("max"))
        for reason, metric in named.items()
    ]


def preview(
    dataset: Dataset, settings: TileSettings, out: Path, most: int = MOST_SLIDES, limits: Limits = DEFAULT_LIMITS
) -> Path:
    """Write OUT/preview.html, atomically; nothing else in ``out`` is touched.

    Args:
        dataset: What would be tiled.
        settings: With which settings.
        out: The folder for the page, made if need be; it may be a store.
        most: Slides that are looked at; of more, an even sample.
        limits: What a slide's header may claim.

    Returns:
        The page.

    Raises:
        UsageError: There is nothing to look at, or ``out`` is a file.
    """
    if settings.thresholds is None:
        raise UsageError("imported tiles are not filtered: there is nothing to preview", dataset.name)
    if not dataset.sources:
        raise UsageError("no slide to preview")
    if out.exists() and not out.is_dir():
        raise UsageError("is a file", out, "choose another --out")
    count = len(dataset.sources)
    chosen = np.linspace(0, count - 1, min(most, count)).round().astype(int)
    findings = _Findings(filters_of(settings.thresholds))
    looks = []
    with progress("preview", len(chosen), "slides") as advance:
        for number in chosen:
            source = dataset.sources[number]
            looks.append(_look(source, settings, findings, limits))
            advance(note=source.slide_id)
    out.mkdir(parents=True, exist_ok=True)
    atomic.write_bytes(out / PREVIEW, _page(dataset, settings, out, looks, findings).encode())
    return out / PREVIEW


def _look(source: Source, settings: TileSettings, findings: _Findings, limits: Limits) -> SlideLook:
    """One slide, or why it could not be read."""
    try:
        with open_slide(source.images[0], settings.slide_mpp, limits) as slide:
            plan = plan_slide(slide, settings)
            reasons = []
            for candidate in cut_slide(slide, plan, settings):
                reasons.append(candidate.reason)
                findings.add(candidate)
    except BonyError as error:
        return SlideLook(source.slide_id, problem=str(error))
    picture = pictures.thumbnail(plan.overview, plan.cut, plan.corners, reasons)
    problem = plan.damage(reasons.count(DAMAGED)) or ("" if plan.brightfield else NOT_BRIGHTFIELD)
    return SlideLook(source.slide_id, Counter(reasons), _data_uri(picture), problem)


def command(dataset: Dataset, settings: TileSettings, out: Path) -> str:
    """The settings as a ``bony tile`` command line; thresholds always, the rest where it is not the default."""
    images = [source.images[0] for source in dataset.sources]
    words = ["bony", "tile"]
    if dataset.name == "slides":
        words += map(str, _places(images))
    else:
        words += ["--dataset", dataset.name, "--root", str(images[0].parent.parent)]
    base = TileSettings()
    for name in ("tile_px", "mpp", "mpp_tolerance", "slide_mpp", "codec", "min_label_share"):
        value = getattr(settings, name)
        if value != getattr(base, name):
            words += [_option(name), "native" if value is None else str(value)]
    for one in filters_of(settings.thresholds or Thresholds()):
        words += [one.option, str(one.limit)]
    return shlex.join([*words, "--out", str(out)])


def _places(images: Sequence[Path]) -> Sequence[Path]:
    """The slides' folders, if they hold these slides and no others; else the slides one by one."""
    folders = sorted({image.parent for image in images})
    try:
        inside = {source.images[0].resolve() for source in slides(folders).sources}
    except UsageError:  # two slides of one name, which were not both given
        return images
    return folders if inside == {image.resolve() for image in images} else images


def histogram(values: np.ndarray, one: Filter) -> dict[str, object]:
    """Bars of a filter's metric: their heights in px, on a logarithmic scale, and which are beyond the threshold.

    Args:
        values: float32 (N,).
        one: The filter; its threshold lies on the edge of two bars.
    """
    limit = float(np.float32(one.limit))
    if one.most:  # a value that equals the threshold is kept: it belongs to the bar below
        limit = float(np.nextafter(np.float32(limit), np.float32(np.inf)))
    top = max(float(values.max(initial=0)), 1.05 * limit, 1e-6)  # the threshold is never at the end
    below = round(BINS * limit / top)
    edges = np.unique([*np.linspace(0, limit, max(below, 1) + 1), *np.linspace(limit, top, max(BINS - below, 1) + 1)])
    counts = np.histogram(values, edges)[0]
    heights = np.log1p(counts) / np.log1p(max(int(counts.max(initial=0)), 1)) * _BARS
    bars = [
        {
            "height": round(float(height), 1), "count": int(count), "low": float(low), "high": float(high),
            "rejected": bool(low >= limit if one.most else high <= limit),
        }
        for height, count, low, high in zip(heights, counts, edges[:-1], edges[1:], strict=True)
    ]  # fmt: skip
    return {"bars": bars, "top": top}


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _data_uri(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def _page(dataset: Dataset, settings: TileSettings, out: Path, looks: Sequence[SlideLook], findings: _Findings) -> str:
    fates = sum((look.fates for look in looks), Counter[str]())
    shown = []
    for one in findings.filters:
        values = findings.values(one)
        beyond = values > one.limit if one.most else values < one.limit
        shown.append(
            {
                "about": one,
                "count": fates[one.reason],
                "beyond": int(beyond.sum()),
                "of": len(values),
                "histogram": histogram(values, one),
                "rejected": sorted(findings.beyond[one.reason].tiles, key=lambda tile: tile[1], reverse=one.most),
                "kept": sorted(findings.within[one.reason].tiles, key=lambda tile: tile[1], reverse=one.most),
            }
        )
    return template("tiling", "", PREVIEW).render(
        dataset=dataset,
        settings=settings,
        command=command(dataset, settings, out),
        looks=looks,
        fates=[(reason, fates[reason]) for reason in pictures.COLOURS if fates[reason] or not reason],
        total=fates.total(),
        names=pictures.NAMES,
        colours=pictures.COLOURS,
        filters=shown,
        kept=findings.kept.tiles,
        tile_side=pictures.SHEET_TILE,
        bars=_BARS,
    )
