"""Every slide of the shared data, tiled: what is kept, and whether its pixels are OpenSlide's."""

from pathlib import Path

import numpy as np
import openslide
import pytest

from tiling import datasets
from tiling.drivers import attempt
from tiling.filters import Thresholds
from tiling.index import build_index
from tiling.run import tile
from tiling.settings import TileSettings
from tiling.store import Description, TileStore, prepare
from tiling.write import Job

OFF = Thresholds(
    min_tissue=0, max_empty=1, max_dark=1, max_pen=1, min_edges=0, min_texture=0, min_sharpness=0
)  # fmt: skip
TIFF_FAMILY = ("wsi/CMU-1-Small-Region.svs", "wsi/test3-DAPI-2-387.ndpi", "panda_stitched/train_images/*.tiff")
BRIGHTFIELD = ("wsi/*.svs", "wsi/*.jpeg", "panda_stitched/train_images/*.tiff", "monuseg14/images/*.jpg")


def found(data: Path, patterns: tuple[str, ...]) -> list[Path]:
    files = [file for pattern in patterns for file in sorted(data.glob(pattern))]
    assert len(files) >= len(patterns)
    return files


@pytest.mark.slow
def test_every_tile_is_openslides(shared_data: Path, tmp_path: Path) -> None:
    """At native mpp, filters off, without loss: 0 pixels differ, in all tiles of all TIFF-family slides."""
    for path in found(shared_data, TIFF_FAMILY):
        store = tmp_path / path.stem
        settings = TileSettings(mpp=None, codec="zstd", thresholds=OFF)
        prepare(store, Description(settings, "slides", ()))
        (source,) = datasets.slides([path]).sources
        assert attempt(Job(store, settings), source).problem == ""
        build_index(store)
        with TileStore(store) as tiles, openslide.OpenSlide(path) as slide:
            columns, rows = (side // 224 for side in slide.dimensions)
            assert len(tiles) == columns * rows
            places = tiles.index.select(["x", "y"]).to_pylist()
            for first in range(0, len(tiles), 64):
                pixels = tiles.read(np.arange(first, min(first + 64, len(tiles))))
                for ours, place in zip(pixels, places[first:], strict=False):
                    theirs = slide.read_region((place["x"], place["y"]), 0, (224, 224)).convert("RGB")
                    assert np.array_equal(ours, np.asarray(theirs)), (path, place)


def test_every_brightfield_slide_keeps_tiles(shared_data: Path, tmp_path: Path) -> None:
    slides = datasets.slides(found(shared_data, BRIGHTFIELD))
    summary = tile(slides, tmp_path / "store", TileSettings(mpp=None, slide_mpp=0.5))
    assert {outcome.slide_id: outcome.kept for outcome in summary.outcomes if not outcome.kept} == {}
    assert not summary.quarantined
