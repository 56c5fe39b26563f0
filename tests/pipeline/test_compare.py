"""``bony compare``: cells trained, judged and ranked for real; killed, continued, spread, refused."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cli import main
from pipeline.commands.parser import pretrain_config
from pipeline.compare import COMPARISON, JUDGED, TABLE, Ranked, best_first, table
from pipeline.pretrain import pretrain
from pipeline.sweep import CELLS, SEED, plan
from tiling import atomic, datasets, phantom
from tiling.errors import UsageError
from tiling.run import tile
from tiling.settings import TileSettings

SWEEP = Path(__file__).parents[2] / "jobs/configs/sweep_out_dim.yaml"
GRID = {"method.out_dim": [16, 64]}
NAMES = ["out_dim-16", "out_dim-64"]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two phantom slides of each grade."""
    root = tmp_path_factory.mktemp("labelled")
    phantom.make_cohort(root, slides_per_grade=2, size=(896, 896), karolinska=0)
    dataset = datasets.panda(root)
    tile(dataset, root / "store", TileSettings(mpp=dataset.mpp))
    return root / "store"


@pytest.fixture
def made_plan(tmp_path: Path, words: Callable[..., list[str]]) -> Callable[..., Path]:
    """A plan whose base is the tiny run: made_plan(grid, more)."""

    def make(grid: dict[str, list[Any]], **more: object) -> Path:
        pairs = zip(*[iter(words(tmp_path))] * 2, strict=True)
        values = {key.removeprefix("--"): yaml.safe_load(value) for key, value in pairs}
        del values["data"], values["out"]
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(values | {"monitor.probe_tiles": 16}))
        (tmp_path / "plan.yaml").write_text(
            yaml.safe_dump({"base": "base.yaml", "grid": grid, **more}, sort_keys=False)
        )
        return tmp_path / "plan.yaml"

    return make


def options(file: Path, store: Path, out: Path, *more: str) -> list[str]:
    return ["compare", "--config", str(file), "--data", str(store), "--out", str(out), *more]


def digests(out: Path) -> dict[str, str]:
    """Everything of the cells, and when it was written."""
    files = sorted(path for part in (CELLS, JUDGED) for path in (out / part).rglob("*") if path.is_file())
    return {str(path.relative_to(out)): f"{atomic.sha256_file(path)} {path.stat().st_mtime_ns}" for path in files}


# ---- the plan --------------------------------------------------------------------------------------------------------


def test_the_repository_s_sweep_is_four_runs_of_the_report(tmp_path: Path) -> None:
    cells = plan(SWEEP, tmp_path / "store", tmp_path / "out")
    assert [cell.config.method.out_dim for cell in cells] == [1024, 2048, 4096, 8192]
    report = pretrain_config(["--config", str(SWEEP.parent / "dino_xcit_m24.yaml")])
    assert {(cell.config.model, cell.config.views, cell.config.optim, cell.config.train) for cell in cells} == {
        (report.model, report.views, report.optim, report.train)
    }
    assert [cell.run for cell in cells] == [tmp_path / "out" / CELLS / cell.name for cell in cells]


def test_set_then_overrides_then_grid(made_plan: Callable[..., Path], tmp_path: Path) -> None:
    file = made_plan(
        {"views.global_scale": [[0.3, 1.0], [0.5, 1.0]], SEED: [0, 1]}, set={"train.steps": 7, "optim.lr": 1e-4}
    )
    cells = plan(file, tmp_path / "store", tmp_path / "out", ["--train.steps", "9"])
    assert [cell.name for cell in cells] == [
        f"global_scale-{low}-1.0_seed-{seed}" for low in (0.3, 0.5) for seed in (0, 1)
    ]
    assert {(cell.config.train.steps, cell.config.optim.lr) for cell in cells} == {(9, 1e-4)}
    assert [cell.config.views.global_scale[0] for cell in cells] == [0.3, 0.3, 0.5, 0.5]
    assert [cell.config.train.seed for cell in cells] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("text", "overrides", "says"),
    [
        ("base: base.yaml\ngrid: {method.out_dims: [16]}", [], "out_dims"),
        ("base: base.yaml\ngrid: {method.out_dim: [16, many]}", [], "method.out_dim"),
        ("base: base.yaml\ngrid: {method.out_dim: [16, 1]}", [], "method.out_dim is 1, must be 2 or more"),
        ("base: base.yaml\ngrid: {method.out_dim: 16}", [], "must be a list"),
        ("base: base.yaml\ngrid: {method.out_dim: [16, 16]}", [], "two cells would be called out_dim-16"),
        ("base: base.yaml\ngrid: {out: [a, b]}", [], "give it as --out"),
        ("base: base.yaml\ngrids: {}\ngrid: {train.seed: [0]}", [], "no key 'grids'"),
        ("base: gone.yaml\ngrid: {train.seed: [0]}", [], "gone.yaml"),
        ("base: base.yaml\nset: 5\ngrid: {train.seed: [0]}", [], "set is 5"),
        ("base: base.yaml", [], "is no plan"),
        ("base: [", [], "cannot be read"),
        ("base: base.yaml\ngrid: {train.seed: [0]}", ["--train.seed", "3"], "--train.seed is what this comparison"),
        ("base: base.yaml\ngrid: {train.seed: [0]}", ["--train.stepz", "3"], "stepz"),
    ],
)
def test_wrong_plans_are_refused_before_anything_runs(
    made_plan: Callable[..., Path],
    store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str,
    overrides: list[str],
    says: str,
) -> None:
    file = made_plan(GRID)
    file.write_text(text)
    assert main(options(file, store, tmp_path / "out", *overrides)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error
    assert not (tmp_path / "out").exists()


def test_plan_option_writes_configs_that_are_the_cells(
    made_plan: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = made_plan(GRID)
    assert main(options(file, tmp_path / "none", tmp_path / "out", "--plan")) == 0
    written = capsys.readouterr().out.split()
    cells = plan(file, tmp_path / "none", tmp_path / "out")
    assert [pretrain_config(["--config", path]) for path in written] == [cell.config for cell in cells]


# ---- for real --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
def test_cells_are_trained_judged_ranked_and_kept(
    made_plan: Callable[..., Path], labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In two parts, the second cell trained elsewhere; a second time nothing is done; a new value is added."""
    file, out = made_plan(GRID, set={"train.steps": 1}), tmp_path / "out"
    pretrain(plan(file, labelled, out)[1].config)  # as torchrun on DIR/configs would
    elsewhere = digests(out)
    assert main(options(file, labelled, out, "--part", "1/2")) == 0
    assert "| 0 of 1 |" in (out / TABLE).read_text()
    assert main(options(file, labelled, out, "--part", "2/2")) == 0
    done = digests(out)
    assert {name: done[name] for name in elsewhere} == elsewhere
    capsys.readouterr()

    assert main(options(file, labelled, out)) == 0
    said = capsys.readouterr().out
    assert digests(out) == done
    ranked = COMPARISON.read(out)["ranked"]
    figures = [line["judged"][0]["knn"] for line in ranked]
    assert sorted(line["varied"]["method.out_dim"] for line in ranked) == [16, 64]
    assert figures == sorted(figures, reverse=True)
    assert all(0 <= figure <= 1 for figure in figures)
    assert {line["judged"][0]["knn_chance"] for line in ranked} == {0.25}  # healthy tissue, Gleason 3, 4 and 5
    assert (out / TABLE).read_text() in said
    for line in ranked:
        assert f"{line['varied']['method.out_dim']} | " in said
        assert f"{line['judged'][0]['knn']:.3f}" in said
    assert "losses do not compare" in said
    assert "One seed each" in said

    assert main(options(file, labelled, out, "--monitor.probe_tiles", "12")) == 0  # judged again, by another probe
    changed = {name for name, digest in digests(out).items() if digest != done[name]}
    assert changed == {f"{JUDGED}/{name}.json" for name in NAMES}

    assert main(options(made_plan({"method.out_dim": [16, 64, 32]}, set={"train.steps": 1}), labelled, out)) == 0
    now = digests(out)
    assert {name for name in done if now[name] != done[name]} == changed
    assert len(COMPARISON.read(out)["ranked"]) == 3

    assert main(options(file, labelled, out, "--optim.lr", "0.001")) == 2  # another base for the same cells
    assert "cell was started with another optim.lr" in capsys.readouterr().err
    assert digests(out) == now


@pytest.mark.usefixtures("one_thread")
def test_a_cell_that_fails_does_not_keep_the_others(
    made_plan: Callable[..., Path], labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    file = made_plan({"views.preset": ["wild", "original"]}, set={"train.steps": 1})
    assert main(options(file, labelled, out)) == 1
    assert "1 of 2 cells failed; preset-wild" in capsys.readouterr().err
    first, second = COMPARISON.read(out)["ranked"]
    assert (first["varied"], len(first["judged"])) == ({"views.preset": "original"}, 1)
    assert (second["varied"], second["judged"]) == ({"views.preset": "wild"}, [])


def test_a_store_that_cannot_judge_is_refused_before_anything_runs(
    made_plan: Callable[..., Path], other_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options(made_plan(GRID), other_store, tmp_path / "out")) == 2
    assert "labelled tiles of two classes" in capsys.readouterr().err
    assert not (tmp_path / "out" / CELLS).exists()


@pytest.mark.usefixtures("one_thread")
def test_cells_of_other_ranks_do_not_compare_but_are_judged_together(
    made_plan: Callable[..., Path], labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice the samples a step, as from two ranks: RUNs that one process could not continue."""
    file, out = made_plan(GRID, set={"train.steps": 1}), tmp_path / "out"
    for number, cell in enumerate(plan(file, labelled, out)):
        pretrain(replace(cell.config, train=replace(cell.config.train, batch_per_rank=4)))
        trained = digests(out)
        assert main(options(file, labelled, out)) == (0 if number else 2)
        assert {name: digests(out)[name] for name in trained} == trained
    assert "out_dim-16 is one of 2 ranks, out_dim-64 of 1" in capsys.readouterr().err
    assert all(line["judged"] for line in COMPARISON.read(out)["ranked"])


@pytest.mark.slow
def test_killed_in_the_second_cell_it_keeps_the_first_and_continues_the_second(
    made_plan: Callable[..., Path], labelled: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    out = tmp_path / "out"
    command = options(made_plan(GRID, set={"train.steps": 4, "checkpoint.every": 1}), labelled, out)
    child = subprocess.Popen([sys.executable, "-m", "pipeline.cli", *command], env=environment)
    try:
        second = out / CELLS / NAMES[1] / "checkpoints"
        end = time.monotonic() + 120
        while not (second / "latest").exists():
            assert child.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    first = {name: digest for name, digest in digests(out).items() if NAMES[0] in name}
    assert (out / JUDGED / f"{NAMES[0]}.json").exists()
    assert not (out / JUDGED / f"{NAMES[1]}.json").exists()
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *command], env=environment, capture_output=True, text=True, check=True
    )
    assert "continuing from" in done.stderr
    assert f"cell {NAMES[0]}" not in done.stderr
    assert {name: digest for name, digest in digests(out).items() if NAMES[0] in name} == first
    assert all(line["judged"] for line in COMPARISON.read(out)["ranked"])


# ---- the table -------------------------------------------------------------------------------------------------------


def judged(knn: float | None, **more: float | None) -> dict[str, Any]:
    return {"knn": knn, "knn_chance": 0.25, "probe_rankme": 20.0, "loss": 7.5, **more}


def test_table_of_several_seeds_some_missing() -> None:
    lines = [
        Ranked({"method.out_dim": 4096}, [judged(None, probe_rankme=None, loss=None)], 2),
        Ranked({"method.out_dim": 2048}, [judged(0.4)], 2),
        Ranked({"method.out_dim": 8192}, [], 2),
        Ranked({"method.out_dim": 1024}, [judged(0.5), judged(0.7)], 2),
        Ranked({"method.out_dim": 512}, [judged(0.6), judged(0.6)], 2),
    ]
    text = table(best_first(lines))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == ["rank", "method.out_dim", "probe accuracy", "seeds", "RankMe", "loss"]
    assert rows[2:] == [
        ["1", "1024", "0.600 ± 0.141", "2", "20.0", "7.500"],
        ["1", "512", "0.600 ± 0.000", "2", "20.0", "7.500"],
        ["3", "2048", "0.400", "1 of 2", "20.0", "7.500"],
        ["-", "4096", "-", "1 of 2", "-", "-"],
        ["-", "8192", "-", "0 of 2", "-", "-"],
    ]
    assert len({len(line) for line in text.splitlines() if line.startswith("|")}) == 1
    assert "chance 0.250" in text
    assert "One seed each" not in text


def test_compare_under_torchrun_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pipeline.commands import compare

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="one process"):
        compare.run(options(SWEEP, tmp_path, tmp_path)[1:])
