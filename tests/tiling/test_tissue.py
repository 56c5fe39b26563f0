from pathlib import Path

import cv2
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tiling.phantom import make_slide
from tiling.slide import open_slide
from tiling.tissue import is_brightfield, tissue_fraction, tissue_mask


@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 20), st.floats(0.5, 20), st.floats(0.5, 20),
    st.integers(0, 999),
)  # fmt: skip
def test_fraction_equals_counting(width: int, height: int, count: int, fx: float, fy: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((height, width)) < rng.random()
    corners = rng.integers(0, (int(width * fx) + 1, int(height * fy) + 1), (count, 2))
    boxes = np.concatenate([corners, corners + rng.integers(1, 60, (count, 2))], axis=1)
    found = tissue_fraction(mask, boxes, (fx, fy))
    assert found.dtype == np.float32
    for box, share in zip(boxes, found, strict=True):
        left, right = (min(round(edge / fx), width) for edge in (box[0], box[2]))
        top, bottom = (min(round(edge / fy), height) for edge in (box[1], box[3]))
        left, top = min(left, width - 1), min(top, height - 1)
        inside = [mask[y, x] for y in range(top, max(bottom, top + 1)) for x in range(left, max(right, left + 1))]
        assert abs(sum(inside) / len(inside) - share) < 1e-6


def test_no_boxes() -> None:
    assert tissue_fraction(np.ones((4, 4), bool), np.zeros((0, 4), np.int64), (1, 1)).shape == (0,)


def test_mask_of_glass_and_of_tissue_alone() -> None:
    glass = np.random.default_rng(0).integers(240, 246, (300, 300, 3), np.uint8)
    assert not tissue_mask(glass).any()
    tissue = np.full((300, 300, 3), (200, 120, 180), np.uint8)
    assert tissue_mask(tissue).all()


def test_mask_of_a_made_slide() -> None:
    """Lumina, white as glass, are part of the true outline: small ones are closed, large ones stay holes."""
    slide = make_slide(3, "4", size=(1024, 1536))
    found = tissue_mask(cv2.resize(slide.image, (96, 64), interpolation=cv2.INTER_AREA))
    true = slide.tissue[::16, ::16]
    assert (found & ~true).sum() < 0.05 * true.sum()
    assert (found & true).sum() > 0.85 * true.sum()


def test_tiny_pictures() -> None:
    for shape in ((1, 1, 3), (2, 9, 3), (5, 5, 3)):
        assert tissue_mask(np.zeros(shape, np.uint8)).shape == shape[:2]


def test_brightfield(shared_data: Path) -> None:
    for name, expected in (("CMU-1-Small-Region.svs", True), ("test3-DAPI-2-387.ndpi", False)):
        with open_slide(shared_data / "wsi" / name) as slide:
            assert is_brightfield(slide.overview()[0]) is expected


def test_holes_up_to_the_limit_are_filled_and_bays_are_not() -> None:
    """A lumen of 40 x 40, a hole of 80 x 80, and glass that reaches the edge, in one piece of tissue."""
    picture = np.full((400, 400, 3), (200, 120, 180), np.uint8)
    picture[50:90, 50:90] = 243
    picture[200:280, 100:180] = 243
    picture[0:30, 300:330] = 243
    plain, filled = tissue_mask(picture), tissue_mask(picture, 2000)
    assert not plain[60:80, 60:80].any()
    assert filled[50:90, 50:90].all()
    assert not filled[210:270, 110:170].any()
    assert not filled[0:25, 305:325].any()
    assert tissue_mask(picture, 8000)[200:280, 100:180].all()
    assert (plain <= filled).all()


def test_filling_leaves_glass_and_whole_tissue_alone() -> None:
    glass = np.full((100, 100, 3), 243, np.uint8)
    assert not tissue_mask(glass, 1e9).any()
    assert tissue_mask(np.full((100, 100, 3), (200, 120, 180), np.uint8), 1e9).all()
