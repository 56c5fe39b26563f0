import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.downstream.splits import PARTS, Split, slide_classes, split_by_slide, split_by_tile
from tiling.errors import EvaluationError, UsageError

SEEDS = st.integers(0, 2**40)


@st.composite
def labelled_rows(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Slides with gaps in their numbers, 1 to 12 rows each, up to 5 classes, rows in any order."""
    numbers = draw(st.lists(st.integers(0, 10_000), min_size=3, max_size=40, unique=True))
    classes = draw(st.integers(1, 5))
    slide, label = [], []
    for number in numbers:
        own = draw(st.lists(st.integers(0, classes - 1), min_size=1, max_size=12))
        slide += [number] * len(own)
        label += own
    order = np.array(draw(st.permutations(range(len(slide)))), np.int64)
    return np.array(slide, np.int64)[order], np.array(label, np.int64)[order]


def assert_partition(split: Split, rows: int) -> None:
    joined = np.concatenate(list(split.parts().values()))
    assert np.array_equal(np.sort(joined), np.arange(rows))
    for part in split.parts().values():
        assert part.dtype == np.int64
        assert len(part)
        assert np.all(np.diff(part) > 0)


@settings(deadline=None, max_examples=60)
@given(labelled_rows(), SEEDS)
def test_by_slide_holds_its_promises(rows: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    slide, label = rows
    split = split_by_slide(slide, label, seed=seed)
    assert_partition(split, len(slide))
    owners = [set(slide[part].tolist()) for part in split.parts().values()]
    assert sum(map(len, owners)) == len(set.union(*owners))  # no slide in two parts
    slides, classes = slide_classes(slide, label)
    for value in np.unique(label):
        of_class = set(slides[classes == value].tolist())
        if len(of_class) >= 3:
            assert all(of_class & owner for owner in owners)
        named = [line for line in split.warnings if line.startswith(f"class {value} ")]
        missing = [name for name, part in split.parts().items() if value not in label[part]]
        assert len(named) == (0 < len(of_class) < 3 or bool(missing))
        assert all(name in named[0] for name in missing)


@settings(deadline=None, max_examples=30)
@given(labelled_rows(), SEEDS, st.randoms(use_true_random=False))
def test_by_slide_ignores_the_order_of_rows(rows, seed, random) -> None:  # type: ignore[no-untyped-def]
    slide, label = rows
    order = list(range(len(slide)))
    random.shuffle(order)
    one = split_by_slide(slide, label, seed=seed)
    two = split_by_slide(slide[order], label[order], seed=seed)
    for name in PARTS:
        assert set(slide[one.parts()[name]]) == set(slide[order][two.parts()[name]])
    assert one.warnings == two.warnings


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 4), min_size=3, max_size=200), SEEDS)
def test_by_tile_is_a_partition_with_a_warning(label: list[int], seed: int) -> None:
    split = split_by_tile(np.array(label), seed=seed)
    assert_partition(split, len(label))
    assert "tiles of one slide stand in train and test" in split.warnings[0]


def test_shares_are_kept_within_each_class() -> None:
    classes = np.repeat([0, 1, 2], [100, 40, 20])
    slide = np.arange(160).repeat(5)
    split = split_by_slide(slide, classes.repeat(5), seed=3)
    assert split.warnings == ()
    for value, expected in ((0, (80, 10, 10)), (1, (32, 4, 4)), (2, (16, 2, 2))):
        counts = tuple(int((classes.repeat(5)[part] == value).sum()) // 5 for part in split.parts().values())
        assert counts == expected
    assert [len(part) for part in split_by_tile(np.zeros(1000, np.int64)).parts().values()] == [800, 100, 100]


def test_the_seed_decides_and_old_splits_can_be_repeated() -> None:
    slide, label = np.arange(10), np.zeros(10, np.int64)
    split = split_by_slide(slide, label, seed=0)
    assert (split.val.tolist(), split.test.tolist()) == ([5], [9])  # as computed when this was written
    assert len({tuple(split_by_slide(slide, label, seed=seed).test) for seed in range(20)}) > 3


def test_the_class_of_a_slide_needs_a_tenth_of_its_rows() -> None:
    slide = np.repeat([4, 9], [30, 31])
    label = np.zeros(61, np.int64)
    label[:3] = 4  # 3 of 30: exactly a tenth
    label[30:33] = 4  # 3 of 31: less
    slides, classes = slide_classes(slide, label)
    assert slides.tolist() == [4, 9]
    assert classes.tolist() == [4, 0]
    even = np.arange(12)  # none has a tenth: the highest of the most common
    assert slide_classes(np.zeros(12, np.int64), even)[1].tolist() == [11]


@pytest.mark.parametrize(
    ("classes", "warned"),
    [([0, 1, 2], 3), ([0, 0, 1], 2), ([0, 0, 1, 1], 2), ([0, 0, 0, 4], 1), ([0] * 5 + [1] * 2, 1)],
)
def test_rare_classes_fill_every_part_and_are_named(classes: list[int], warned: int) -> None:
    names = ("background", "healthy", "Gleason 3", "Gleason 4", "Gleason 5")
    for seed in range(10):
        split = split_by_slide(np.arange(len(classes)), np.array(classes), seed=seed, class_names=names)
        assert_partition(split, len(classes))
        assert len(split.warnings) == warned
    rare = names[classes[-1]]
    count = classes.count(classes[-1])
    assert split.warnings[-1].startswith(f"class {rare} is the class of {count} slide(s)")
    assert "no rows in" in split.warnings[-1]


def test_a_class_that_names_no_slide_is_warned_about_where_it_is_missing() -> None:
    slide = np.arange(10).repeat(20)
    label = np.zeros(200, np.int64)
    label[0] = 3
    (warning,) = split_by_slide(slide, label).warnings
    assert warning.startswith("class 3 has no rows in ")


def test_errors_say_what_and_what_to_do() -> None:
    two = np.array([1, 1, 2])
    with pytest.raises(EvaluationError, match=r"2 slide\(s\).*at least 3.*label more slides"):
        split_by_slide(two, np.zeros(3, np.int64))
    with pytest.raises(EvaluationError, match="1 of 3 labels below 0"):
        split_by_slide(np.arange(3), np.array([0, -1, 1]))
    with pytest.raises(EvaluationError, match="one of each per row"):
        split_by_slide(np.arange(4), np.zeros(3, np.int64))
    with pytest.raises(EvaluationError, match=r"2 labelled row\(s\)"):
        split_by_tile(np.zeros(2, np.int64))
    with pytest.raises(EvaluationError, match="float64"):
        split_by_tile(np.zeros(5))
    for shares in ((0.8, 0.2), (0.8, 0.2, 0.0), (0.8, 0.1, 0.2)):
        with pytest.raises(UsageError, match="summing to 1"):
            split_by_tile(np.zeros(5, np.int64), shares)
    with pytest.raises(UsageError, match="seed -1"):
        split_by_tile(np.zeros(5, np.int64), seed=-1)
