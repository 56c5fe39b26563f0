from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tiling.errors import UsageError
from tiling.filters import Metrics, Thresholds, measure, verdict
from tiling.settings import TileSettings

DEFAULT = Thresholds()


@pytest.fixture(scope="module")
def real_tiles(shared_data: Path) -> list[np.ndarray]:
    """Every sixth of the PANDA tiles: chosen as tissue by others."""
    paths = sorted((shared_data / "panda_gleason_tiles" / "tiles").rglob("*.jpeg"))[::6]
    return [np.asarray(Image.open(path)) for path in paths]


def why(tile: np.ndarray) -> str:
    return verdict(measure(tile), DEFAULT)


@pytest.mark.parametrize("grey", [220, 240, 255])
def test_glass_is_empty(grey: int) -> None:
    tile = np.full((224, 224, 3), grey, np.uint8)
    assert measure(tile) == Metrics(1.0, 0.0, 0.0)
    assert why(tile) == "empty"


def test_flat_dye_has_no_edges() -> None:
    assert why(np.full((224, 224, 3), (200, 120, 180), np.uint8)) == "edges"


def test_real_tiles_are_kept(real_tiles: list[np.ndarray]) -> None:
    verdicts = [why(tile) for tile in real_tiles]
    assert len(verdicts) > 150
    assert verdicts.count("") >= 0.95 * len(verdicts)


def test_blurred_tiles_are_rejected(real_tiles: list[np.ndarray]) -> None:
    sharp = [tile for tile in real_tiles if why(tile) == ""]
    blurred = [why(cv2.GaussianBlur(tile, (0, 0), 20)) for tile in sharp]
    assert sum(reason in ("edges", "texture") for reason in blurred) >= 0.95 * len(blurred)


def test_order_of_reasons() -> None:
    bad = Metrics(empty=1.0, edges=0.0, texture=0.0)
    assert verdict(bad, DEFAULT) == "empty"
    assert verdict(bad, Thresholds(max_empty=1)) == "edges"
    assert verdict(bad, Thresholds(max_empty=1, min_edges=0)) == "texture"
    assert verdict(bad, Thresholds(max_empty=1, min_edges=0, min_texture=0)) == ""


@given(st.integers(8, 64), st.integers(0, 2**32 - 1))
def test_metrics_stay_in_range(side: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tile = rng.integers(0, 256, (side, side, 3), np.uint8) // rng.integers(1, 9, dtype=np.uint8)
    metrics = measure(tile)
    assert 0 <= metrics.empty <= 1
    assert 0 <= metrics.edges <= 1
    assert 0 <= metrics.texture <= 127.5
    assert measure(tile) == metrics


@pytest.mark.parametrize("name", ["min_tissue", "max_empty", "min_edges", "min_texture"])
@pytest.mark.parametrize("value", [-0.1, 300.0, float("nan")])
def test_impossible_thresholds(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{name} is {value}, must lie in 0 to "):
        Thresholds(**{name: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tile_px", 7), ("tile_px", 5000), ("mpp", 0.01), ("mpp", float("nan")), ("slide_mpp", 20.0),
        ("mpp_tolerance", 1.0), ("mpp_tolerance", -0.1), ("codec", "webp"), ("min_label_share", 1.1),
    ],
)  # fmt: skip
def test_impossible_settings(key: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"{key} is "):
        TileSettings(**{key: value})


def test_settings_survive_json() -> None:
    for settings in (TileSettings(), TileSettings(mpp=None, thresholds=None, codec="zstd", slide_mpp=0.25)):
        assert TileSettings.from_json(settings.to_json()) == settings
