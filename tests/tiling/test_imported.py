"""Images that others have cut: tiles, masks and labels of them, through the real command where it matters."""

import csv
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from pipeline.cli import main
from tiling import patches
from tiling.datasets import Source
from tiling.errors import GridError, SlideError
from tiling.imported import ImportedTiles
from tiling.labels import UNLABELLED, Scheme
from tiling.run import tile
from tiling.settings import TileSettings
from tiling.store import TileStore

IMPORT = TileSettings(codec="zstd", thresholds=None)


def table_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def image(path: Path, width: int = 256, height: int = 256, seed: int = 0) -> np.ndarray:
    """A noisy picture on disk; returns its pixels as written (PNG) or as they were (JPEG)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    root = tmp_path / "tiles"
    for number, (kind, name) in enumerate([("stroma", "s1_0"), ("stroma", "s2_0"), ("tumour", "s1_1")]):
        image(root / kind / f"{name}.png", 224, 224, seed=number)
    return root


# Folders of tiles


def test_larger_images_are_cut_on_the_16_px_grid(tmp_path: Path) -> None:
    sizes = {"a_0": (256, 300), "a_1": (224, 224), "a_2": (512, 700), "b_0": (460, 230)}
    pixels = {
        name: image(tmp_path / "tiles" / "x" / f"{name}.png", *size, seed=number)
        for number, (name, size) in enumerate(sizes.items())
    }
    found = patches.tile_folders(tmp_path / "tiles", slide_pattern=r"(\w)_")
    tile(found, tmp_path / "store", IMPORT)
    with TileStore(tmp_path / "store") as store:
        rows = store.index.to_pylist()
        for number, row in enumerate(rows):
            name = f"{row['slide_id']}_{row['image']}"
            x, y = row["x"], row["y"]
            assert np.array_equal(store.read(np.array([number]))[0], pixels[name][y : y + 224, x : x + 224])
    places = {}
    for row in rows:
        places.setdefault(f"{row['slide_id']}_{row['image']}", []).append((row["x"], row["y"]))
    assert places == {
        "a_0": [(16, 32)],
        "a_1": [(0, 0)],
        "a_2": [(32, 0), (256, 0), (32, 224), (256, 224), (32, 448), (256, 448)],
        "b_0": [(0, 0), (224, 0)],
    }


def test_a_broken_image_among_tiles(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folders / "stroma" / "s1_0.png"
    path.write_bytes(path.read_bytes()[:5000])
    words = ["tile", "--dataset", "tiles", "--root", str(folders), "--slide-pattern", r"(s\d)_"]
    assert main([*words, "--out", str(tmp_path / "store"), "--no-deidentify"]) == 3
    quarantine = (tmp_path / "store" / "quarantine.jsonl").read_text()
    assert "s1#0: image does not decode" in quarantine
    with TileStore(tmp_path / "store") as store:
        found = [(row["slide_id"], row["image"], row["label"]) for row in store.index.to_pylist()]
    assert found == [("s1", 1, 1), ("s2", 0, 0)]
    assert "s1: " in capsys.readouterr().err


def test_images_smaller_than_a_tile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image(tmp_path / "tiles" / "x" / "a.png", 223, 400)
    words = ["tile", "--dataset", "tiles", "--root", str(tmp_path / "tiles"), "--slide-pattern", ".+"]
    assert main([*words, "--out", str(tmp_path / "store"), "--no-deidentify"]) == 1
    assert "no tile can be cut: images are smaller than 224 px" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_panda_gleason_tiles(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = shared_data / "panda_gleason_tiles"
    words = ["tile", "--dataset", "tiles", "--root", str(root / "tiles"), "--slides-csv", str(root / "manifest.csv")]
    assert main([*words, "--out", str(tmp_path / "store"), "--no-deidentify"]) == 0
    assert "105 slides (0 were there already), 994 new tiles" in capsys.readouterr().out
    of_slide: dict[str, list[tuple[str, int]]] = {}
    for row in table_of(root / "manifest.csv"):
        of_slide.setdefault(row["slide_id"], []).append((row["path"], int(row["label"])))
    with TileStore(tmp_path / "store", threads=2) as store:
        assert (len(store), len(store.slide_ids)) == (994, 105)
        assert store.description.class_names == ("0", "1", "2", "3")
        pixels = store.read(np.arange(len(store)))
        for number, row in enumerate(store.index.to_pylist()):
            path, label = sorted(of_slide[row["slide_id"]])[row["image"]]
            assert row["label"] == label
            assert (row["x"], row["y"]) == (16, 16)
            if number % 30 == 0:
                source = np.asarray(Image.open(root / path))[16:240, 16:240].astype(float)
                assert 10 * np.log10(255**2 / np.mean((pixels[number] - source) ** 2)) > 40
    assert Counter(store.labels().tolist()) == Counter(label for rows in of_slide.values() for _, label in rows)


# What ImportedTiles gives


def test_candidates_of_images(tmp_path: Path) -> None:
    pixels = image(tmp_path / "a.png", 300, 260)
    image(tmp_path / "b.jpg", 128, 128, seed=1)
    images = ImportedTiles(
        Source("s", (tmp_path / "a.png", tmp_path / "b.jpg"), image_labels=(4, 2)),
        TileSettings(tile_px=128, thresholds=None),
    )
    found = list(images)
    assert [(one.image, one.x, one.y, one.label, one.reason) for one, _ in found] == [
        (0, 16, 0, 4, ""), (0, 144, 0, 4, ""), (0, 16, 128, 4, ""), (0, 144, 128, 4, ""), (1, 0, 0, 2, ""),
    ]  # fmt: skip
    for candidate, jpeg in found[:4]:
        assert jpeg is None
        expected = pixels[candidate.y : candidate.y + 128, candidate.x : candidate.x + 128]
        assert candidate.tile is not None
        assert np.array_equal(candidate.tile, expected)
        assert candidate.metrics is not None
        assert np.isfinite(candidate.metrics).all()
    assert found[4][1] is not None
    assert (images.broken, images.mpp, images.damage()) == ([], 0.5, "")


def test_the_scale_of_images(tmp_path: Path) -> None:
    image(tmp_path / "a.png", 512, 512)
    resolution = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(tmp_path / "stated.tif", np.zeros((448, 448, 3), np.uint8), photometric="rgb", **resolution)

    def of(name: str, mpp: float | None = None, **settings: float | None) -> tuple[int, float | None]:
        images = ImportedTiles(
            Source("s", (tmp_path / name,), image_labels=(0,), mpp=mpp),
            TileSettings(**{"thresholds": None, **settings}),
        )
        return len(list(images)), images.mpp

    assert of("a.png", mpp=0.5) == (4, 0.5)
    assert of("a.png", mpp=0.25) == (1, 0.5)
    assert of("a.png", mpp=0.25, slide_mpp=0.5) == (4, 0.5)
    assert of("stated.tif") == (4, 0.5)
    with pytest.raises(GridError, match=r"finest level has 1 um/px, coarser than the 0\.5 um/px asked for"):
        of("a.png", mpp=1.0)


def test_images_without_any_scale(tmp_path: Path) -> None:
    image(tmp_path / "a.png", 224, 224)
    images = ImportedTiles(
        Source("s", (tmp_path / "a.png",), image_labels=(0,)), TileSettings(mpp=None, thresholds=None)
    )
    with pytest.raises(
        SlideError, match=r"no tile can be cut: .*a\.png: tile images do not say their scale; give it with --mpp"
    ):
        list(images)


# Pairs


BINARY = Scheme(("no", "yes"), (0, 1), ("no", "yes"), {0: 0, 1: 1})


def test_masks_follow_their_tiles(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        image(tmp_path / "images" / f"{name}.png", 460, 250, seed=ord(name))
    mask = np.zeros((250, 460), np.uint8)
    mask[:125, 6:230] = 1
    for name in ("a", "b"):
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(tmp_path / "masks" / f"{name}.png")
    Image.fromarray(mask + 1).save(tmp_path / "masks" / "c.png")
    path = tmp_path / "images" / "b.png"
    path.write_bytes(path.read_bytes()[:5000])
    found = patches.pairs(tmp_path, BINARY, slide_pattern="()")
    images = ImportedTiles(found.sources[0], TileSettings(thresholds=None, min_label_share=0.5))
    candidates = [candidate for candidate, _ in images]
    assert [(one.image, one.x, one.y, one.label) for one in candidates] == [(0, 0, 0, 1), (0, 224, 0, UNLABELLED)]
    for candidate in candidates:
        x = candidate.x
        assert candidate.mask is not None
        assert np.array_equal(candidate.mask, mask[:224, x : x + 224])
        assert candidate.coverage[1] == pytest.approx(np.mean(candidate.mask), abs=1e-6)
    assert len(images.broken) == 2
    assert "b.png: image does not decode" in images.broken[0]
    assert "c.png: mask holds value 2, known are 0 to 1 (no, yes); add it to" in images.broken[1]
    assert images.damage().startswith("2 of 3 images left out; the first: ")


def test_monuseg(shared_data: Path, tmp_path: Path) -> None:
    found = patches.pairs(shared_data / "monuseg14")
    count = len(list((shared_data / "monuseg14" / "images").iterdir()))
    assert len(found.sources) == count > 0
    tile(found, tmp_path / "store", TileSettings(thresholds=None))
    with TileStore(tmp_path / "store") as store:
        rows = store.index.to_pylist()
        assert len(rows) == count * 16
        for number, row in enumerate(rows):
            mask = store.read_mask(number)
            assert row["coverage_foreground"] == pytest.approx(np.mean(mask), abs=1e-6)
            if number % 16 == 5:
                whole = (
                    np.asarray(Image.open(shared_data / "monuseg14" / "masks" / f"{row['slide_id']}.jpg"))[..., 0] > 127
                )
                assert np.array_equal(mask, whole[row["y"] : row["y"] + 224, row["x"] : row["x"] + 224])
        assert 0.1 < np.mean([row["coverage_foreground"] for row in rows]) < 0.5


# SICAPv2's masks and labels, on real pixels where there are some


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_sicapv2_patches_cut_to_224(suffix: str, tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    for number, name in enumerate(("graded", "benign")):
        image(tmp_path / "images" / f"{name}.jpg", 512, 512, seed=number)
    mask = np.zeros((512, 512), np.uint8)
    mask[40:240, 40:240], mask[300:470, 40:200], mask[260:300, 300:420] = 3, 5, 4
    Image.fromarray(mask).save(tmp_path / "masks" / f"graded{suffix}", quality=95)
    Image.fromarray(mask * 0).save(tmp_path / "masks" / f"benign{suffix}", quality=95)
    source = Source(
        "s", (tmp_path / "images" / "graded.jpg", tmp_path / "images" / "benign.jpg"), image_labels=(UNLABELLED, 1),
        scheme=patches.SICAPV2, mpp=1.0,
        image_masks=(tmp_path / "masks" / f"graded{suffix}", tmp_path / "masks" / f"benign{suffix}"),
    )  # fmt: skip
    found = [candidate for candidate, _ in ImportedTiles(source, TileSettings(mpp=1.0, thresholds=None))]
    assert [(one.image, one.x, one.y, one.label) for one in found] == [
        (0, 32, 32, 2), (0, 256, 32, UNLABELLED), (0, 32, 256, 4), (0, 256, 256, 3),
        (1, 32, 32, 1), (1, 256, 32, 1), (1, 32, 256, 1), (1, 256, 256, 1),
    ]  # fmt: skip
    stored = np.array([0, 0, 0, 1, 2, 3])[mask]
    for candidate in found[:4]:
        assert candidate.mask is not None
        agree = candidate.mask == stored[candidate.y : candidate.y + 224, candidate.x : candidate.x + 224]
        assert np.mean(agree) > (0.9999 if suffix == ".png" else 0.97)


# MedMNIST


def medmnist_archive(path: Path, images: np.ndarray, save: Callable[..., None] = np.savez_compressed) -> Path:
    arrays = {f"{part}_images": images for part in ("train", "val", "test")}
    labels = np.arange(len(images), dtype=np.uint8)[:, None] % 4
    save(path, **arrays, **{f"{part}_labels": labels for part in ("train", "val", "test")})
    return path


@pytest.mark.parametrize("shape", [(28, 28, 3), (28, 28)])
def test_medmnist_images(shape: tuple[int, ...], tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (11, *shape), np.uint8)
    found = patches.medmnist(medmnist_archive(tmp_path / "some.npz", pixels))
    settings = TileSettings(tile_px=found.tile_px, mpp=found.mpp, codec="zstd", thresholds=None)
    tile(found, tmp_path / "store", settings)
    with TileStore(tmp_path / "store") as store:
        read = store.read(np.arange(len(store))).reshape(3, 11, 28, 28, 3)
        assert np.array_equal(
            read, np.broadcast_to(pixels if len(shape) == 3 else pixels[..., None], (11, 28, 28, 3))[None].repeat(3, 0)
        )
        rows = store.index.to_pylist()
        assert [row["label"] for row in rows[:11]] == [number % 4 for number in range(11)]
        assert {(row["slide_id"], row["split"]) for row in rows} == {(part, part) for part in ("train", "val", "test")}
        assert all(row["mpp"] is None for row in rows)
        assert np.isnan(store.mpp)


def test_a_scale_that_the_user_states(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    (source, *_) = patches.medmnist(medmnist_archive(tmp_path / "some.npz", pixels)).sources
    images = ImportedTiles(source, TileSettings(tile_px=32, mpp=1.0, slide_mpp=0.5, thresholds=None))
    assert len(list(images)) == 2
    assert images.mpp == 1.0
    images = ImportedTiles(source, TileSettings(tile_px=32, mpp=None, thresholds=None))
    assert [(one.image, one.x, one.y) for one, _ in images] == [
        (n, x, y) for n in (0, 1) for y in (0, 32) for x in (0, 32)
    ]
    with pytest.raises(SlideError, match="no tile can be cut: images are smaller than 224 px"):
        list(ImportedTiles(source, TileSettings(mpp=None, thresholds=None)))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_archive(save: Callable[..., None], tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 28, 28, 3), np.uint8)
    path = medmnist_archive(tmp_path / "some.npz", pixels, save)
    source = next(source for source in patches.medmnist(path).sources if source.split == "train")
    data = path.read_bytes()
    for place in (5_000, 60_000, 110_000):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(SlideError, match=r"some\.npz: archive is damaged \("):
            list(ImportedTiles(source, TileSettings(tile_px=28, mpp=None, thresholds=None)))


def test_an_archive_is_read_as_a_stream(tmp_path: Path) -> None:
    """40 MB of images pass through a batch's memory."""
    source = patches.medmnist(medmnist_archive(tmp_path / "some.npz", np.zeros((3500, 64, 64, 3), np.uint8))).sources[0]
    tracemalloc.start()
    numbers = [one.image for one, _ in ImportedTiles(source, TileSettings(tile_px=64, mpp=None, thresholds=None))]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert numbers == list(range(3500))
    assert peak < 25e6
