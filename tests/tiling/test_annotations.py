"""Annotation files are read as they are written, and drawn pixel for pixel."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import assume, given
from hypothesis import strategies as st

from tiling.annotations import Annotation, Drawing, polygons, read_annotations
from tiling.errors import MaskError

SQUARE = [[10, 10], [90, 10], [90, 90], [10, 90], [10, 10]]
HOLE = [[30, 30], [30, 60], [60, 60], [60, 30], [30, 30]]
FAR = [[200, 200], [240, 200], [220, 250], [200, 200]]


def feature(kind: str, coordinates: Any, **properties: Any) -> dict[str, Any]:
    geometry = {"type": kind, "coordinates": coordinates}
    return {"type": "Feature", "id": "PathAnnotationObject", "geometry": geometry, "properties": properties}


def read(path: Path, content: Any) -> list[Annotation]:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_annotations(path)


# QuPath's GeoJSON


def test_qupath(tmp_path: Path) -> None:
    content = {
        "type": "FeatureCollection",
        "features": [
            feature(
                "Polygon", [SQUARE, HOLE], objectType="annotation", classification={"name": "Gleason 3", "color": [1]}
            ),
            feature("MultiPolygon", [[SQUARE], [FAR]], classification={"names": ["Tumor", "Positive"]}),
            feature("Polygon", [SQUARE], classification={"name": "Tumor: Negative", "colorRGB": -1}),
            feature("Polygon", [SQUARE], pathClassId="Stroma"),
            feature("Polygon", [FAR], classification="Benign"),
            feature("Polygon", [SQUARE], objectType="annotation"),
            feature("Point", [3, 4], classification={"name": "Gleason 3"}),
            feature("LineString", [[3, 4], [5, 6]], classification={"name": "Gleason 3"}),
            feature("Polygon", [[[1, 1], [2, 2], [1, 1]]], classification={"name": "Gleason 3"}),
            {"type": "Feature", "geometry": None, "properties": None},
        ],
    }
    found = read(tmp_path / "a.geojson", content)
    assert [one.names for one in found] == [
        ("Gleason 3",), ("Tumor: Positive", "Tumor"), ("Tumor: Positive", "Tumor"), ("Tumor: Negative", "Tumor"),
        ("Stroma",), ("Benign",), (),
    ]  # fmt: skip
    assert [len(one.rings) for one in found] == [2, 1, 1, 1, 1, 1, 1]
    assert found[0].rings[1].tolist() == HOLE
    assert found[2].rings[0].tolist() == FAR


@pytest.mark.parametrize(
    "wrap", [lambda one: [one], lambda one: one, lambda one: {"type": "FeatureCollection", "features": [one]}]
)
def test_older_exports_are_bare_lists(wrap: Any, tmp_path: Path) -> None:
    (found,) = read(tmp_path / "a.json", wrap(feature("Polygon", [SQUARE], classification={"name": "G4"})))
    assert found.names == ("G4",)


def test_geometry_collections_and_heights(tmp_path: Path) -> None:
    parts = [
        {"type": "Polygon", "coordinates": [[[*point, 0.5] for point in SQUARE]]},
        {"type": "Point", "coordinates": [1, 2]},
    ]
    one = feature("Point", None, classification={"name": "G5"}) | {
        "geometry": {"type": "GeometryCollection", "geometries": parts}
    }
    (found,) = read(tmp_path / "a.json", one)
    assert found.rings[0].tolist() == SQUARE


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", r"annotations do not parse \(JSONDecodeError\); export it again"),
        ('{"type": "FeatureCollection", "features": [{"type"', r"do not parse \(JSONDecodeError\)"),
        ("{}", r"do not parse \(KeyError\)"),
        ("3", r"do not parse \(TypeError\)"),
        ('{"type": "Circle", "coordinates": []}', "'Circle' is no geometry of GeoJSON"),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [1, NaN], [1, 1], [0, 0]]]}', "a coordinate that is no number"),
        ('{"type": "Polygon", "coordinates": [[[0, 0], ["x", 1], [1, 1], [0, 0]]]}', r"do not parse \(ValueError\)"),
        ("[" * 100_000, r"do not parse \(RecursionError\)"),
    ],
)
def test_geojson_that_is_none(content: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(MaskError, match=rf"a\.json: .*{complaint}"):
        read(tmp_path / "a.json", content)


# ASAP's XML


def asap(*annotations: tuple[str, str, list[list[float]]], groups: dict[str, str]) -> str:
    drawn = "".join(
        f'<Annotation Name="A{number}" Type="{kind}" PartOfGroup="{group}" Color="#F4FA58"><Coordinates>'
        + "".join(
            f'<Coordinate Order="{order}" X="{x}" Y="{y}" />' for order, (x, y) in reversed(list(enumerate(points)))
        )
        + "</Coordinates></Annotation>"
        for number, (kind, group, points) in enumerate(annotations)
    )
    nested = "".join(
        f'<Group Name="{name}" PartOfGroup="{above}" Color="#00ff00"><Attributes /></Group>'
        for name, above in groups.items()
    )
    return (
        f'<?xml version="1.0"?><ASAP_Annotations><Annotations>{drawn}</Annotations>'
        f"<AnnotationGroups>{nested}</AnnotationGroups></ASAP_Annotations>"
    )


def test_asap(tmp_path: Path) -> None:
    content = asap(
        ("Polygon", "left", SQUARE[:4]), ("Spline", "Tumor", SQUARE[:4]), ("Rectangle", "None", FAR[:3]),
        ("Dot", "Tumor", [[1, 2]]), ("PointSet", "Tumor", SQUARE[:4]), ("Polygon", "loop", FAR[:3]),
        groups={"Tumor": "None", "left": "inner", "inner": "Tumor", "loop": "loop"},
    )  # fmt: skip
    found = read(tmp_path / "a.xml", content)
    assert [one.names for one in found] == [("left", "inner", "Tumor"), ("Tumor",), (), ("loop",)]
    assert found[0].rings[0].tolist() == SQUARE[:4]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("<Annotations><Annotation/></Annotations>", "XML of Annotations, ASAP's has ASAP_Annotations; export"),
        ("<ASAP_Annotations><Annotations>", r"do not parse \(ParseError\)"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><ASAP_Annotations>&b;</ASAP_Annotations>', "XML with entities is not read"),
        (asap(("Polygon", "a", [[1, 2], [3, float("inf")], [4, 9]]), groups={}), "a coordinate that is no number"),
        ('<ASAP_Annotations><Annotation Type="Polygon"><Coordinate Order="0" X="1"/></Annotation></ASAP_Annotations>',
         r"do not parse \(KeyError\)"),
    ],
)  # fmt: skip
def test_xml_that_is_none_of_asaps(content: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(MaskError, match=rf"a\.xml: .*{complaint}"):
        read(tmp_path / "a.xml", content)


def test_annotations_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(MaskError, match=r"gone\.xml: annotations cannot be read \(No such file"):
        read_annotations(tmp_path / "gone.xml")


# Drawing

coordinate = st.floats(-40, 140, allow_nan=False).map(lambda value: round(value * 16) / 16)
ring = st.lists(st.tuples(coordinate, coordinate), min_size=3, max_size=9, unique=True)


def truth(
    shapes: np.ndarray, values: np.ndarray, scale: float, box: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Values at pixel centres by shapely, and which centres lie on no edge."""
    x, y, span = box
    columns, rows = np.meshgrid(x + np.arange(span) + 0.5, y + np.arange(span) + 0.5)
    out, clear = np.zeros((span, span), np.uint8), np.ones((span, span), bool)
    points = shapely.points(columns / scale, rows / scale)
    for value in [*sorted(set(values.tolist()) - {0}), 0]:
        for shape in shapes[values == value]:
            out[shapely.contains(shape, points)] = value
            clear &= shapely.distance(shape.boundary, points) > 1e-6
    return out, clear


@given(st.lists(st.tuples(ring, st.integers(0, 3)), min_size=1, max_size=5), st.sampled_from([1.0, 0.25, 2.0]))
def test_drawing_agrees_with_shapely_at_every_pixel_centre(
    drawn: list[tuple[list[tuple[float, float]], int]], scale: float
) -> None:
    shapes, origin = polygons([Annotation((), (np.array(points),)) for points, _ in drawn])
    assume(len(shapes))
    values = np.array([value for _, value in drawn])[origin]
    drawing = Drawing(shapes, values, (scale, scale))
    for y in (0, 32, 64):
        for x in (0, 32, 64, 32):
            expected, clear = truth(shapes, values, scale, (x, y, 32))
            assert np.array_equal(drawing.at(x, y, 32)[clear], expected[clear])


def test_holes_overlaps_and_background() -> None:
    def drawn(*rings_and_value: tuple[list[list[list[int]]], int]) -> np.ndarray:
        annotations = [Annotation((), tuple(np.array(one, float) for one in rings)) for rings, _ in rings_and_value]
        shapes, origin = polygons(annotations)
        return Drawing(shapes, np.array([value for _, value in rings_and_value])[origin], (1.0, 1.0)).at(0, 0, 100)

    holed = drawn(([SQUARE, HOLE], 2))
    assert (holed[20, 20], holed[45, 45], holed[5, 5]) == (2, 0, 0)
    assert np.count_nonzero(holed) == 80 * 80 - 30 * 30
    assert drawn(([SQUARE, HOLE], 2), ([HOLE], 1))[45, 45] == 1
    assert drawn(([SQUARE, HOLE], 2), ([SQUARE], 2))[45, 45] == 2
    assert drawn(([SQUARE], 3), ([SQUARE], 1))[45, 45] == 3
    assert np.count_nonzero(drawn(([SQUARE], 3), ([HOLE], 0))) == 80 * 80 - 30 * 30


def test_a_ring_that_crosses_itself_is_split() -> None:
    bow_tie = np.array([[0, 0], [40, 40], [40, 0], [0, 40]], float)
    shapes, origin = polygons([Annotation((), (bow_tie,))])
    assert origin.tolist() == [0, 0]
    out = Drawing(shapes, np.array([1, 1]), (1.0, 1.0)).at(0, 0, 40)
    assert (out[20, 5], out[20, 35], out[5, 20], out[35, 20]) == (1, 1, 0, 0)


def test_no_polygon_at_all() -> None:
    shapes, origin = polygons([])
    assert not Drawing(shapes, np.array([], int)[origin], (1.0, 1.0)).at(0, 0, 16).any()
