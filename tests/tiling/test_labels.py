import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiling.errors import MaskError
from tiling.labels import GLEASON_CLASSES, SCHEMES, UNLABELLED, coverage, label

RADBOUD, KAROLINSKA = SCHEMES["radboud"], SCHEMES["karolinska"]


def mask_of(*counts: int) -> np.ndarray:
    """A mask of 10 x 10 pixels with so many of each value."""
    return np.repeat(np.arange(len(counts), dtype=np.uint8), counts).reshape(10, 10)


@pytest.mark.parametrize(
    ("value", "name"),
    [(1, "healthy"), (2, "healthy"), (3, "gleason3"), (4, "gleason4"), (5, "gleason5")],
)
def test_radbouds_values(value: int, name: str) -> None:
    shares = coverage(np.full((10, 10), value, np.uint8), RADBOUD)
    assert GLEASON_CLASSES[label(shares, RADBOUD, 0.05)] == name


def test_names_of_values() -> None:
    assert RADBOUD.values == ("background", "stroma", "benign", "gleason3", "gleason4", "gleason5")
    assert KAROLINSKA.values == ("background", "benign", "cancer")
    assert RADBOUD.classes is not None
    assert len(RADBOUD.classes) == len(RADBOUD.values)
    assert max(RADBOUD.classes) == len(GLEASON_CLASSES) - 1


def test_a_single_pixel_decides_with_share_0() -> None:
    shares = coverage(mask_of(0, 49, 48, 2, 0, 1), RADBOUD)
    assert label(shares, RADBOUD, 0.0) == 4
    assert label(shares, RADBOUD, 0.009) == 4
    assert label(shares, RADBOUD, 0.015) == 2
    assert label(shares, RADBOUD, 0.05) == 1


def test_stroma_and_benign_are_one_class() -> None:
    shares = coverage(mask_of(94, 3, 3), RADBOUD)
    assert label(shares, RADBOUD, 0.05) == 1


def test_background_or_unknown_alone_is_unlabelled() -> None:
    assert label(coverage(mask_of(100), RADBOUD), RADBOUD, 0.05) == UNLABELLED
    assert label(coverage(mask_of(97, 3), RADBOUD), RADBOUD, 0.05) == UNLABELLED
    assert label(coverage(mask_of(97, 3), RADBOUD), RADBOUD, 0.0) == 1


@given(st.lists(st.integers(0, 2), min_size=1, max_size=50), st.sampled_from([0.0, 0.05, 0.5]))
def test_karolinska_is_never_labelled(values: list[int], share: float) -> None:
    shares = coverage(np.array([values], np.uint8), KAROLINSKA)
    assert label(shares, KAROLINSKA, share) == UNLABELLED


@given(st.sampled_from(["radboud", "karolinska"]), st.integers(1, 60), st.integers(1, 60), st.integers(0, 999))
def test_coverage_sums_to_1(provider: str, height: int, width: int, seed: int) -> None:
    scheme = SCHEMES[provider]
    mask = np.random.default_rng(seed).integers(0, len(scheme.values), (height, width), np.uint8)
    shares = coverage(mask, scheme)
    assert shares.dtype == np.float32
    assert shares.shape == (len(scheme.values),)
    assert abs(shares.sum(dtype=np.float64) - 1) < 1e-6
    for value, share in enumerate(shares):
        assert share == pytest.approx((mask == value).mean(), abs=1e-6)


@given(st.lists(st.floats(0, 1), min_size=6, max_size=6).filter(lambda s: sum(s) > 0), st.floats(0, 0.9))
def test_label_is_the_highest_class_that_covers_enough(weights: list[float], least: float) -> None:
    shares = np.array(weights) / sum(weights)
    of_class = [shares[0], shares[1] + shares[2], *shares[3:]]
    enough = [number for number in range(1, 5) if of_class[number] >= least and of_class[number] > 0]
    assert label(shares, RADBOUD, least) == (max(enough) if enough else UNLABELLED)


@pytest.mark.parametrize(("provider", "value", "most"), [("radboud", 6, 5), ("karolinska", 3, 2), ("radboud", 255, 5)])
def test_unknown_value(provider: str, value: int, most: int) -> None:
    mask = np.zeros((10, 10), np.uint8)
    mask[3, 3] = value
    with pytest.raises(MaskError) as raised:
        coverage(mask, SCHEMES[provider])
    text = f"mask holds value {value}, known are 0 to {most} ({', '.join(SCHEMES[provider].values)})"
    assert str(raised.value) == f"{text}; check data_provider in train.csv"
