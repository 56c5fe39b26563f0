"""What a store holds against what OpenSlide reads, and what damage to it does."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import openslide
import pytest

from tiling import datasets
from tiling.audit import store_problems
from tiling.errors import DamageError
from tiling.run import tile
from tiling.settings import TileSettings
from tiling.store import TileStore

STITCHED = ("296c0eebe031a2dfa58e2921f74354dd", "636498ce17020805892b1dd50e5eed64", "dd0790e07f87653482414f27785c593d")
SVS = "CMU-1-Small-Region"
SHARD = "tiles.zarr/c/0/0/0/0"
FLIPS = 200

# Runs without Bony: plain zarr and the codecs that imagecodecs registers.
PLAIN = """
import sys
import imagecodecs.zarr
import numpy as np
import zarr

imagecodecs.zarr.register_codecs()
for array, expected in zip(sys.argv[1::2], sys.argv[2::2]):
    found, want = zarr.open_array(array, mode="r"), np.load(expected)
    assert found.shape == want.shape, (array, found.shape, want.shape)
    assert found.dtype == want.dtype
    assert np.array_equal(found[:], want), array
    print(array)
assert not [name for name in sys.modules if name.split(".")[0] in ("tiling", "pipeline")]
"""


def sources(data: Path, *ids: str) -> datasets.Dataset:
    found = datasets.panda(data / "panda_stitched")
    return replace(found, sources=tuple(source for source in found.sources if source.slide_id in ids))


@pytest.fixture(scope="module")
def stores(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same slides, lossless and as JPEG: zstd/, jpeg/ and svs_zstd/, svs_jpeg/."""
    root = tmp_path_factory.mktemp("parity")
    for codec in ("zstd", "jpeg"):
        settings = TileSettings(mpp=None, codec=codec)
        tile(sources(shared_data, *STITCHED), root / codec, settings)
        tile(datasets.slides([shared_data / "wsi" / f"{SVS}.svs"]), root / f"svs_{codec}", settings)
    return root


def of_openslide(store: TileStore, data: Path) -> np.ndarray:
    """Every kept tile as OpenSlide reads it at the place that the index names."""
    rows = store.index.select(["slide_id", "x", "y"]).to_pylist()
    out = np.empty((len(rows), 224, 224, 3), np.uint8)
    for slide_id in store.slide_ids:
        path = data / "wsi" / f"{SVS}.svs"
        if slide_id != SVS:
            path = data / "panda_stitched" / "train_images" / f"{slide_id}.tiff"
        with openslide.OpenSlide(path) as slide:
            for number, row in enumerate(rows):
                if row["slide_id"] == slide_id:
                    region = slide.read_region((row["x"], row["y"]), 0, (224, 224))
                    out[number] = np.asarray(region)[..., :3]
    return out


@pytest.mark.parametrize(("name", "slides"), [("zstd", 3), ("svs_zstd", 1)])
def test_lossless_tiles_are_openslides_pixels(name: str, slides: int, stores: Path, shared_data: Path) -> None:
    with TileStore(stores / name) as store:
        assert len(store.slide_ids) == slides
        assert len(store) >= 15 * slides
        assert np.array_equal(store.read(np.arange(len(store))), of_openslide(store, shared_data))


@pytest.mark.parametrize(("name", "pooled_least"), [("jpeg", 50.0), ("svs_jpeg", 50.0)])
def test_jpeg_tiles_are_near_lossless(name: str, pooled_least: float, stores: Path, shared_data: Path) -> None:
    with TileStore(stores / name) as store, TileStore(stores / name.replace("jpeg", "zstd")) as lossless:
        assert store.index.select(["slide_id", "x", "y"]).equals(lossless.index.select(["slide_id", "x", "y"]))
        difference = store.read(np.arange(len(store))).astype(np.float32) - of_openslide(store, shared_data)
    squared = (difference**2).reshape(len(difference), -1).mean(axis=1)
    assert 10 * np.log10(255**2 / squared.max()) >= 40
    assert 10 * np.log10(255**2 / squared.mean()) >= pooled_least


def test_jpeg_costs_about_what_the_source_does(stores: Path, shared_data: Path) -> None:
    """A tile's bytes against its share of the source's tissue; zstd needs several times that."""
    sizes = {name: (stores / name / "slides" / STITCHED[0] / SHARD).stat().st_size for name in ("jpeg", "zstd")}
    assert sizes["zstd"] > 4 * sizes["jpeg"]
    assert sizes["jpeg"] < (shared_data / "panda_stitched" / "train_images" / f"{STITCHED[0]}.tiff").stat().st_size


def test_threads_read_the_same(stores: Path) -> None:
    with TileStore(stores / "jpeg") as one, TileStore(stores / "jpeg", threads=3) as three:
        rows = np.random.default_rng(0).permutation(len(one))
        assert np.array_equal(one.read(rows), three.read(rows))


def test_plain_zarr_opens_every_array(stores: Path, tmp_path: Path) -> None:
    words: list[str] = []
    for name in ("jpeg", "zstd", "svs_jpeg", "svs_zstd"):
        with TileStore(stores / name) as store:
            for slide, slide_id in enumerate(store.slide_ids):
                rows = np.flatnonzero(store.slide_of_row == slide)
                arrays = {"tiles.zarr": store.read(rows)}
                if slide_id != SVS:
                    arrays["masks.zarr"] = np.stack([store.read_mask(int(row)) for row in rows])
                for array, pixels in arrays.items():
                    expected = tmp_path / f"{name}-{slide_id}-{array}.npy"
                    np.save(expected, pixels)
                    words += [str(stores / name / "slides" / slide_id / array), str(expected)]
    command = [sys.executable, "-I", "-c", PLAIN, *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == words[::2]
    assert len(words) // 2 == 2 * (3 * 2 + 1)


@pytest.fixture
def one_slide(request: pytest.FixtureRequest, shared_data: Path, tmp_path: Path) -> Path:
    """A store of one slide, to be damaged."""
    tile(sources(shared_data, STITCHED[0]), tmp_path / "store", TileSettings(codec=request.param))
    return tmp_path / "store"


def outcome(store: Path, sound: np.ndarray) -> tuple[int, int]:
    """Reads every tile on its own; counts those that raise and those that differ without a word."""
    said: dict[int, str] = {}
    wrong = 0
    with TileStore(store) as reader:
        for row in range(len(reader)):
            try:
                wrong += not np.array_equal(reader.read(np.array([row]))[0], sound[row])
            except DamageError as error:
                said[row] = str(error)
    for row, text in said.items():
        assert text.startswith(f"{store}: slide {STITCHED[0]}, tile {row}: ")
        assert "\n" not in text
    return len(said), wrong


@pytest.mark.parametrize("one_slide", ["jpeg", "zstd"], indirect=True)
def test_no_flipped_bit_is_read(one_slide: Path) -> None:
    with TileStore(one_slide) as reader:
        sound = reader.read(np.arange(len(reader)))
    shard = one_slide / "slides" / STITCHED[0] / SHARD
    whole = shard.read_bytes()
    rng = np.random.default_rng(20)
    for flip in range(FLIPS):
        at, bit = int(rng.integers(len(whole))), int(rng.integers(8))
        data = bytearray(whole)
        data[at] ^= 1 << bit
        shard.write_bytes(data)
        raised, wrong = outcome(one_slide, sound)
        assert wrong == 0, f"bit {bit} of byte {at} was read silently"
        assert raised >= 1
        if flip % 40 == 0:
            assert store_problems(one_slide) == [f"{shard}: sha256 differs from COMPLETE"]
    shard.write_bytes(whole)
    assert outcome(one_slide, sound) == (0, 0)
    assert store_problems(one_slide) == []


@pytest.mark.parametrize("one_slide", ["jpeg"], indirect=True)
def test_no_missing_byte_is_read_as_zeros(one_slide: Path) -> None:
    with TileStore(one_slide) as reader:
        sound = reader.read(np.arange(len(reader)))
    shard = one_slide / "slides" / STITCHED[0] / SHARD
    whole = shard.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        shard.write_bytes(whole[:length])
        assert outcome(one_slide, sound) == (len(sound), 0)
        assert store_problems(one_slide) == [f"{shard}: sha256 differs from COMPLETE"]
    shard.unlink()
    assert outcome(one_slide, sound) == (len(sound), 0)
    assert store_problems(one_slide) == [f"{shard}: missing"]


@pytest.mark.parametrize("one_slide", ["zstd"], indirect=True)
def test_flipped_bits_raise_in_plain_zarr_too(one_slide: Path) -> None:
    zarr = pytest.importorskip("zarr")
    folder = one_slide / "slides" / STITCHED[0]
    shard = folder / SHARD
    whole = shard.read_bytes()
    for at in np.random.default_rng(3).integers(len(whole), size=20):
        data = bytearray(whole)
        data[int(at)] ^= 16
        shard.write_bytes(data)
        with pytest.raises(ValueError, match="checksum"):
            zarr.open_array(folder / "tiles.zarr", mode="r")[:]


def test_masks_are_guarded_too(own_store: Path) -> None:
    with TileStore(own_store) as reader:
        slide_id = reader.slide_ids[0]
    shard = own_store / "slides" / slide_id / "masks.zarr" / "c" / "0" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[3] ^= 1
    shard.write_bytes(data)
    with TileStore(own_store) as reader, pytest.raises(DamageError, match=f"slide {slide_id}, tile 0: "):
        reader.read_mask(0)
    assert store_problems(own_store) == [f"{shard}: sha256 differs from COMPLETE"]


def test_store_json_holds_no_patient_data(stores: Path) -> None:
    text = (stores / "jpeg" / "store.json").read_text()
    keys = {"format", "format_version", "software", "dataset", "class_names", "class_map", "ids", "settings", "sha256"}
    assert set(json.loads(text)) == keys
    assert not [slide_id for slide_id in STITCHED if slide_id in text]


def test_every_file_of_a_slide_is_listed(own_store: Path) -> None:
    slide = sorted((own_store / "slides").iterdir())[0]
    # The listing is sha256sum's own: anybody can check a box without bony.
    subprocess.run(["sha256sum", "--check", "--quiet", "--strict", "COMPLETE"], cwd=slide, check=True)
    listed = [line.split("  ")[1] for line in (slide / "COMPLETE").read_text().splitlines()]
    assert {"rows.parquet", "tiles.zarr/zarr.json", "masks.zarr/zarr.json", "thumbnail.jpg"} <= set(listed)
    for name in listed:
        path = slide / name
        sound = path.read_bytes()
        path.write_bytes(sound[:-1])
        assert any(str(path) in line for line in store_problems(own_store)), name
        path.write_bytes(sound)
    (slide / "extra.txt").write_text("who put this here")
    assert store_problems(own_store) == [f"{slide / 'extra.txt'}: not listed in COMPLETE"]
    (slide / "extra.txt").unlink()
    (slide / "COMPLETE").write_text("{}")
    assert f"{slide / 'COMPLETE'}: unreadable" in store_problems(own_store)


def test_a_link_in_place_of_a_slide_is_named(own_store: Path, tmp_path: Path) -> None:
    slide = sorted((own_store / "slides").iterdir())[0]
    shutil.move(slide, tmp_path / "elsewhere")
    slide.symlink_to(tmp_path / "elsewhere")
    assert store_problems(own_store) == [f"{slide}: is a symbolic link"]


def test_no_flipped_bit_of_the_index_is_read(own_store: Path) -> None:
    index = own_store / "index.parquet"
    whole = index.read_bytes()
    rng = np.random.default_rng(7)
    for _ in range(60):
        data = bytearray(whole)
        data[int(rng.integers(len(whole)))] ^= 1 << int(rng.integers(8))
        index.write_bytes(data)
        assert store_problems(own_store) == [f"{index}: sha256 differs from index.sha256; run `bony index {own_store}`"]
