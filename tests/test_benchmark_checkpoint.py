"""That the checkpoint benchmark runs and reports: no figure is judged here, machines differ."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_checkpoint_reports_waits_and_memory_of_every_contender(tmp_path: Path) -> None:
    script = str(ROOT / "benchmarks/checkpoint.py")
    command = [sys.executable, "-W", "error", script, "--quick", "--saves", "2", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    for name in ("saver", "torch_save", "floor"):
        assert 0 < report[name]["waits_s"] <= report[name]["stands_s"]
    # Whoever saved other tensors did other work: 16 bytes a parameter of student, teacher and two moments.
    assert report["saver"]["extra_mb"] == pytest.approx(report["bytes"] / 1e6, rel=0.2)
    assert report["saver"]["beside"] > 0
    assert not list(tmp_path.iterdir())
