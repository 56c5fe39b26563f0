"""One slide to tiles: tissue mask, grid, decode once, filters, labels. No output here: candidates are yielded."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

import cv2
import numpy as np

from tiling import filters, labels
from tiling.errors import SlideError
from tiling.grid import Cut, Level, choose_cut, tile_corners, to_level0
from tiling.masks import MaskReader, tile_labels
from tiling.segments import RowReader
from tiling.settings import TileSettings
from tiling.slide import Slide
from tiling.tissue import is_brightfield, tissue_fraction, tissue_mask

NO_TISSUE, FLAT, DAMAGED = "tissue", "flat", "damaged"
NOT_BRIGHTFIELD = "does not look like bright-field: dark background"
# Lumina of large benign glands and small vessels are about this large.
LARGEST_HOLE_UM2 = 30_000.0
# Up to so many compressed bytes, and so many per pixel, a segment shows nothing: a JPEG of one colour has some 600 of
# tables and, at 4:2:0, 0.016 per pixel; stained tissue has more than 0.1.
FLAT_HEADER, FLAT_BYTES = 700, 0.02
# So many bytes of source pixels are cut and measured together: enough to share the cost of a call, few enough to stay
# in the processor's cache.
_BATCH_BYTES = 1 << 23


@dataclass(frozen=True, slots=True)
class Candidate:
    """One place of the grid, and what became of it.

    Args:
        x: Left edge in level-0 pixels.
        y: Top edge in level-0 pixels.
        tissue_fraction: Share of tissue mask under it.
        reason: Why it was rejected: ``tissue``, ``flat``, ``damaged`` or a filter's name; "" when kept.
        metrics: ``filters.METRICS``, float32; None when it was not decoded.
        tile: Pixels, uint8 (px, px, 3); None when it was not decoded.
        mask: Mask values of a kept tile, uint8 (px, px), where the slide has a mask.
        coverage: Share per mask value of a kept tile, where the slide has a mask.
        label: Class, or ``labels.UNLABELLED``.
        image: Which image of the slide it was cut from (a slide file has one, a set of tile images many).
    """

    x: int
    y: int
    tissue_fraction: float
    reason: str = ""
    metrics: np.ndarray | None = None
    tile: np.ndarray | None = None
    mask: np.ndarray | None = None
    coverage: tuple[float, ...] = ()
    label: int = labels.UNLABELLED
    image: int = 0


@dataclass(frozen=True)
class Plan:
    """What will be cut from a slide: made from the overview and the header alone.

    Args:
        cut: Level, span and true mpp.
        corners: Candidates' corners in level pixels, int64 (N, 2), in row order.
        tissue_fraction: Per candidate, float32 (N,).
        overview: The picture the tissue mask was made from, uint8 (H, W, 3).
        brightfield: Whether the overview looks like bright-field microscopy.
        unknown: Share of the overview that does not decode; filters alone judge the tiles there.
    """

    cut: Cut
    corners: np.ndarray
    tissue_fraction: np.ndarray
    overview: np.ndarray = field(repr=False)
    brightfield: bool = True
    unknown: float = 0.0

    def damage(self, dropped: int) -> str:
        """What of the slide does not decode, ``dropped`` tiles among it; "" when all of it does."""
        found = [f"{dropped} tiles lie on damaged segments and were dropped"] if dropped else []
        if self.unknown:
            found.append(f"{self.unknown:.2%} of its overview does not decode: filters alone judged the tiles there")
        return "; ".join(found)


def plan_slide(slide: Slide, settings: TileSettings) -> Plan:
    """Grid and tissue share of a slide.

    Raises:
        SlideError: The slide has no mpp and none was given.
        GridError: Its mpp cannot give the target's.
    """
    if slide.mpp is None:
        raise SlideError("the file does not say its scale (um per pixel)", slide.path, "give it with --slide-mpp")
    cut = choose_cut(slide.levels, slide.mpp, settings.tile_px, settings.mpp, settings.mpp_tolerance)
    overview, unknown = slide.overview()
    corners = tile_corners(cut.level.width, cut.level.height, cut.span)
    boxes = np.concatenate([corners, corners + cut.span], axis=1)
    downsample = cut.level.width / overview.shape[1], cut.level.height / overview.shape[0]
    # What cannot be seen may be tissue: its tiles are cut, and listed as damaged where they do not decode either.
    overview_mpp = slide.mpp * slide.levels[0].width / overview.shape[1]
    mask = tissue_mask(overview, LARGEST_HOLE_UM2 / overview_mpp**2)
    share = tissue_fraction(mask | unknown, boxes, downsample)
    limits = settings.thresholds
    touched = share > 0 if limits is not None and limits.min_tissue > 0 else np.ones(len(share), bool)
    brightfield = is_brightfield(overview)
    return Plan(cut, corners[touched], share[touched], overview, brightfield, float(unknown.mean()))


def cut_slide(
    slide: Slide,
    plan: Plan,
    settings: TileSettings,
    mask: MaskReader | None = None,
    scheme: labels.Scheme | None = None,
) -> Iterator[Candidate]:
    """Every candidate of a plan, in row order; each source segment is decoded at most once.

    Args:
        slide: The slide.
        plan: Its plan.
        settings: Filters and label share.
        mask: The slide's mask.
        scheme: What the mask's values mean; needed with ``mask``.

    Yields:
        Candidates. Their tiles are views of larger arrays: who keeps some of them for long, copies.

    Raises:
        MaskError: The mask holds unknown values.
    """
    cut = plan.cut
    reader = row_reader(slide, cut.level)
    known = _judged_unseen(slide, plan, settings.thresholds)
    level0 = to_level0(plan.corners, cut.level)
    for batch in _batches(plan, known):
        reasons = known[batch]
        seen = [n for n, reason in enumerate(reasons) if not reason]
        tiles, metrics = _decoded(reader, plan, batch, seen, reasons, settings.thresholds)
        place_of = {n: place for place, n in enumerate(seen)}
        columns = (array[batch].tolist() for array in (level0, plan.corners, plan.tissue_fraction))
        for n, ((x0, y0), (x, y), share) in enumerate(zip(*columns, strict=True)):
            place, reason, labelled = place_of.get(n), reasons[n], None
            if place is None or reason == DAMAGED:
                yield Candidate(x0, y0, share, reason)
                continue
            if mask is not None and scheme is not None and not reason:
                labelled = tile_labels(mask, x, y, cut, scheme, settings.min_label_share)
                reason = "" if labelled else DAMAGED
            found = Candidate(x0, y0, share, reason, metrics[place], tiles[place])
            if labelled:
                found = replace(found, mask=labelled.mask, coverage=labelled.coverage, label=labelled.label)
            yield found


def _judged_unseen(slide: Slide, plan: Plan, limits: filters.Thresholds | None) -> list[str]:
    """Reasons to reject candidates without decoding them, "" for the others."""
    if limits is None:
        return [""] * len(plan.corners)
    reasons = np.where(_flat(slide, plan) & (limits.max_empty < 1), FLAT, "").astype(object)
    reasons[plan.tissue_fraction < limits.min_tissue] = NO_TISSUE
    return [str(reason) for reason in reasons]


def _flat(slide: Slide, plan: Plan) -> np.ndarray:
    """Which candidates lie on segments alone that are compressed to nothing, bool (N,)."""
    level, span = plan.cut.level.index, plan.cut.span
    sizes, grid = slide.compressed_sizes(level), slide.segment_grid(level)
    if sizes is None:
        return np.zeros(len(plan.corners), bool)
    shown = sizes > FLAT_HEADER + FLAT_BYTES * grid.segment_width * grid.segment_height
    sums = np.pad(shown.reshape(grid.rows, grid.columns).cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    x0, y0 = (plan.corners // (grid.segment_width, grid.segment_height)).T
    x1, y1 = ((plan.corners + span - 1) // (grid.segment_width, grid.segment_height)).T + 1
    return np.asarray(sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0] == 0)


def _batches(plan: Plan, known: list[str]) -> Iterator[slice]:
    """Slices of the candidates, each with as many as fit into _BATCH_BYTES among those that must be decoded."""
    most = max(1, _BATCH_BYTES // (3 * plan.cut.span**2))
    unseen = [n for n, reason in enumerate(known) if not reason]
    starts = [0, *unseen[most::most], len(known)]
    for start, end in pairwise(starts):
        yield slice(start, end)


def _decoded(
    reader: RowReader, plan: Plan, batch: slice, seen: list[int], reasons: list[str], limits: filters.Thresholds | None
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels, uint8 (len(seen), px, px, 3), and metrics of a batch's candidates; ``reasons`` gets their verdicts."""
    cut, half = plan.cut, plan.cut.px // 2
    tiles = np.empty((len(seen), cut.px, cut.px, 3), np.uint8)
    halves = np.empty((len(seen), half, half, 3), np.uint8)
    whole = np.zeros(len(seen), bool)
    for place, (x, y) in enumerate(plan.corners[batch][seen].tolist()):
        pixels = reader.cut(x, y, cut.span, None if cut.resampled else tiles[place])
        whole[place] = pixels is not None
        if pixels is None:
            tiles[place], halves[place] = 0, 0
            continue
        if cut.resampled:
            cv2.resize(pixels, (cut.px, cut.px), dst=tiles[place], interpolation=cv2.INTER_AREA)
        filters.halve(tiles[place], halves[place])
    metrics = filters.measure_halves(halves)
    verdicts = filters.verdicts(metrics, limits) if limits is not None else [""] * len(seen)
    for place, n in enumerate(seen):
        reasons[n] = verdicts[place] if whole[place] else DAMAGED
    return tiles, metrics


def row_reader(slide: Slide, level: Level) -> RowReader:
    """Reader of one level, decode once."""
    return RowReader(slide.segment_grid(level.index), lambda number: slide.read_segment(level.index, number))
