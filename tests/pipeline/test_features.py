"""FeatureStore and evaluation: other stores, damage, missing parts, labels, protocols."""

import json
from pathlib import Path

import numpy as np
import pytest
import zarr

from pipeline import features
from pipeline.downstream.tasks import any_pixel_labels, evaluate
from pipeline.features import FeatureDescription
from tiling import atomic, datasets, phantom
from tiling.errors import DamageError, EvaluationError, FeatureError, StoreError, UsageError
from tiling.run import tile
from tiling.settings import TileSettings
from tiling.store import TileStore

WIDTH = 16


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small phantom slides of every grade with masks, one of them Karolinska's; a store of them."""
    root = tmp_path_factory.mktemp("cohort")
    phantom.make_cohort(root / "slides", slides_per_grade=3, size=(896, 1344))
    tile(datasets.panda(root / "slides"), root / "store", TileSettings())
    return root / "store"


def write_features(path: Path, store: TileStore, fingerprint: str | None = None, nan: bool = False) -> Path:
    """Features that tell the classes apart, so that a decoder has something to learn."""
    label = store.labels()
    values = np.random.default_rng(0).normal(size=(len(store), WIDTH)).astype(np.float32)
    values[np.arange(len(store)), np.maximum(label, 0)] += 6
    if nan:
        values[0, 0] = np.nan
    about = FeatureDescription(
        "made",
        "0" * 64,
        fingerprint or store.fingerprint,
        "1" * 64,
        {"head": WIDTH},
        (0.5,) * 3,
        (0.2,) * 3,
        0.5,
        0.5,
        False,
    )
    (path / features.SLIDES).mkdir(parents=True)
    atomic.write_json(path / features.DESCRIPTION, about.to_json())
    for number, slide_id in enumerate(store.slide_ids):
        features.write_slide(path, slide_id, {"head": values[store.slide_of_row == number]})
    return path


def test_features_come_back_in_the_store_s_order(cohort: Path, tmp_path: Path) -> None:
    with TileStore(cohort) as store:
        write_features(tmp_path / "f", store)
        values = features.read_features(tmp_path / "f", store, "head")
        assert values.shape == (len(store), WIDTH)
        assert values.dtype == np.float32
        for number in range(len(store.slide_ids)):
            assert np.array_equal(store.rows_of_slide(number), np.flatnonzero(store.slide_of_row == number))
        labelled = store.labels() >= 0
        assert (values[labelled].argmax(axis=1) == store.labels()[labelled]).mean() > 0.95
    assert features.problems(tmp_path / "f") == []


def test_plain_zarr_reads_the_arrays(cohort: Path, tmp_path: Path) -> None:
    with TileStore(cohort) as store:
        write_features(tmp_path / "f", store)
        slide = store.slide_ids[0]
        array = zarr.open_array(features.slide_folder(tmp_path / "f", slide) / "head.zarr", mode="r")
        assert array.shape == (int((store.slide_of_row == 0).sum()), WIDTH)


def test_features_of_another_store_are_refused(cohort: Path, tmp_path: Path) -> None:
    with TileStore(cohort) as store:
        write_features(tmp_path / "f", store, fingerprint="f" * 64)
        with pytest.raises(FeatureError, match="another store"):
            features.read_features(tmp_path / "f", store, "head")


def test_one_changed_byte_is_found_and_refused(cohort: Path, tmp_path: Path) -> None:
    with TileStore(cohort) as store:
        write_features(tmp_path / "f", store)
        chunk = next(path for path in (tmp_path / "f").rglob("c/*/*") if path.is_file())
        data = bytearray(chunk.read_bytes())
        data[len(data) // 2] ^= 1
        chunk.write_bytes(data)
        assert str(chunk) in features.problems(tmp_path / "f")[0]
        with pytest.raises(DamageError, match=chunk.name):
            features.read_features(tmp_path / "f", store, "head")


def test_missing_slide_missing_tap_and_nan_are_named(cohort: Path, tmp_path: Path) -> None:
    with TileStore(cohort) as store:
        write_features(tmp_path / "nan", store, nan=True)
        with pytest.raises(FeatureError, match="1 tiles have features that are not finite"):
            features.read_features(tmp_path / "nan", store, "head")
        write_features(tmp_path / "f", store)
        with pytest.raises(FeatureError, match="no tap 'cls', it has head"):
            features.read_features(tmp_path / "f", store, "cls")
        atomic.set_aside(features.slide_folder(tmp_path / "f", store.slide_ids[1]), tmp_path / "away")
        with pytest.raises(FeatureError, match=f"slide {store.slide_ids[1]} is missing"):
            features.read_features(tmp_path / "f", store, "head")


def test_default_protocol_learns_and_keeps_slides_apart(cohort: Path, tmp_path: Path) -> None:
    with TileStore(cohort) as store:
        write_features(tmp_path / "f", store)
        unlabelled = int((store.labels() < 0).sum())
    result = evaluate("panda", cohort, tmp_path / "f", tmp_path / "r")
    assert result["metrics"]["test"]["balanced_accuracy"] > 0.8
    assert result["counts"]["unlabelled"] == unlabelled > 0  # Karolinska's slide
    assert json.loads((tmp_path / "r/results.json").read_text()) == json.loads(json.dumps(result))
    assert atomic.damaged_files(tmp_path / "r") == []
    with pytest.raises(UsageError, match="exists already"):
        evaluate("panda", cohort, tmp_path / "f", tmp_path / "r")


def test_any_pixel_labels_are_the_report_s(cohort: Path) -> None:
    """A single pixel decides; a tile of graded slides with nothing else is background; Karolinska stays out."""
    to_class = np.array([0, 1, 1, 2, 3, 4])
    with TileStore(cohort) as store:
        label = any_pixel_labels(store)
        providers = store.index["provider"].to_pylist()
        for row in range(0, len(store), 3):
            if providers[row] == "karolinska":
                assert label[row] == -1
            else:
                assert label[row] == to_class[store.read_mask(row)].max()


def test_unknown_task_and_protocol_are_usage_errors(cohort: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="known are panda"):
        evaluate("pandas", cohort, tmp_path, tmp_path / "r")
    with pytest.raises(UsageError, match="known are default, paper"):
        evaluate("panda", cohort, tmp_path, tmp_path / "r", "defalt")


def test_store_without_labels_is_refused(tmp_path: Path) -> None:
    slide = phantom.make_slide(3, "4", size=(896, 896))
    phantom.write_slide(slide, tmp_path)
    tile(datasets.slides([tmp_path / "train_images"]), tmp_path / "store", TileSettings())
    with TileStore(tmp_path / "store") as store:
        write_features(tmp_path / "f", store)
    with pytest.raises(EvaluationError, match="no labelled tile"):
        evaluate("panda", tmp_path / "store", tmp_path / "f", tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_not_a_store_and_not_features(tmp_path: Path, cohort: Path) -> None:
    with pytest.raises(StoreError, match="not a tile store"):
        evaluate("panda", tmp_path, tmp_path, tmp_path / "r")
    with pytest.raises(FeatureError, match="not a feature store"):
        evaluate("panda", cohort, tmp_path, tmp_path / "r")
