"""``bony demo --quick``, whole, as a real process."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

BONY = Path(sys.executable).with_name("bony")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_quick_demo_runs_the_chain_and_leaves_a_page(tmp_path: Path) -> None:
    done = subprocess.run(
        [BONY, "demo", "--quick", "--out", tmp_path / "demo"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "balanced accuracy" in done.stdout
    page = (tmp_path / "demo/report.html").read_text()
    for heading in ("13 slides, ", "Pretraining", "Features", "Decoder: panda", "Bundle", "Predictions"):
        assert heading in page
    # 4 slides with thumbnail and contact sheet, class bars, curves of the run, confusion matrix, curves of the decoder,
    # the heat map of the slide that was left out
    assert len(re.findall(r"<img ", page)) == 4 * 2 + 4 + 1
    for box in ("store", "run", "features", "result", "bundle", "predictions"):
        subprocess.run([BONY, "verify", tmp_path / "demo" / box], capture_output=True, check=True)
    result = json.loads((tmp_path / "demo/result/results.json").read_text())
    assert result["counts"]["test"]["tiles"] > 0
    again = subprocess.run([BONY, "demo", "--out", tmp_path / "demo"], capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "holds a finished demo" in again.stderr
