"""The summary of a store: what it counts, what it prints, and the page as a reader sees it."""

import io
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from playwright.sync_api import Browser, Page, expect

from tiling.atomic import COMPLETE
from tiling.codec import encode_jpeg
from tiling.errors import DamageError
from tiling.index import METADATA_KEY, ROWS, SLIDES
from tiling.quarantine import entry, read_quarantine, update_quarantine
from tiling.settings import TileSettings
from tiling.store import Description, prepare
from tiling.summary import PAGE, Pace, SlideSummary, StoreSummary, print_table, summarise, write_page
from tiling.write import SHEET, THUMBNAIL

WIDTH = 1280
HOSTILE = '</script><img src="x.png" onerror="lost()"> [bold]&amp;'


def make_slide(store: Path, slide_id: str, overview: bool = True, **facts: Any) -> None:
    """A finished folder, as far as the summary looks."""
    folder = store / SLIDES / slide_id
    folder.mkdir(parents=True)
    everything = {"slide_id": slide_id, "mpp": 0.4952, "bytes": 0, "reasons": {}, "remark": "", **facts}
    table = pa.table({"x": [0]}).replace_schema_metadata({METADATA_KEY: json.dumps(everything).encode()})
    pq.write_table(table, folder / ROWS)
    grey = np.full((300, 400, 3), 200, np.uint8)
    for name in (THUMBNAIL, SHEET) if overview else (SHEET,):
        (folder / name).write_bytes(encode_jpeg(grey, None))
    (folder / COMPLETE).touch()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Three finished slides, one of them without tiles and one of tile images; one slide left out, one damaged."""
    path = tmp_path / "store"
    prepare(path, Description(TileSettings(), "slides", ()))
    make_slide(path, "b", candidates=10, kept=6, bytes=60_000, reasons={"tissue": 3, "edges": 1})
    make_slide(path, "c-50%25", overview=False, candidates=4, kept=4, bytes=20_000, mpp=float("nan"))
    make_slide(path, "a", candidates=5, kept=0, reasons={"tissue": 1, "empty": 4}, remark=HOSTILE)
    (path / SLIDES / "unfinished").mkdir()
    update_quarantine(path, [entry("b", False, "2 tiles lost"), entry("z", True, f"no slide {HOSTILE}")], ())
    return path


def test_every_finished_slide_is_counted(store: Path) -> None:
    found = summarise(store)
    assert [slide.slide_id for slide in found.slides] == ["a", "b", "c-50%25"]
    assert (found.candidates, found.kept, found.bytes, found.left_out) == (19, 10, 80_000, 1)
    assert list(found.fates.items()) == [("", 10), ("empty", 4), ("tissue", 4), ("edges", 1)]
    assert [slide.slide_id for slide in found.without_tiles] == ["a"]
    assert [slide.mpp for slide in found.slides] == [0.4952, 0.4952, None]
    assert [slide.has_overview for slide in found.slides] == [True, True, False]
    assert [line["slide_id"] for line in found.quarantined] == ["z", "b"]  # left out first


def test_it_agrees_with_the_rows_of_tiled_slides(cohort_store: Path) -> None:
    found = summarise(cohort_store)
    for slide in found.slides:
        reasons = Counter(pq.read_table(cohort_store / SLIDES / slide.slide_id / ROWS)["reason"].to_pylist())
        assert slide.candidates == reasons.total() > slide.kept == reasons.pop("") > 0
        assert slide.reasons == reasons
        arrays = (cohort_store / SLIDES / slide.slide_id / "tiles.zarr").rglob("*")
        assert 0.9 < slide.bytes / sum(path.stat().st_size for path in arrays if path.is_file()) <= 1
        assert slide.has_overview
    assert len(found.slides) == 3
    assert list(found.quarantined) == read_quarantine(cohort_store) == []


@pytest.mark.parametrize("spoil", ["cut", "facts", "absent"])
def test_rows_that_say_nothing_are_named(store: Path, spoil: str) -> None:
    rows = store / SLIDES / "b" / ROWS
    if spoil == "cut":
        rows.write_bytes(rows.read_bytes()[:-20])
    elif spoil == "facts":
        pq.write_table(pa.table({"x": [0]}), rows)
    else:
        rows.unlink()
    with pytest.raises(DamageError, match=r"slides/b/rows\.parquet: cannot be read"):
        summarise(store)


def test_a_log_gets_plain_lines(store: Path) -> None:
    file = io.StringIO()
    print_table(summarise(store), Pace(tiles=6, seconds=1.5), file)
    assert file.getvalue().splitlines() == [
        "slides             3          1 without a tile",
        "candidates         19",
        "kept               10         52.6 %",
        "mostly empty       4          21.1 %",
        "too little tissue  4          21.1 %",
        "too few edges      1          5.3 %",
        "size               80 kB      8 kB a tile",
        "speed              4 tiles/s  6 new tiles in 1.5 s",
        "left out           1          1 damaged in part",
        "no tile kept:",
        f"  a  {HOSTILE}: mostly empty 4, too little tissue 1",
        "left out or damaged:",
        f"  z  left out: no slide {HOSTILE}",
        "  b  damaged in part: 2 tiles lost",
    ]


def test_a_long_list_is_cut_in_the_terminal_and_whole_on_the_page(store: Path) -> None:
    update_quarantine(store, [entry(f"q{n:03d}", True, "cut") for n in range(300)], ())
    file = io.StringIO()
    print_table(summarise(store), Pace(0, 0.0), file)
    assert file.getvalue().count("left out: cut") == 10
    assert "and 292 more  see summary.html" in file.getvalue()
    page = write_page(store, summarise(store)).read_text()
    assert page.count("<td>cut</td>") == 300


def test_an_empty_store_has_a_summary(tmp_path: Path) -> None:
    prepare(tmp_path / "store", Description(TileSettings(mpp=None), "slides", ()))
    file = io.StringIO()
    print_table(summarise(tmp_path / "store"), Pace(0, 0.1), file)
    assert "kept        0          -\n" in file.getvalue()
    assert "own scale" in write_page(tmp_path / "store", summarise(tmp_path / "store")).read_text()


def test_the_page_depends_on_the_store_alone(store: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(store, tmp_path / "elsewhere/copy")
    first = write_page(store, summarise(store)).read_bytes()
    assert write_page(copy, summarise(copy)).read_bytes() == first == write_page(store, summarise(store)).read_bytes()
    assert b"tiles/s" not in first
    assert b"tiles/s" in write_page(store, summarise(store), Pace(6, 1.5)).read_bytes()
    assert str(tmp_path).encode() not in first


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A window in which any complaint, and any request that leaves the disk, fails the test."""
    found = browser.new_page(viewport={"width": WIDTH, "height": 900})
    complaints: list[str] = []
    found.on("console", lambda message: complaints.append(message.text))
    found.on("pageerror", lambda error: complaints.append(str(error)))
    found.on("requestfailed", lambda request: complaints.append(request.url))
    found.on("request", lambda request: request.url.startswith(("file:", "data:")) or complaints.append(request.url))
    yield found
    found.close()
    assert complaints == []


def shown(page: Page) -> list[str]:
    return page.locator("#grid h3").all_inner_texts()


def test_page_shows_every_slide_and_its_fate(store: Path, page: Page) -> None:
    page.goto(write_page(store, summarise(store), Pace(6, 1.5)).as_uri())
    assert shown(page) == ["a", "b", "c-50%25"]
    page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth === 400)")
    assert page.locator("#grid img").count() == 3
    hrefs = page.locator("#grid a").evaluate_all("links => links.map(link => decodeURIComponent(link.pathname))")
    assert all(Path(href).is_file() for href in hrefs)
    assert len(hrefs) == 6
    text = page.locator("body").inner_text()
    assert f"no slide {HOSTILE}" in text  # as text: nothing of it was run
    assert "6 of 10 kept, 0.495 um/px" in text
    assert "4 of 4 kept ·" in text  # nobody knows the scale
    assert page.locator("#without-tiles tbody tr").count() == 1
    assert page.locator("#quarantined tbody tr").count() == 2
    widths = page.locator("header .bar span").evaluate_all("parts => parts.map(part => part.offsetWidth)")
    assert np.allclose(np.array(widths) / sum(widths), np.array([10, 4, 4, 1]) / 19, atol=0.01)
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTH


def test_slides_are_found_and_sorted(store: Path, page: Page) -> None:
    page.goto(write_page(store, summarise(store)).as_uri())
    for order, expected in {"few": "a c b", "many": "b c a", "share": "a b c", "id": "a b c"}.items():
        page.select_option("#order", order)
        assert [name[0] for name in shown(page)] == expected.split()
    for words, expected in {"C-5": ["c-50%25"], "onerror": ["a"], "nothing": [], "": ["a", "b", "c-50%25"]}.items():
        page.fill("#filter", words)
        assert shown(page) == expected
        expect(page.locator("#count")).to_have_text(f"{len(expected)} of {len(expected)} slides shown")


def test_a_page_of_10616_slides_is_small_and_opens_fast(store: Path, page: Page) -> None:
    reasons = {"tissue": 151, "empty": 40, "edges": 20, "texture": 8, "damaged": 1}
    slides = [
        SlideSummary(f"{number:032x}", 420 + number, 200 + number, reasons, 4_000_000, 0.4952, "", has_overview=False)
        for number in range(10_616)
    ]
    lines = [entry(f"q{number}", True, "file is cut: its segments reach to byte 1, it has 0") for number in range(500)]
    path = write_page(store, StoreSummary(tuple(slides), tuple(lines)))
    assert path.stat().st_size < 2e6
    page.route("**/*.jpg", lambda route: route.fulfill(path=store / SLIDES / "b" / SHEET))
    page.goto(path.as_uri())
    took = page.evaluate("performance.getEntriesByType('navigation')[0].domComplete")
    assert took < 3000
    assert len(shown(page)) == 60
    page.locator("#more").scroll_into_view_if_needed()
    expect(page.locator("#grid h3")).to_have_count(120)
    page.fill("#filter", f"{10_615:032x}")
    assert len(shown(page)) == 1


def test_page_is_no_part_of_what_the_store_holds(store: Path) -> None:
    before = summarise(store)
    assert write_page(store, before) == store / PAGE
    assert summarise(store) == before
