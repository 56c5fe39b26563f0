"""The preview: it says what tiling would do, of which slides, and shows the tiles nearest to each threshold."""

import base64
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from playwright.sync_api import Browser

from pipeline.commands import tile as tile_command
from pipeline.commands.tile_options import dataset_of, settings_of, tile_parser
from tiling import datasets
from tiling.datasets import Dataset
from tiling.errors import UsageError
from tiling.filters import METRICS, REASONS, Thresholds
from tiling.preview import Filter, command, filters_of, histogram, preview
from tiling.run import tile
from tiling.settings import TileSettings
from tiling.store import PREVIEW

WIDTH = 1280
# Of the made slides' candidates, each filter rejects some.
STRICT = TileSettings(thresholds=Thresholds(0.6, 0.4, 0.1, 0.1, 0.2, 12.0, 1.0))


def fates(page: str) -> dict[str, int]:
    """The counts in the page's legend, by name."""
    legend = page[page.index('<ul class="legend">') : page.index("</ul>")]
    return {name: int(count.replace(",", "")) for name, count in re.findall(r"</i>([a-z -]+) ([\d,]+)", legend)}


def card(page: str, reason: str) -> str:
    """The part of the page that shows one filter."""
    return page.partition(f'<div class="filter" id="{reason}">')[2].partition('<div class="filter"')[0]


def values(page: str, reason: str) -> tuple[list[float], list[float]]:
    """The values under the tiles that a filter rejected, and under those that were kept."""
    rejected, kept = card(page, reason).split("nearest to the threshold first")
    captions = [[float(text) for text in re.findall(r"<figcaption>([\d.]+)<", part)] for part in (rejected, kept)]
    return captions[0], captions[1]


@pytest.fixture(scope="module")
def strict(cohort_slides: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, object]]]:
    """The page of the made slides with strict filters, and the rows of a store tiled with the same."""
    folder = tmp_path_factory.mktemp("strict")
    page = preview(cohort_slides, STRICT, folder / "look").read_text()
    tile(cohort_slides, folder / "store", STRICT)
    rows = [
        row for path in sorted(folder.glob("store/slides/*/rows.parquet")) for row in pq.read_table(path).to_pylist()
    ]
    return page, rows


def test_it_counts_what_tiling_does(strict: tuple[str, list[dict[str, object]]]) -> None:
    page, rows = strict
    named = {"": "kept", "tissue": "too little tissue", "empty": "mostly empty", "edges": "too few edges"}
    named |= {"texture": "too homogeneous", "blur": "out of focus", "flat": "nothing but background"}
    reasons = Counter(str(row["reason"]) for row in rows)
    assert len(reasons) > 3
    assert fates(page) == {named[reason]: count for reason, count in reasons.items()}
    assert page.count("every candidate and its fate") == 3


def test_it_shows_the_tiles_nearest_to_each_threshold(strict: tuple[str, list[dict[str, object]]]) -> None:
    page, rows = strict
    for one in filters_of(STRICT.thresholds or Thresholds())[1:]:
        metric = METRICS[REASONS.index(one.reason)]
        for shown, reason in zip(values(page, one.reason), (one.reason, ""), strict=True):
            near = sorted(
                (abs(float(str(row[metric])) - one.limit), row[metric]) for row in rows if row["reason"] == reason
            )
            expected = sorted((float(str(value)) for _, value in near[:7]), reverse=one.most)
            assert shown == pytest.approx(expected, rel=0.01, abs=5e-4)


def test_every_filter_has_its_option_and_its_histogram(strict: tuple[str, list[dict[str, object]]]) -> None:
    page, rows = strict
    assert len(filters_of(Thresholds())) == len(REASONS) + 1
    decoded = sum(row["empty"] is not None for row in rows)
    for one in filters_of(STRICT.thresholds or Thresholds()):
        part = card(page, one.reason)
        assert f"<code>{one.option} {one.limit:g}</code>" in part
        counts = re.findall(r"<title>[^<]*: ([\d,]+)</title>", part)
        assert sum(int(count.replace(",", "")) for count in counts) == (
            len(rows) if one.reason == "tissue" else decoded
        )


@given(
    arrays(np.float32, st.integers(0, 40), elements=st.floats(0, 50, width=32)),
    st.floats(0, 50),
    st.booleans(),
    st.integers(0, 3),
)
def test_no_bar_is_on_both_sides_of_the_threshold(found: np.ndarray, limit: float, most: bool, equal: int) -> None:
    found = np.concatenate([found, np.full(equal, limit, np.float32)])
    bars = histogram(found, Filter("empty", "--max-empty", limit, most))["bars"]
    assert isinstance(bars, list)
    assert sum(bar["count"] for bar in bars) == len(found)
    beyond = found > limit if most else found < limit
    assert sum(bar["count"] for bar in bars if bar["rejected"]) == beyond.sum()
    assert all((bar["height"] > 0) == (bar["count"] > 0) for bar in bars)


def test_nothing_but_the_page_is_written(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dataset", "panda", "--root", str(cohort), "--out", str(tmp_path / "new/look"), "--preview"]
    assert tile_command.run(words) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'new/look' / PREVIEW}\n"
    assert [path.name for path in (tmp_path / "new/look").iterdir()] == [PREVIEW]
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_tiling_goes_on_where_the_preview_was(cohort: Path, tmp_path: Path) -> None:
    words = ["--dataset", "panda", "--root", str(cohort), "--out", str(tmp_path / "look")]
    assert tile_command.run([*words, "--preview"]) == 0
    page = (tmp_path / "look" / PREVIEW).read_bytes()
    assert tile_command.run(words) == 0
    assert len(list((tmp_path / "look/slides").iterdir())) == 3
    assert (tmp_path / "look" / PREVIEW).read_bytes() == page


def test_a_store_is_left_as_it_is(
    own_store: Path, cohort_slides: Dataset, files: Callable[[Path], dict[str, str]]
) -> None:
    before = files(own_store)
    preview(cohort_slides, STRICT, own_store)
    after = files(own_store)
    assert after.pop(PREVIEW)
    assert after == before


def test_of_many_slides_an_even_sample_is_looked_at(cohort: Path, tmp_path: Path) -> None:
    slide = next((cohort / "train_images").glob("*.tiff"))
    found = datasets.slides([slide])
    many = replace(found, sources=tuple(replace(found.sources[0], slide_id=f"slide-{n}") for n in range(9)))
    page = preview(many, TileSettings(), tmp_path / "look", most=3).read_text()
    assert re.findall(r"<h3>(slide-\d)</h3>", page) == ["slide-0", "slide-4", "slide-8"]
    assert "3 of 9 slides, evenly spread" in page
    assert "all 9 slides" in preview(many, TileSettings(), tmp_path / "look").read_text()


def test_slides_that_cannot_be_read_are_told(own_cohort: Path, tmp_path: Path) -> None:
    images = sorted((own_cohort / "train_images").glob("*.tiff"))
    images[0].write_bytes(images[0].read_bytes()[:5000])
    images[1].rename(images[1].with_name("<b>&.tiff"))
    page = preview(datasets.slides([own_cohort / "train_images"]), TileSettings(), tmp_path / "look").read_text()
    assert page.count("Left out: ") == 1
    assert re.search(rf"Left out: [^<]*{images[0].name}", page)
    assert page.count("candidates kept") == 2
    for image in (own_cohort / "train_images").iterdir():
        image.write_bytes(b"nothing")
    page = preview(datasets.slides([own_cohort / "train_images"]), TileSettings(), tmp_path / "look").read_text()
    assert page.count("Left out: ") == 3
    assert "&lt;b&gt;&amp;.tiff" in page
    assert "<b>" not in page
    assert "No tile would be kept" in page
    assert fates(page) == {"kept": 0}


def test_the_limits_of_the_command_line_count(cohort_slides: Dataset, own_cohort: Path, tmp_path: Path) -> None:
    words = [str(own_cohort / "train_images"), "--out", str(tmp_path / "look"), "--preview"]
    assert tile_command.run([*words, "--max-level-pixels", "1000"]) == 0
    page = (tmp_path / "look" / PREVIEW).read_text()
    assert page.count("raise it with --max-level-pixels if the slide is sound") == len(cohort_slides.sources)


def test_damage_is_told(own_cohort: Path, spoil: Callable[..., tuple[int, int, int, int]], tmp_path: Path) -> None:
    slide = sorted((own_cohort / "train_images").glob("*.tiff"))[0]
    for number in range(6):
        spoil(slide, number)
    page = preview(datasets.slides([slide]), TileSettings(), tmp_path / "look").read_text()
    dropped = fates(page)["damaged in the file"]
    assert f"{dropped} tiles lie on damaged segments and were dropped" in page
    assert page.count("candidates kept") == 1


def test_a_fluorescence_slide_is_told(shared_data: Path, tmp_path: Path) -> None:
    found = datasets.slides([shared_data / "wsi/test3-DAPI-2-387.ndpi"])
    page = preview(found, TileSettings(mpp=None), tmp_path / "look").read_text()
    assert "does not look like bright-field: dark background" in page


def test_the_given_scale_is_used(cohort_slides: Dataset, tmp_path: Path) -> None:
    settings = TileSettings(slide_mpp=0.25)
    page = preview(cohort_slides, settings, tmp_path / "look").read_text()
    tile(cohort_slides, tmp_path / "store", settings)
    rows = [pq.read_table(path)["reason"].to_pylist() for path in tmp_path.glob("store/slides/*/rows.parquet")]
    assert fates(page)["kept"] == sum(reasons.count("") for reasons in rows) > 0
    assert sum(fates(page).values()) == sum(map(len, rows))


@pytest.mark.parametrize(
    "settings",
    [
        TileSettings(),
        TileSettings(tile_px=112, mpp=None, codec="zstd", thresholds=Thresholds(max_pen=0.123456789, min_texture=4.25)),
        TileSettings(mpp=1.0, mpp_tolerance=0.03, slide_mpp=0.25, min_label_share=0.2),
    ],
)
def test_the_command_has_these_settings_and_slides(
    cohort: Path, cohort_slides: Dataset, settings: TileSettings, tmp_path: Path
) -> None:
    images = sorted((cohort / "train_images").glob("*.tiff"))
    spaced = tmp_path / "my slides"
    shutil.copytree(cohort / "train_images", spaced)
    for found in (cohort_slides, datasets.slides(images), datasets.slides(images[1:]), datasets.slides([spaced])):
        words = shlex.split(command(found, settings, tmp_path / "a store"))
        assert words[:2] == ["bony", "tile"]
        args = tile_parser().parse_args(words[2:])
        again = dataset_of(args)
        assert (again.name, again.sources) == (found.name, found.sources)
        assert settings_of(args, again) == settings
        assert args.out == tmp_path / "a store"


@pytest.mark.parametrize("names", ["folder", "files"])
def test_whole_folders_are_named_as_such(cohort: Path, names: str, tmp_path: Path) -> None:
    images = sorted((cohort / "train_images").glob("*.tiff"))
    given = [cohort / "train_images"] if names == "folder" else images[:2]
    words = shlex.split(command(datasets.slides(given), TileSettings(), tmp_path))
    assert words[2 : words.index("--min-tissue")] == [str(path) for path in given]


def test_a_slide_beside_one_of_the_same_name_is_named_itself(cohort: Path, tmp_path: Path) -> None:
    slide = next((cohort / "train_images").glob("*.tiff"))
    for suffix in (".tiff", ".tif"):
        shutil.copy(slide, tmp_path / f"one{suffix}")
    words = shlex.split(command(datasets.slides([tmp_path / "one.tif"]), TileSettings(), tmp_path))
    assert words[2] == str(tmp_path / "one.tif")


def test_what_cannot_be_previewed(cohort_slides: Dataset, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UsageError, match="file: is a file"):
        preview(cohort_slides, TileSettings(), file)
    with pytest.raises(UsageError, match="imported tiles are not filtered"):
        preview(cohort_slides, TileSettings(thresholds=None), tmp_path / "look")
    with pytest.raises(UsageError, match="no slide to preview"):
        preview(Dataset("slides", ()), TileSettings(), tmp_path / "look")
    assert list(tmp_path.iterdir()) == [file]


def test_the_page_needs_nothing_else_and_fits(
    strict: tuple[str, list[dict[str, object]]], tmp_path: Path, browser: Browser
) -> None:
    (tmp_path / PREVIEW).write_text(strict[0])
    window = browser.new_page(viewport={"width": WIDTH, "height": 900})
    asked: list[str] = []
    complaints: list[str] = []
    window.on("request", lambda request: asked.append(request.url))
    window.on("console", lambda message: complaints.append(message.text))
    window.goto((tmp_path / PREVIEW).as_uri())
    assert [url for url in asked if not url.startswith("data:")] == [(tmp_path / PREVIEW).as_uri()]
    assert window.evaluate("document.documentElement.scrollWidth") <= WIDTH
    pictures = window.evaluate(
        "[...document.images].map(i => [i.alt, i.naturalWidth, i.getBoundingClientRect().width, i.src.slice(0, 30)])"
    )
    assert len(pictures) > 20
    assert all(alt and natural and shown >= 0.6 * natural for alt, natural, shown, _ in pictures)
    assert base64.b64decode(pictures[0][3].partition(",")[2][:4]) == b"\xff\xd8\xff"
    assert complaints == []
    window.close()
