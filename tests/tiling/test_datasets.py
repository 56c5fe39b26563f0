import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.cli import main
from tiling import datasets
from tiling.errors import UsageError
from tiling.labels import GLEASON_CLASSES
from tiling.run import tile
from tiling.settings import TileSettings
from tiling.store import TileStore


def table_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def write_csv(root: Path, text: str) -> None:
    (root / "train.csv").write_text(text)


def replace(root: Path, old: str, new: str) -> None:
    text = (root / "train.csv").read_text()
    assert old in text
    write_csv(root, text.replace(old, new, 1))


def image(path: Path, width: int = 256, height: int = 256, seed: int = 0) -> np.ndarray:
    """A noisy picture on disk; returns its pixels as written (PNG) or as they were (JPEG)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


# PANDA's layout


def test_panda(cohort: Path) -> None:
    found = datasets.panda(cohort)
    listed = table_of(cohort / "train.csv")
    assert [source.slide_id for source in found.sources] == sorted(row["image_id"] for row in listed)
    assert found.class_names == GLEASON_CLASSES
    assert found.remarks == ("3 slides of 3 in train.csv",)
    for row in listed:
        (source,) = (source for source in found.sources if source.slide_id == row["image_id"])
        assert source.provider == row["data_provider"]
        assert source.isup_grade == int(row["isup_grade"])
        assert source.images[0].is_file()
        assert source.mask is not None
        assert source.mask.is_file()
    assert {source.gleason_score for source in found.sources} == {"3+3", "5+5", "0+0"}


def test_panda_with_slides_and_masks_that_are_not_there(own_cohort: Path) -> None:
    ids = sorted(path.stem for path in (own_cohort / "train_images").iterdir())
    (own_cohort / "train_images" / f"{ids[0]}.tiff").unlink()
    (own_cohort / "train_label_masks" / f"{ids[1]}_mask.tiff").unlink()
    found = datasets.panda(own_cohort)
    assert [source.slide_id for source in found.sources] == ids[1:]
    assert found.sources[0].mask is None
    assert found.remarks == (
        "2 slides of 3 in train.csv",
        "1 listed slides are not in train_images",
        "1 slides have no mask: their tiles are unlabelled",
    )


@pytest.mark.parametrize("column", ["image_id", "data_provider", "isup_grade", "gleason_score"])
def test_panda_without_a_column(column: str, own_cohort: Path) -> None:
    replace(own_cohort, column, "other")
    with pytest.raises(UsageError, match=rf"train\.csv: column '{column}' is missing; it has .*other"):
        datasets.panda(own_cohort)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (",radboud,", ",rad boud,", r"train\.csv, line 2: data_provider 'rad boud', known are radboud, karolinska"),
        (",karolinska,0,", ",karolinska,6,", r"train\.csv, line 4: isup_grade '6', must be 0 to 5"),
        (",karolinska,0,", ",karolinska,,", r"train\.csv, line 4: isup_grade '', must be 0 to 5"),
        ("gleason_score\n", "gleason_score\n../", r"train\.csv, line 2: image_id '\.\./.*' is no file name"),
    ],
)
def test_panda_with_a_wrong_value(old: str, new: str, complaint: str, own_cohort: Path) -> None:
    replace(own_cohort, old, new)
    with pytest.raises(UsageError, match=complaint):
        datasets.panda(own_cohort)


def test_panda_with_a_short_row(own_cohort: Path) -> None:
    with (own_cohort / "train.csv").open("a") as file:
        file.write("onlyanid\n")
    with pytest.raises(UsageError, match=r"train\.csv, line 5: no data_provider in this row"):
        datasets.panda(own_cohort)


def test_panda_csv_that_is_none(own_cohort: Path) -> None:
    (own_cohort / "train.csv").write_bytes(b"PK\x03\x04\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"train\.csv: cannot be read as CSV \(.*; save it as comma-separated UTF-8"):
        datasets.panda(own_cohort)


def test_panda_twice_the_same_slide(own_cohort: Path) -> None:
    text = (own_cohort / "train.csv").read_text()
    write_csv(own_cohort, text + text.splitlines()[1] + "\n")
    with pytest.raises(UsageError, match=r"slide id '\w+' stands for both "):
        datasets.panda(own_cohort)


def test_panda_without_images_or_list(own_cohort: Path, tmp_path: Path) -> None:
    for path in (own_cohort / "train_images").iterdir():
        path.unlink()
    with pytest.raises(UsageError, match=r"none of the 3 slides of train\.csv is in train_images"):
        datasets.panda(own_cohort)
    with pytest.raises(UsageError, match=r"empty/train\.csv: no such file"):
        datasets.panda(tmp_path / "empty")
    write_csv(own_cohort, "")
    with pytest.raises(UsageError, match="column 'image_id' is missing; it has no columns"):
        datasets.panda(own_cohort)


def test_panda_csv_of_a_spreadsheet(own_cohort: Path) -> None:
    """Excel saves CSV with a byte order mark and CRLF."""
    text = (own_cohort / "train.csv").read_text()
    (own_cohort / "train.csv").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert len(datasets.panda(own_cohort).sources) == 3


# Slide files and folders


def test_slides_of_files_and_folders(cohort: Path, tmp_path: Path) -> None:
    images = sorted((cohort / "train_images").iterdir())
    found = datasets.slides([images[1], cohort / "train_images", images[1]])
    assert [source.images for source in found.sources] == [(path,) for path in images]
    assert all(source.provider is None and source.mask is None for source in found.sources)
    odd = tmp_path / "case 7 #2.tiff"
    odd.write_bytes(b"")
    assert [source.slide_id for source in datasets.slides([odd]).sources] == ["case_7_2"]


def test_slides_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a slide")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"notes\.txt: not a slide: its name ends in '\.txt'; slides end in \.bif, "):
        datasets.slides([tmp_path / "notes.txt"])
    with pytest.raises(UsageError, match=r"empty: folder holds no slides; slides end in "):
        datasets.slides([tmp_path / "empty"])
    with pytest.raises(UsageError, match=r"gone: no such file or folder"):
        datasets.slides([tmp_path / "gone"])


def test_two_slides_of_one_name(tmp_path: Path) -> None:
    for name in ("a/slide.tiff", "b/slide.svs"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UsageError, match=r"slide id 'slide' stands for both .*a/slide.tiff and .*b/slide.svs"):
        datasets.slides([tmp_path])


# Folders of tiles


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    root = tmp_path / "tiles"
    for number, (kind, name) in enumerate([("stroma", "s1_0"), ("stroma", "s2_0"), ("tumour", "s1_1")]):
        image(root / kind / f"{name}.png", 224, 224, seed=number)
    (root / "tumour" / "notes.txt").write_text("no image")
    return root


def test_tiles_by_pattern(folders: Path) -> None:
    found = datasets.tile_folders(folders, slide_pattern=r"(s\d+)_")
    assert found.class_names == ("stroma", "tumour")
    assert [(source.slide_id, source.image_labels) for source in found.sources] == [("s1", (0, 1)), ("s2", (0,))]
    assert found.remarks == ("3 images of 2 slides in 2 classes",)
    whole = datasets.tile_folders(folders, slide_pattern=r"s\d")
    assert [source.slide_id for source in whole.sources] == ["s1", "s2"]


@pytest.mark.parametrize("prefix", ["", "tiles/"])
def test_tiles_by_csv(prefix: str, folders: Path) -> None:
    table = folders.parent / "list.csv"
    table.write_text(f"path,patient\n{prefix}stroma/s1_0.png,A\n{prefix}stroma/s2_0.png,A\n{prefix}tumour/s1_1.png,B\n")
    found = datasets.tile_folders(folders, table, "patient")
    assert [(source.slide_id, source.image_labels) for source in found.sources] == [("A", (0, 0)), ("B", (1,))]
    table.write_text(f"path,patient\n{prefix}stroma/s1_0.png,A\n")
    with pytest.raises(UsageError, match=r"list\.csv: image stroma/s2_0\.png has no row; its path column"):
        datasets.tile_folders(folders, table, "patient")
    with pytest.raises(UsageError, match=r"list\.csv: column 'slide_id' is missing; it has path, patient"):
        datasets.tile_folders(folders, table)
    with pytest.raises(UsageError, match=r"gone\.csv: no such file"):
        datasets.tile_folders(folders, folders / "gone.csv")


def test_tiles_without_their_slides(folders: Path) -> None:
    with pytest.raises(UsageError, match="tiles must be told apart by slide; give --slides-csv FILE"):
        datasets.tile_folders(folders)
    with pytest.raises(UsageError, match=r"s1_0\.png: name does not match --slide-pattern 'x'"):
        datasets.tile_folders(folders, slide_pattern="x")
    with pytest.raises(UsageError, match=r"--slide-pattern '\(' is no regular expression"):
        datasets.tile_folders(folders, slide_pattern="(")


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no class folders with images; expected ROOT/CLASS/image\.png"):
        datasets.tile_folders(tmp_path, slide_pattern=".+")
    with pytest.raises(UsageError, match="gone: no such folder"):
        datasets.tile_folders(tmp_path / "gone", slide_pattern=".+")


def test_larger_images_are_cut_on_the_16_px_grid(tmp_path: Path) -> None:
    sizes = {"a_0": (256, 300), "a_1": (224, 224), "a_2": (512, 700), "b_0": (460, 230)}
    pixels = {
        name: image(tmp_path / "tiles" / "x" / f"{name}.png", *size, seed=number)
        for number, (name, size) in enumerate(sizes.items())
    }
    found = datasets.tile_folders(tmp_path / "tiles", slide_pattern=r"(\w)_")
    tile(found, tmp_path / "store", TileSettings(codec="zstd", thresholds=None))
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
    assert main([*words, "--out", str(tmp_path / "store")]) == 3
    quarantine = (tmp_path / "store" / "quarantine.jsonl").read_text()
    assert "s1_0.png: image does not decode" in quarantine
    with TileStore(tmp_path / "store") as store:
        found = [(row["slide_id"], row["image"], row["label"]) for row in store.index.to_pylist()]
    assert found == [("s1", 1, 1), ("s2", 0, 0)]
    assert "s1: " in capsys.readouterr().err


def test_images_smaller_than_a_tile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image(tmp_path / "tiles" / "x" / "a.png", 223, 400)
    words = ["tile", "--dataset", "tiles", "--root", str(tmp_path / "tiles"), "--slide-pattern", ".+"]
    assert main([*words, "--out", str(tmp_path / "store")]) == 1
    assert "no tile can be cut: images are smaller than 224 px" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_panda_gleason_tiles(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = shared_data / "panda_gleason_tiles"
    words = ["tile", "--dataset", "tiles", "--root", str(root / "tiles"), "--slides-csv", str(root / "manifest.csv")]
    assert main([*words, "--out", str(tmp_path / "store")]) == 0
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
