"""The report: any boxes to one page that holds everything, says what is wrong, and survives what is missing."""

import base64
import html
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline import boxes, checkpoint, monitor
from pipeline.alarms import episodes
from pipeline.commands import report as command
from pipeline.config import PretrainConfig, flatten
from pipeline.downstream.metrics import classification
from pipeline.features import FeatureDescription
from pipeline.report import runs, stores
from pipeline.report.figures import class_bars
from pipeline.report.page import BoxSection, Fold, Link, Note, Picture, Row, Section, Stack, Table, write_page
from pipeline.report.write import COMPARISONS, SECTIONS, write_report
from tiling import atomic
from tiling.errors import BonyError, DamageError, UsageError
from tiling.index import INDEX, build_index, read_index, slide_folders
from tiling.settings import TileSettings

NAMES = ("background", "healthy", "<script>alert(1)</script>")
ENCODER, STORE = "e" * 64, "5" * 64


def line(step: int, **figures: Any) -> dict[str, Any]:
    return {"step": step, "loss": 6.0, "teacher_entropy": 5.0, "ln_k": math.log(4096), "samples_per_s": 64.0, **figures}


def make_run(path: Path, lines: list[dict[str, Any]], saved: tuple[int, ...] = (), **config: Any) -> Path:
    """A run of 4 steps as bony writes it, but for its tensors."""
    values = flatten(asdict(PretrainConfig())) | {"train.steps": 4} | config
    about = {
        "config": values, "global_batch": 64, "ranks": 2, "store_fingerprint": STORE, "dataset": "panda", "slides": 2,
        "tiles": 640, "tiling": TileSettings().to_json(), "mpp": 0.5, "software": {"bony": "1", "torch": "2"},
        "begins_with": None,
    }  # fmt: skip
    path.mkdir()
    atomic.write_json(path / "run.json", boxes.RUN.describe(about))
    if lines:
        (path / "metrics.jsonl").write_text("".join(json.dumps(values) + "\n" for values in lines))
    for step in saved:
        with atomic.building(checkpoint.step_folder(path, step), path / "checkpoints/work") as folder:
            state = {"step": step, "samples_seen": 64 * step, **about}
            atomic.write_json(folder / "state.json", boxes.CHECKPOINT.describe(state))
            (folder / "teacher.safetensors").write_text(f"teacher {step}")
    return path


def make_features(path: Path, **changes: Any) -> dict[str, Any]:
    about = FeatureDescription("xcit", ENCODER, STORE, "0" * 64, {"head": 8}, (0.5,) * 3, (0.2,) * 3, 0.5, 0.5, False)
    values = replace(about, **changes).to_json()
    path.mkdir()
    atomic.write_json(path / "features.json", values)
    return values


def make_result(path: Path, features: Mapping[str, Any], **changes: Any) -> Path:
    """A result with an absent class, one that is never predicted, and one whose name is a script."""
    truth = np.array([1, 1, 1, 2])
    judged = classification(truth, np.eye(3)[[1, 1, 1, 1]], NAMES)
    part = {"tiles": 4, "slides": 2, "per_class": dict(zip(NAMES, (0, 3, 1), strict=True))}
    record = {"epoch": 1, "train_loss": 1.0, "val_loss": math.nan, "val_accuracy": 0.5, "val_balanced_accuracy": None}
    values = {
        "task": "panda", "protocol": "default", "class_names": NAMES, "seed": 0, "tap": "head", "features": features,
        "counts": {"tiles": 13, "unlabelled": 1, "train": part, "val": part, "test": part},
        "metrics": {"val": judged | {"macro_f1": math.nan}, "test": judged}, "warnings": ["a <b>warning</b>"],
        "fit": {"epochs": 1}, "best_epoch": 1, "history": [record], "software": {"bony": "1"}, **changes,
    }  # fmt: skip
    with atomic.building(path, path.parent / "work") as folder:
        (folder / "results.json").write_text(json.dumps(boxes.RESULT.describe(values)))
    return path


def text(section: Section) -> str:
    """What a section says, table cells by bars."""
    return "\n".join([section.title, section.summary, *section.warnings, *map(_part_text, section.parts)])


def _part_text(part: Any) -> str:
    if isinstance(part, Table):
        rows = [part.columns, *part.rows]
        cells = [" | ".join(cell.text if isinstance(cell, Link) else cell for cell in row) for row in rows]
        return "\n".join([part.caption, *cells])
    if isinstance(part, Picture):
        assert part.size[0] > 100
        return part.caption
    return part.text if isinstance(part, Note) else "\n".join(map(_part_text, part.parts))


def test_the_page_holds_its_pictures_and_fetches_nothing(tmp_path: Path) -> None:
    picture = Picture(class_bars({"healthy": 3, "gleason3": 0}), "Bars <of> classes")
    table = Table("Rows", ("a", "b"), [("1", "<b>"), ("2", Link("there", "sha")), ("3", Link("nowhere", "other"))])
    parts = [Note("a note"), Row([picture, Stack([table])]), Fold("more", [picture])]
    section = Section("Tiles", parts, ["careful & slow"], identities=["sha"])
    write_page(
        tmp_path / "index.html", "Title", ["<subtitle>"], [], [BoxSection("a<b", Path("/x/a<b"), "store", section)]
    )
    page = (tmp_path / "index.html").read_text()
    assert page.count(base64.b64encode(picture.data).decode()) == 2
    for escaped in ("careful &amp; slow", "&lt;b&gt;", "Bars &lt;of&gt; classes", "&lt;subtitle&gt;", "a&lt;b"):
        assert escaped in page
    assert set(re.findall(r'(?:src|href)="([a-z]+:|#)', page)) == {"data:", "#"}
    assert '<a href="#box-1">there</a>' in page
    assert "<td>nowhere" in page  # no section is of that identity


def test_numbers_stand_to_the_right() -> None:
    rows = [("1", "1,200", "3.5 %", "3+4", "-"), ("2", "-", "<0.1 %", "1", "")]
    assert Table("", "abcde", rows).numeric == (False, True, True, False, False)


def test_constants_are_those_of_the_writers() -> None:
    """The report's modules repeat them, because the writers' load torch."""
    assert (runs.METRICS, runs.CHECKPOINTS) == (monitor.METRICS, checkpoint.FOLDER)


def test_every_kind_of_box_is_shown() -> None:
    assert set(COMPARISONS) <= set(SECTIONS) == set(boxes.KINDS)


def test_store(store: Path) -> None:
    section = stores.store_section(store)
    table, about = read_index(store)
    said = text(section)
    assert section.summary == f"2 slides, {len(table)} tiles of 224 px"
    assert list(section.identities) == [about["fingerprint"]]
    assert section.warnings == []
    for folder in slide_folders(store):
        rows = pq.read_table(folder / "rows.parquet", columns=["kept"])["kept"].to_pylist()
        assert re.search(rf"^{folder.name} \| .* \| {len(rows)} \| {sum(rows)} \| ", said, re.MULTILINE)
        assert f"{folder.name}: some of its tiles" in said
    assert re.search(rf"^kept \| {len(table)} \|", said, re.MULTILINE)
    assert "tissue on less than 0.25 of the tile" in said


def test_large_store_has_a_short_table(store: Path, tmp_path: Path) -> None:
    first, second = slide_folders(store)
    for number in range(60):
        shutil.copytree(first if number % 2 else second, tmp_path / f"slides/s{number:02}")
    shutil.copy(store / "store.json", tmp_path)
    entries = [{"slide_id": f"q{number}", "left_out": number > 1, "reason": "no tissue"} for number in range(50)]
    (tmp_path / "quarantine.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    section = stores.store_section(tmp_path)
    said = text(section)
    assert "Slides with the fewest tiles (40 of 60 are shown)" in said
    assert "Slides left out or damaged (40 of 50 are shown)" in said
    assert len(re.findall(r"^s\d\d \|", said, re.MULTILINE)) == len(re.findall(r"^q\d+ \|", said, re.MULTILINE)) == 40
    kept = [int(words.split(" | ")[6]) for words in re.findall(r"^s\d\d \|.*", said, re.MULTILINE)]
    assert kept == sorted(kept)
    assert kept[0] < kept[-1]
    assert any("no index" in warning for warning in section.warnings)
    assert "48 slides could not be tiled and are left out" in section.warnings
    assert "2 slides are damaged in part: some tiles are missing" in section.warnings


def test_damage_in_a_store_is_named(store: Path, tmp_path: Path) -> None:
    box = tmp_path / "store"
    shutil.copytree(store, box)
    slide = slide_folders(box)[0]
    (slide / "thumbnail.jpg").write_bytes(b"\xff\xd8\xff")
    section = stores.store_section(box)
    assert [warning for warning in section.warnings if f"{slide.name}/thumbnail.jpg" in warning]
    (box / INDEX).write_bytes(b"")
    assert "sha256 differs" in stores.store_section(box).warnings[0]
    build_index(box)
    (slide / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(DamageError, match=rf"{slide.name}/rows.parquet"):
        write_report([box], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_store_without_slides(store: Path, tmp_path: Path) -> None:
    shutil.copy(store / "store.json", tmp_path)
    assert "No slide is finished yet." in text(stores.store_section(tmp_path))


def test_finished_run(tmp_path: Path) -> None:
    section = runs.run_section(make_run(tmp_path / "run", [line(2), line(4)], (2, 4)))
    said = text(section)
    assert section.warnings == []
    assert section.summary.endswith("4 of 4 steps")
    assert "256 (0.40 epochs)" in said  # 4 steps of 64 of 640 tiles
    assert "4 s, 64.0 tiles/s" in said
    assert "train.steps | 4 | 30000" in said
    assert list(section.identities) == [
        atomic.sha256_file(tmp_path / f"run/checkpoints/step-0000000{step}/teacher.safetensors") for step in (4, 2)
    ]


@pytest.mark.parametrize(
    ("lines", "saved", "warned"),
    [
        ([], (), ["not finished: 0 of 4 steps, there is no checkpoint yet", "no figures are logged yet"]),
        ([line(3)], (2,), ["not finished: 3 of 4 steps, the newest checkpoint is of step 2"]),
        ([line(4, loss=None)], (4,), ["the loss is not finite in 1 logged line"]),
        ([line(4, loss=math.nan, kl=math.inf)], (4,), []),
        ([{"step": 4}], (4,), ["the loss is not finite"]),
        ([line(4, samples_per_s=None)], (4,), []),
    ],
)
def test_run_warnings(tmp_path: Path, lines: Any, saved: Any, warned: list[str]) -> None:
    section = runs.run_section(make_run(tmp_path / "run", lines, saved))
    assert len(section.warnings) == len(warned)
    assert all(part in warning for part, warning in zip(warned, section.warnings, strict=True))
    assert text(section)


def test_alarms_are_named_with_their_steps(tmp_path: Path) -> None:
    """Those of pipeline.alarms, which are not judged in the warm-up; the one that is over says so."""
    steps = range(2, 122, 2)
    uniform = {step: {"teacher_entropy": 8.317} if 40 < step < 80 else {} for step in steps}
    lines = [line(step, data_wait_share=0.5 if step > 20 else 0.0, **uniform[step]) for step in steps]
    config = {"train.steps": 120, "optim.warmup_steps": 30}
    section = runs.run_section(make_run(tmp_path / "run", lines, (120,), **config))
    first, second = section.warnings
    assert first.startswith("alarm starved, at steps 30 to 120: 50 % of the time is spent waiting for tiles; raise")
    assert re.match(r"alarm uniform_teacher, at steps 52 to 86, over now: the teacher's entropy .*; lower", second)
    found = episodes(lines, 30)
    assert [(one.alarm.name, one.first_step, one.last_step) for one in found] == [
        ("starved", 30, 120), ("uniform_teacher", 52, 86),
    ]  # fmt: skip
    many = [line(step, skipped_tiles=step // 10 % 2, skipped_share=0.0) for step in steps]
    section = runs.run_section(make_run(tmp_path / "often", many, (120,), **config))
    assert section.warnings[0].startswith(
        "alarm damaged_tiles, 3 times before and at steps 70 to 78, 90 to 98, 110 to 118"
    )


def test_a_run_with_a_probe(tmp_path: Path) -> None:
    judged = [{"step": 0, "knn": 0.4, "knn_chance": 1 / 3, "probe_rankme": 9.0, "alarms": []}, line(2)]
    used = {"mfu": 0.1234, "gflop_per_tile": 121.1, "peak_tflops": 989.0, "peak_is_measured": 0.0, "memory_gib": 9.96}
    judged += [line(4, knn=0.62, knn_chance=1 / 3, probe_rankme=20.0, **used)]
    section = runs.run_section(make_run(tmp_path / "run", judged, (4,)))
    assert section.warnings == []  # the line of step 0 has no loss, and needs none
    assert "kNN balanced accuracy | 0.620 at step 4, 0.400 at step 0, chance 0.333" in text(section)
    assert "utilisation | 12.3 % of 989 TFLOP/s (data sheet), at 121.1 GFLOP a tile" in text(section)
    assert "memory | 10.0 GiB at most" in text(section)
    said = text(runs.compare_runs({"a": tmp_path / "run", "b": make_run(tmp_path / "b", [line(2)])}))
    assert "knn | 0.620 | -" in said
    assert "nearest neighbours" in said


def test_damage_in_a_run_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [line(1), line(4)], (2, 3, 4))
    metrics = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(metrics + '{"step": 5, "lo')
    assert runs.run_section(run).warnings == []  # what a kill cut short
    (run / "metrics.jsonl").write_text('{"step\n' + metrics)
    (run / "checkpoints/step-00000002/state.json").write_text("{}")
    (run / "checkpoints/step-00000003/teacher.safetensors").unlink()
    first, second, third = runs.run_section(run).warnings
    assert "1 line of metrics.jsonl cannot be read" in first
    assert "step-00000002/state.json: sha256 differs" in second
    assert "step-00000003/teacher.safetensors: missing" in third


def test_runs_compared(tmp_path: Path) -> None:
    paths = {
        "a": make_run(tmp_path / "a", [line(1), line(2)]),
        "b": make_run(tmp_path / "b", [line(1)], **{"optim.lr": 0.1, "method.out_dim": 64}),
        "c": make_run(tmp_path / "c", []),
    }
    said = text(runs.compare_runs(paths))
    assert "optim.lr | 0.0005 | 0.1 | 0.0005" in said
    assert "steps done | 2 | 1 | 0" in said
    assert "views.global_crops" not in said
    assert "not comparable" in said


def test_features(tmp_path: Path) -> None:
    make_features(tmp_path / "features", mpp=1.0, mpp_override=True)
    section = SECTIONS["features"](tmp_path / "features")
    assert list(section.warnings) == ["no slide is encoded yet", "tiles have 1 um/px, the encoder was trained at 0.5"]
    assert "head (8)" in text(section)


def test_result_with_absent_classes_and_values_that_are_not_finite(tmp_path: Path) -> None:
    said = text(SECTIONS["result"](make_result(tmp_path / "result", make_features(tmp_path / "features"))))
    assert "test | 4 | 2 | 0.750 | 0.500 | 0.429" in said
    assert "val | 4 | 2 | 0.750 | 0.500 | -" in said
    assert "background | 0 | 0 | 0 | - | - | -" in said
    assert "Always answering healthy would have accuracy 0.750 and balanced accuracy 0.500" in said


def test_report_of_everything(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    features = make_features(tmp_path / "features")
    make_run(tmp_path / "run", [line(4)], (4,))
    for name in ("one", "two"):
        make_result(tmp_path / name, features)
    (tmp_path / "report.html").write_text("an older page")
    words = ["one", str(store), "run", "two", "features", "./run", "--title", "Mine & yours"]
    assert command.run(words) == 0
    page = (tmp_path / "report.html").read_text()
    assert "<h1>Mine &amp; yours</h1>" in page
    assert "<script" not in page
    assert html.escape(NAMES[2]) in page
    assert page.count('<section id="box-') == 5  # the run was named twice
    assert "Results compared" in page
    assert "Runs compared" not in page
    assert page.count("a &lt;b&gt;warning&lt;/b&gt;") == 4  # at the top and in the section, of two results
    assert page.count('<a href="#box-5">tap head</a>') == 2
    anchors = set(re.findall(r'href="#([^"]+)"', page))
    assert anchors <= set(re.findall(r' id="([^"]+)"', page))


@pytest.mark.parametrize("name", ["run.json", "results.json", "features.json", "store.json"])
def test_a_broken_box_is_named_in_one_line(tmp_path: Path, name: str) -> None:
    for content in ("{", "[]", "{}", "\xff"):
        (tmp_path / name).write_text(content, encoding="latin-1")
        with pytest.raises(BonyError, match=name) as raised:
            write_report([tmp_path], tmp_path.parent / "report.html")
        assert raised.value.exit_code == 1
        assert "\n" not in str(raised.value)


def test_a_box_that_lacks_something_is_named(tmp_path: Path) -> None:
    result = make_result(tmp_path / "result", {}, counts={})
    with pytest.raises(BonyError, match="result: does not hold what a result does") as raised:
        write_report([result], tmp_path / "report.html")
    assert raised.value.exit_code == 1


def test_a_changed_result_is_refused(tmp_path: Path) -> None:
    result = make_result(tmp_path / "result", make_features(tmp_path / "features"))
    file = result / "results.json"
    file.write_text(file.read_text().replace('"accuracy": 0.75', '"accuracy": 0.95'))
    with pytest.raises(DamageError, match=r"results.json: sha256 differs"):
        write_report([result], tmp_path / "report.html")


def test_wrong_use(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [], (2,))
    for paths, out in (
        ([tmp_path / "gone"], tmp_path / "report.html"),
        ([tmp_path], tmp_path / "report.html"),
        ([run / "checkpoints/step-00000002"], tmp_path / "report.html"),
        ([run], tmp_path),
        ([run], run / "report.html"),
    ):
        with pytest.raises(UsageError):
            write_report(paths, out)
    with pytest.raises(UsageError):
        command.run([])


def test_the_report_does_not_load_torch(store: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "run", [line(4)], (4,))
    make_result(tmp_path / "result", make_features(tmp_path / "features"))
    program = "import sys\nfrom pipeline.commands.report import run\nrun(sys.argv[1:])\nprint(*sys.modules)"
    words = [str(store), "run", "features", "result"]
    done = subprocess.run(
        [sys.executable, "-c", program, *words], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "matplotlib" in done.stdout.split()
    assert "torch" not in done.stdout.split()
