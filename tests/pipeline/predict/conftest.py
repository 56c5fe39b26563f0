"""What the tests of prediction share: a bundle in memory, and made slides whose mask says every tile's class."""

import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from pipeline.bundle import Bundle, Decoder
from pipeline.downstream.fit import classifier
from pipeline.models.encoders import build_encoder
from pipeline.models.frozen import FrozenEncoder
from pipeline.models.heads import DinoHead
from pipeline.palette import class_colours
from pipeline.predict import predict
from pipeline.scoring import Score
from tiling import datasets
from tiling.cut import Candidate
from tiling.datasets import Dataset
from tiling.labels import GLEASON_CLASSES
from tiling.phantom import PhantomSlide, make_slide, write_slide
from tiling.settings import TileSettings

MakeBundle = Callable[..., Bundle]
RowsOf = Callable[[Path], list[dict[str, Any]]]

# Radboud's mask value -> class: background, stroma and benign glands (healthy), Gleason 3, 4, 5.
CLASS_OF_VALUE = np.array([0, 1, 1, 2, 3, 4])


def bundle_in_memory(decoder: bool = True, mpp: float = 0.5, sha256: str = "b" * 64, tile_px: int = 224) -> Bundle:
    """A bundle in memory: random networks whose decoder does not find all tiles alike."""
    torch.manual_seed(0)
    backbone = build_encoder("xcit_nano_12_p16_224").eval().requires_grad_(False)
    head = DinoHead(128, 64, 32, 16).eval().requires_grad_(False)
    triples = (0.6, 0.4, 0.5), (0.2, 0.3, 0.1)
    encoder = FrozenEncoder("xcit_nano_12_p16_224", backbone, head, *triples, mpp, "e" * 64, "s" * 64)
    model = classifier(64, 5, nn.Linear).eval().requires_grad_(False)
    graded = Decoder(model, "head", GLEASON_CLASSES, class_colours(GLEASON_CLASSES)) if decoder else None
    return Bundle(Path("none"), sha256, encoder, graded, TileSettings(tile_px=tile_px, mpp=mpp), {})


@pytest.fixture(scope="session")
def make_bundle() -> MakeBundle:
    """make_bundle(decoder=True, mpp=0.5, sha256=..., tile_px=224)."""
    return bundle_in_memory


@dataclass(frozen=True)
class Made:
    """A made slide on disk, its truth, and how it is cut."""

    path: Path
    truth: PhantomSlide
    side: int  # of a tile, in level-0 pixels
    tile_px: int  # of the bundle
    mpp: float  # of the bundle
    slide_mpp: float | None = None  # override

    @property
    def true_mpp(self) -> float:
        return self.slide_mpp or 0.5

    def score(self, candidates: Sequence[Candidate]) -> dict[str, np.ndarray]:
        """An oracle: the mask's class under each tile."""
        found = [self.true_class(candidate.x, candidate.y) for candidate in candidates]
        return {"probabilities": (0.6 * np.eye(5)[found] + 0.08).astype(np.float32)}

    def true_class(self, x: int, y: int) -> int:
        """The class that covers most of the tile."""
        values = CLASS_OF_VALUE[self.truth.mask[y : y + self.side, x : x + self.side]]
        return int(np.bincount(values.ravel()).argmax())

    def true_tiles(self) -> dict[tuple[int, int], int]:
        """Class of each tile of the grid with at least half of it tissue, by its corner."""
        height, width = self.truth.mask.shape
        corners = [
            (x, y)
            for y in range(0, height - self.side + 1, self.side)
            for x in range(0, width - self.side + 1, self.side)
        ]
        tissue = self.truth.tissue
        return {
            (x, y): self.true_class(x, y)
            for x, y in corners
            if tissue[y : y + self.side, x : x + self.side].mean() >= 0.5
        }

    def dataset(self) -> Dataset:
        return datasets.slides([self.path])

    def predict(self, out: Path, score: Score | None = None) -> Path:
        """DIR/<slide_id> after a prediction by the oracle."""
        predict(
            self.dataset(),
            bundle_in_memory(mpp=self.mpp, tile_px=self.tile_px),
            out,
            self.slide_mpp,
            score=score or self.score,
        )
        return out / self.truth.image_id


# Grade, size, tile side at level 0, in the bundle, its mpp, --slide-mpp: as it is, resampled, from level 1.
CASES = {
    "benign": ("benign", (1792, 2240), 224, 224, 0.5, None),
    "3": ("3", (2240, 2688), 224, 224, 0.5, None),
    "4": ("4", (2240, 2688), 224, 224, 0.5, None),
    "5": ("5", (2688, 2240), 224, 224, 0.5, None),
    "finer": ("4", (2240, 2688), 320, 160, 0.5, 0.25),
    "coarser": ("5", (2240, 1792), 256, 128, 1.0, None),
    "level 1": ("5", (1792, 2240), 256, 64, 2.0, None),
}


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    """Each of CASES, where a test does not name some itself."""
    return str(request.param)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """A slide of CASES, made when first asked for; never changed."""
    root, known = tmp_path_factory.mktemp("made"), dict[str, Made]()

    def get(name: str) -> Made:
        if name not in known:
            grade, size, side, px, mpp, slide_mpp = CASES[name]
            slide = make_slide(7, grade, size=size)
            write_slide(slide, root)
            path = root / "train_images" / f"{slide.image_id}.tiff"
            known[name] = Made(path, slide, side, px, mpp, slide_mpp)
        return known[name]

    return get


@pytest.fixture(scope="module")
def predicted(made: Callable[[str], Made], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """DIR/<slide_id> of a slide of CASES, by the oracle; never changed."""
    known = dict[str, Path]()

    def get(name: str) -> Path:
        if name not in known:
            known[name] = made(name).predict(tmp_path_factory.mktemp("predicted") / "out")
        return known[name]

    return get


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A slide of some 20 tiles, for the real networks and for what has nothing to do with classes."""
    root, slide = tmp_path_factory.mktemp("small"), make_slide(3, "4", size=(1120, 1344))
    write_slide(slide, root)
    return Made(root / "train_images" / f"{slide.image_id}.tiff", slide, 224, 224, 0.5)


@pytest.fixture
def folder_of_slides(small: Made, tmp_path: Path) -> Path:
    """Three times the small slide, under names of its own."""
    (tmp_path / "slides").mkdir()
    for name in ("a", "b", "c"):
        shutil.copy(small.path, tmp_path / f"slides/{name}.tiff")
    return tmp_path / "slides"


@pytest.fixture(scope="session")
def rows_of() -> RowsOf:
    """The tiles of a slide's prediction."""

    def read(folder: Path) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = pq.read_table(folder / "tiles.parquet").to_pylist()
        return rows

    return read


@pytest.fixture
def no_thread_stays() -> Iterator[None]:
    """Threads that a test began have ended with it; other tests may have left some."""
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before
