"""Patch data sets' layouts on disk, as lists of sources."""

import zipfile
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import openpyxl
import pytest
from PIL import Image

from tiling import patches
from tiling.errors import UsageError
from tiling.labels import GLEASON_CLASSES, UNLABELLED, Scheme


def image(path: Path, side: int = 32) -> None:
    """A black picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(path)


# Folders of tiles


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    root = tmp_path / "tiles"
    for kind, name in [("stroma", "s1_0"), ("stroma", "s2_0"), ("tumour", "s1_1")]:
        image(root / kind / f"{name}.png")
    (root / "tumour" / "notes.txt").write_text("no image")
    return root


def test_tiles_by_pattern(folders: Path) -> None:
    found = patches.tile_folders(folders, slide_pattern=r"(s\d+)_")
    assert found.class_names == ("stroma", "tumour")
    assert [(source.slide_id, source.image_labels) for source in found.sources] == [("s1", (0, 1)), ("s2", (0,))]
    assert found.remarks == ("3 images of 2 slides in 2 classes",)
    whole = patches.tile_folders(folders, slide_pattern=r"s\d")
    assert [source.slide_id for source in whole.sources] == ["s1", "s2"]


@pytest.mark.parametrize("prefix", ["", "tiles/"])
def test_tiles_by_csv(prefix: str, folders: Path) -> None:
    table = folders.parent / "list.csv"
    table.write_text(f"path,patient\n{prefix}stroma/s1_0.png,A\n{prefix}stroma/s2_0.png,A\n{prefix}tumour/s1_1.png,B\n")
    found = patches.tile_folders(folders, table, "patient")
    assert [(source.slide_id, source.image_labels) for source in found.sources] == [("A", (0, 0)), ("B", (1,))]
    table.write_text(f"path,patient\n{prefix}stroma/s1_0.png,A\n")
    with pytest.raises(UsageError, match=r"list\.csv: image stroma/s2_0\.png has no row; its path column"):
        patches.tile_folders(folders, table, "patient")
    with pytest.raises(UsageError, match=r"list\.csv: column 'slide_id' is missing; it has path, patient"):
        patches.tile_folders(folders, table)
    with pytest.raises(UsageError, match=r"gone\.csv: no such file"):
        patches.tile_folders(folders, folders / "gone.csv")


def test_tiles_without_their_slides(folders: Path) -> None:
    with pytest.raises(UsageError, match="tiles must be told apart by slide; give --slides-csv FILE"):
        patches.tile_folders(folders)
    with pytest.raises(UsageError, match=r"s1_0\.png: name does not match --slide-pattern 'x'"):
        patches.tile_folders(folders, slide_pattern="x")
    with pytest.raises(UsageError, match=r"--slide-pattern '\(' is no regular expression"):
        patches.tile_folders(folders, slide_pattern="(")


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no class folders with images; expected ROOT/CLASS/image\.png"):
        patches.tile_folders(tmp_path, slide_pattern=".+")
    with pytest.raises(UsageError, match="gone: no such folder"):
        patches.tile_folders(tmp_path / "gone", slide_pattern=".+")


# Image + mask pairs


def test_pairs(tmp_path: Path) -> None:
    for name in (
        "images/a.png",
        "masks/a.png",
        "images/b.tif",
        "masks/b_mask.png",
        "images/sub/c.jpg",
        "masks/sub/c.jpg",
    ):
        image(tmp_path / name)
    image(tmp_path / "images" / "d.png")
    found = patches.pairs(tmp_path)
    assert found.name == "pairs"
    assert found.class_names == ("background", "foreground")
    assert [(source.slide_id, source.images, source.image_masks) for source in found.sources] == [
        ("a", (tmp_path / "images/a.png",), (tmp_path / "masks/a.png",)),
        ("b", (tmp_path / "images/b.tif",), (tmp_path / "masks/b_mask.png",)),
        ("sub_c", (tmp_path / "images/sub/c.jpg",), (tmp_path / "masks/sub/c.jpg",)),
    ]
    assert all(source.image_labels == (UNLABELLED,) for source in found.sources)
    assert found.remarks == (
        "3 pairs of image and mask",
        "1 images have no mask: left out",
        "no --class-map: mask value 0 is background, 255 foreground",
        "each image counts as a slide of its own: give --slides-csv or --slide-pattern if some share one",
    )


def test_pairs_of_slides(tmp_path: Path) -> None:
    for name in ("p1_0", "p1_1", "p2_0"):
        image(tmp_path / "images" / f"{name}.png")
        image(tmp_path / "masks" / f"{name}.png")
    scheme = Scheme(("no", "yes"), (0, 1), ("no", "yes"), {0: 0, 1: 1})
    found = patches.pairs(tmp_path, scheme, slide_pattern=r"(p\d)_")
    assert [(source.slide_id, len(source.images)) for source in found.sources] == [("p1", 2), ("p2", 1)]
    assert (found.class_names, found.remarks) == (("no", "yes"), ("3 pairs of image and mask",))
    assert {source.scheme for source in found.sources} == {scheme}
    (tmp_path / "list.csv").write_text("path,who\nimages/p1_0.png,A\nimages/p1_1.png,B\nimages/p2_0.png,B\n")
    found = patches.pairs(tmp_path, scheme, tmp_path / "list.csv", "who")
    assert [(source.slide_id, len(source.images)) for source in found.sources] == [("A", 1), ("B", 2)]


def test_pairs_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"no image with a mask; expected ROOT/images/NAME\.png and ROOT/masks/NAME\.png"
    ):
        patches.pairs(tmp_path)
    image(tmp_path / "images" / "a.png")
    image(tmp_path / "masks" / "b.png")
    with pytest.raises(UsageError, match="no image with a mask"):
        patches.pairs(tmp_path)
    image(tmp_path / "masks" / "a.png")
    image(tmp_path / "masks" / "a_mask.png")
    with pytest.raises(UsageError, match=r"two masks of one image, a\.png and a_mask\.png; leave one of them"):
        patches.pairs(tmp_path)


# SICAPv2


def spreadsheet(
    path: Path, rows: list[tuple[str, str]], columns: tuple[str, ...] = ("NC", "G3", "G4", "G5", "G4C")
) -> None:
    """An official list: image_name and one column per class, 1 where it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    book = openpyxl.Workbook()
    assert book.active is not None
    book.active.append(("image_name", *columns))
    for name, kind in rows:
        book.active.append((f"{name}.jpg", *(int(column == kind) for column in columns)))
    book.save(path)


def patch_name(slide: str, number: int) -> str:
    return f"{slide}_Block_Region_{number}_0_1_xini_{500 * number}_yini_4321"


@pytest.fixture
def sicapv2(tmp_path: Path) -> Path:
    """Two training slides and one for testing, two patches each, in SICAPv2's layout."""
    root = tmp_path / "SICAPv2"
    kinds = {"16B0001851": ("NC", "G3"), "17B00208": ("NC", "G5"), "18B0006623": ("G4", "NC")}
    rows = {
        slide: [(patch_name(slide, number), kind) for number, kind in enumerate(of_slide)]
        for slide, of_slide in kinds.items()
    }
    for listed in rows.values():
        for name, _ in listed:
            image(root / "images" / f"{name}.jpg")
            image(root / "masks" / f"{name}.png")
    first, second, test = rows.values()
    spreadsheet(root / "partition" / "Test" / "Train.xlsx", [*first, *second])
    spreadsheet(root / "partition" / "Test" / "Test.xlsx", test)
    for fold, (train, held_out) in enumerate([(second, first), (first, second)], start=1):
        spreadsheet(root / "partition" / "Validation" / f"Val{fold}" / "Train.xlsx", train)
        spreadsheet(root / "partition" / "Validation" / f"Val{fold}" / "Test.xlsx", held_out)
    return root


def test_sicapv2(sicapv2: Path) -> None:
    found = patches.sicapv2(sicapv2)
    assert (found.name, found.class_names, found.mpp) == ("sicapv2", GLEASON_CLASSES, 1.0)
    assert found.remarks == ("6 images of 3 slides: 2 to train, 1 to test",)
    seen = [(source.slide_id, source.split, source.fold, source.image_labels) for source in found.sources]
    assert seen == [
        ("16B0001851", "train", "Val1", (1, UNLABELLED)),
        ("17B00208", "train", "Val2", (1, UNLABELLED)),
        ("18B0006623", "test", None, (UNLABELLED, 1)),
    ]
    for source in found.sources:
        assert source.image_masks is not None
        assert [path.stem for path in source.image_masks] == [path.stem for path in source.images]
        assert source.mpp == 1.0


def test_sicapv2_with_what_is_not_there(sicapv2: Path) -> None:
    (sicapv2 / "images" / f"{patch_name('17B00208', 0)}.jpg").unlink()
    (sicapv2 / "masks" / f"{patch_name('18B0006623', 1)}.png").unlink()
    image(sicapv2 / "images" / "unlisted.jpg")
    found = patches.sicapv2(sicapv2)
    assert found.remarks == (
        "4 images of 3 slides: 2 to train, 1 to test",
        "2 of 6 listed images have no file or no mask: left out",
        "2 images are in no list, or have no mask: left out",
    )
    for path in (sicapv2 / "masks").iterdir():
        path.unlink()
    with pytest.raises(UsageError, match="none of the 6 listed images is in images/ with a mask in masks/"):
        patches.sicapv2(sicapv2)


def test_a_slide_in_two_parts(sicapv2: Path) -> None:
    train = [(patch_name("16B0001851", 0), "NC"), (patch_name("18B0006623", 7), "G3")]
    spreadsheet(sicapv2 / "partition" / "Test" / "Train.xlsx", train)
    with pytest.raises(UsageError, match="partition: slide 18B0006623 is in both train and test"):
        patches.sicapv2(sicapv2)


def test_sicapv2_with_broken_lists(sicapv2: Path) -> None:
    path = sicapv2 / "partition" / "Test" / "Test.xlsx"
    spreadsheet(path, [], columns=("G3", "G4"))
    with pytest.raises(UsageError, match=r"Test\.xlsx: column 'NC' is missing; it has image_name, G3, G4"):
        patches.sicapv2(sicapv2)
    path.write_text("image_name,NC")
    with pytest.raises(UsageError, match=r"Test\.xlsx: cannot be read as a spreadsheet \(BadZipFile\)"):
        patches.sicapv2(sicapv2)
    path.unlink()
    with pytest.raises(UsageError, match=r"Test\.xlsx: no such file; SICAPv2 has partition/Test"):
        patches.sicapv2(sicapv2)


# MedMNIST


def archive(
    path: Path, count: int = 5, shape: tuple[int, ...] = (28, 28, 3), classes: int = 3, **other: np.ndarray
) -> Path:
    rng = np.random.default_rng(0)
    arrays = {
        f"{part}_images": rng.integers(0, 256, (count + extra, *shape), np.uint8)
        for extra, part in enumerate(("train", "val", "test"))
    }
    arrays |= {
        f"{part}_labels": (np.arange(count + extra) % classes)[:, None].astype(np.uint8)
        for extra, part in enumerate(("train", "val", "test"))
    }
    np.savez_compressed(path, **{**arrays, **other})
    return path


@pytest.mark.parametrize("shape", [(28, 28, 3), (28, 28), (64, 64, 3)])
def test_medmnist(shape: tuple[int, ...], tmp_path: Path) -> None:
    found = patches.medmnist(archive(tmp_path / "some.npz", shape=shape))
    assert (found.name, found.tile_px, found.mpp) == ("medmnist", shape[0], None)
    assert found.class_names == ("0", "1", "2")
    assert [(source.slide_id, source.split, source.image_labels) for source in found.sources] == [
        ("test", "test", (0, 1, 2, 0, 1, 2, 0)),
        ("train", "train", (0, 1, 2, 0, 1)),
        ("val", "val", (0, 1, 2, 0, 1, 2)),
    ]
    assert found.remarks == ("some.npz: 5 to train, 6 to val, 7 to test; no scale known",)
    assert patches.medmnist(tmp_path) == found
    assert all(len(ForkingPickler.dumps(source)) < 2000 for source in found.sources)


def test_known_classes(tmp_path: Path) -> None:
    found = patches.medmnist(archive(tmp_path / "bloodmnist_64.npz", count=8, classes=8))
    assert found.class_names[-1] == "platelet"
    assert patches.medmnist(archive(tmp_path / "bloodmnist.npz", classes=3)).class_names == ("0", "1", "2")


def test_archives_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"0 \.npz files, one is needed; name the file itself with --root"):
        patches.medmnist(tmp_path)
    path = tmp_path / "some.npz"
    path.write_text("not an archive")
    with pytest.raises(UsageError, match=r"some\.npz: not a MedMNIST archive \("):
        patches.medmnist(path)
    for other, complaint in (
        ({"val_images": np.zeros((6, 28, 28, 3), np.float32)}, "val_images is float32, uint8 in C order is read"),
        (
            {"val_images": np.zeros((6, 28, 28, 28), np.uint8)},
            r"images of shape \(6, 28, 28, 28\), \(N, side, side\) or",
        ),
        ({"val_images": np.zeros((6, 28, 30, 3), np.uint8)}, r"images of shape \(6, 28, 30, 3\)"),
        (
            {"val_labels": np.zeros((6, 14), np.uint8)},
            r"labels of shape \(6, 14\), one class for each of 6 images is read",
        ),
        ({"val_labels": np.zeros((5, 1), np.uint8)}, r"labels of shape \(5, 1\)"),
        ({"val_labels": np.full((6, 1), -1)}, "label -1, classes are counted from 0"),
        ({"val_labels": np.array([[None]] * 6, object)}, "Object arrays cannot be loaded when allow_pickle=False"),
    ):
        with pytest.raises(UsageError, match=complaint):
            patches.medmnist(archive(path, **other))
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "part.npz", "w") as part:
        part.writestr("train_images.npy", whole.read("train_images.npy"))
    with pytest.raises(UsageError, match="train_labels"):
        patches.medmnist(tmp_path / "part.npz")


def test_bloodmnist(shared_data: Path) -> None:
    found = patches.medmnist(shared_data / "medmnist" / "bloodmnist.npz")
    assert found.class_names == patches.MEDMNIST_CLASSES["bloodmnist"]
    assert {source.split: len(source.image_labels or ()) for source in found.sources} == {
        "train": 11959, "val": 1712, "test": 3421,
    }  # fmt: skip
