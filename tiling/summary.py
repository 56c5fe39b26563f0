"""What a store holds and what was left out, as a table in the terminal and as STORE/summary.html.

Both are made from the slides' own facts and quarantine.jsonl, so they cover the whole store, whoever tiled which part
of it, and can be made again at any time.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tiling import atomic
from tiling.errors import DamageError
from tiling.index import METADATA_KEY, ROWS, slide_folders
from tiling.pages import template
from tiling.pictures import COLOURS, NAMES
from tiling.quarantine import read_quarantine
from tiling.store import read_description
from tiling.write import SHEET, THUMBNAIL

PAGE = "summary.html"
_LISTED = 10  # slides of a kind in the terminal; the page has all
_OTHER = (120, 120, 120)


@dataclass(frozen=True)
class SlideSummary:
    """One finished slide.

    Args:
        slide_id: Its folder.
        candidates: Tiles that were looked at.
        kept: Tiles stored.
        reasons: Rejected candidates by reason.
        bytes: Of the stored tiles.
        mpp: True scale of the tiles, um/px; None where nobody knows it.
        remark: Something odd about it, such as why it has no tile.
        has_overview: Whether there is a thumbnail: slides of tile images have none.
    """

    slide_id: str
    candidates: int
    kept: int
    reasons: dict[str, int]
    bytes: int
    mpp: float | None
    remark: str
    has_overview: bool


@dataclass(frozen=True)
class StoreSummary:
    """A store.

    Args:
        slides: Finished ones, by id.
        quarantined: Lines of quarantine.jsonl, slides that were left out first.
    """

    slides: tuple[SlideSummary, ...]
    quarantined: tuple[dict[str, Any], ...]

    @cached_property
    def kept(self) -> int:
        """Tiles stored."""
        return sum(slide.kept for slide in self.slides)

    @cached_property
    def candidates(self) -> int:
        """Tiles looked at."""
        return sum(slide.candidates for slide in self.slides)

    @cached_property
    def bytes(self) -> int:
        """Bytes of the stored tiles."""
        return sum(slide.bytes for slide in self.slides)

    @cached_property
    def fates(self) -> dict[str, int]:
        """Candidates by reason of rejection, "" for kept ones first, then the most frequent."""
        total = sum((Counter(slide.reasons) for slide in self.slides), Counter[str]())
        return {"": self.kept} | dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))

    @cached_property
    def without_tiles(self) -> tuple[SlideSummary, ...]:
        """Finished slides without a single kept tile."""
        return tuple(slide for slide in self.slides if not slide.kept)

    @cached_property
    def left_out(self) -> int:
        """Quarantined slides that are not in the store."""
        return sum(bool(line["left_out"]) for line in self.quarantined)


@dataclass(frozen=True)
class Pace:
    """What one run did: new tiles kept, and the seconds it took."""

    tiles: int
    seconds: float


def summarise(store: Path) -> StoreSummary:
    """Read what the slides' rows say of themselves; of each file only its footer.

    Raises:
        DamageError: The rows of a slide are unreadable.
    """
    lines = sorted(read_quarantine(store), key=lambda line: (not line["left_out"], line["slide_id"]))
    return StoreSummary(tuple(_slide(folder) for folder in slide_folders(store)), tuple(lines))


def _slide(folder: Path) -> SlideSummary:
    try:
        facts = json.loads(pq.read_schema(folder / ROWS).metadata[METADATA_KEY])
        mpp = facts["mpp"]
        return SlideSummary(
            slide_id=facts["slide_id"],
            candidates=facts["candidates"],
            kept=facts["kept"],
            reasons=facts["reasons"],
            bytes=facts["bytes"],
            mpp=None if mpp is None or math.isnan(mpp) else mpp,
            remark=facts["remark"],
            has_overview=(folder / THUMBNAIL).is_file(),
        )
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        what = f"cannot be read ({type(error).__name__}: {error})"
        raise DamageError(what, folder / ROWS, "run `bony verify` on the store, then tile that slide again") from error


def print_table(summary: StoreSummary, pace: Pace, file: TextIO | None = None) -> None:
    """Print the summary: with colours on a terminal, as plain lines elsewhere.

    Args:
        summary: The store.
        pace: This run.
        file: Where to; standard output when not given.
    """
    console = Console(file=file, highlight=False)
    if not console.is_terminal:
        console.width = 1000  # lines of a log are not to be folded
    facts = Table.grid(padding=(0, 2))
    for name, (value, note) in _facts(summary, pace).items():
        facts.add_row(Text(name, "bold"), Text(value), Text(note))
    with console.capture() as printed:
        console.print(facts)
        _print_slides(console, "no tile kept", [(slide.slide_id, _why(slide)) for slide in summary.without_tiles])
        whys = [(line["slide_id"], f"{_what(line)}: {line['reason']}") for line in summary.quarantined]
        _print_slides(console, "left out or damaged", whys)
    console.file.write("".join(f"{line.rstrip()}\n" for line in printed.get().splitlines()))


def _print_slides(console: Console, title: str, rows: Sequence[tuple[str, str]]) -> None:
    if not rows:
        return
    console.print(Text(f"{title}:", "bold"))
    table = Table.grid(padding=(0, 2))
    for slide_id, why in rows[:_LISTED]:
        table.add_row("", Text(slide_id), Text(why))
    if len(rows) > _LISTED:
        table.add_row("", Text(f"and {len(rows) - _LISTED:,} more"), Text(f"see {PAGE}"))
    console.print(table)


def _facts(summary: StoreSummary, pace: Pace | None) -> dict[str, tuple[str, str]]:
    """The totals: name -> value, note."""
    without, damaged = len(summary.without_tiles), len(summary.quarantined) - summary.left_out
    facts = {
        "slides": (f"{len(summary.slides):,}", f"{without:,} without a tile" if without else ""),
        "candidates": (f"{summary.candidates:,}", ""),
    }
    for reason, count in summary.fates.items():
        facts[_name(reason)] = (f"{count:,}", _share(count, summary.candidates))
    facts["size"] = (_size(summary.bytes), f"{_size(summary.bytes / summary.kept)} a tile" if summary.kept else "")
    if pace is not None:
        rate = pace.tiles / max(pace.seconds, 1e-9)
        facts["speed"] = (f"{rate:,.0f} tiles/s", f"{pace.tiles:,} new tiles in {pace.seconds:,.1f} s")
    facts["left out"] = (f"{summary.left_out:,}", f"{damaged:,} damaged in part" if damaged else "")
    return facts


def _name(reason: str) -> str:
    return NAMES.get(reason, reason)


def _share(part: int, whole: int) -> str:
    """In percent.

    >>> _share(1, 3), _share(1, 9999), _share(0, 0)
    ('33.3 %', '< 0.1 %', '-')
    """
    if not whole:
        return "-"
    percent = 100 * part / whole
    return "< 0.1 %" if 0 < percent < 0.05 else f"{percent:.1f} %"


def _size(count: float) -> str:
    """Bytes with a unit.

    >>> _size(532), _size(12_345), _size(7_654_321_000)
    ('532 bytes', '12.3 kB', '7.65 GB')
    """
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} bytes"


def _why(slide: SlideSummary) -> str:
    """Why a slide has no tile."""
    rejected = sorted(slide.reasons.items(), key=lambda item: (-item[1], item[0]))
    counts = ", ".join(f"{_name(reason)} {count:,}" for reason, count in rejected)
    return ": ".join(text for text in (slide.remark, counts) if text)


def _what(line: dict[str, Any]) -> str:
    return "left out" if line["left_out"] else "damaged in part"


def write_page(store: Path, summary: StoreSummary, pace: Pace | None = None) -> Path:
    """Write STORE/summary.html, atomically; it shows the slides' own pictures, and opens from disk.

    Args:
        store: The store.
        summary: What it holds.
        pace: The run that ends; without it the page is the same for the same store.

    Returns:
        The page.
    """
    about = read_description(store)
    html = template("tiling", "", PAGE).render(
        about=about,
        facts=_facts(summary, pace),
        summary=summary,
        fates=[(_name(reason), _colour(reason), count) for reason, count in summary.fates.items()],
        why=_why,
        what=_what,
        share=_share,
        slides=[_card(slide, list(summary.fates)) for slide in summary.slides],
        picture=THUMBNAIL,
        sheet=SHEET,
    )
    atomic.write_bytes(store / PAGE, html.encode())
    return store / PAGE


def _colour(reason: str) -> str:
    return f"rgb{COLOURS.get(reason, _OTHER)}"


def _card(slide: SlideSummary, fates: Sequence[str]) -> list[Any]:
    """A slide for the page's script, small: there may be 10,000."""
    counts = [slide.kept if reason == "" else slide.reasons.get(reason, 0) for reason in fates]
    mpp = "" if slide.mpp is None else f"{slide.mpp:.3g}"
    return [slide.slide_id, counts, mpp, slide.remark, int(slide.has_overview)]
