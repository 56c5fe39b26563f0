"""Regions of tiles of one class, as GeoJSON that QuPath (0.4 or later) opens: pure functions of boxes and classes."""

import json
import uuid
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import shapely
from shapely.geometry.polygon import orient

from pipeline.palette import Colour

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "bony/regions")


@dataclass(frozen=True)
class ClassMap:
    """Which class each tile of a slide was given: the most probable one.

    Args:
        boxes: x0, y0, x1, y1 in level-0 pixels, int64 (N, 4); tiles do not overlap, neighbours share a whole edge.
        probabilities: Per tile and class, float32 (N, C).
        class_names: C names.
        colours: C RGB colours.
        mpp: um per level-0 pixel.
    """

    boxes: np.ndarray
    probabilities: np.ndarray
    class_names: tuple[str, ...]
    colours: tuple[Colour, ...]
    mpp: float

    @cached_property
    def classes(self) -> np.ndarray:
        """Class of each tile, int64 (N,)."""
        return np.asarray(self.probabilities.argmax(axis=1))

    @cached_property
    def areas_mm2(self) -> np.ndarray:
        """Area of each tile in mm2, float64 (N,)."""
        return areas_mm2(self.boxes, self.mpp)

    def per_class(self) -> dict[str, dict[str, Any]]:
        """``tiles``, ``share`` of all tiles (None when there is none) and ``area_mm2`` of each class."""
        found = {}
        for number, name in enumerate(self.class_names):
            mine = self.classes == number
            share = round(float(mine.mean()), 6) if len(mine) else None
            area = round(float(self.areas_mm2[mine].sum()), 6)
            found[name] = {"tiles": int(mine.sum()), "share": share, "area_mm2": area}
        return found


def areas_mm2(boxes: np.ndarray, mpp: float) -> np.ndarray:
    """Areas in mm2, float64 (N,), of boxes (N, 4) in pixels of ``mpp`` um.

    >>> areas_mm2(np.array([[0, 0, 2000, 1000]]), 0.5).tolist()
    [0.5]
    """
    sides = (boxes[:, 2:] - boxes[:, :2]) * (mpp / 1000)
    return np.asarray(sides[:, 0] * sides[:, 1])


def feature_collection(tiles: ClassMap, slide_id: str) -> dict[str, Any]:
    """One GeoJSON feature per region: tiles of one class that are joined by their edges, not by corners alone.

    Coordinates are whole level-0 pixels from the top left corner, as QuPath counts them. The same tiles give the same
    features in the same order with the same ids; ``slide_id`` keeps the ids of different slides apart.
    """
    features = [
        feature for number in range(len(tiles.class_names)) for feature in _features_of_class(tiles, number, slide_id)
    ]
    return {"type": "FeatureCollection", "features": features}


def _features_of_class(tiles: ClassMap, number: int, slide_id: str) -> list[dict[str, Any]]:
    """The regions of one class, from left to right."""
    mine = np.flatnonzero(tiles.classes == number)
    boxes = tiles.boxes[mine]
    regions = shapely.get_parts(shapely.union_all(shapely.box(*boxes.T)))
    tile_of, region_of = shapely.STRtree(regions).query(
        shapely.points((boxes[:, :2] + boxes[:, 2:]) / 2), predicate="within"
    )
    features = []
    for position, region in enumerate(regions):
        members = mine[tile_of[region_of == position]]
        rings = _rings(region)
        name = tiles.class_names[number]
        measurements = {
            "tiles": len(members),
            "area mm2": round(float(tiles.areas_mm2[members].sum()), 6),
            "mean probability": round(float(tiles.probabilities[members, number].mean(dtype=np.float64)), 6),
        }
        features.append(
            {
                "type": "Feature",
                "id": str(uuid.uuid5(_NAMESPACE, json.dumps([slide_id, name, rings]))),
                "geometry": {"type": "Polygon", "coordinates": rings},
                "properties": {
                    "objectType": "annotation",
                    "classification": {"name": name, "color": list(tiles.colours[number])},
                    "measurements": measurements,
                },
            }
        )
    # No two regions of a class begin at the same corner: their tiles there would share an edge.
    return sorted(features, key=lambda feature: feature["geometry"]["coordinates"][0][0])


def _rings(region: shapely.Polygon) -> list[list[list[int]]]:
    """Shell and holes as GeoJSON rings, each closed and begun at its leftmost, then topmost corner.

    Shells run as RFC 7946 wants them. Points inside an edge, where tiles meet, are left out.
    """
    region = orient(shapely.normalize(region))
    rings = []
    for line in (region.exterior, *region.interiors):
        points = np.rint(shapely.get_coordinates(line)[:-1]).astype(np.int64)
        upright_before = points[:, 0] == np.roll(points[:, 0], 1)
        upright_after = points[:, 0] == np.roll(points[:, 0], -1)
        corners = points[upright_before != upright_after].tolist()
        rings.append([*corners, corners[0]])
    return rings
