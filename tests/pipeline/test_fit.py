import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.downstream.fit import FitConfig, FitResult, classifier, fit_classifier, predict
from pipeline.downstream.splits import Split, split_by_tile
from tiling.errors import EvaluationError, UsageError

QUICK = FitConfig(epochs=8, batch_size=32, lr=3e-2, seed=5)


def small(in_features: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(in_features, 16), nn.ReLU(), nn.Linear(16, classes))


def blobs(rows: int = 240, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Separable features, shape (rows, 12), on scales that need standardising, and their classes."""
    random = np.random.default_rng(seed)
    label = random.integers(0, classes, rows)
    features = random.normal(size=(rows, 12))
    features[np.arange(rows), label] += 8
    return (features * np.geomspace(0.01, 100, 12) + 50).astype(np.float32), label


def fit(features: np.ndarray, label: np.ndarray, split: Split, **changes: Any) -> FitResult:
    arguments: dict[str, Any] = {"classes": 3, "config": QUICK, "decoder": small}
    return fit_classifier(features, label, split, **(arguments | changes))


@pytest.mark.parametrize("kind", [np.float32, np.float16])
@pytest.mark.parametrize("class_weights", [False, True])
def test_learns_separable_blobs(kind: type, class_weights: bool) -> None:
    features, label = blobs()
    features = features.astype(kind)
    split = split_by_tile(label)
    result = fit(features, label, split, class_weights=class_weights)
    probabilities = predict(result.model, features[split.test])
    assert probabilities.dtype == np.float32
    assert probabilities.sum(axis=1) == pytest.approx(1)
    assert (probabilities.argmax(axis=1) == label[split.test]).all()
    assert result.history[-1]["val_balanced_accuracy"] == 1.0
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]


def test_the_default_decoder_is_the_reports() -> None:
    features, label = blobs(30)
    result = fit_classifier(features, label, split_by_tile(label), 3, FitConfig(epochs=1))
    assert result.model.state_dict()["decoder.0.weight"].shape == (7192, 12)


def test_is_deterministic_and_leaves_the_global_random_state_alone() -> None:
    features, label = blobs()
    split = split_by_tile(label)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    one = fit(features, label, split)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(321)
    two = fit(features, label, split)
    assert one.history == two.history
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, two.model.state_dict()[name]), name
    other = fit(features, label, split, config=replace(QUICK, seed=6))
    assert other.history != one.history


def test_the_normalisation_is_of_train_and_travels_with_the_weights() -> None:
    features, label = blobs()
    features[:, 7] = 3.0  # does not vary
    split = split_by_tile(label)
    result = fit(features, label, split)
    state = result.model.state_dict()
    train = features[split.train].astype(np.float64)
    expected = train.std(axis=0)
    expected[7] = 1.0
    np.testing.assert_allclose(state["norm.mean"], train.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(state["norm.std"], expected, rtol=1e-5)
    trainable = sum(p.numel() for p in result.model.parameters() if p.requires_grad)
    assert trainable == sum(p.numel() for p in small(12, 3).parameters())
    loaded = classifier(12, 3, small)
    loaded.load_state_dict(state)
    np.testing.assert_array_equal(predict(loaded, features), predict(result.model, features))


def test_the_test_part_is_not_looked_at() -> None:
    features, label = blobs()
    split = split_by_tile(label)
    one = fit(features, label, split)
    features[split.test] = np.nan
    label[split.test] = -1
    assert fit(features, label, split).history == one.history


@pytest.mark.parametrize("class_weights", [False, True])
def test_a_class_that_train_lacks(class_weights: bool) -> None:
    features, label = blobs(classes=3)
    rows = np.arange(len(label))
    split = Split(rows[:160][label[:160] != 1], rows[160:200], rows[200:])
    result = fit(features, label, split, class_weights=class_weights, classes=4)
    probabilities = predict(result.model, features[split.test])
    assert probabilities.shape == (40, 4)
    known = label[split.test] != 1
    assert (probabilities.argmax(axis=1) == label[split.test])[known].all()
    # Rows that cannot be learnt do not decide which epoch is kept, but count against the accuracies.
    assert result.best_epoch > 3
    last = result.history[-1]
    assert last["val_loss"] < 0.1
    assert last["val_accuracy"] == pytest.approx((label[split.val] != 1).mean())
    assert last["val_balanced_accuracy"] == pytest.approx(2 / 3)


def test_class_weights_make_a_rare_class_count() -> None:
    random = np.random.default_rng(1)
    label = (random.random(600) < 0.06).astype(np.int64)
    features = (random.normal(size=(600, 12)) + 0.8 * label[:, None]).astype(np.float32)
    split = split_by_tile(label)
    config = FitConfig(epochs=3, batch_size=64, lr=1e-2)
    recall = {}
    for weighted in (False, True):
        model = fit(features, label, split, classes=2, config=config, class_weights=weighted).model
        recall[weighted] = (predict(model, features)[label == 1].argmax(axis=1) == 1).mean()
    assert recall[True] > recall[False] + 0.1


def test_the_best_epoch_is_kept_and_patience_stops() -> None:
    features, label = blobs(120)
    label[100:] = np.random.default_rng(2).permutation(label[100:])  # val that training makes worse
    rows = np.arange(120)
    split = Split(rows[:100], rows[100:110], rows[110:])
    seen = []
    config = FitConfig(epochs=40, batch_size=16, lr=1e-2, patience=3)
    result = fit(features, label, split, config=config, progress=lambda *call: seen.append(call))
    losses = [record["val_loss"] for record in result.history]
    assert result.best_epoch == int(np.argmin(losses)) + 1
    assert len(losses) == result.best_epoch + 3 < 40
    assert [call[0] for call in seen] == [record["epoch"] for record in result.history]
    assert all(total == 40 for _, total, _ in seen)
    assert [call[2] for call in seen] == result.history
    probabilities = predict(result.model, features[split.val])
    kept = -np.log(probabilities[np.arange(10), label[split.val]]).mean()
    assert kept == pytest.approx(min(losses), rel=1e-4)


def test_predict_of_nothing_and_in_any_batch_size() -> None:
    features, _ = blobs(50)
    model = classifier(12, 3, small).train()
    assert predict(model, features[:0]).shape == (0, 3)
    np.testing.assert_allclose(predict(model, features, 7), predict(model, features, 1024), atol=1e-6)
    assert model.training


def test_features_that_are_not_finite_are_counted() -> None:
    features, label = blobs(100)
    split = split_by_tile(label)
    features[split.train[:2], 3] = np.inf
    features[split.val[0], 0] = np.nan
    with pytest.raises(EvaluationError, match="not finite in 3 of 90 rows"):
        fit(features, label, split)
    with pytest.raises(EvaluationError, match="not finite in 3 of 100 rows"):
        predict(classifier(12, 3, small), features)


def test_a_loss_that_explodes_names_the_epoch_and_the_lr() -> None:
    features, label = blobs()
    config = FitConfig(epochs=5, batch_size=32, lr=1e30)
    with pytest.raises(EvaluationError, match=r"epoch 1: train loss .*lr 1e\+30"):
        fit(features, label, split_by_tile(label), config=config)


def test_parts_that_cannot_be_learnt_from() -> None:
    features, label = blobs(30)
    rows, none = np.arange(30), np.empty(0, np.int64)
    by_class = [rows[label == value] for value in range(3)]
    cases = (
        (Split(none, rows[:5], rows[5:]), "train part has no rows"),
        (Split(rows[:5], none, rows[5:]), "val part has no rows"),
        (Split(by_class[1], by_class[0], none), "only class 1"),
        (Split(np.concatenate(by_class[:2]), by_class[2], none), "no class of the val part"),
    )
    for split, text in cases:
        with pytest.raises(EvaluationError, match=text):
            fit(features, label, split)
    with pytest.raises(EvaluationError, match="train part: label 2 outside the 2 classes"):
        fit(features, label, split_by_tile(label), classes=2)
    with pytest.raises(EvaluationError, match=r"\(30, 12\) for 29 labels"):
        fit(features, label[:29], split_by_tile(label[:29]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"patience": 0},
        {"lr": 0.0},
        {"lr": math.nan},
        {"weight_decay": -1.0},
        {"seed": -1},
        {"device": "abacus"},
    ],
)
def test_config_is_validated(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(UsageError, match=name):
        FitConfig(**wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="'cuda' is not available here"):
        FitConfig(device="cuda")
