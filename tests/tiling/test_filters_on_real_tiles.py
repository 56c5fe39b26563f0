"""The defaults on real tiles, and on real tiles that were spoilt: the figures of docs/filters.md, with some air."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from tiling.filters import METRICS, Thresholds, measure, verdicts

DOCS = Path(__file__).resolve().parents[2] / "docs"
STAINED = ("CRC-VAL-HE", "MoNuSeg (40x)", "IHC, DAB and haematoxylin", "StarDist H&E", "CMU-1 SVS")


@pytest.fixture(scope="module")
def figure() -> Iterator[ModuleType]:
    """The script that makes the figures of docs/filters.md."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS))
        yield importlib.import_module("make_filter_figure")


@pytest.fixture(scope="module")
def tissue(figure: ModuleType, shared_data: Path) -> np.ndarray:
    """All PANDA tiles: chosen as tissue by others."""
    return np.asarray(figure.panda_tiles(shared_data))


@pytest.fixture(scope="module")
def some(tissue: np.ndarray) -> np.ndarray:
    return tissue[::8]


def reasons(tiles: np.ndarray) -> np.ndarray:
    return np.array(verdicts(measure(tiles), Thresholds()))


def pen(tiles: np.ndarray) -> np.ndarray:
    return np.asarray(measure(tiles)[:, METRICS.index("pen")])


def test_tissue_is_kept(tissue: np.ndarray) -> None:
    told = reasons(tissue)
    assert len(told) == 994
    assert (told == "").mean() >= 0.995


def test_blue_surgical_ink_is_the_only_reason_to_reject_tissue(tissue: np.ndarray) -> None:
    """Real ink, on the margin of one slide: it makes the largest values, and the only rejected tile."""
    told, values = reasons(tissue), pen(tissue)
    assert set(told) == {"", "pen"}
    inked = tissue[values.argmax()].reshape(-1, 3).astype(int)
    assert (inked[:, 2] > inked[:, 0] + 60).mean() > 0.1
    assert np.sort(values)[-20] < 0.03


def test_other_stains_organs_and_scanners_are_no_ink(figure: ModuleType, shared_data: Path) -> None:
    sets = figure.real_sets(shared_data)
    for name in STAINED:
        assert (reasons(sets[name]) == "").all(), name
        assert pen(sets[name]).max() < 0.08, name
    assert (pen(sets["LC25000 (enlarged)"]) <= 0.1).all()
    assert (reasons(sets["LC25000 (enlarged)"]) == "").mean() > 0.92
    told = reasons(sets["HistoPrep prostate"])
    assert (told == "").mean() > 0.9
    assert set(told) <= {"", "empty", "edges"}


def test_glass_is_empty(figure: ModuleType, shared_data: Path) -> None:
    told = reasons(figure.glass_tiles(shared_data))
    assert len(told) > 300
    assert (told == "empty").mean() >= 0.99


@pytest.mark.parametrize(("sigma", "least", "most"), [(1.5, 0, 0.01), (2.0, 0, 0.05), (3.0, 0.4, 1), (4.0, 0.95, 1)])
def test_what_is_out_of_focus_is_told_by_degree(
    figure: ModuleType, some: np.ndarray, sigma: float, least: float, most: float
) -> None:
    blurred = reasons(figure.blurred(some, sigma))
    assert least <= np.isin(blurred, ["blur", "edges"]).mean() <= most
    assert set(blurred) <= {"", "blur", "edges", "pen"}


@pytest.mark.parametrize("ink", ["blue", "navy", "green", "cyan", "black", "red"])
def test_strokes_of_ink_are_rejected(figure: ModuleType, some: np.ndarray, ink: str) -> None:
    told = reasons(figure.inked(some, ink))
    assert np.isin(told, ["pen", "dark"]).mean() >= 0.95


@pytest.mark.parametrize("share", [0.15, 0.3, 0.6])
def test_black_borders_are_rejected(figure: ModuleType, some: np.ndarray, share: float) -> None:
    assert (reasons(figure.bordered(some, share)) == "dark").all()


def test_a_narrow_border_is_no_reason(figure: ModuleType, some: np.ndarray) -> None:
    assert (reasons(figure.bordered(some, 0.05)) == "").mean() > 0.98


@pytest.mark.slow
def test_table_and_figure_are_those_in_docs(figure: ModuleType, shared_data: Path, tissue: np.ndarray) -> None:
    real = figure.real_sets(shared_data)
    degraded = figure.degraded_sets(tissue[::4], shared_data)
    assert figure.table(real, degraded) in (DOCS / "filters.md").read_text()
    drawn = np.asarray(figure.draw(figure.pools_of(real, degraded)), float)
    stored = np.asarray(Image.open(DOCS / "filters.jpg"), float)
    assert np.abs(drawn - stored).mean() < 3  # JPEG
