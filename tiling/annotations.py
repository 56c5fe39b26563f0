"""Annotation files as polygons in level-0 pixels, QuPath's GeoJSON and ASAP's XML, and drawing them box by box.

GeoJSON: ``Polygon`` and ``MultiPolygon`` with holes, in features, collections or bare lists; points and lines are left
out. The class is ``classification`` (an object with ``name`` or ``names``, or a plain name), ``pathClassId`` in older
files. ASAP: ``Polygon``, ``Spline`` (its points joined by lines) and ``Rectangle``; dots and measurements are left out.
The class is the annotation's group, then that group's group.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import shapely

from tiling.errors import MaskError

GEOJSON_SUFFIXES = frozenset({".geojson", ".json"})
ASAP_SUFFIX = ".xml"
ANNOTATION_SUFFIXES = GEOJSON_SUFFIXES | {ASAP_SUFFIX}
_ASAP_SHAPES = frozenset({"Polygon", "Spline", "Rectangle"})
_NO_GROUP = frozenset({"", "None"})
_EXPORT_AGAIN = "export it again"


@dataclass(frozen=True)
class Annotation:
    """A region that somebody drew.

    Args:
        names: Its class, then the more general ones that it belongs to; empty when it has none.
        rings: x, y of each ring in level-0 pixels, float64 (n, 2): the outline, then holes.
    """

    names: tuple[str, ...]
    rings: tuple[np.ndarray, ...]


def read_annotations(path: Path) -> list[Annotation]:
    """Annotations of one slide, in the file's order.

    Raises:
        MaskError: The file is missing, or is neither GeoJSON nor ASAP's XML.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MaskError(f"annotations cannot be read ({error.strerror})", path) from error
    try:
        found = _asap(data) if path.suffix.lower() == ASAP_SUFFIX else list(_geojson(json.loads(data)))
    except MaskError as error:
        raise MaskError(error.what, path, error.do) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ElementTree.ParseError) as error:
        # A file cut short, or of another shape than the format's: whatever it trips over, it is not readable.
        raise MaskError(f"annotations do not parse ({type(error).__name__})", path, _EXPORT_AGAIN) from error
    if not all(np.isfinite(ring).all() for annotation in found for ring in annotation.rings):
        raise MaskError("an annotation has a coordinate that is no number", path, _EXPORT_AGAIN)
    return found


def polygons(annotations: list[Annotation]) -> tuple[np.ndarray, np.ndarray]:
    """Annotations as valid polygons: what crosses itself is split by the even-odd rule.

    Returns:
        Shapely polygons, object (N,), and which annotation each comes from, int64 (N,).
    """
    shapes = np.array([shapely.Polygon(one.rings[0], one.rings[1:]) for one in annotations], object)
    crossed = ~shapely.is_valid(shapes)
    shapes[crossed] = shapely.make_valid(shapes[crossed])
    parts, origin = shapely.get_parts(shapes, return_index=True)
    # make_valid gives collections that nest multipolygons.
    parts, inner = shapely.get_parts(parts, return_index=True)
    areas = (shapely.get_type_id(parts) == shapely.GeometryType.POLYGON) & ~shapely.is_empty(parts)
    return parts[areas], origin[inner][areas]


class Drawing:
    """Polygons with values, drawn box by box: a pixel belongs to the polygons that its centre lies in.

    Where polygons overlap, the highest value wins, but 0 wins over all: what somebody marked as background or exclusion
    is no label. Where there is no polygon, pixels are 0.

    A pixel is inside where the winding number over all polygons of its value is not 0: outlines and holes run in
    opposite directions, so that a hole takes away its own polygon only. Crossings of edges and pixel rows are worked
    out once per band of boxes, and summed up from left to right.

    Args:
        shapes: Valid shapely polygons, object (N,).
        values: Value of each, integer (N,), 0 to 254.
        scale: Pixels drawn per unit of the polygons, along x and y.
    """

    def __init__(self, shapes: np.ndarray, values: np.ndarray, scale: tuple[float, float]) -> None:
        rings, of_shape = shapely.get_rings(shapely.orient_polygons(shapes), return_index=True)
        points, of_ring = shapely.get_coordinates(rings, return_index=True)
        points = points * scale
        edge = np.flatnonzero(of_ring[1:] == of_ring[:-1])
        up = points[edge, 1] > points[edge + 1, 1]
        upper, lower = points[np.where(up, edge + 1, edge)], points[np.where(up, edge, edge + 1)]
        first, end = (np.ceil(side[:, 1] - 0.5).astype(np.int64) for side in (upper, lower))
        crossing = first < end  # an edge between two pixel rows' centres crosses none
        drawn = np.unique(values)
        self._values = [*drawn[drawn != 0].tolist(), *drawn[drawn == 0].tolist()]
        self._kind = np.array([self._values.index(value) for value in values[of_shape[of_ring[edge]]][crossing]], int)
        self._upper, self._lower = upper[crossing], lower[crossing]
        self._first, self._end = first[crossing], end[crossing]
        self._sign = np.where(up, 1, -1)[crossing]
        self._band: tuple[int, int] | None = None

    def at(self, x: int, y: int, span: int) -> np.ndarray:
        """Values under a box of drawn pixels whose corner is at x, y, uint8 (span, span)."""
        if self._band != (y, span):
            self._enter_band(y, span)
        left, right = np.searchsorted(self._column, (x + 1, x + span))
        self._pass_to(int(left))
        out = np.zeros((span, span), np.uint8)
        inside = slice(int(left), int(right))
        for kind, value in enumerate(self._values):
            own = np.flatnonzero(self._of_kind[inside] == kind) + left
            if not len(own):
                out[self._passed[kind] != 0] = value
                continue
            winding = np.zeros((span, span), np.int32)
            winding[:, 0] = self._passed[kind]
            np.add.at(winding, (self._row[own], self._column[own] - x), self._step[own])
            out[np.cumsum(winding, axis=1, dtype=np.int32) != 0] = value
        return out

    def _enter_band(self, y: int, span: int) -> None:
        """Crossings of the band's pixel rows, from left to right."""
        chosen = np.flatnonzero((self._first < y + span) & (self._end > y))
        first = np.maximum(self._first[chosen], y)
        counts = np.minimum(self._end[chosen], y + span) - first
        edge = np.repeat(chosen, counts)
        row = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(first, counts)
        upper, lower = self._upper[edge], self._lower[edge]
        along = (row + 0.5 - upper[:, 1]) / (lower[:, 1] - upper[:, 1])
        # The first column whose centre is not left of the crossing.
        column = np.ceil(upper[:, 0] + along * (lower[:, 0] - upper[:, 0]) - 0.5).astype(np.int64)
        order = np.argsort(column, kind="stable")
        self._column, self._row = column[order], row[order] - y
        self._of_kind, self._step = self._kind[edge][order], self._sign[edge][order]
        self._band = y, span
        self._forget_passed()

    def _forget_passed(self) -> None:
        self._passed_count = 0
        self._passed = np.zeros((len(self._values), (self._band or (0, 0))[1]), np.int32)

    def _pass_to(self, count: int) -> None:
        """Winding numbers at a box's left edge, (values, span): sums of the first ``count`` crossings."""
        if count < self._passed_count:
            self._forget_passed()
        new = slice(self._passed_count, count)
        np.add.at(self._passed, (self._of_kind[new], self._row[new]), self._step[new])
        self._passed_count = count


def _geojson(value: Any) -> Iterator[Annotation]:
    """Annotations of any GeoJSON object, or a list of them."""
    if isinstance(value, list):
        for item in value:
            yield from _geojson(item)
        return
    kind = value["type"]
    if kind == "FeatureCollection":
        yield from _geojson(value["features"])
    elif kind == "Feature":
        names = _class_names(value.get("properties") or {})
        yield from (Annotation(names, rings) for rings in _rings(value["geometry"]))
    else:
        yield from (Annotation((), rings) for rings in _rings(value))


def _class_names(properties: dict[str, Any]) -> tuple[str, ...]:
    """The class of a feature; of a derived one (``Tumor: Positive``) its bases, too."""
    found = properties.get("classification") or properties.get("pathClassId") or ""
    if isinstance(found, dict):
        found = found.get("names") or found.get("name") or ""
    parts = [str(part).strip() for part in (found if isinstance(found, list) else found.split(":"))]
    if not any(parts):
        return ()
    return tuple(": ".join(parts[:count]) for count in range(len(parts), 0, -1))


def _rings(geometry: dict[str, Any] | None) -> Iterator[tuple[np.ndarray, ...]]:
    """Rings of each polygon in a geometry."""
    if geometry is None:
        return
    kind = geometry["type"]
    if kind == "GeometryCollection":
        for part in geometry["geometries"]:
            yield from _rings(part)
    elif kind in ("Polygon", "MultiPolygon"):
        for polygon in [geometry["coordinates"]] if kind == "Polygon" else geometry["coordinates"]:
            # A third coordinate would be a height: slides have none.
            rings = [np.array([point[:2] for point in ring], np.float64) for ring in polygon]
            if rings and _encloses(rings[0]):
                yield (rings[0], *filter(_encloses, rings[1:]))
    elif kind not in ("Point", "MultiPoint", "LineString", "MultiLineString"):
        raise MaskError(f"{kind!r} is no geometry of GeoJSON", do=_EXPORT_AGAIN)


def _encloses(ring: np.ndarray) -> bool:
    """Whether a ring has three corners: a slip of the mouse leaves rings of one or two."""
    return len(np.unique(ring, axis=0)) >= 3


def _asap(data: bytes) -> list[Annotation]:
    if b"<!ENTITY" in data:
        raise MaskError("XML with entities is not read", do=_EXPORT_AGAIN)
    root = ElementTree.fromstring(data)
    if root.tag != "ASAP_Annotations":
        raise MaskError(f"XML of {root.tag}, ASAP's has ASAP_Annotations", do="export it from ASAP, or as GeoJSON")
    above = {group.attrib["Name"]: group.get("PartOfGroup", "") for group in root.iter("Group")}
    found = []
    for annotation in root.iter("Annotation"):
        points = sorted(annotation.iter("Coordinate"), key=lambda point: int(float(point.attrib["Order"])))
        ring = np.array([(float(point.attrib["X"]), float(point.attrib["Y"])) for point in points])
        if annotation.get("Type") in _ASAP_SHAPES and _encloses(ring):
            found.append(Annotation(_groups(annotation.get("PartOfGroup", ""), above), (ring,)))
    return found


def _groups(group: str, above: dict[str, str]) -> tuple[str, ...]:
    """A group and those it is part of; a group that is part of itself ends the chain."""
    chain: list[str] = []
    while group not in _NO_GROUP and group not in chain:
        chain.append(group)
        group = above.get(group, "")
    return tuple(chain)
