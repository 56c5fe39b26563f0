"""What is decoded at all: each segment at most once, background never."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tifffile

from tiling.cut import FLAT, NO_TISSUE, cut_slide, plan_slide
from tiling.filters import Thresholds
from tiling.phantom import make_slide
from tiling.settings import TileSettings
from tiling.slide import open_slide

OFF = Thresholds(
    min_tissue=0, max_empty=1, max_dark=1, max_pen=1, min_edges=0, min_texture=0, min_sharpness=0
)  # fmt: skip


@pytest.fixture(scope="module")
def island(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tissue of 1024 px in the middle of a white slide of 3584: one level, JPEG."""
    pixels = np.full((3584, 3584, 3), 255, np.uint8)
    pixels[1280:2304, 1280:2304] = make_slide(4, "3", size=(1536, 1536)).image[256:1280, 256:1280]
    path = tmp_path_factory.mktemp("cut") / "island.tiff"
    layout = {"photometric": "rgb", "tile": (256, 256), "resolution": (2e4, 2e4), "resolutionunit": 3}
    tifffile.imwrite(path, pixels, compression="jpeg", compressionargs={"level": 85}, **layout)
    return path


def tiled(path: Path, limits: Thresholds, mpp: float = 0.5) -> tuple[Counter[str], Counter[int]]:
    """Candidates by fate, and how often each segment was decoded for them."""
    settings = TileSettings(mpp=mpp, thresholds=limits)
    with open_slide(path) as slide:
        plan, calls, read = plan_slide(slide, settings), Counter[int](), slide.read_segment

        def counted(level: int, number: int) -> np.ndarray:
            calls[number] += 1
            return read(level, number)

        slide.read_segment = counted  # type: ignore[method-assign]
        return Counter(one.reason for one in cut_slide(slide, plan, settings)), calls


def with_tissue(path: Path) -> set[int]:
    return {row * 14 + column for row in range(5, 9) for column in range(5, 9)}


def test_background_is_not_decoded(island: Path) -> None:
    fates, calls = tiled(island, Thresholds())
    assert fates[""] >= 16
    assert fates[NO_TISSUE] > 0
    assert set(calls.values()) == {1}
    # A tile at the tissue's edge reaches into the next segments, and none goes further.
    assert set(calls) <= {row * 14 + column for row in range(4, 10) for column in range(4, 10)}


def test_segments_compressed_to_nothing_are_not_decoded(island: Path) -> None:
    """The tissue mask is off: their sizes tell."""
    fates, calls = tiled(island, Thresholds(min_tissue=0))
    assert fates[FLAT] > 150
    assert with_tissue(island) <= set(calls)
    assert set(calls) <= {row * 14 + column for row in range(4, 10) for column in range(4, 10)}
    kept = tiled(island, Thresholds())[0][""]
    assert fates[""] >= kept


@pytest.mark.parametrize("mpp", [0.5, 1.0])
def test_with_filters_off_every_segment_is_decoded_once(island: Path, mpp: float) -> None:
    fates, calls = tiled(island, OFF, mpp)
    assert fates == {"": (256, 64)[mpp > 0.5]}
    assert calls == dict.fromkeys(range(14 * 14), 1)


def test_batches_do_not_show(island: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same candidates, however many are cut at once."""

    def found() -> list[tuple[int, int, str, bytes, bytes]]:
        settings = TileSettings(mpp=0.5)
        with open_slide(island) as slide:
            return [
                (one.x, one.y, one.reason, one.metrics.tobytes(), one.tile.tobytes())
                for one in cut_slide(slide, plan_slide(slide, settings), settings)
                if one.tile is not None and one.metrics is not None
            ]

    whole = found()
    for size in (1, 3, 5):
        monkeypatch.setattr("tiling.cut._BATCH_BYTES", size * 3 * 224**2)
        assert found() == whole
