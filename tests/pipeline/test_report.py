"""The page: self-contained, escaped, with every picture inside."""

import base64
import re
from pathlib import Path

from pipeline.report.figures import class_bars
from pipeline.report.page import Picture, Section, Table, write_page


def test_page_holds_its_pictures_and_fetches_nothing(tmp_path: Path) -> None:
    picture = Picture(class_bars({"healthy": 3, "gleason3": 0}), "Bars <of> classes")
    section = Section(
        "Tiles", ["careful & slow"], ["a note"], [Table(("a", "b"), [("1", "<b>")])], [picture], [(picture, picture)]
    )
    write_page(tmp_path / "index.html", "Title", "subtitle", [section])
    html = (tmp_path / "index.html").read_text()
    assert html.count(base64.b64encode(picture.data).decode()) == 3
    assert "careful &amp; slow" in html
    assert "&lt;b&gt;" in html
    assert "Bars &lt;of&gt; classes" in html
    assert set(re.findall(r'(?:src|href)="([a-z]+):', html)) == {"data"}
    assert "http" not in html


def test_picture_kind_is_read_from_its_bytes() -> None:
    assert Picture(b"\x89PNG....", "").kind == "image/png"
    assert Picture(b"\xff\xd8\xff\xe0...", "").kind == "image/jpeg"
