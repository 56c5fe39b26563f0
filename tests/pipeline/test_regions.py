"""Regions as QuPath reads them: exactly the tiles of each class, in whole level-0 pixels, whatever their pattern."""

import itertools
import json
import uuid
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.regions import ClassMap, areas_mm2, feature_collection

NAMES, COLOURS = ("benign", "gleason3", "gleason4"), ((1, 2, 3), (40, 50, 60), (255, 0, 128))
NONE = -1


def class_map(grid: np.ndarray, side: float = 224, mpp: float = 0.5, offset: int = 0) -> ClassMap:
    """Tiles of a grid of classes (rows, columns), where NONE is no tile; edges are rounded from side to side."""
    rows, columns = np.nonzero(grid != NONE)
    edges = [np.rint(offset + side * number).astype(np.int64) for number in (columns, rows, columns + 1, rows + 1)]
    probabilities = np.full((len(rows), len(NAMES)), 0.1, np.float32)
    probabilities[np.arange(len(rows)), grid[rows, columns]] = 0.8
    return ClassMap(np.stack(edges, axis=1), probabilities, NAMES, COLOURS, mpp)


def shapes(collection: dict[str, Any], name: str) -> list[shapely.Polygon]:
    """Polygons of one class."""
    return [
        shapely.Polygon(rings[0], rings[1:])
        for feature in collection["features"]
        if feature["properties"]["classification"]["name"] == name
        for rings in [feature["geometry"]["coordinates"]]
    ]


grids = hnp.arrays(np.int64, st.tuples(st.integers(1, 7), st.integers(1, 7)), elements=st.integers(NONE, 2))
sides = st.sampled_from([224, 896.0, 448.7, 100.3, 7.5])


@given(grids, sides, st.integers(0, 50_000))
def test_polygons_of_a_class_are_exactly_its_tiles(grid: np.ndarray, side: float, offset: int) -> None:
    tiles = class_map(grid, side, offset=offset)
    found = feature_collection(tiles, "slide")
    every = []
    for number, name in enumerate(NAMES):
        polygons = shapes(found, name)
        assert all(polygon.is_valid and polygon.area > 0 for polygon in polygons)
        boxes = tiles.boxes[tiles.classes == number]
        expected = sum(int((x1 - x0) * (y1 - y0)) for x0, y0, x1, y1 in boxes)
        assert sum(polygon.area for polygon in polygons) == expected
        assert all(any(polygon.covers(shapely.box(*box)) for polygon in polygons) for box in boxes)
        every += polygons
    # Equal areas, every tile covered, and no two polygons with common area: nothing is in them but the tiles.
    assert all(a.intersection(b).area == 0 for a, b in itertools.combinations(every, 2))


@given(grids, sides)
def test_one_region_for_each_group_of_tiles_joined_by_edges(grid: np.ndarray, side: float) -> None:
    found = feature_collection(class_map(grid, side), "slide")
    for number, name in enumerate(NAMES):
        groups, parts = cv2.connectedComponents((grid == number).astype(np.uint8), connectivity=4)
        sizes = sorted(np.bincount(parts.ravel())[1:].tolist())
        features = [one for one in found["features"] if one["properties"]["classification"]["name"] == name]
        assert len(features) == groups - 1
        assert sorted(one["properties"]["measurements"]["tiles"] for one in features) == sizes


@given(grids, sides)
def test_rings_hold_corners_only(grid: np.ndarray, side: float) -> None:
    for feature in feature_collection(class_map(grid, side), "slide")["features"]:
        for number, ring in enumerate(feature["geometry"]["coordinates"]):
            assert ring[0] == ring[-1]
            assert all(type(value) is int for point in ring for value in point)
            steps = np.diff([*ring, ring[1]], axis=0)
            assert ((steps != 0).sum(axis=1) == 1).all()  # along one axis
            assert ((steps[:-1] != 0) != (steps[1:] != 0)).all()  # and turning every time
            # RFC 7946: shells and holes run in opposite senses
            assert shapely.LinearRing(ring).is_ccw == (number == 0)


@given(grids, st.randoms(use_true_random=False))
def test_order_of_the_tiles_does_not_matter(grid: np.ndarray, random: Any) -> None:
    tiles = class_map(grid)
    order = list(range(len(tiles.boxes)))
    random.shuffle(order)
    shuffled = ClassMap(tiles.boxes[order], tiles.probabilities[order], NAMES, COLOURS, tiles.mpp)
    texts = [json.dumps(feature_collection(one, "slide")) for one in (tiles, shuffled)]
    assert texts[0] == texts[1]
    features = json.loads(texts[0])["features"]
    begin = [
        (NAMES.index(feature["properties"]["classification"]["name"]), feature["geometry"]["coordinates"][0][0])
        for feature in features
    ]
    assert begin == sorted(begin)
    ids = [feature["id"] for feature in features]
    assert len(set(ids)) == len(ids)
    others = {feature["id"] for feature in feature_collection(tiles, "other slide")["features"]}
    assert not others & set(ids)


def only(grid: Sequence[Sequence[int]]) -> Any:
    features = feature_collection(class_map(np.array(grid), 10), "slide")["features"]
    assert len(features) == 1
    return features[0]


def test_a_feature_as_qupath_reads_it() -> None:
    feature = only([[1, 1], [1, NONE]])
    assert uuid.UUID(feature.pop("id")).version == 5
    assert feature == {
        "type": "Feature",
        "geometry": {
            "type": "Polygon",
            "coordinates": [[[0, 0], [20, 0], [20, 10], [10, 10], [10, 20], [0, 20], [0, 0]]],
        },
        "properties": {
            "objectType": "annotation",
            "classification": {"name": "gleason3", "color": [40, 50, 60]},
            "measurements": {"tiles": 3, "area mm2": 7.5e-5, "mean probability": pytest.approx(0.8, abs=1e-6)},
        },
    }


def test_a_hole_is_a_ring_of_its_own() -> None:
    rings = only([[2, 2, 2], [2, NONE, 2], [2, 2, 2]])["geometry"]["coordinates"]
    assert [sorted(map(tuple, ring[:-1])) for ring in rings] == [
        [(0, 0), (0, 30), (30, 0), (30, 30)],
        [(10, 10), (10, 20), (20, 10), (20, 20)],
    ]


def test_a_hole_that_touches_the_outside_at_a_corner_leaves_a_valid_polygon() -> None:
    rings = only([[0, 0, 0], [0, NONE, 0], [0, 0, NONE]])["geometry"]["coordinates"]
    polygon = shapely.Polygon(rings[0], rings[1:])
    assert polygon.is_valid
    assert (polygon.area, len(rings)) == (700, 2)


def test_corners_alone_do_not_join() -> None:
    found = feature_collection(class_map(np.array([[1, NONE], [NONE, 1]]), 10), "slide")["features"]
    assert [feature["geometry"]["coordinates"][0][0] for feature in found] == [[0, 0], [10, 10]]


def test_a_class_inside_another_fills_its_hole() -> None:
    found = feature_collection(class_map(np.array([[1, 1, 1], [1, 2, 1], [1, 1, 1]]), 448.7), "slide")
    outer, inner = shapes(found, "gleason3")[0], shapes(found, "gleason4")[0]
    assert outer.interiors[0].equals(inner.exterior)


def test_probabilities_are_meant_over_the_regions_own_tiles() -> None:
    boxes = np.array([[0, 0, 10, 10], [10, 0, 20, 10], [40, 0, 50, 10]])
    probabilities = np.array([[0.1, 0.6, 0.3], [0.1, 0.9, 0], [0, 0.5, 0.5]], np.float32)
    found = feature_collection(ClassMap(boxes, probabilities, NAMES, COLOURS, 100.0), "slide")["features"]
    assert [feature["properties"]["measurements"] for feature in found] == [
        {"tiles": 2, "area mm2": 2.0, "mean probability": pytest.approx(0.75, abs=1e-6)},
        {"tiles": 1, "area mm2": 1.0, "mean probability": 0.5},
    ]


def test_no_tile_gives_a_valid_empty_collection() -> None:
    empty = ClassMap(np.zeros((0, 4), np.int64), np.zeros((0, 3), np.float32), NAMES, COLOURS, 0.5)
    assert feature_collection(empty, "slide") == {"type": "FeatureCollection", "features": []}
    assert empty.per_class()["benign"] == {"tiles": 0, "share": None, "area_mm2": 0.0}


def test_figures_per_class() -> None:
    tiles = class_map(np.array([[1, 1, NONE], [2, NONE, 1]]), side=2000, mpp=0.25)
    assert tiles.per_class() == {
        "benign": {"tiles": 0, "share": 0.0, "area_mm2": 0.0},
        "gleason3": {"tiles": 3, "share": 0.75, "area_mm2": 0.75},
        "gleason4": {"tiles": 1, "share": 0.25, "area_mm2": 0.25},
    }
    assert areas_mm2(np.array([[10, 10, 4010, 2010]]), 0.5).tolist() == [2.0]
