"""Faults F9 and S3 of FAULTS.md, made for real: damage anywhere in a store, and indexes that lead out of it."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cli import main
from tiling import atomic
from tiling.audit import repair, store_problems
from tiling.datasets import Dataset
from tiling.errors import BonyError, DamageError, StoreError
from tiling.index import METADATA_KEY, build_index, open_index
from tiling.run import tile
from tiling.settings import TileSettings
from tiling.store import Description, TileStore, prepare, read_description

TILES = "tiles.zarr/c/0/0/0/0"
Files = Callable[[Path], dict[str, str]]


def verified(store: Path) -> int:
    """Exit code of `bony verify`."""
    return main(["verify", str(store)])


def read_silently(store: Path, sound: np.ndarray) -> int:
    """Reads every tile that can be read; counts those that are not what they were."""
    try:
        reader = TileStore(store)
    except BonyError:
        return 0
    wrong, said = 0, {}
    with reader:
        for row in range(len(reader)):
            try:
                wrong += not np.array_equal(reader.read(np.array([row]))[0], sound[row])
            except DamageError as error:
                said[f"{store}: slide {reader.slide_ids[reader.slide_of_row[row]]}, "] = str(error)
    assert all(text.startswith(place) and "\n" not in text for place, text in said.items())
    return wrong


@pytest.fixture(scope="module")
def sound(cohort_store: Path) -> np.ndarray:
    with TileStore(cohort_store) as store:
        return store.read(np.arange(len(store)))


def some_boundaries(path: Path) -> list[int]:
    """Lengths at which a file can end: nothing, a byte, in its data, at the edges of a shard's parts, a byte short."""
    size = path.stat().st_size
    lengths = {0, 1, size // 2, size - 1}
    if path.parts[-2] == "0":
        metadata = json.loads(
            next(parent for parent in path.parents if parent.suffix == ".zarr").joinpath("zarr.json").read_text()
        )
        index = metadata["chunk_grid"]["configuration"]["chunk_shape"][0] * 16
        entries = np.frombuffer(path.read_bytes()[-index - 4 : -4], "<u8").reshape(-1, 2).astype(np.int64)
        first_end = int(entries[0].sum())
        lengths |= {first_end - 4, first_end, size - index - 4, size - index + 12, size - 4}
    if path.suffix == ".json" and path.parent.name == "own_store":
        lengths.remove(size - 1)  # without its last newline store.json says the same
    return sorted(length for length in lengths if 0 <= length < size)


def test_every_file_cut_anywhere_is_found(own_store: Path, sound: np.ndarray) -> None:
    """Of one slide every file, and what belongs to the whole store."""
    slide = sorted((own_store / "slides").iterdir())[0]
    paths = [path for path in slide.rglob("*") if path.is_file()]
    paths += [own_store / name for name in ("store.json", "index.parquet", "index.sha256")]
    cuts = 0
    for path in paths:
        whole = path.read_bytes()
        for length in some_boundaries(path):
            path.write_bytes(whole[:length])
            cuts += 1
            assert verified(own_store) == 1, f"{path} cut to {length} bytes"
            if "c" in path.parts or length == 0:
                assert read_silently(own_store, sound) == 0, f"{path} cut to {length} bytes"
        path.unlink()
        assert main(["verify", str(own_store)]) in (1, 2), f"{path} deleted"
        assert read_silently(own_store, sound) == 0
        path.write_bytes(whole)
    assert cuts > 50
    assert verified(own_store) == 0


def test_every_flipped_file_is_found(own_store: Path) -> None:
    slide = sorted((own_store / "slides").iterdir())[0]
    paths = [path for path in slide.rglob("*") if path.is_file()]
    paths += [own_store / name for name in ("store.json", "index.parquet", "index.sha256")]
    rng = np.random.default_rng(9)
    for path in paths:
        whole = path.read_bytes()
        for _ in range(8):
            data = bytearray(whole)
            at = int(rng.integers(len(whole)))
            data[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(data)
            assert verified(own_store) == 1, f"{path}, byte {at}"
        path.write_bytes(whole)
    assert verified(own_store) == 0


def test_every_bit_of_store_json_counts(own_store: Path) -> None:
    path = own_store / "store.json"
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 3):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(StoreError):
            read_description(own_store)
    value = json.loads(whole)
    value["settings"]["tile_px"] = 256
    path.write_text(json.dumps(value))
    with pytest.raises(StoreError, match="does not match the checksum that it holds"):
        TileStore(own_store)
    del value["sha256"]
    path.write_text(json.dumps(value))
    with pytest.raises(StoreError, match="does not match the checksum that it holds"):
        TileStore(own_store)


def test_parts_of_one_job_prepare_the_same_store(tmp_path: Path) -> None:
    store, description = tmp_path / "store", Description(TileSettings(), "made", ("a",))
    (store / "slides").mkdir(parents=True)
    (store / ".store.json.123").write_text("another process is at it")
    prepare(store, description)
    (store / "slides" / "one").mkdir()
    prepare(store, description)
    assert read_description(store) == description
    (store / "store.json").unlink()
    with pytest.raises(StoreError, match="exists and is no tile store"):
        prepare(store, description)


def forge(store: Path, slide_id: str, listed: bool = True) -> None:
    """An index whose checksum is right and whose first slide is another."""
    table = build_index(store)
    about = json.loads(table.schema.metadata[METADATA_KEY])
    ids = table["slide_id"].cast(pa.string()).to_pylist()
    renamed = pa.array([slide_id if name == ids[0] else name for name in ids]).dictionary_encode()
    table = table.set_column(table.column_names.index("slide_id"), "slide_id", renamed)
    if listed:
        about["slides"][0] = slide_id
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps(about).encode()}), store / "index.parquet")
    digest = hashlib.sha256((store / "index.parquet").read_bytes()).hexdigest()
    (store / "index.sha256").write_text(f"{digest}  index.parquet\n")


@pytest.mark.parametrize("url", [False, True])
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("slide_id", ["../../elsewhere", "..", ".", "/etc", "a/../../elsewhere", "", "a\\b", "\0"])
def test_an_index_that_leads_elsewhere(own_store: Path, tmp_path: Path, slide_id: str, listed: bool, url: bool) -> None:
    shutil.copytree(sorted((own_store / "slides").iterdir())[0], tmp_path / "elsewhere")
    forge(own_store, slide_id, listed)
    with pytest.raises(StoreError, match=r"index names .* no slide of this store|index lists 3 slides"):
        TileStore(f"file://{own_store}" if url else own_store)
    assert verified(own_store) == 1


def test_links_out_of_the_store_are_not_followed(own_store: Path, tmp_path: Path) -> None:
    """The slide's folder, its array, a folder inside, the shard itself: all lead to sound bytes elsewhere."""
    slide = sorted((own_store / "slides").iterdir())[0]
    for name in (".", "tiles.zarr", "tiles.zarr/c/0", TILES):
        path = slide / name
        path.rename(tmp_path / "away")
        path.symlink_to(tmp_path / "away")
        with TileStore(own_store) as store, pytest.raises(DamageError, match=f"slide {slide.name}, tile 0: .*link"):
            store.read(np.arange(3))
        assert verified(own_store) == 1
        path.unlink()
        (tmp_path / "away").rename(path)
    assert verified(own_store) == 0


def test_a_store_behind_a_link_is_read(own_store: Path, tmp_path: Path, sound: np.ndarray) -> None:
    (tmp_path / "link").symlink_to(own_store)
    with TileStore(tmp_path / "link") as store:
        assert np.array_equal(store.read(np.arange(4)), sound[:4])


@pytest.mark.parametrize("name", ["../../../secret.txt", "/etc/hostname", "thumbnail.jpg/../../../../secret.txt"])
def test_a_listing_that_leads_elsewhere(own_store: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.txt").write_text("x")
    slide = sorted((own_store / "slides").iterdir())[0]
    target = Path(name) if name.startswith("/") else (slide / name)
    digest = atomic.sha256_file(target) if target.exists() else hashlib.sha256(b"x").hexdigest()
    lines = [*(slide / "COMPLETE").read_text().splitlines(), f"{digest}  {name}"]
    (slide / "COMPLETE").write_text(
        "".join(f"{line}\n" for line in sorted(lines, key=lambda line: line.split("  ")[1]))
    )
    assert any(line.endswith(f"{name}: missing") for line in store_problems(own_store))


@pytest.mark.parametrize("line", ['{"slide_id": "../x"}', '{"slide_id": "/etc"}', '{"slide_id": 5}', "{", "{}", "5"])
def test_a_quarantine_that_leads_elsewhere(own_store: Path, line: str) -> None:
    (own_store / "quarantine.jsonl").write_text(line + "\n")
    assert [text.split(": ")[0] for text in store_problems(own_store)] == [str(own_store / "quarantine.jsonl")]
    (own_store / "quarantine.jsonl").write_text('{"slide_id": "a slide", "left_out": true, "reason": "r"}\n')
    assert store_problems(own_store) == []


def test_repair_sets_aside_what_is_broken(
    own_store: Path, cohort_store: Path, cohort_slides: Dataset, files: Files
) -> None:
    assert repair(own_store) == []
    broken, gone, fine = sorted((own_store / "slides").iterdir())
    shard = broken / TILES
    shard.write_bytes(shard.read_bytes()[:-1])
    (gone / "COMPLETE").unlink()
    done = repair(own_store)
    assert [line.split(": ")[0] for line in done[:2]] == [str(shard), str(gone / "COMPLETE")]
    assert "index lists 3 slides, the store has 1" in done[2]
    assert store_problems(own_store) == []
    assert open_index(own_store).slides == (fine.name,)
    assert sorted(path.name for path in (own_store / "work").iterdir()) == [
        f"{broken.name}.broken0", f"{gone.name}.broken0",
    ]  # fmt: skip
    tile(cohort_slides, own_store, TileSettings())
    assert files(own_store / "slides") == files(cohort_store / "slides")
    assert store_problems(own_store) == []


def test_repair_of_an_index_alone(own_store: Path, files: Files) -> None:
    content = files(own_store)
    (own_store / "index.parquet").write_bytes(b"nonsense")
    assert len(repair(own_store)) == 1
    assert files(own_store) == content


def test_repair_where_no_slide_is_left(own_store: Path) -> None:
    for folder in (own_store / "slides").iterdir():
        (folder / TILES).unlink()
    done = repair(own_store)
    assert len(done) == 5
    assert not any((own_store / "slides").iterdir())
    with pytest.raises(StoreError, match="the store has no index"):
        TileStore(own_store)
