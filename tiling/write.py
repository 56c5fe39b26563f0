"""One source into one folder of the store: cut, encode, write, draw, seal, rename."""

import shutil
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from tiling import atomic, claims, codec, pictures, stain
from tiling.cut import DAMAGED, NOT_BRIGHTFIELD, Candidate, cut_slide, plan_slide
from tiling.datasets import Source
from tiling.errors import SlideError
from tiling.imported import ImportedTiles
from tiling.index import ROWS, SLIDES
from tiling.labels import UNLABELLED
from tiling.limits import DEFAULT_LIMITS, Limits
from tiling.masks import open_mask
from tiling.memory import keep_freed_memory
from tiling.rows import Rows
from tiling.settings import TileSettings
from tiling.shard import ArrayWriter
from tiling.slide import open_slide
from tiling.store import MASK_CODEC, MASKS, TILES, WORK

THUMBNAIL, SHEET = "thumbnail.jpg", "contact.jpg"
MOST_DEATHS = 5
_COLOUR_SAMPLES = 32


@dataclass(frozen=True)
class Job:
    """What is the same for every source of a run.

    Args:
        store: Where the tiles go.
        settings: What decides the store's content.
        class_names: Names of the classes, for captions.
        limits: What a slide's header may claim.
    """

    store: Path
    settings: TileSettings
    class_names: tuple[str, ...] = ()
    limits: Limits = DEFAULT_LIMITS


@dataclass(frozen=True)
class Outcome:
    """What became of one source.

    Args:
        slide_id: The slide.
        kept: Tiles stored.
        bytes: Bytes of the encoded tiles.
        problem: Why it was left out, or what is damaged in it; "" when all is well.
        skipped: It was there already.
        written: A finished folder stands in the store.
        held: Another job is writing it.
        remark: Something odd that loses nothing (a fluorescence slide, no tile kept).
    """

    slide_id: str
    kept: int = 0
    bytes: int = 0
    problem: str = ""
    skipped: bool = False
    written: bool = True
    held: bool = False
    remark: str = ""


@dataclass(frozen=True)
class _Found:
    """What the folder of a source says about it, beside its tiles."""

    facts: dict[str, Any]
    coverage_names: tuple[str, ...] = ()
    damage: str = ""
    remark: str = ""


@dataclass
class _Even:
    """An even sample of a stream of unknown length: when it is full, every second one goes, and twice as few come."""

    most: int
    items: list[Any] = field(default_factory=list)
    _every: int = 1
    _seen: int = 0

    def wants_next(self) -> bool:
        """Whether the next one belongs to the sample; call once for each."""
        self._seen += 1
        return (self._seen - 1) % self._every == 0

    def add(self, item: Any) -> None:
        """Take one that was wanted."""
        self.items.append(item)
        if len(self.items) == 2 * self.most:
            self.items, self._every = self.items[::2], 2 * self._every


class _SlideWriter:
    """Takes the candidates of one source: arrays go to disk, rows and sample tiles stay in memory."""

    def __init__(self, folder: Path, settings: TileSettings, most: int, with_masks: bool) -> None:
        shape = (settings.tile_px, settings.tile_px)
        self._settings = settings
        self._tiles = ArrayWriter(folder / TILES, most, (*shape, 3), settings.codec)
        self._masks = ArrayWriter(folder / MASKS, most, shape, MASK_CODEC) if with_masks else None
        self.rows = Rows()
        self.sheet = pictures.Sheet()
        self._shown, self._colour = _Even(pictures.SHEET_KEPT), _Even(_COLOUR_SAMPLES)
        self.bytes = 0

    def add(self, candidate: Candidate, jpeg: codec.JpegSettings | None) -> None:
        """Store one candidate: its row always, its pixels when kept."""
        tile, mask = candidate.tile, candidate.mask
        self.rows.add(candidate)
        if tile is None:
            return
        if candidate.reason:
            self.sheet.reject(tile, candidate.reason)
            return
        data = codec.encode(tile, self._settings.codec, jpeg)
        self.bytes += len(data)
        self._tiles.append(data)
        if self._shown.wants_next():
            self._shown.add((pictures.small(tile), candidate.label))
        if self._colour.wants_next():
            self._colour.add(stain.tile_sample(tile))
        if self._masks is not None:
            if mask is None:
                raise SlideError("kept tile without mask in a slide that has one")
            self._masks.append(codec.encode(mask, MASK_CODEC, None))

    def close(self, folder: Path, found: _Found, split: str | None, class_names: tuple[str, ...]) -> None:
        """Finish arrays, write rows and contact sheet."""
        self._tiles.close()
        if self._masks is not None:
            self._masks.close()
        reasons = Counter(self.rows.reasons)
        samples = self._colour.items
        brightfield = found.facts.get("brightfield", True)
        colour = stain.slide_stains(np.concatenate(samples)) if samples and brightfield else None
        counts = {
            "candidates": reasons.total(), "kept": reasons.pop("", 0), "reasons": dict(sorted(reasons.items())),
            "bytes": self.bytes, "remark": found.remark, "colour": colour.to_json() if colour else None,
        }  # fmt: skip
        table = self.rows.table(split, found.coverage_names, found.facts | counts)
        pq.write_table(table, folder / ROWS, compression="zstd")
        shown = self._shown.items
        for place in np.linspace(0, len(shown) - 1, min(pictures.SHEET_KEPT, len(shown))).round().astype(int):
            tile, label = shown[place]
            self.sheet.keep(tile, _caption(label, class_names))
        (folder / SHEET).write_bytes(self.sheet.draw())

    def __enter__(self) -> "_SlideWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._tiles.release()
        if self._masks is not None:
            self._masks.release()


def _caption(label: int, class_names: tuple[str, ...]) -> str:
    if not class_names:
        return ""
    return "unlabelled" if label == UNLABELLED else class_names[label]


def write_source(job: Job, source: Source) -> Outcome:
    """Tile one source into STORE/slides/<slide_id>; whole or not there at all.

    A finished folder is left as it is; a broken one is set aside, redone, and then removed.

    Returns:
        The outcome; damage inside the slide is in ``problem``, listed per tile in its rows.

    Raises:
        HeldError: Another job is writing this slide.
        BonyError: The slide cannot be tiled at all; nothing stands at its name.
    """
    keep_freed_memory()
    final, work = job.store / SLIDES / source.slide_id, job.store / WORK
    with claims.claimed(work, source.slide_id) as claim:
        _sweep(work, source.slide_id, claim)
        if atomic.stands(final, work):
            return Outcome(source.slide_id, skipped=True)
        if len(claim.dead) >= MOST_DEATHS:
            raise SlideError(f"{len(claim.dead)} processes that wrote it died (crash of a decoder, or out of memory?)")
        with atomic.building(final, work, token=claim.token) as folder:
            write = _write_slide if source.image_labels is None else _write_images
            writer, found = write(folder, source, job)
            claim.require_held()
        for broken in work.glob(f"{source.slide_id}.broken*"):
            shutil.rmtree(broken)
    kept = writer.rows.reasons.count("")
    return Outcome(source.slide_id, kept, writer.bytes, found.damage, remark=found.remark)


def give_up(store: Path, slide_id: str) -> None:
    """Remove what dead writers of a slide have left."""
    with claims.claimed(store / WORK, slide_id) as claim:
        _sweep(store / WORK, slide_id, claim)


def _sweep(work: Path, slide_id: str, claim: claims.Claim) -> None:
    for token in claim.dead:
        shutil.rmtree(work / f"{slide_id}.{token}", ignore_errors=True)


def _facts(source: Source, **more: Any) -> dict[str, Any]:
    """Slide-level facts that travel in the rows' metadata."""
    return {
        "slide_id": source.slide_id,
        "provider": source.provider,
        "isup_grade": source.isup_grade,
        "gleason_score": source.gleason_score,
        **more,
    }


def _write_slide(folder: Path, source: Source, job: Job) -> tuple[_SlideWriter, _Found]:
    """A slide file."""
    with ExitStack() as opened:
        slide = opened.enter_context(open_slide(source.images[0], job.settings.slide_mpp, job.limits))
        plan = plan_slide(slide, job.settings)
        mask = open_mask(source, slide, plan.cut, job.limits)
        if mask is not None:
            opened.callback(mask.close)
        writer = opened.enter_context(_SlideWriter(folder, job.settings, len(plan.corners), mask is not None))
        jpeg = None if plan.cut.resampled else slide.jpeg(plan.cut.level.index)
        for candidate in cut_slide(slide, plan, job.settings, mask, source.scheme):
            writer.add(candidate, jpeg)
        reasons = writer.rows.reasons
        damaged = reasons.count(DAMAGED)
        facts = _facts(
            source, mpp=plan.cut.mpp, slide_mpp=slide.mpp, level=plan.cut.level.index, span=plan.cut.span,
            width=slide.levels[0].width, height=slide.levels[0].height, brightfield=plan.brightfield,
            damaged_tiles=damaged,
        )  # fmt: skip
        remark = "" if plan.brightfield else NOT_BRIGHTFIELD
        remark = remark or ("" if "" in reasons else "no tile kept" if reasons else "no tissue found")
        names = source.scheme.values if source.scheme and mask is not None else ()
        found = _Found(facts, names, plan.damage(damaged), remark)
        writer.close(folder, found, source.split, job.class_names)
    (folder / THUMBNAIL).write_bytes(pictures.thumbnail(plan.overview, plan.cut, plan.corners, reasons))
    return writer, found


def _write_images(folder: Path, source: Source, job: Job) -> tuple[_SlideWriter, _Found]:
    """Images that others have chosen: larger ones are cut, none is filtered."""
    scheme = source.scheme if source.image_masks is not None else None
    tiles = ImportedTiles(source, job.settings, job.limits)
    with _SlideWriter(folder, job.settings, len(source.image_labels or ()), scheme is not None) as writer:
        for candidate, jpeg in tiles:
            writer.add(candidate, jpeg)
        facts = _facts(source, mpp=tiles.mpp, images=len(source.image_labels or ()), fold=source.fold)
        found = _Found(facts, scheme.values if scheme else (), tiles.damage())
        writer.close(folder, found, source.split, job.class_names)
    return writer, found
