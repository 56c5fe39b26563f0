"""One self-contained HTML page: pictures are inside it, nothing is fetched, it opens from disk."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from tiling import atomic

_KINDS = {b"\x89PNG": "image/png", b"\xff\xd8\xff\xe0": "image/jpeg"}


@dataclass(frozen=True)
class Picture:
    """A PNG or JPEG with its caption."""

    data: bytes
    caption: str

    @property
    def kind(self) -> str:
        """MIME type, from the file's first bytes."""
        return _KINDS.get(self.data[:4], "image/jpeg")

    @property
    def base64(self) -> str:
        """The bytes as text."""
        return base64.b64encode(self.data).decode()


@dataclass(frozen=True)
class Table:
    """Column heads, and rows of text."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A part of the page: warnings, notes, tables, pictures, and pictures that stand side by side, in this order."""

    title: str
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    pairs: Sequence[tuple[Picture, Picture]] = ()


def write_page(path: Path, title: str, subtitle: str, sections: Sequence[Section]) -> None:
    """Write the page, atomically."""
    environment = Environment(
        loader=PackageLoader("pipeline", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    html = environment.get_template("page.html").render(title=title, subtitle=subtitle, sections=sections)
    atomic.write_bytes(path, html.encode())
