"""The report as a reader sees it: Chromium opens it from disk, finds everything in it, and it fits the window."""

import base64
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page

from pipeline.commands import predict, report
from pipeline.commands.parser import pretrain_config
from pipeline.downstream.tasks import evaluate
from pipeline.embed import embed
from pipeline.export import export
from pipeline.pretrain import pretrain
from tiling import datasets, phantom
from tiling.errors import EXIT_PARTIAL
from tiling.run import tile
from tiling.settings import TileSettings

CONFIG = Path(__file__).parents[1] / "jobs/configs/demo.yaml"
WIDTH = 1280
LEAST_SHARE = 0.6  # of a picture's own width; below it writing in it is not legible

MEASURE = """() => ({
    width: document.documentElement.scrollWidth,
    lost: [...document.querySelectorAll('a[href]')].map(a => a.getAttribute('href'))
        .filter(href => !href.startsWith('#') || document.getElementById(href.slice(1)) === null),
    pictures: [...document.images].map(image => {
        const box = image.getBoundingClientRect();
        return {alt: image.alt, natural: image.naturalWidth, left: box.left, right: box.right};
    }),
})"""


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    found = browser.new_page(viewport={"width": WIDTH, "height": 900})
    yield found
    found.close()


def problems(page: Page, file: Path) -> list[str]:
    """Everything that a reader of a page would miss or that the page should not do, one line each."""
    found: list[str] = []
    page.on("console", lambda message: found.append(f"console {message.type}: {message.text}"))
    page.on("pageerror", lambda error: found.append(f"script error: {error}"))
    page.on("requestfailed", lambda request: found.append(f"failed request: {request.url[:80]}"))
    page.on(
        "request",
        lambda request: request.url.startswith(("data:", file.as_uri())) or found.append(f"request: {request.url}"),
    )
    page.goto(file.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    seen = page.evaluate(MEASURE)
    if seen["width"] > WIDTH:
        found.append(f"the page is {seen['width']} px wide")
    found += [f"a link leads nowhere: {href}" for href in seen["lost"]]
    found += [text for picture in seen["pictures"] if (text := _problem(picture))]
    return found


def _problem(picture: dict[str, Any]) -> str:
    shown, natural = picture["right"] - picture["left"], picture["natural"]
    if not natural:
        return f"a picture is not shown: {picture['alt']}"
    if shown < LEAST_SHARE * natural:
        return f"a picture of {natural} px is shown at {shown:.0f} px: {picture['alt']}"
    if picture["left"] < 0 or picture["right"] > WIDTH:
        return f"a picture leaves the window: {picture['alt']}"
    return "" if picture["alt"] else "a picture has no text"


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every kind of box, really made, though small."""
    out = tmp_path_factory.mktemp("chain")
    phantom.make_cohort(out / "slides", slides_per_grade=1, size=(1344, 1344))
    (out / "slides/train_images" / f"{'0' * 32}.tiff").write_bytes(b"no slide")
    with (out / "slides/train.csv").open("a") as file:
        file.write(f"{'0' * 32},radboud,0,negative\n")
    tile(datasets.panda(out / "slides"), out / "store", TileSettings())
    changes = {
        "method.out_dim": 64, "method.hidden_dim": 32, "method.bottleneck_dim": 16, "views.local_crops": 2,
        "views.global_size": 64, "views.local_size": 32, "train.batch_per_rank": 2, "train.steps": 4,
        "train.log_every": 1, "optim.warmup_steps": 1,
    }  # fmt: skip
    for name, rate in (("run", 0.01), ("another-run", 0.001)):
        values = {"config": CONFIG, "data": out / "store", "out": out / name, "optim.lr": rate, **changes}
        pretrain(pretrain_config([word for key, value in values.items() for word in (f"--{key}", str(value))]))
    embed(out / "run", out / "store", out / "features")
    for protocol in ("default", "paper"):
        evaluate("panda", out / "store", out / "features", out / protocol, protocol)
    export(out / "run", out / "bundle", out / "default")
    slides = sorted((out / "slides/train_images").glob("*.tiff"))
    words = [*map(str, slides), "--bundle", str(out / "bundle"), "--out", str(out / "predictions")]
    assert predict.run(words) == EXIT_PARTIAL
    return out


def test_report_is_whole_and_legible(chain: Path, page: Page) -> None:
    names = ("store", "run", "features", "default", "another-run", "paper", "bundle", "predictions")
    assert report.run([*(str(chain / name) for name in names), "--out", str(chain / "report.html")]) == 0
    assert problems(page, chain / "report.html") == []
    assert page.locator("section").count() == len(names) + 2  # the runs and the results are compared
    # 4 slides with overview and sheet, class bars; curves of 2 runs and of both; matrix and curves of 2 results; 4 heat
    # maps
    assert page.locator("img").count() == 4 * 2 + 1 + 3 + 4 + 4
    warnings = page.locator("header .warnings").inner_text()
    assert "1 slide could not be tiled and is left out" in warnings
    assert "tiles of one slide stand in train and test" in warnings
    assert f"{'0' * 32}: " in warnings
    assert page.get_by_role("row").filter(has_text="trained on store").get_by_role("link").count() >= 2


def test_long_names_do_not_widen_the_page(chain: Path, page: Page) -> None:
    copies = [chain / f"{number}-{'run' * 60}" for number in range(4)]
    for copy in copies:
        copy.mkdir()
        for name in ("run.json", "metrics.jsonl"):
            shutil.copy(chain / "run" / name, copy)
    assert report.run([*map(str, copies), "--out", str(chain / "long.html"), "--title", "title" * 60]) == 0
    assert problems(page, chain / "long.html") == []


def png(width: int) -> str:
    """A picture as a data URI."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, 40)).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('<img alt="a" src="http://127.0.0.1:9/a.png">', "request: http://127.0.0.1:9/a.png"),
        ('<link rel="stylesheet" href="style.css">', "failed request: file:///"),
        ('<img alt="a" src="data:image/png;base64,AAAA">', "a picture is not shown: a"),
        (f'<img alt="a" style="width: 100px" src="{png(400)}">', "a picture of 400 px is shown at 100 px: a"),
        (f'<img alt="a" style="margin-left: 1200px" src="{png(400)}">', "a picture leaves the window: a"),
        (f'<img src="{png(400)}">', "a picture has no text"),
        ("<script>console.warn('careful')</script>", "console warning: careful"),
        ("<script>lost()</script>", "script error: lost is not defined"),
        ('<a href="#nowhere">b</a>', "a link leads nowhere: #nowhere"),
        ('<div style="width: 1400px">wide</div>', "the page is 14"),
    ],
)
def test_the_check_finds(page: Page, tmp_path: Path, body: str, said: str) -> None:
    (tmp_path / "bad.html").write_text(f'<!doctype html><link rel="icon" href="data:,"><body>{body}</body>')
    assert any(text.startswith(said) for text in problems(page, tmp_path / "bad.html"))
