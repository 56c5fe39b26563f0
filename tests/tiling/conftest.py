"""What the tiling tests share: made slides on disk, and the fingerprints of what tiling makes of them."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile

from tiling import datasets, phantom
from tiling.datasets import Dataset
from tiling.run import tile
from tiling.settings import TileSettings
from tiling.slide import Slide

SIZE = (1024, 1536)

Files = Callable[[Path], dict[str, str]]
Pixels = Callable[[Slide, int], np.ndarray]
Spoil = Callable[..., tuple[int, int, int, int]]


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two made slides of each provider in PANDA's layout: never changed, copied by tests that spoil one."""
    root = tmp_path_factory.mktemp("cohort")
    rows = ["image_id,data_provider,isup_grade,gleason_score"]
    for seed, (grade, provider) in enumerate([("3", "radboud"), ("5", "radboud"), ("benign", "karolinska")]):
        slide = phantom.make_slide(seed, grade, provider, SIZE)
        phantom.write_slide(slide, root)
        rows.append(f"{slide.image_id},{provider},{slide.isup_grade},{slide.gleason_score}")
    (root / "train.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture
def own_cohort(cohort: Path, tmp_path: Path) -> Path:
    """A copy of the made slides that a test may spoil."""
    return Path(shutil.copytree(cohort, tmp_path / "own_cohort"))


@pytest.fixture(scope="session")
def cohort_slides(cohort: Path) -> Dataset:
    return datasets.panda(cohort)


@pytest.fixture(scope="session")
def cohort_store(cohort_slides: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made slides tiled with the default settings; never changed."""
    store = tmp_path_factory.mktemp("tiled") / "store"
    tile(cohort_slides, store, TileSettings())
    return store


@pytest.fixture
def own_store(cohort_store: Path, tmp_path: Path) -> Path:
    """A copy of the store that a test may spoil."""
    return Path(shutil.copytree(cohort_store, tmp_path / "own_store"))


@pytest.fixture(scope="session")
def files() -> Files:
    """Relative path -> sha256 of every file under a folder."""

    def digests(folder: Path) -> dict[str, str]:
        return {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    return digests


@pytest.fixture(scope="session")
def level_pixels() -> Pixels:
    """A whole level put together from its segments, uint8 (H, W, 3)."""

    def paste(slide: Slide, level: int) -> np.ndarray:
        grid = slide.segment_grid(level)
        out = np.zeros((grid.height, grid.width, 3), np.uint8)
        for number in range(grid.rows * grid.columns):
            left, top = grid.corner(number)
            pixels = slide.read_segment(level, number)[: grid.height - top, : grid.width - left]
            out[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
        return out

    return paste


@pytest.fixture(scope="session")
def spoil() -> Spoil:
    """Overwrite bytes inside one segment of a TIFF, all of it or ``count`` of them; returns its box x0, y0, x1, y1."""

    def overwrite(path: Path, number: int, level: int = 0, count: int | None = None) -> tuple[int, int, int, int]:
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages[level]
            at, size = page.dataoffsets[number], page.databytecounts[number]
            wide, high = page.tilewidth, page.tilelength
            row, column = divmod(number, -(-page.imagewidth // wide))
        data = bytearray(path.read_bytes())
        first, size = (at, size) if count is None else (at + (size - count) // 2, count)
        data[first : first + size] = np.random.default_rng(number).bytes(size)
        path.write_bytes(data)
        return column * wide, row * high, (column + 1) * wide, (row + 1) * high

    return overwrite
