"""`bony predict` as it is typed: what it prints, its exit codes, what it refuses."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pipeline.bundle import Bundle
from pipeline.commands.predict import run
from tiling.errors import UsageError
from tiling.phantom import make_slide

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, make_bundle: Callable[..., Bundle]) -> None:
    """`--bundle` gives the bundle in memory."""
    monkeypatch.setattr("pipeline.bundle.open_bundle", lambda path, device: make_bundle())


@pytest.mark.usefixtures("opened")
def test_the_command_prints_a_table_and_says_where_things_are(
    folder_of_slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(folder_of_slides), "--bundle", "bundle", "--out", str(tmp_path / "out")]
    assert run(words) == 0
    said = capsys.readouterr()
    assert "1/3 a: " in said.err
    for word in ("slide", "mm2", "gleason5", "highest grade", "100.0%", str(tmp_path / "out")):
        assert word in said.out
    (folder_of_slides / "z.tiff").write_bytes(b"no slide")
    assert run(words) == 3
    said = capsys.readouterr()
    assert "quarantine.jsonl: 1 slides left out or damaged" in said.out
    assert "1/4" not in said.err
    Image.fromarray(make_slide(3, "4", size=(512, 512)).image).save(tmp_path / "scan.png")
    assert run([str(tmp_path / "scan.png"), *words[1:], "--slide-mpp", "0.25", "--batch", "3"]) == 0
    assert json.loads((tmp_path / "out/scan/summary.json").read_bytes())["slide_mpp"] == 0.25


@pytest.mark.usefixtures("opened")
def test_pictures_may_not_land_among_the_slides(folder_of_slides: Path) -> None:
    with pytest.raises(UsageError, match="would count as slides"):
        run([str(folder_of_slides), "--bundle", "bundle", "--out", str(folder_of_slides / "predictions")])


def test_help_needs_no_torch() -> None:
    program = (
        "import sys, pipeline.commands.predict as command\n"
        "try: command.run(['--help'])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "bony predict slide.svs --bundle bundle --out predictions" in done.stdout
