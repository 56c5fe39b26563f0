"""The filters' arithmetic: each metric against a plain definition, each verdict against its threshold."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiling import filters
from tiling.errors import UsageError
from tiling.filters import METRICS, REASONS, Thresholds, measure, verdicts
from tiling.settings import TileSettings

DEFAULT = Thresholds()
WHITE, PINK, BLACK = (245, 243, 244), (220, 150, 190), (8, 5, 9)


def flat(colour: tuple[int, int, int], px: int = 224) -> np.ndarray:
    return np.full((px, px, 3), colour, np.uint8)


def metric(tile: np.ndarray, name: str) -> float:
    return float(measure(tile[None])[0, METRICS.index(name)])


def why(tile: np.ndarray) -> str:
    return verdicts(measure(tile[None]), DEFAULT)[0]


def grain(seed: int = 0, px: int = 224, coarse: int = 4) -> np.ndarray:
    """Pink with blobs of ``coarse`` pixels: sharp, and full of edges."""
    rng = np.random.default_rng(seed)
    blobs = rng.integers(0, 2, (px // coarse + 1,) * 2).repeat(coarse, 0).repeat(coarse, 1)[:px, :px]
    return np.where(blobs[..., None], PINK, (90, 50, 130)).astype(np.uint8)


def by_hand(tile: np.ndarray) -> dict[str, float]:
    """The metrics, pixel by pixel and window by window, as the module's text defines them."""
    side = len(tile) // 4
    small = np.array(cv2.resize(tile[: side * 4, : side * 4], (side * 2,) * 2, interpolation=cv2.INTER_AREA))
    half, quarter = small, np.array(cv2.resize(small, (side, side), interpolation=cv2.INTER_AREA))
    colours = quarter.astype(int).reshape(-1, 3)
    low, high = colours.min(1), colours.max(1)
    red, green, blue = colours.T
    dark = high < 30
    cold = (green > np.rint(1.2 * red + 3)) & (high - low > 20)
    navy = (red < 90) & (blue - red > 40) & (red - green < 12)
    hot = (red > 3 * np.maximum(green, blue)) & (red > 100)
    black = (high < 90) & (high - low < 30) & ~dark
    grey, fine = (cv2.cvtColor(one, cv2.COLOR_RGB2GRAY).astype(float) for one in (quarter, half))
    across, down = (cv2.Sobel(grey, cv2.CV_64F, *order)[1:-1, 1:-1] / 8 for order in ((1, 0), (0, 1)))
    window = min(7, side)
    steps = range(0, side - window + 1, window)
    texture = np.mean([grey[y : y + window, x : x + window].std() for y in steps for x in steps])
    bend = cv2.Laplacian(fine, cv2.CV_64F)[1:-1:8, 1:-1]
    return {
        "empty": ((low >= 215) & (high - low <= 18)).mean(),
        "dark": dark.mean(),
        "pen": (cold | navy | hot | black).mean(),
        "edges": (np.hypot(across, down) > 12).mean(),
        "texture": float(texture),
        "sharpness": float(np.sqrt((bend**2).mean()) / max(texture, 1)),
    }


@given(st.integers(4, 16), st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_metrics_are_what_they_are_defined_as(quarter: int, seed: int, coarse: int) -> None:
    rng = np.random.default_rng(seed)
    side = 4 * quarter
    tile = rng.integers(0, 256, (side // coarse + 1, side // coarse + 1, 3), np.uint8)
    tile = tile.repeat(coarse, 0).repeat(coarse, 1)[:side, :side]
    if rng.integers(2):
        tile = np.where(rng.integers(0, 2, (side, side, 1)) > 0, rng.integers(180, 256, 3), tile // 6).astype(np.uint8)
    expected = by_hand(tile)
    found = dict(zip(METRICS, measure(tile[None])[0].tolist(), strict=True))
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)


@given(st.integers(16, 90), st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_a_tile_is_measured_alone(px: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tiles = rng.integers(0, 256, (count, px, px, 3), np.uint8) // rng.integers(1, 9, (count, 1, 1, 1), np.uint8)
    together = measure(tiles)
    assert together.dtype == np.float32
    assert together.shape == (count, len(METRICS))
    assert np.isfinite(together).all()
    assert (together[:, :4] >= 0).all()
    assert (together[:, :4] <= 1).all()
    for number, tile in enumerate(tiles):
        assert np.array_equal(measure(tile[None])[0], together[number])
    shuffled = rng.permutation(count)
    assert np.array_equal(measure(tiles[shuffled]), together[shuffled])


@pytest.mark.parametrize("count", [1, 3, 8, 40])
def test_batches_of_any_size_give_the_same_bits(count: int) -> None:
    tiles = np.stack([grain(seed, coarse=2 + seed % 5) for seed in range(40)])
    parts = [measure(tiles[start : start + count]) for start in range(0, 40, count)]
    assert np.array_equal(np.concatenate(parts), measure(tiles))


@pytest.mark.parametrize("count", [0, 20_000])
def test_no_tile_and_very_many_small_ones(count: int) -> None:
    tiles = np.broadcast_to(grain(px=28), (count, 28, 28, 3))
    found = measure(np.ascontiguousarray(tiles))
    assert found.shape == (count, len(METRICS))
    assert (found == measure(grain(px=28)[None])).all()
    assert verdicts(found, DEFAULT) == [""] * count


def test_views_are_measured_like_copies() -> None:
    image = np.concatenate([grain(1), grain(2)], axis=1)
    views = image.reshape(224, 2, 224, 3).transpose(1, 0, 2, 3)
    assert np.array_equal(measure(views), measure(np.stack([grain(1), grain(2)])))


@pytest.mark.parametrize("px", [16, 28, 225, 226, 227, 512])
def test_flat_tiles_of_any_side(px: int) -> None:
    assert measure(flat(WHITE, px)[None]).tolist() == [[1, 0, 0, 0, 0, 0]]
    assert measure(flat(BLACK, px)[None]).tolist() == [[0, 1, 0, 0, 0, 0]]
    assert measure(flat(PINK, px)[None]).tolist() == [[0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("tile", "reason"),
    [
        (flat(WHITE), "empty"), (flat(BLACK), "dark"), (flat(PINK), "edges"), (flat((40, 60, 170)), "pen"),
        (flat((30, 120, 80)), "pen"), (flat((60, 62, 64)), "pen"), (flat((190, 30, 45)), "pen"), (grain(), ""),
        (cv2.GaussianBlur(grain(coarse=16), (0, 0), 4), "blur"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tile: np.ndarray, reason: str) -> None:
    assert why(tile) == reason


@pytest.mark.parametrize(
    "colour",
    [(220, 150, 190), (90, 50, 130), (60, 30, 100), (150, 90, 60), (160, 170, 205), (175, 45, 75), (200, 205, 215)],
    ids=["eosin", "haematoxylin", "dark nuclei", "DAB", "pale counterstain", "blood", "bluish glass"],
)
def test_colours_of_stains_are_no_ink(colour: tuple[int, int, int]) -> None:
    assert metric(flat(colour), "pen") == 0


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("empty", (215, 215, 215), (214, 215, 215)), ("empty", (233, 220, 215), (234, 220, 215)),
        ("dark", (29, 29, 29), (29, 30, 29)), ("pen", (100, 124, 103), (100, 123, 103)),
        ("pen", (89, 78, 130), (90, 78, 131)), ("pen", (80, 69, 121), (80, 69, 120)),
        ("pen", (80, 69, 130), (80, 68, 130)), ("pen", (160, 53, 53), (159, 53, 53)),
        ("pen", (101, 33, 20), (100, 33, 20)),
        ("pen", (89, 80, 75), (90, 80, 75)), ("pen", (80, 60, 51), (80, 60, 50)), ("pen", (30, 25, 25), (29, 25, 25)),
    ],
)  # fmt: skip
def test_colours_at_the_bounds(name: str, inside: tuple[int, int, int], outside: tuple[int, int, int]) -> None:
    assert metric(flat(inside, 32), name) == 1
    assert metric(flat(outside, 32), name) == 0


def test_sharpness_does_not_depend_on_contrast() -> None:
    faint = (200 + (grain().astype(float) - 200) * 0.4).clip(0, 255).astype(np.uint8)
    assert metric(faint, "sharpness") == pytest.approx(metric(grain(), "sharpness"), rel=0.05)
    blurred = cv2.GaussianBlur(grain(), (0, 0), 2)
    assert metric(blurred, "sharpness") < 0.6 * metric(grain(), "sharpness")


@pytest.mark.parametrize("step", [1, 2, 4, 12])
def test_faint_tiles_are_not_sharpened_by_division(step: int) -> None:
    """Texture below one grey level is noise: it divides nothing."""
    faint = np.where(grain()[..., :1] > 150, 200, 200 - step).astype(np.uint8).repeat(3, axis=2)
    found = dict(zip(METRICS, measure(faint[None])[0].tolist(), strict=True))
    assert found == pytest.approx(by_hand(faint), rel=5e-3, abs=5e-3)


def test_each_threshold_is_the_last_value_that_is_kept() -> None:
    good = {"empty": 0.0, "dark": 0.0, "pen": 0.0, "edges": 1.0, "texture": 255.0, "sharpness": 255.0}
    for field in fields(Thresholds)[1:]:
        side, _, name = field.name.partition("_")
        limit = np.float32(getattr(DEFAULT, field.name))
        beyond = np.nextafter(limit, np.float32(np.inf if side == "max" else -np.inf))
        rows = np.array([[{**good, name: value}[key] for key in METRICS] for value in (limit, beyond)], np.float32)
        assert verdicts(rows, DEFAULT) == ["", REASONS[METRICS.index(name)]]


def test_the_first_filter_that_fails_is_told() -> None:
    worst = np.array([[1, 1, 1, 0, 0, 0]], np.float32)
    off = {
        "max_empty": 1.0,
        "max_dark": 1.0,
        "max_pen": 1.0,
        "min_edges": 0.0,
        "min_texture": 0.0,
        "min_sharpness": 0.0,
    }
    told = [verdicts(worst, Thresholds(**dict(list(off.items())[:count])))[0] for count in range(len(off) + 1)]
    assert told == [*REASONS, ""]


def test_verdicts_of_many_and_of_none() -> None:
    metrics = measure(np.stack([grain(), flat(WHITE), grain(1), flat(PINK)]))
    assert verdicts(metrics, DEFAULT) == ["", "empty", "", "edges"]
    assert verdicts(metrics[:0], DEFAULT) == []


@pytest.mark.parametrize("name", [field.name for field in fields(Thresholds)])
@pytest.mark.parametrize("value", [-0.1, 300.0, float("nan")])
def test_impossible_thresholds(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{name} is {value}, must lie in 0 to "):
        Thresholds(**{name: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tile_px", 15), ("tile_px", 5000), ("mpp", 0.01), ("mpp", float("nan")), ("slide_mpp", 20.0),
        ("mpp_tolerance", 1.0), ("mpp_tolerance", -0.1), ("codec", "webp"), ("min_label_share", 1.1),
    ],
)  # fmt: skip
def test_impossible_settings(key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{key} is "):
        TileSettings(**{key: value})


def test_settings_survive_json() -> None:
    for settings in (TileSettings(), TileSettings(mpp=None, thresholds=None, codec="zstd", slide_mpp=0.25)):
        assert TileSettings.from_json(settings.to_json()) == settings


def test_every_metric_and_threshold_is_explained() -> None:
    text = (Path(__file__).parents[2] / "docs/filters.md").read_text()
    assert all(f"``{name}``" in (filters.__doc__ or "") and f"`{name}`" in text for name in METRICS)
    assert all(f"`--{field.name.replace('_', '-')}`" in text for field in fields(Thresholds))
