from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiling.errors import MaskError, UsageError
from tiling.labels import (
    GLEASON_ANNOTATIONS,
    GLEASON_CLASSES,
    SCHEMES,
    UNLABELLED,
    Scheme,
    coverage,
    label,
    read_class_map,
)

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


@pytest.mark.parametrize("provider", ["radboud", "karolinska"])
def test_providers_store_their_own_values(provider: str) -> None:
    scheme = SCHEMES[provider]
    mask = np.arange(len(scheme.values), dtype=np.uint8)[None]
    assert np.array_equal(scheme.stored(mask), mask)
    assert not scheme.names


@pytest.mark.parametrize(("provider", "value", "most"), [("radboud", 6, 5), ("karolinska", 3, 2), ("radboud", 255, 5)])
def test_unknown_value(provider: str, value: int, most: int) -> None:
    mask = np.zeros((10, 10), np.uint8)
    mask[3, 3] = value
    with pytest.raises(MaskError) as raised:
        SCHEMES[provider].stored(mask)
    text = f"mask holds value {value}, known are 0 to {most} ({', '.join(SCHEMES[provider].values)})"
    assert str(raised.value) == f"{text}; check data_provider in train.csv"


# Class maps

CLASS_MAP = """
classes: [background, healthy, gleason3]
values: {0: background, 1: healthy, 7: gleason3, 9: null, Gleason 3: gleason3, "Ignore*": null}
"""


@pytest.fixture
def scheme(tmp_path: Path) -> Scheme:
    (tmp_path / "map.yaml").write_text(CLASS_MAP)
    return read_class_map(tmp_path / "map.yaml")


def test_a_class_map(scheme: Scheme, tmp_path: Path) -> None:
    assert scheme.class_names == scheme.values == ("background", "healthy", "gleason3")
    assert scheme.stored(np.array([[0, 1, 7, 9]], np.uint8)).tolist() == [[0, 1, 2, 0]]
    assert scheme.stored_of_class(["GLEASON_3"]) == 2
    assert scheme.stored_of_class(["ignore*"]) is None
    assert scheme.stored_of_class([]) is None
    (tmp_path / "map.json").write_text(
        '{"classes": ["background", "healthy", "gleason3"], "values": {"0": "background", "1": "healthy", '
        '"7": "gleason3", "9": null, "Gleason 3": "gleason3", "Ignore*": null}}'
    )
    assert read_class_map(tmp_path / "map.json") == scheme


def test_labels_of_a_class_map(scheme: Scheme) -> None:
    shares = coverage(scheme.stored(np.array([[0, 1, 7, 7]], np.uint8)), scheme)
    assert shares.tolist() == [0.25, 0.25, 0.5]
    assert label(shares, scheme, 0.3) == 2
    assert label(shares, scheme, 0.6) == UNLABELLED


def test_what_a_class_map_does_not_know(scheme: Scheme) -> None:
    with pytest.raises(MaskError) as raised:
        scheme.stored(np.array([[0, 8]], np.uint8))
    assert str(raised.value) == (
        "mask holds value 8, known are 0, 1, 7, 9 (background, healthy, gleason3, background); "
        "add it to the file of --class-map"
    )
    with pytest.raises(
        MaskError, match=r"annotation class 'Tumor: x', known are 0, 1, 7, 9, gleason3, ignore\*; add it"
    ):
        scheme.stored_of_class(["Tumor: x", "Tumor"])
    with pytest.raises(MaskError, match="mask holds value 1, known are none"):
        GLEASON_ANNOTATIONS.stored(np.ones((1, 1), np.uint8))


def test_the_most_special_class_counts(scheme: Scheme) -> None:
    assert scheme.stored_of_class(["healthy: gleason 3", "gleason 3"]) == 2
    assert scheme.stored_of_class(["7", "gleason 3"]) == 2


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[1, 2]", "not a class map; it holds {classes:"),
        ("classes: [a, b]", "not a class map"),
        ("{classes: [a, b], values: {}}", "not a class map"),
        ("{classes: [a], values: {0: a}}", "1 classes, 2 to 254 are possible"),
        ("{classes: [a, a], values: {0: a}}", "classes must be names, none of them twice"),
        ("{classes: [a, 5], values: {0: a}}", "classes must be names"),
        ("{classes: [a, b], values: {0: c}}", "'0' stands for class 'c', classes are a, b"),
        ("{classes: [a, b], values: {0: [a]}}", r"'0' stands for class \['a'\], classes are a, b"),
        ("{classes: [a, b], values: {256: b}}", "mask value 256, must lie in 0 to 255"),
        ("{classes: [a, b], values: {G 3: a, g_3: b}}", "two annotation classes differ only in case or separators"),
        ("{classes: [a, b", "class map cannot be read"),
    ],
)
def test_class_maps_that_are_none(text: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "map.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=rf"map\.yaml: {complaint}"):
        read_class_map(path)
    with pytest.raises(UsageError, match=r"gone\.yaml: class map cannot be read"):
        read_class_map(tmp_path / "gone.yaml")


@pytest.mark.parametrize(
    ("name", "class_name"),
    [("Gleason 3", "gleason3"), ("G4", "gleason4"), ("gleason pattern 5", "gleason5"), ("GP3", "gleason3"),
     ("Benign", "healthy"), ("Stroma", "healthy"), ("Exclusion", "background")],
)  # fmt: skip
def test_gleason_annotations_without_a_class_map(name: str, class_name: str) -> None:
    number = GLEASON_ANNOTATIONS.stored_of_class([name])
    assert number is not None
    assert GLEASON_CLASSES[number] == class_name


def test_tumour_without_a_grade_needs_a_class_map() -> None:
    with pytest.raises(MaskError, match=r"annotation class 'Tumor', known are .*; map it with --class-map"):
        GLEASON_ANNOTATIONS.stored_of_class(["Tumor"])


@given(st.sets(st.integers(0, 255), min_size=1, max_size=5), st.integers(0, 255))
def test_lossy_masks_count_as_the_nearest_known_value(known: set[int], value: int) -> None:
    scheme = Scheme(("a",) * len(known), None, pixels={pixel: place for place, pixel in enumerate(sorted(known))})
    (found,) = scheme.stored(np.array([[value]], np.uint8), lossy=True)[0]
    assert abs(sorted(known)[found] - value) == min(abs(pixel - value) for pixel in known)
