from collections import Counter
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiling.errors import GridError, SlideError
from tiling.grid import tile_corners
from tiling.segments import RowReader, SegmentGrid, shrink


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def decoder(
    pixels: np.ndarray, grid: SegmentGrid, broken: frozenset[int] = frozenset(), padded: bool = False
) -> tuple[Callable[[int], np.ndarray], Counter[int]]:
    """Segments of an array, as TIFF gives them: tiles reach past the edge (padded), strips do not."""
    calls: Counter[int] = Counter()

    def decode(number: int) -> np.ndarray:
        calls[number] += 1
        if number in broken:
            raise SlideError(f"segment {number} is broken")
        left, top = grid.corner(number)
        part = pixels[top : top + grid.segment_height, left : left + grid.segment_width]
        if not padded:
            return part
        rest = grid.segment_height - part.shape[0], grid.segment_width - part.shape[1]
        return np.pad(part, ((0, rest[0]), (0, rest[1]), (0, 0)), constant_values=77)

    return decode, calls


sides = st.integers(1, 120)


@given(sides, sides, st.integers(1, 50), st.integers(1, 50), st.integers(1, 40), st.booleans(), st.data())
def test_boxes_equal_slices(
    width: int, height: int, wide: int, high: int, span: int, padded: bool, data: st.DataObject
) -> None:
    pixels, grid = picture(width, height), SegmentGrid(width, height, wide, high)
    decode, calls = decoder(pixels, grid, padded=padded)
    reader = RowReader(grid, decode)
    corners = tile_corners(width, height, span).tolist()
    chosen = [corner for corner in corners if data.draw(st.booleans())]
    for x, y in chosen:
        assert (reader.cut(x, y, span) == pixels[y : y + span, x : x + span]).all()
    assert all(count == 1 for count in calls.values())
    assert set(calls) == {number for x, y in chosen for number in grid.under(x, y, span)}
    assert reader.decoded == len(calls)
    assert not reader.damaged


@given(st.sets(st.integers(0, 15), max_size=5), st.integers(5, 45))
def test_a_damaged_segment_loses_the_boxes_on_it(broken: set[int], span: int) -> None:
    pixels, grid = picture(160, 130), SegmentGrid(160, 130, 40, 35)
    decode, calls = decoder(pixels, grid, frozenset(broken))
    reader = RowReader(grid, decode)
    for x, y in tile_corners(160, 130, span).tolist():
        tile = reader.cut(x, y, span)
        if broken & set(grid.under(x, y, span)):
            assert tile is None
        else:
            assert tile is not None
            assert (tile == pixels[y : y + span, x : x + span]).all()
    assert all(count == 1 for count in calls.values())
    assert set(reader.damaged) == broken & set(calls)
    assert all(text == f"segment {number} is broken" for number, text in reader.damaged.items())


def test_boxes_must_come_in_row_order() -> None:
    grid = SegmentGrid(100, 100, 20, 20)
    reader = RowReader(grid, decoder(picture(100, 100), grid)[0])
    reader.cut(0, 60, 20)
    with pytest.raises(GridError, match="box in segment row 1 after row 3: boxes must come in row order"):
        reader.cut(0, 20, 20)


@pytest.mark.parametrize(("x", "y"), [(-1, 0), (0, -1), (81, 0), (0, 81)])
def test_box_outside_the_level(x: int, y: int) -> None:
    grid = SegmentGrid(100, 100, 30, 30)
    with pytest.raises(GridError, match=f"box at {x}, {y} of 20 px lies outside a level of 100 x 100 px"):
        grid.under(x, y, 20)


@pytest.mark.parametrize("factor", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(("wide", "high"), [(64, 64), (208, 8), (208, 25), (208, 160), (48, 16), (30, 20)])
@pytest.mark.parametrize("padded", [False, True])
def test_shrink_is_the_area_mean(factor: int, wide: int, high: int, padded: bool) -> None:
    width, height = 208, 160
    pixels, grid = picture(width, height), SegmentGrid(width, height, wide, high)
    small, unknown = shrink(grid, decoder(pixels, grid, padded=padded)[0], factor)
    want = cv2.resize(pixels, (width // factor, height // factor), interpolation=cv2.INTER_AREA)
    assert np.array_equal(small, want)
    assert not unknown.any()


@pytest.mark.parametrize(("wide", "high"), [(64, 64), (203, 8), (203, 157), (30, 30)])
def test_shrink_of_odd_sizes_covers_everything(wide: int, high: int) -> None:
    grid = SegmentGrid(203, 157, wide, high)
    small, _ = shrink(grid, decoder(np.full((157, 203, 3), 9, np.uint8), grid)[0], 8)
    assert small.shape == (20, 26, 3)
    assert (small == 9).all()


def test_shrink_says_what_is_unknown() -> None:
    pixels, grid = picture(160, 128), SegmentGrid(160, 128, 32, 32)
    small, unknown = shrink(grid, decoder(pixels, grid, frozenset({7}))[0], 4)
    left, top = grid.corner(7)
    want = np.zeros((32, 40), bool)
    want[top // 4 : top // 4 + 8, left // 4 : left // 4 + 8] = True
    assert (unknown == want).all()
    assert (small[want] == 255).all()
    assert (small[~want] != 255).any()
