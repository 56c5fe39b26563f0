"""The index: what it holds, that columns come when asked for, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiling import atomic
from tiling.errors import DamageError, StoreError
from tiling.index import METADATA_KEY, build_index, is_plain_name, open_index, read_index, slide_facts, slide_folders
from tiling.store import TileStore

ROOT = Path(__file__).resolve().parents[2]


def other_rows(folder: Path, rows: pa.Table) -> None:
    """Replace a slide's rows, and their digest in COMPLETE."""
    pq.write_table(rows, folder / "rows.parquet")
    lines = [line for line in (folder / "COMPLETE").read_text().splitlines() if not line.endswith("  rows.parquet")]
    lines.append(f"{atomic.sha256_file(folder / 'rows.parquet')}  rows.parquet")
    lines.sort(key=lambda line: line.split("  ")[1])
    (folder / "COMPLETE").write_text("".join(f"{line}\n" for line in lines))


def test_rows_are_those_kept_of_each_slide(cohort_store: Path) -> None:
    expected = []
    for folder in sorted((cohort_store / "slides").iterdir()):
        rows = pq.read_table(folder / "rows.parquet")
        facts = slide_facts(rows)
        kept = rows.filter(rows["kept"]).to_pylist()
        for number, row in enumerate(kept):
            named = {key: facts[key] for key in ("slide_id", "provider", "gleason_score", "isup_grade")}
            coverage = {key: value for key, value in row.items() if key.startswith("coverage_")}
            some = {key: row[key] for key in ("image", "x", "y", "label", "split", "tissue_fraction")}
            expected.append({**some, **coverage, "row": number, **named, "mpp": pytest.approx(facts["mpp"])})
    found = read_index(cohort_store)[0].to_pylist()
    assert [{key: value for key, value in row.items() if value is not None} for row in found] == [
        {key: value for key, value in row.items() if value is not None} for row in expected
    ]


def test_an_index_built_twice_is_the_same(own_store: Path) -> None:
    before = [(own_store / name).read_bytes() for name in ("index.parquet", "index.sha256")]
    build_index(own_store)
    assert [(own_store / name).read_bytes() for name in ("index.parquet", "index.sha256")] == before


def test_columns_come_when_asked_for(cohort_store: Path) -> None:
    index = open_index(cohort_store)
    assert index.read(["label", "x"]).column_names == ["label", "x"]
    whole, about = read_index(cohort_store)
    assert index.read().equals(whole)
    assert (list(index.slides), index.fingerprint) == (about["slides"], about["fingerprint"])
    with TileStore(cohort_store) as store:
        assert "index" not in vars(store)
        assert store.labels().tolist() == whole["label"].to_pylist()
        assert store.mpp == pytest.approx(np.mean(whole["mpp"].to_pylist()))
        assert "index" not in vars(store)
        assert store.index.equals(whole)


def test_a_slide_without_a_kept_tile(own_store: Path) -> None:
    first = slide_folders(own_store)[0]
    rows = pq.read_table(first / "rows.parquet")
    none = rows.set_column(rows.column_names.index("kept"), "kept", pa.array([False] * len(rows)))
    other_rows(first, none.replace_schema_metadata(rows.schema.metadata))
    build_index(own_store)
    with TileStore(own_store) as store:
        assert len(open_index(own_store).slides) == 3
        assert store.slide_ids == [folder.name for folder in slide_folders(own_store)[1:]]
        assert [len(store.rows_of_slide(number)) for number in (0, 1)] == np.bincount(store.slide_of_row).tolist()
        assert store.read(store.rows_of_slide(1)[:2]).shape == (2, 224, 224, 3)


def test_colours_travel_in_the_index(own_store: Path) -> None:
    folders = slide_folders(own_store)
    for folder, colour in zip(folders, ({"mean": [1.5, 2, 3]}, None, {}), strict=True):
        rows = pq.read_table(folder / "rows.parquet")
        facts = slide_facts(rows) | {"colour": colour}
        other_rows(folder, rows.replace_schema_metadata({METADATA_KEY: json.dumps(facts).encode()}))
    build_index(own_store)
    assert open_index(own_store).colours() == {folders[0].name: {"mean": [1.5, 2, 3]}}


def test_a_slide_whose_rows_are_damaged(own_store: Path) -> None:
    rows = slide_folders(own_store)[1] / "rows.parquet"
    rows.write_bytes(rows.read_bytes()[:-1])
    with pytest.raises(DamageError, match=f"{rows}: sha256 differs"):
        build_index(own_store)


def test_no_slide_at_all(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no finished slide in this store"):
        build_index(tmp_path)


@pytest.mark.parametrize("text", ["", "\n", "0" * 64, "\xff"])
def test_a_checksum_that_is_none(own_store: Path, text: str) -> None:
    (own_store / "index.sha256").write_text(text, encoding="latin1")
    with pytest.raises(StoreError, match=r"sha256 differs from index.sha256; run `bony index "):
        open_index(own_store)
    (own_store / "index.sha256").unlink()
    with pytest.raises(StoreError, match=r"its checksum cannot be read .* run `bony index "):
        open_index(own_store)


@given(st.text(max_size=8))
def test_a_plain_name_stays_in_its_folder(name: str) -> None:
    stays = name != "" and "\0" not in name and os.path.normpath(f"/box/{name}") == f"/box/{name}"
    assert is_plain_name(name) == (stays and "/" not in name and "\\" not in name)


@pytest.mark.slow
def test_an_index_of_all_of_panda_opens_in_seconds(tmp_path: Path) -> None:
    """A fifth of the slides and tiles, to be quick; benchmarks/index_scale.py has them all."""
    words = [sys.executable, str(ROOT / "benchmarks" / "index_scale.py"), "--slides", "2123", "--tiles", "570540"]
    done = subprocess.run([*words, "--work", str(tmp_path)], check=True, capture_output=True, text=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["open"]["rows"] == 570540
    assert figures["open"]["seconds"] < 3
    assert figures["open"]["peak_mb"] < 1000
