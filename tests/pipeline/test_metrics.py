import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, recall_score

from pipeline.downstream.metrics import classification
from tiling.errors import EvaluationError

NAMES = ("background", "healthy", "Gleason 3", "Gleason 4", "Gleason 5")


def scores(predicted: list[int], classes: int) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[predicted] * 0.6 + 0.1


def test_by_hand_with_all_classes() -> None:
    #                          0  0  0  0  1  1  2  2
    result = classification(np.array([0, 0, 0, 0, 1, 1, 2, 2]), scores([0, 0, 0, 1, 1, 2, 2, 2], 3), ("a", "b", "c"))
    assert result["n"] == 8
    assert result["confusion"] == [[3, 1, 0], [0, 1, 1], [0, 0, 2]]
    assert result["accuracy"] == pytest.approx(6 / 8)
    assert result["balanced_accuracy"] == pytest.approx((3 / 4 + 1 / 2 + 1) / 3)
    assert result["macro_f1"] == pytest.approx((6 / 7 + 1 / 2 + 4 / 5) / 3)
    assert result["absent"] == []
    assert result["per_class"][1] == {"name": "b", "support": 2, "precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_by_hand_with_absent_classes() -> None:
    # Class 3 is predicted once but never true, class 4 is neither, class 0 is true but never predicted.
    result = classification(np.array([0, 1, 1, 2]), scores([1, 1, 1, 3], 5), NAMES)
    assert result["confusion"] == [[0, 1, 0, 0, 0], [0, 2, 0, 0, 0], [0, 0, 0, 1, 0], [0] * 5, [0] * 5]
    assert result["accuracy"] == pytest.approx(0.5)
    assert result["balanced_accuracy"] == pytest.approx((0 + 1 + 0) / 3)
    assert result["macro_f1"] == pytest.approx((0 + 0.8 + 0 + 0) / 4)
    assert result["absent"] == ["Gleason 4", "Gleason 5"]
    by_name = {entry.pop("name"): entry for entry in result["per_class"]}
    assert by_name["background"] == {"support": 1, "precision": None, "recall": 0.0, "f1": 0.0}
    assert by_name["Gleason 4"] == {"support": 0, "precision": 0.0, "recall": None, "f1": 0.0}
    assert by_name["Gleason 5"] == {"support": 0, "precision": None, "recall": None, "f1": None}
    json.dumps(result, allow_nan=False)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60))
def test_agrees_with_scikit_learn_over_the_classes_it_names(pairs: list[tuple[int, int]]) -> None:
    truth, predicted = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    result = classification(np.array(truth), scores(predicted, 4), "abcd")
    present = sorted(set(truth))
    recall = recall_score(truth, predicted, labels=present, average="macro", zero_division=0)
    f1 = f1_score(truth, predicted, labels=sorted({*truth, *predicted}), average="macro", zero_division=0)
    assert result["balanced_accuracy"] == pytest.approx(recall)
    assert result["macro_f1"] == pytest.approx(f1)
    assert sum(map(sum, result["confusion"])) == len(pairs)
    assert sum(entry["support"] for entry in result["per_class"]) == len(pairs)


def test_half_precision_and_small_label_types_are_fine() -> None:
    result = classification(np.array([0, 1], np.uint8), scores([0, 1], 2).astype(np.float16), "ab")
    assert result["accuracy"] == 1.0


def test_errors_name_the_value() -> None:
    truth = np.array([0, 1, 1])
    bad = scores([0, 1, 1], 2)
    bad[1, 0], bad[2, 1] = np.nan, np.inf
    with pytest.raises(EvaluationError, match="not finite in 2 of 3 rows"):
        classification(truth, bad, "ab")
    with pytest.raises(EvaluationError, match="label 2 outside the 2 classes"):
        classification(np.array([0, 2]), scores([0, 1], 2), "ab")
    with pytest.raises(EvaluationError, match="label -1 outside"):
        classification(np.array([0, -1]), scores([0, 1], 2), "ab")
    with pytest.raises(EvaluationError, match=r"\(3, 2\).*3 class names"):
        classification(truth, scores([0, 1, 1], 2), "abc")
    with pytest.raises(EvaluationError, match="no rows"):
        classification(np.empty(0, np.int64), np.empty((0, 2)), "ab")
