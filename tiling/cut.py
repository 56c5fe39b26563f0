"""One slide to tiles: tissue mask, grid, decode once, filters, labels. No output here: candidates are yielded."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import cv2
import numpy as np

from tiling import filters, labels
from tiling.errors import MaskError, SlideError
from tiling.filters import Metrics
from tiling.grid import Cut, Level, choose_cut, tile_corners, to_level0
from tiling.segments import RowReader
from tiling.settings import TileSettings
from tiling.slide import Slide
from tiling.tissue import is_brightfield, tissue_fraction, tissue_mask

NO_TISSUE, DAMAGED = "tissue", "damaged"
NOT_BRIGHTFIELD = "does not look like bright-field: dark background"
# Lumina of large benign glands and small vessels are about this large.
LARGEST_HOLE_UM2 = 30_000.0
_MCU = 16


@dataclass(frozen=True)
class Candidate:
    """One place of the grid, and what became of it.

    Args:
        x: Left edge in level-0 pixels.
        y: Top edge in level-0 pixels.
        tissue_fraction: Share of tissue mask under it.
        reason: Why it was rejected: ``tissue``, ``damaged`` or a filter's name; "" when kept.
        metrics: Filter metrics; None when it was not decoded.
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
    metrics: Metrics | None = None
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
    mask: Slide | None = None,
    scheme: labels.Scheme | None = None,
) -> Iterator[Candidate]:
    """Every candidate of a plan, in row order; each source segment is decoded at most once.

    Args:
        slide: The slide.
        plan: Its plan.
        settings: Filters and label share.
        mask: The slide's mask, values in its first channel.
        scheme: What the mask's values mean; needed with ``mask``.

    Yields:
        Candidates.

    Raises:
        MaskError: The mask does not fit the slide, or holds unknown values.
    """
    cut, limits = plan.cut, settings.thresholds
    reader = row_reader(slide, cut.level)
    mask_cut = _MaskCutter(mask, slide, cut) if mask is not None else None
    level0 = to_level0(plan.corners, cut.level)
    for (x, y), (x0, y0), share in zip(plan.corners, level0, plan.tissue_fraction, strict=True):
        place = Candidate(int(x0), int(y0), float(share))
        if limits is not None and share < limits.min_tissue:
            yield replace(place, reason=NO_TISSUE)
            continue
        tile = reader.cut(int(x), int(y), cut.span)
        if tile is None:
            yield replace(place, reason=DAMAGED)
            continue
        tile = _to_size(tile, cut)
        metrics = filters.measure(tile)
        decoded = replace(place, metrics=metrics, tile=tile)
        reason = filters.verdict(metrics, limits) if limits is not None else ""
        if reason or mask_cut is None or scheme is None:
            yield replace(decoded, reason=reason)
            continue
        values = mask_cut.at(int(x), int(y))
        yield replace(decoded, reason=DAMAGED) if values is None else _labelled(decoded, values, cut, scheme, settings)


def _labelled(
    candidate: Candidate, values: np.ndarray, cut: Cut, scheme: labels.Scheme, settings: TileSettings
) -> Candidate:
    """The candidate with mask, coverage and label; ``values`` are the mask's under the tile, at source resolution."""
    shares = labels.coverage(values, scheme)
    if values.shape[0] != cut.px:
        values = cv2.resize(values, (cut.px, cut.px), interpolation=cv2.INTER_NEAREST)
    label = labels.label(shares, scheme, settings.min_label_share)
    return replace(candidate, mask=values, coverage=tuple(float(share) for share in shares), label=label)


def cut_image(image: Slide, settings: TileSettings, number: int, label: int) -> tuple[Cut, list[Candidate]]:
    """Every whole tile of a tile image that others have chosen and labelled: measured, not filtered.

    What is left over is shared between both sides, on the JPEG's 16-pixel grid.

    Args:
        image: The opened image.
        settings: Tile side and scale.
        number: Which image of its slide it is.
        label: Its class.

    Raises:
        SlideError: The image does not say its scale and none was given, or does not decode.
        GridError: It is coarser than the target.
    """
    if image.mpp is None:
        raise SlideError("tile images do not say their scale", image.path, "give it with --mpp or --slide-mpp")
    cut = choose_cut(image.levels, image.mpp, settings.tile_px, settings.mpp, settings.mpp_tolerance)
    width, height = cut.level.width, cut.level.height
    margin = tuple(side % cut.span // 2 // _MCU * _MCU if side >= cut.span else 0 for side in (width, height))
    reader = row_reader(image, cut.level)
    candidates = []
    for x, y in tile_corners(width, height, cut.span, (margin[0], margin[1])):
        tile = reader.cut(int(x), int(y), cut.span)
        if tile is None:
            raise SlideError(next(iter(reader.damaged.values())), image.path)
        tile = _to_size(tile, cut)
        place = Candidate(int(x), int(y), math.nan, image=number, label=label)
        candidates.append(replace(place, metrics=filters.measure(tile), tile=tile))
    return cut, candidates


def _to_size(tile: np.ndarray, cut: Cut) -> np.ndarray:
    """A tile at its stored size, by area mean."""
    return np.asarray(cv2.resize(tile, (cut.px, cut.px), interpolation=cv2.INTER_AREA)) if cut.resampled else tile


def row_reader(slide: Slide, level: Level) -> RowReader:
    """Reader of one level, decode once."""
    return RowReader(slide.segment_grid(level.index), lambda number: slide.read_segment(level.index, number))


class _MaskCutter:
    """Cuts the mask under a tile: from the level of the same size, else from the mask's level 0."""

    def __init__(self, mask: Slide, slide: Slide, cut: Cut) -> None:
        ours, theirs = mask.levels[0], slide.levels[0]
        if (ours.width, ours.height) != (theirs.width, theirs.height):
            raise MaskError(
                f"mask is {ours.width} x {ours.height} px, its slide {theirs.width} x {theirs.height} px",
                mask.path,
                "masks must have the slide's level-0 size",
            )
        same = [level for level in mask.levels if (level.width, level.height) == (cut.level.width, cut.level.height)]
        self._scale = 1.0 if same else cut.level.downsample
        self._span = round(cut.span * self._scale)
        self._reader = row_reader(mask, same[0] if same else ours)

    def at(self, x: int, y: int) -> np.ndarray | None:
        """Mask values under the tile whose corner is at x, y of the cut level, uint8 (span, span); None: damaged."""
        grid = self._reader.grid
        left = min(round(x * self._scale), grid.width - self._span)
        top = min(round(y * self._scale), grid.height - self._span)
        values = self._reader.cut(left, top, self._span)
        return None if values is None else np.ascontiguousarray(values[..., 0])
