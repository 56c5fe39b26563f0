"""Whole runs: resumed, repeated with other workers, with corrupt slides, with damage to what is finished."""

import gc
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile

from pipeline.cli import main
from tiling import datasets
from tiling.audit import store_problems
from tiling.datasets import Dataset
from tiling.drivers import processes
from tiling.errors import DamageError, StoreError, UsageError
from tiling.filters import Thresholds
from tiling.index import fingerprint, read_index
from tiling.run import tile
from tiling.settings import TileSettings
from tiling.store import TileStore

Files = Callable[[Path], dict[str, str]]
Spoil = Callable[..., tuple[int, int, int, int]]


def quarantine(store: Path) -> dict[str, dict[str, object]]:
    lines = (store / "quarantine.jsonl").read_text().splitlines()
    return {entry["slide_id"]: entry for entry in map(json.loads, lines)}


def rows_of(store: Path, slide_id: str) -> dict[tuple[int, int], dict[str, object]]:
    rows = pq.read_table(store / "slides" / slide_id / "rows.parquet").to_pylist()
    return {(row["x"], row["y"]): row for row in rows}


def bony_tile(*words: str | Path) -> int:
    """Under the files' own names."""
    return main(["tile", *map(str, words), "--no-deidentify"])


def test_a_finished_store_is_left_alone(own_store: Path, cohort_slides: Dataset, files: Files) -> None:
    before = {path: path.stat().st_mtime_ns for path in (own_store / "slides").rglob("*")}
    content = files(own_store)
    summary = tile(cohort_slides, own_store, TileSettings())
    assert [outcome.skipped for outcome in summary.outcomes] == [True] * 3
    assert not summary.quarantined
    assert {path: path.stat().st_mtime_ns for path in (own_store / "slides").rglob("*")} == before
    assert files(own_store) == content
    assert not (own_store / "work").exists()


def test_a_stopped_run_is_continued(cohort_slides: Dataset, cohort_store: Path, tmp_path: Path, files: Files) -> None:
    store = tmp_path / "store"
    tile(replace(cohort_slides, sources=cohort_slides.sources[1:2]), store, TileSettings())
    assert len(read_index(store)[1]["slides"]) == 1
    summary = tile(cohort_slides, store, TileSettings())
    assert [outcome.skipped for outcome in summary.outcomes] == [False, True, False]
    assert files(store) == files(cohort_store)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (TileSettings(mpp=1.0), r"mpp = 0\.5, not 1\.0"),
        (TileSettings(mpp=None), r"mpp = 0\.5, not None"),
        (TileSettings(codec="zstd"), "codec = jpeg, not zstd"),
        (TileSettings(tile_px=256), "tile_px = 224, not 256"),
        (TileSettings(mpp_tolerance=0.1), r"mpp_tolerance = 0\.12, not 0\.1"),
        (TileSettings(slide_mpp=0.5), r"slide_mpp = None, not 0\.5"),
        (TileSettings(min_label_share=0.0), r"min_label_share = 0\.05, not 0\.0"),
        (TileSettings(thresholds=Thresholds(min_tissue=0.1)), r"min_tissue = 0\.25, not 0\.1"),
        (TileSettings(thresholds=Thresholds(max_empty=1)), r"max_empty = 0\.8, not 1"),
        (TileSettings(thresholds=None), "thresholds = True, not False"),
    ],
)
def test_other_settings_are_refused(
    settings: TileSettings, key: str, cohort_store: Path, cohort_slides: Dataset, files: Files
) -> None:
    content = files(cohort_store)
    with pytest.raises(StoreError, match=rf"store was made with {key}; use the same settings, or choose another --out"):
        tile(cohort_slides, cohort_store, settings)
    assert files(cohort_store) == content


def test_another_data_set_is_refused(cohort: Path, cohort_store: Path, files: Files) -> None:
    content = files(cohort_store)
    with pytest.raises(StoreError, match="store was made with dataset = panda, not slides; choose another --out"):
        tile(datasets.slides([cohort / "train_images"]), cohort_store, TileSettings())
    assert files(cohort_store) == content


def test_workers_make_the_same_bytes(cohort_slides: Dataset, cohort_store: Path, tmp_path: Path, files: Files) -> None:
    tile(cohort_slides, tmp_path / "store", TileSettings(), processes(2))
    assert fingerprint(tmp_path / "store") == fingerprint(cohort_store)
    assert files(tmp_path / "store") == files(cohort_store)
    assert store_problems(tmp_path / "store") == []


def test_corrupt_slides_among_good_ones(
    cohort: Path, tmp_path: Path, files: Files, spoil: Spoil, capsys: pytest.CaptureFixture[str]
) -> None:
    good = tmp_path / "good"
    shutil.copytree(cohort / "train_images", good)
    ids = sorted(path.stem for path in good.iterdir())
    assert bony_tile(good, "--out", tmp_path / "clean") == 0

    mixed = Path(shutil.copytree(good, tmp_path / "mixed"))
    whole = (good / f"{ids[0]}.tiff").read_bytes()
    (mixed / "truncated.tiff").write_bytes(whole[: len(whole) * 2 // 3])
    (mixed / "text.tiff").write_text("image_id,isup_grade\n")
    (mixed / "zero.svs").write_bytes(b"")
    for name, count in (("segment_gone", None), ("segment_hurt", 2048)):
        shutil.copyfile(good / f"{ids[0]}.tiff", mixed / f"{name}.tiff")
        box = spoil(mixed / f"{name}.tiff", 1, count=count)
    assert bony_tile(mixed, "--out", tmp_path / "store") == 3
    said = capsys.readouterr()

    for slide_id in ids:
        slide = Path("slides") / slide_id
        assert files(tmp_path / "store" / slide) == files(tmp_path / "clean" / slide)
    assert store_problems(tmp_path / "store") == []
    found = quarantine(tmp_path / "store")
    left_out = {slide_id: entry["left_out"] for slide_id, entry in found.items()}
    assert left_out == {
        "truncated": True, "text": True, "zero": True, "segment_gone": False, "segment_hurt": False
    }  # fmt: skip
    assert "list of pages does not end" in str(found["truncated"]["reason"])
    assert "not a TIFF" in str(found["text"]["reason"])
    assert "file is empty (0 bytes)" in str(found["zero"]["reason"])
    for slide_id, entry in found.items():
        assert f"{slide_id}: {entry['reason']}" in said.err
        assert (tmp_path / "store" / "slides" / slide_id).is_dir() is not entry["left_out"]
    assert f"{tmp_path / 'store' / 'quarantine.jsonl'}: 5 slides left out or damaged" in said.out

    x0, y0, x1, y1 = box
    sound = rows_of(tmp_path / "clean", ids[0])
    touched = {(x, y) for x, y in sound if x < x1 and x + 224 > x0 and y < y1 and y + 224 > y0}
    lost = {place for place in touched if sound[place]["reason"] != "tissue"}
    assert lost
    for name in ("segment_gone", "segment_hurt"):
        damaged = rows_of(tmp_path / "store", name)
        assert {place for place, row in damaged.items() if row["reason"] == "damaged"} == lost
        others = {place: row for place, row in sound.items() if place not in lost}
        assert {place: row for place, row in damaged.items() if place not in lost} == others
        assert found[name]["reason"] == f"{len(lost)} tiles lie on damaged segments and were dropped"
    with TileStore(tmp_path / "store") as store, TileStore(tmp_path / "clean") as clean:
        index = clean.index.to_pylist()
        for number, row in enumerate(store.index.to_pylist()):
            if row["slide_id"].startswith("segment"):
                (same,) = (
                    n
                    for n, other in enumerate(index)
                    if (other["slide_id"], other["x"], other["y"]) == (ids[0], row["x"], row["y"])
                )
                assert np.array_equal(store.read(np.array([number])), clean.read(np.array([same])))


def test_a_mended_slide_leaves_the_quarantine(cohort: Path, tmp_path: Path) -> None:
    slides = Path(shutil.copytree(cohort / "train_images", tmp_path / "slides"))
    first, second, _ = sorted(slides.iterdir())
    whole = first.read_bytes()
    first.write_bytes(whole[:5000])
    assert bony_tile(slides, "--out", tmp_path / "store") == 3
    assert bony_tile(second, "--out", tmp_path / "store") == 0
    assert set(quarantine(tmp_path / "store")) == {first.stem}
    first.write_bytes(whole)
    assert bony_tile(slides, "--out", tmp_path / "store") == 0
    assert quarantine(tmp_path / "store") == {}
    assert store_problems(tmp_path / "store") == []


def test_damage_in_the_overview_is_told(own_cohort: Path, tmp_path: Path, cohort_store: Path, spoil: Spoil) -> None:
    """The lowest level is one segment here: without it, filters alone decide."""
    source = datasets.panda(own_cohort).sources[0]
    spoil(source.images[0], 0, level=2)
    summary = tile(replace(datasets.panda(own_cohort), sources=(source,)), tmp_path / "store", TileSettings())
    (outcome,) = [outcome for outcome in summary.outcomes if outcome.slide_id in summary.quarantined]
    assert outcome.written
    assert outcome.problem == "100.00% of its overview does not decode: filters alone judged the tiles there"
    sound = {place for place, row in rows_of(cohort_store, source.slide_id).items() if row["kept"]}
    found = {place for place, row in rows_of(tmp_path / "store", source.slide_id).items() if row["kept"]}
    assert sound <= found


def test_damage_found_earlier_is_still_told(own_cohort: Path, tmp_path: Path, spoil: Spoil) -> None:
    """A second run finds the slide complete; what is missing in it is still missing."""
    source = datasets.panda(own_cohort).sources[0]
    spoil(source.images[0], 1)
    words = ("--dataset", "panda", "--root", own_cohort, "--out", tmp_path / "store")
    assert [bony_tile(*words), bony_tile(*words)] == [3, 3]


def test_a_damaged_mask_loses_the_tiles_on_it(own_cohort: Path, tmp_path: Path, spoil: Spoil) -> None:
    found = datasets.panda(own_cohort)
    source = found.sources[0]
    assert source.mask is not None
    spoil(source.mask, 1)
    summary = tile(replace(found, sources=(source,)), tmp_path / "store", TileSettings())
    assert "tiles lie on damaged segments" in summary.outcomes[0].problem
    with TileStore(tmp_path / "store") as store:
        kept = [(row["x"], row["y"]) for row in store.index.to_pylist()]
    assert kept
    assert not [(x, y) for x, y in kept if x + 224 > 512 and x < 1024 and y < 512]


def test_an_unknown_mask_value_in_the_last_tile(own_cohort: Path, cohort_store: Path, tmp_path: Path) -> None:
    """By then most of the slide is written."""
    found = datasets.panda(own_cohort)
    source = found.sources[0]
    assert source.mask is not None
    x, y = max(
        (place for place, row in rows_of(cohort_store, source.slide_id).items() if row["kept"]), key=lambda p: p[1]
    )
    values = tifffile.imread(source.mask)[..., 0]
    values[y + 100, x + 100] = 9
    tifffile.imwrite(source.mask, values, tile=(512, 512))
    summary = tile(found, tmp_path / "store", TileSettings())
    assert "mask holds value 9, known are 0 to " in summary.outcomes[0].problem
    assert not (tmp_path / "store" / "slides" / source.slide_id).exists()
    assert not (tmp_path / "store" / "work").exists()
    gc.collect()


def test_only_a_corrupt_slide_leaves_nothing(tmp_path: Path, cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "truncated.tiff"
    path.write_bytes(sorted((cohort / "train_images").iterdir())[0].read_bytes()[:5000])
    assert bony_tile(path, "--out", tmp_path / "store") == 1
    assert not (tmp_path / "store").exists()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("bony: error: no slide could be tiled; the first one: truncated: ")
    assert last.endswith("; no store was left")


def test_a_store_stays_when_only_new_slides_are_corrupt(
    cohort: Path, tmp_path: Path, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = sorted((cohort / "train_images").iterdir())[0], tmp_path / "bad.tiff"
    bad.write_bytes(b"nothing")
    assert bony_tile(good, "--out", tmp_path / "store") == 0
    content = files(tmp_path / "store" / "slides")
    assert bony_tile(bad, "--out", tmp_path / "store") == 3
    assert files(tmp_path / "store" / "slides") == content
    assert set(quarantine(tmp_path / "store")) == {"bad"}
    assert "bad: " in capsys.readouterr().err


def test_a_worker_error_is_the_same_in_a_process(cohort: Path, tmp_path: Path) -> None:
    slides = Path(shutil.copytree(cohort / "train_images", tmp_path / "slides"))
    (slides / "text.tiff").write_text("no slide")
    for workers in (1, 2):
        assert bony_tile(slides, "--out", tmp_path / str(workers), "--workers", workers) == 3
    assert quarantine(tmp_path / "1") == quarantine(tmp_path / "2")
    assert set(quarantine(tmp_path / "1")) == {"text"}


def test_the_index_can_be_rebuilt(own_store: Path, files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    content, table = files(own_store), read_index(own_store)[0]
    for name in ("index.parquet", "index.sha256"):
        (own_store / name).unlink()
    with pytest.raises(StoreError, match=rf"the store has no index; run `bony index {own_store}`"):
        TileStore(own_store)
    assert main(["index", str(own_store)]) == 0
    assert capsys.readouterr().out == f"{own_store / 'index.parquet'}: {len(table)} tiles\n"
    assert files(own_store) == content
    assert read_index(own_store)[0].equals(table)


def test_the_index_is_the_slides_kept_rows(cohort_store: Path) -> None:
    table, about = read_index(cohort_store)
    assert about["fingerprint"] == fingerprint(cohort_store)
    expected = [
        (slide_id, number, row["x"], row["y"], row["label"])
        for slide_id in about["slides"]
        for number, row in enumerate(row for row in rows_of(cohort_store, slide_id).values() if row["kept"])
    ]
    found = [(row["slide_id"], row["row"], row["x"], row["y"], row["label"]) for row in table.to_pylist()]
    assert found == expected


def test_a_stale_index_is_refused(own_store: Path, tmp_path: Path) -> None:
    slide = sorted((own_store / "slides").iterdir())[1]
    shutil.move(slide, tmp_path / slide.name)
    with pytest.raises(StoreError, match=r"index lists 3 slides, the store has 2; run `bony index "):
        TileStore(own_store)
    assert any("index lists 3 slides" in line for line in store_problems(own_store))
    assert main(["index", str(own_store)]) == 0
    with TileStore(own_store) as store:
        assert len(store.slide_ids) == 2
    shutil.move(tmp_path / slide.name, slide)
    with pytest.raises(StoreError, match=r"index lists 2 slides, the store has 3; run `bony index "):
        TileStore(own_store)


def test_an_index_older_than_its_slides(
    own_store: Path, cohort_store: Path, cohort_slides: Dataset, tmp_path: Path
) -> None:
    """A slide of the same name but other content: what `bony verify` names."""
    tile(cohort_slides, tmp_path / "other", TileSettings(min_label_share=0.9))
    slide = sorted((own_store / "slides").iterdir())[0]
    shutil.rmtree(slide)
    shutil.copytree(tmp_path / "other" / "slides" / slide.name, slide)
    assert fingerprint(own_store) != fingerprint(cohort_store)
    index = own_store / "index.parquet"
    assert store_problems(own_store) == [f"{index}: index is older than the slides; run `bony index {own_store}`"]


def test_rows_that_are_damaged_enter_no_index(own_store: Path) -> None:
    rows = sorted((own_store / "slides").iterdir())[2] / "rows.parquet"
    data = bytearray(rows.read_bytes())
    data[len(data) // 2] ^= 1
    rows.write_bytes(data)
    with pytest.raises(DamageError, match=rf"{rows}: sha256 differs from COMPLETE"):
        main(["index", str(own_store), "--debug"])
    assert main(["index", str(own_store)]) == 1


def test_a_broken_finished_slide_is_set_aside_and_redone(
    own_store: Path, cohort_slides: Dataset, cohort_store: Path, files: Files
) -> None:
    slide = sorted((own_store / "slides").iterdir())[0]
    shard = slide / "tiles.zarr" / "c" / "0" / "0" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[1000] ^= 8
    shard.write_bytes(data)
    assert store_problems(own_store) == [f"{shard}: sha256 differs from COMPLETE"]
    summary = tile(cohort_slides, own_store, TileSettings())
    assert [outcome.skipped for outcome in summary.outcomes] == [False, True, True]
    assert files(own_store / "slides") == files(cohort_store / "slides")
    assert store_problems(own_store) == []
    assert not (own_store / "work").exists()


def test_a_half_written_slide_is_no_slide(own_store: Path, cohort_slides: Dataset, cohort_store: Path) -> None:
    slide = sorted((own_store / "slides").iterdir())[0]
    (slide / "COMPLETE").unlink()
    with pytest.raises(StoreError, match="index lists 3 slides, the store has 2"):
        TileStore(own_store)
    tile(cohort_slides, own_store, TileSettings())
    assert fingerprint(own_store) == fingerprint(cohort_store)


def test_a_store_without_a_kept_tile(cohort_slides: Dataset, tmp_path: Path) -> None:
    settings = TileSettings(thresholds=Thresholds(min_texture=255))
    summary = tile(cohort_slides, tmp_path / "store", settings)
    assert {(outcome.kept, outcome.remark) for outcome in summary.outcomes} == {(0, "no tile kept")}
    assert store_problems(tmp_path / "store") == []
    with TileStore(tmp_path / "store") as store:
        assert len(store) == 0
        assert store.labels().shape == (0,)
        assert store.read(np.zeros(0, np.int64)).shape == (0, 224, 224, 3)


def test_nobody_is_left_to_be_tiled(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no slide to tile"):
        tile(Dataset("nothing", ()), tmp_path / "store", TileSettings())
    assert not (tmp_path / "store").exists()


def test_fluorescence_is_remarked(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shared_data / "wsi" / "test3-DAPI-2-387.ndpi"
    assert bony_tile(path, "--out", tmp_path / "store", "--mpp", "native") == 0
    assert "test3-DAPI-2-387: does not look like bright-field: dark background" in capsys.readouterr().err
