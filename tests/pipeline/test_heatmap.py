"""The heat map's file: colours at the right places, a true scale bar, nothing cut off."""

import io
import json
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from pipeline.heatmap import heat_map
from pipeline.regions import ClassMap

NAMES = ("background", "healthy", "gleason3", "gleason4")
COLOURS = ((150, 150, 150), (0, 158, 115), (240, 228, 66), (230, 120, 0))
SHAPES = [(300, 400), (1500, 300), (60, 300), (1000, 1000), (7, 9)]


def drawn(overview: np.ndarray, size: tuple[int, int], tiles: ClassMap) -> tuple[np.ndarray, dict[str, int]]:
    """The picture, uint8 (H, W, 3), and where in it the slide lies, both from the PNG's bytes."""
    data = heat_map(overview, size, tiles, "slide", "For research use, not a diagnosis")
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB")), json.loads(image.text["slide"])  # type: ignore[attr-defined]


def class_map(boxes: list[list[int]], classes: list[int], mpp: float = 0.5, names: tuple[str, ...] = NAMES) -> ClassMap:
    probabilities = np.eye(len(names), dtype=np.float32)[np.array(classes, int)]
    colours = tuple(COLOURS[number % len(COLOURS)] for number in range(len(names)))
    return ClassMap(np.array(boxes, np.int64).reshape(-1, 4), probabilities, names, colours, mpp)


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_each_tile_has_its_classs_colour_over_grey_and_the_rest_is_the_slide(height: int, width: int) -> None:
    pink = np.full((height, width, 3), (200, 80, 160), np.uint8)
    size = 16 * width, 16 * height
    x, y = 8 * width, 8 * height  # the slide's middle
    tiles = class_map([[0, 0, x, y], [x, 0, 2 * x, y], [x, y, 2 * x, 2 * y]], [1, 3, 2])
    picture, place = drawn(pink, size, tiles)
    left, top = place["left"], place["top"]
    shown = picture[top : top + place["height"], left : left + place["width"]]
    assert max(shown.shape[:2]) == 1200
    assert shown.shape[1] / shown.shape[0] == pytest.approx(width / height, rel=0.02)
    half = np.array(shown.shape[:2]) // 2
    grey = 0.299 * 200 + 0.587 * 80 + 0.114 * 160
    for row, column, number in ((0, 0, 1), (0, 1, 3), (1, 1, 2)):
        part = shown[1:-1, 1:-1][row * half[0] : (row + 1) * half[0] - 2, column * half[1] : (column + 1) * half[1] - 2]
        assert np.abs(part - (0.55 * grey + 0.45 * np.array(COLOURS[number]))).max() <= 1
    assert (shown[half[0] + 1 : -1, 1 : half[1] - 1] == pink[0, 0]).all()


@pytest.mark.parametrize("side", [224, 448.7, 3.3])
def test_neighbours_leave_no_gap(side: float) -> None:
    """A slide that is all tiles of one class has one colour in every pixel, also where its overview was rounded."""
    edges = np.rint(side * np.arange(31)).astype(int).tolist()
    boxes = [[x0, y0, x1, y1] for y0, y1 in pairwise(edges) for x0, x1 in pairwise(edges)]
    size = edges[-1]
    picture, place = drawn(np.full((97, 93, 3), 230, np.uint8), (size, size), class_map(boxes, [1] * len(boxes)))
    shown = picture[place["top"] :, place["left"] :][: place["height"], : place["width"]]
    assert (shown == shown[0, 0]).all()


@pytest.mark.parametrize(("height", "width", "mpp"), [(*SHAPES[0], 0.25), (*SHAPES[1], 0.499), (*SHAPES[2], 2.0)])
def test_scale_bar_is_as_long_as_it_says(height: int, width: int, mpp: float) -> None:
    size = 16 * width, 16 * height
    picture, place = drawn(np.full((height, width, 3), 240, np.uint8), size, class_map([[0, 0, 8, 8]], [1], mpp))
    below = picture[place["top"] + place["height"] + 2 :]
    row = below[[line.all() for line in (below[:, 12:40] == 0).all(axis=2)]][0]
    length = int(np.argmin((row[12:] == 0).all(axis=1)))  # black pixels from the margin on
    length_mm = (length - 1) * mpp * size[0] / place["width"] / 1000
    steps = np.array([factor * 10.0**power for power in range(-4, 3) for factor in (1, 2, 5)])
    assert np.abs(length_mm / steps - 1).min() < 1 / length
    assert 100 < length <= 301


def test_nothing_is_cut_off() -> None:
    """However many classes: the margins stay white, and the picture fits a page of 1280 px."""
    names = tuple(f"a class with a long name {number}" for number in range(12))
    for height, width in SHAPES:
        tiles = class_map([[0, 0, 8 * width, 8 * height]], [3], names=names)
        size = 16 * width, 16 * height
        picture, place = drawn(np.full((height, width, 3), 240, np.uint8), size, tiles)
        assert picture.shape[1] <= 1280
        for edge in (picture[:, :8], picture[:, -8:], picture[:8], picture[-8:]):
            assert (edge == 255).all()
        swatch = (picture[: place["top"]] == COLOURS[1]).all(axis=2)
        assert swatch.sum() > 3 * 400  # three of the twelve have this colour


def test_a_long_title_is_shown_to_its_end() -> None:
    overview, tiles = np.full((100, 100, 3), 200, np.uint8), class_map([], [])
    pictures = [heat_map(overview, (1600, 1600), tiles, "a-long-slide-id-" * 8 + end, "note") for end in "xy"]
    assert pictures[0] != pictures[1]


def test_a_slide_without_tiles_is_shown_plain() -> None:
    overview = np.random.default_rng(0).integers(0, 256, (1200, 800, 3), np.uint8)
    picture, place = drawn(overview, (12800, 19200), class_map([], []))
    assert np.array_equal(picture[place["top"] :, place["left"] :][:1200, :800], overview)


def test_the_same_slide_gives_the_same_bytes() -> None:
    overview, tiles = np.full((100, 100, 3), 200, np.uint8), class_map([[0, 0, 800, 800]], [2])
    assert heat_map(overview, (1600, 1600), tiles, "a", "b") == heat_map(overview, (1600, 1600), tiles, "a", "b")
