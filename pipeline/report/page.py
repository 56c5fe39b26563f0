"""One self-contained HTML page: pictures are inside it, nothing is fetched, it opens from disk."""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from PIL import Image

from tiling import atomic
from tiling.pages import template

_NUMBER = re.compile(r"[<>]?-?\d[\d,.]*(e[+-]?\d+)?( %)?")


@dataclass(frozen=True)
class Link:
    """Text that leads to the section of a box, where the page has one: by the box's path or by an identity of it."""

    text: str
    target: str


Cell = str | Link


def text_of(cell: Cell) -> str:
    """What a reader sees of a cell."""
    return cell.text if isinstance(cell, Link) else cell


@dataclass(frozen=True)
class Note:
    """A paragraph."""

    text: str
    tag: ClassVar[str] = "note"


@dataclass(frozen=True)
class Picture:
    """A PNG or JPEG.

    Args:
        data: The file's bytes.
        caption: Text below it.
        alt: What it shows, for who cannot see it; the caption when not given.
        shrinks_to: Share of its own width that is still legible, so that pictures can stand side by side.
    """

    data: bytes
    caption: str
    alt: str = ""
    shrinks_to: float = 1.0
    tag: ClassVar[str] = "picture"

    @cached_property
    def _header(self) -> tuple[str, tuple[int, int]]:
        with Image.open(io.BytesIO(self.data)) as image:
            return str(image.get_format_mimetype()), image.size

    @property
    def mime(self) -> str:
        """MIME type, from the file's own header."""
        return self._header[0]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self._header[1]

    @property
    def base64(self) -> str:
        """The bytes as text."""
        return base64.b64encode(self.data).decode()


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first cell of each names the row.

    Args:
        caption: What the table shows.
        columns: Column heads; none for a table of facts.
        rows: The cells.
    """

    caption: str
    columns: Sequence[Cell]
    rows: Sequence[Sequence[Cell]]
    tag: ClassVar[str] = "table"

    @cached_property
    def numeric(self) -> tuple[bool, ...]:
        """Which columns hold numbers only, and stand to the right; the first one holds names."""
        columns = [[text_of(cell) for cell in column] for column in zip(*self.rows, strict=True)]
        return tuple(
            number > 0
            and any(map(_NUMBER.fullmatch, texts))
            and all(text in ("", "-") or _NUMBER.fullmatch(text) for text in texts)
            for number, texts in enumerate(columns)
        )


@dataclass(frozen=True)
class Row:
    """Parts side by side, where they fit."""

    parts: Sequence["Part"]
    tag: ClassVar[str] = "row"


@dataclass(frozen=True)
class Stack:
    """Parts one below the other, as one part of a row."""

    parts: Sequence["Part"]
    tag: ClassVar[str] = "stack"


@dataclass(frozen=True)
class Fold:
    """Parts that are shown when asked for."""

    title: str
    parts: Sequence["Part"]
    tag: ClassVar[str] = "fold"


Part = Note | Picture | Table | Row | Stack | Fold


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Args:
        title: Its heading.
        parts: What it shows, in order.
        warnings: What a reader must know before trusting it.
        summary: One line for the table of contents.
        identities: sha256 of what it shows, the most recent first; links from other sections find it by them.
    """

    title: str
    parts: Sequence[Part]
    warnings: Sequence[str] = ()
    summary: str = ""
    identities: Sequence[str] = ()


@dataclass(frozen=True)
class BoxSection:
    """The section of a box on disk.

    Args:
        name: A short name, which no other box of the page has.
        path: Where it lies.
        kind: What it is: a key of ``pipeline.boxes.KINDS``.
        section: What the page shows of it.
    """

    name: str
    path: Path
    kind: str
    section: Section


def write_page(
    path: Path, title: str, notes: Sequence[str], comparisons: Sequence[Section], boxes: Sequence[BoxSection]
) -> None:
    """Write the page, atomically.

    Args:
        path: The HTML file; an older one is replaced.
        title: Heading of the page.
        notes: Lines below it.
        comparisons: Sections over several boxes.
        boxes: The boxes' own sections.
    """
    anchors: dict[str, str] = {}
    for number, box in enumerate(boxes, 1):
        for name in (str(box.path), *box.section.identities):
            anchors.setdefault(name, f"box-{number}")
    html = template("pipeline", "report", "page.html").render(
        title=title, notes=notes, comparisons=comparisons, boxes=boxes, anchors=anchors, text_of=text_of
    )
    atomic.write_bytes(path, html.encode())
