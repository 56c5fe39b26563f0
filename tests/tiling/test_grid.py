import doctest
import importlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiling.errors import GridError
from tiling.grid import Level, choose_cut, tile_corners, to_level0

SIDES = st.integers(1, 1500)
PYRAMID = [Level(0, 8192, 4096, 1.0), Level(1, 2048, 1024, 4.0), Level(2, 512, 256, 16.0)]


@pytest.mark.parametrize("module", ["grid", "labels", "tissue", "datasets"])
def test_examples_in_docstrings(module: str) -> None:
    results = doctest.testmod(importlib.import_module(f"tiling.{module}"))
    assert results.attempted > 0
    assert results.failed == 0


@given(width=SIDES, height=SIDES, span=st.integers(5, 500), margin=st.tuples(st.integers(0, 99), st.integers(0, 99)))
def test_corners(width: int, height: int, span: int, margin: tuple[int, int]) -> None:
    corners = tile_corners(width, height, span, margin)
    columns, rows = (max(0, (side - first) // span) for side, first in zip((width, height), margin, strict=True))
    assert corners.dtype == np.int64
    assert corners.shape == (rows * columns, 2)
    if not len(corners):
        return
    assert (corners >= margin).all()
    assert (corners + span <= (width, height)).all()
    # On one grid and all different: none overlaps another.
    assert not ((corners - margin) % span).any()
    assert len(np.unique(corners, axis=0)) == len(corners)
    order = np.lexsort((corners[:, 0], corners[:, 1]))
    assert (order == np.arange(len(corners))).all()


def test_span_of_nothing() -> None:
    with pytest.raises(GridError, match="tile span of 0 px, at least 1 is needed"):
        tile_corners(100, 100, 0)


def test_level0_corners_are_rounded() -> None:
    level = Level(1, 100, 100, 4.003)
    assert to_level0(np.array([[0, 224], [448, 0]]), level).tolist() == [[0, 897], [1793, 0]]
    crooked = Level(1, 100, 100, 4.003, (4.0, 4.006))
    assert to_level0(np.array([[448, 448]]), crooked).tolist() == [[1792, 1795]]


@given(
    slide_mpp=st.floats(0.05, 10),
    target=st.floats(0.05, 10),
    tolerance=st.floats(0, 0.5),
    ratios=st.lists(st.sampled_from([2, 3, 4]), max_size=4),
)
def test_cut_is_never_enlarged(slide_mpp: float, target: float, tolerance: float, ratios: list[int]) -> None:
    downsamples = np.cumprod([1, *ratios]).tolist()
    levels = [Level(number, 1 << 14, 1 << 14, float(ratio)) for number, ratio in enumerate(downsamples)]
    scales = [slide_mpp * ratio for ratio in downsamples]
    near = [scale for scale in scales if abs(scale / target - 1) <= tolerance]
    if not near and scales[0] >= target:
        with pytest.raises(GridError) as raised:
            choose_cut(levels, slide_mpp, 224, target, tolerance)
        for part in (f"{scales[0]:.4g} um/px", f"{target:.4g} um/px", f"{tolerance:.0%}", "choose a coarser --mpp"):
            assert part in str(raised.value)
        return
    cut = choose_cut(levels, slide_mpp, 224, target, tolerance)
    scale = slide_mpp * cut.level.downsample
    assert cut.mpp == pytest.approx(scale * cut.span / 224)
    if near:
        assert not cut.resampled
        assert abs(scale / target - 1) == min(abs(other / target - 1) for other in near)
    else:
        assert scale == max(other for other in scales if other < target)
        assert cut.span >= 224
        assert abs(cut.mpp / target - 1) <= 0.5 / 224


def test_within_tolerance_a_level_is_used_as_it_is() -> None:
    cut = choose_cut(PYRAMID, 0.46, 224, 0.5, 0.12)
    assert (cut.level.index, cut.span, cut.resampled) == (0, 224, False)
    assert cut.mpp == 0.46
    cut = choose_cut(PYRAMID, 0.26, 224, 1.0, 0.12)
    assert (cut.level.index, cut.span) == (1, 224)
    assert cut.mpp == pytest.approx(1.04)


def test_outside_tolerance_the_nearest_finer_level_is_resampled() -> None:
    cut = choose_cut(PYRAMID, 0.25, 224, 0.5, 0.12)
    assert (cut.level.index, cut.span, cut.px, cut.resampled) == (0, 448, 224, True)
    assert cut.mpp == 0.5
    cut = choose_cut(PYRAMID, 0.25, 224, 2.0, 0.12)
    assert (cut.level.index, cut.span) == (1, 448)


def test_native_is_level_0() -> None:
    cut = choose_cut(PYRAMID, 0.2282, 224, None, 0.12)
    assert (cut.level.index, cut.span, cut.mpp) == (0, 224, 0.2282)


@pytest.mark.parametrize("mpp", [0.0, -1.0, 0.049, 10.1, 2540.0, float("nan"), float("inf")])
def test_absurd_mpp(mpp: float) -> None:
    with pytest.raises(GridError, match=r"outside 0\.05 to 10\.0; give the true one with --slide-mpp"):
        choose_cut(PYRAMID, mpp, 224, 0.5, 0.12)


@pytest.mark.parametrize(("slide", "level", "error"), [(1.0, "1 um/px", "enlarged"), (0.57, "0.57 um/px", "enlarged")])
def test_too_coarse(slide: float, level: str, error: str) -> None:
    with pytest.raises(GridError) as raised:
        choose_cut(PYRAMID, slide, 224, 0.5, 0.12)
    text = str(raised.value)
    assert f"finest level has {level}, coarser than the 0.5 um/px asked for (tolerance 12%)" in text
    assert "tiles are never enlarged: choose a coarser --mpp or --mpp native" in text
    assert error in text
