"""One source into one folder of the store: cut, encode, write, draw, seal, rename."""

from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from tiling import atomic, codec, pictures
from tiling.cut import DAMAGED, NOT_BRIGHTFIELD, Candidate, Plan, cut_image, cut_slide, plan_slide
from tiling.datasets import Source
from tiling.errors import SlideError
from tiling.index import ROWS, SLIDES, rows_table
from tiling.labels import SCHEMES, UNLABELLED
from tiling.settings import TileSettings
from tiling.shard import ArrayWriter
from tiling.slide import open_slide
from tiling.store import MASK_CODEC, MASKS, TILES, WORK

THUMBNAIL, SHEET = "thumbnail.jpg", "contact.jpg"
_SHEET_KEPT, _SHEET_REJECTED_EACH = 32, 8


@dataclass(frozen=True)
class Outcome:
    """What became of one source.

    Args:
        slide_id: The slide.
        kept: Tiles stored.
        reasons: Count per reason of rejection.
        bytes: Bytes of the encoded tiles.
        problem: Why it was left out, or what is damaged in it; "" when all is well.
        skipped: It was there already.
        written: A finished folder stands in the store.
        remark: Something odd that loses nothing (a fluorescence slide, no tile kept).
    """

    slide_id: str
    kept: int = 0
    reasons: dict[str, int] | None = None
    bytes: int = 0
    problem: str = ""
    skipped: bool = False
    written: bool = True
    remark: str = ""


class _SlideWriter:
    """Collects the candidates of one source: arrays on disk, columns and sample tiles in memory."""

    def __init__(self, folder: Path, settings: TileSettings, most: int, with_masks: bool) -> None:
        shape = (settings.tile_px, settings.tile_px)
        self._settings = settings
        self._tiles = ArrayWriter(folder / TILES, most, (*shape, 3), settings.codec)
        self._masks = ArrayWriter(folder / MASKS, most, shape, MASK_CODEC) if with_masks else None
        self.columns: dict[str, list[Any]] = {
            name: []
            for name in (
                "image", "x", "y", "kept", "reason", "tissue_fraction", "empty", "edges", "texture", "label",
                "split", "coverage",
            )
        }  # fmt: skip
        self.sample: list[tuple[np.ndarray, int]] = []
        self.rejected: dict[str, list[np.ndarray]] = {}
        self.bytes = 0
        self._every = 1

    def add(self, candidate: Candidate, jpeg: codec.JpegSettings | None, split: str | None) -> None:
        """Store one candidate: its row always, its pixels when kept."""
        kept = candidate.reason == ""
        metrics = asdict(candidate.metrics) if candidate.metrics else dict.fromkeys(("empty", "edges", "texture"))
        row = {
            "image": candidate.image, "x": candidate.x, "y": candidate.y, "kept": kept, "reason": candidate.reason,
            "tissue_fraction": candidate.tissue_fraction, "label": candidate.label, "split": split,
            "coverage": candidate.coverage, **metrics,
        }  # fmt: skip
        for name, value in row.items():
            self.columns[name].append(value)
        if candidate.tile is None:
            return
        if not kept:
            examples = self.rejected.setdefault(candidate.reason, [])
            if len(examples) < _SHEET_REJECTED_EACH:
                examples.append(candidate.tile)
            return
        data = codec.encode(candidate.tile, self._settings.codec, jpeg)
        self.bytes += len(data)
        if self._tiles.count % self._every == 0:
            self.sample.append((candidate.tile, candidate.label))
            if len(self.sample) == 2 * _SHEET_KEPT:  # half as many, twice as far apart: an even sample of any slide
                self.sample, self._every = self.sample[::2], 2 * self._every
        self._tiles.append(data)
        if self._masks is not None:
            if candidate.mask is None:
                raise SlideError("kept tile without mask in a slide that has one")
            self._masks.append(codec.encode(candidate.mask, MASK_CODEC, None))

    def close(self, folder: Path, coverage_names: tuple[str, ...], facts: dict[str, Any]) -> None:
        """Finish arrays and write the rows."""
        self._tiles.close()
        if self._masks is not None:
            self._masks.close()
        pq.write_table(rows_table(self.columns, coverage_names, facts), folder / ROWS, compression="zstd")

    def __enter__(self) -> "_SlideWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._tiles.release()
        if self._masks is not None:
            self._masks.release()

    def draw_sheet(self, folder: Path, class_names: tuple[str, ...]) -> None:
        """Write the contact sheet."""
        shown = np.linspace(0, len(self.sample) - 1, min(_SHEET_KEPT, len(self.sample))).round().astype(int)
        kept = [(self.sample[number][0], _caption(self.sample[number][1], class_names)) for number in shown]
        rejected = [(tile, reason) for reason, tiles in sorted(self.rejected.items()) for tile in tiles]
        (folder / SHEET).write_bytes(pictures.contact_sheet(kept, rejected))


def _caption(label: int, class_names: tuple[str, ...]) -> str:
    if not class_names:
        return ""
    return "unlabelled" if label == UNLABELLED else class_names[label]


def write_source(store: Path, source: Source, settings: TileSettings, class_names: tuple[str, ...]) -> Outcome:
    """Tile one source into STORE/slides/<slide_id>; whole or not there at all.

    A finished folder is left as it is; a broken one is renamed aside first.

    Returns:
        The outcome; damage inside the slide is in ``problem``, listed per tile in its rows.

    Raises:
        BonyError: The slide cannot be tiled at all; nothing stands at its name.
    """
    final = store / SLIDES / source.slide_id
    if atomic.stands(final, store / WORK):
        return Outcome(source.slide_id, skipped=True)
    with atomic.building(final, store / WORK) as folder:
        if source.image_labels is None:
            writer, damage, remark = _write_slide(folder, source, settings)
        else:
            writer, damage, remark = _write_images(folder, source, settings)
        writer.draw_sheet(folder, class_names)
    reasons = Counter(reason for reason in writer.columns["reason"] if reason)
    kept = sum(writer.columns["kept"])
    if not kept and not remark:
        remark = "no tile kept" if writer.columns["kept"] else "no tissue found"
    return Outcome(source.slide_id, kept, dict(reasons), writer.bytes, damage, remark=remark)


def _facts(source: Source, **more: Any) -> dict[str, Any]:
    """Slide-level facts that travel in the rows' metadata."""
    return {
        "slide_id": source.slide_id,
        "provider": source.provider,
        "isup_grade": source.isup_grade,
        "gleason_score": source.gleason_score,
        **more,
    }


def _write_slide(folder: Path, source: Source, settings: TileSettings) -> tuple[_SlideWriter, str, str]:
    """A slide file: writer, damage, remark."""
    path = source.images[0]
    scheme = SCHEMES[source.provider] if source.provider else None
    with ExitStack() as opened:
        slide = opened.enter_context(open_slide(path, settings.slide_mpp))
        plan = plan_slide(slide, settings)
        mask = opened.enter_context(open_slide(source.mask)) if source.mask is not None else None
        writer = opened.enter_context(_SlideWriter(folder, settings, len(plan.corners), mask is not None))
        jpeg = None if plan.cut.resampled else slide.jpeg(plan.cut.level.index)
        for candidate in cut_slide(slide, plan, settings, mask, scheme):
            writer.add(candidate, jpeg, source.split)
        damaged = writer.columns["reason"].count(DAMAGED)
        facts = _facts(
            source, mpp=plan.cut.mpp, slide_mpp=slide.mpp, level=plan.cut.level.index, span=plan.cut.span,
            width=slide.levels[0].width, height=slide.levels[0].height, brightfield=plan.brightfield,
            damaged_tiles=damaged,
        )  # fmt: skip
        writer.close(folder, scheme.values if scheme and mask is not None else (), facts)
    (folder / THUMBNAIL).write_bytes(_thumbnail(plan, writer))
    return writer, plan.damage(damaged), "" if plan.brightfield else NOT_BRIGHTFIELD


def _thumbnail(plan: Plan, writer: _SlideWriter) -> bytes:
    return pictures.thumbnail(plan.overview, plan.cut, plan.corners, writer.columns["reason"])


def _write_images(folder: Path, source: Source, settings: TileSettings) -> tuple[_SlideWriter, str, str]:
    """The tile images of one slide: larger ones are cut, none is filtered."""
    labels = source.image_labels or ()
    broken: list[str] = []
    mpp = 0.0
    with _SlideWriter(folder, settings, len(source.images), with_masks=False) as writer:
        for number, (path, label) in enumerate(zip(source.images, labels, strict=True)):
            try:
                with open_slide(path, settings.slide_mpp or settings.mpp) as image:
                    cut, candidates = cut_image(image, settings, number, label)
                    jpeg = None if cut.resampled else image.jpeg(0)
            except SlideError as error:
                broken.append(str(error))
                continue
            mpp = cut.mpp
            for candidate in candidates:
                writer.add(candidate, jpeg, source.split)
        if not writer.columns["x"]:
            smallest = f"images are smaller than {settings.tile_px} px" if not broken else broken[0]
            raise SlideError(f"no tile can be cut: {smallest}", source.images[0])
        writer.close(folder, (), _facts(source, mpp=mpp, images=len(source.images)))
    return writer, "; ".join(broken), ""
