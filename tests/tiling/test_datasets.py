import csv
from collections import Counter
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiling import datasets
from tiling.errors import UsageError
from tiling.labels import GLEASON_ANNOTATIONS, GLEASON_CLASSES, SCHEMES, Scheme


def table_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def write_csv(root: Path, text: str) -> None:
    (root / "train.csv").write_text(text)


def replace(root: Path, old: str, new: str) -> None:
    text = (root / "train.csv").read_text()
    assert old in text
    write_csv(root, text.replace(old, new, 1))


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
        assert source.scheme == SCHEMES[row["data_provider"]]
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


def touched(root: Path, *names: str) -> list[Path]:
    """Empty files."""
    paths = [root / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return paths


def ids_of(found: datasets.Dataset, root: Path) -> dict[str, str]:
    """File -> slide id."""
    return {source.images[0].relative_to(root).as_posix(): source.slide_id for source in found.sources}


def test_slides_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    touched(tmp_path, "a/slide.tiff", "b/slide.svs", "b/other.svs", "case/x/he.svs", "twin/x/he.svs")
    assert ids_of(datasets.slides([tmp_path]), tmp_path) == {
        "a/slide.tiff": "a_slide", "b/slide.svs": "b_slide", "b/other.svs": "other",
        "case/x/he.svs": "case_x_he", "twin/x/he.svs": "twin_x_he",
    }  # fmt: skip


def test_slides_of_one_name_in_one_folder_keep_their_suffixes(tmp_path: Path) -> None:
    touched(tmp_path, "a/slide.tiff", "a/slide.svs", "b/slide.svs")
    assert ids_of(datasets.slides([tmp_path]), tmp_path) == {
        "a/slide.tiff": "slide.tiff", "a/slide.svs": "slide.svs", "b/slide.svs": "slide",
    }  # fmt: skip


def test_a_folder_joined_to_a_name_that_another_slide_has(tmp_path: Path) -> None:
    touched(tmp_path, "a/s.svs", "b/s.svs", "c/a_s.svs")
    ids = ids_of(datasets.slides([tmp_path]), tmp_path)
    assert ids == {"a/s.svs": f"{tmp_path.name}_a_s", "b/s.svs": "b_s", "c/a_s.svs": "c_a_s"}


FOLDERS = st.lists(st.sampled_from(["a", "b", "s"]), max_size=3).map(tuple)
NAMES = st.sampled_from(["s.svs", "s.tiff", "t#.svs", "t.svs"])


@given(st.sets(st.tuples(FOLDERS, NAMES), min_size=1, max_size=12), st.randoms())
def test_slide_ids_are_unique_whatever_the_order(places: set[tuple[tuple[str, ...], str]], random: Random) -> None:
    files = [Path("/root", *folders, name) for folders, name in sorted(places)]
    ids = datasets.slide_ids(files)
    assert len(set(ids.values())) == len(files)
    assert datasets.slide_ids(random.sample(files, len(files))) == ids
    assert all(datasets.safe_id(slide_id) == slide_id for slide_id in ids.values())
    stems = Counter(datasets.safe_id(file.stem) for file in files)
    alone = [file for file in files if stems[datasets.safe_id(file.stem)] == 1]
    assert all(ids[file] == datasets.safe_id(file.stem) for file in alone)


def test_names_that_nothing_tells_apart(tmp_path: Path) -> None:
    touched(tmp_path, "a b/s.svs", "a#b/s.svs")
    with pytest.raises(UsageError, match=r"slide id '.*a_b_s' stands for both .*; rename one of the files"):
        datasets.slides([tmp_path])


# Annotations of slides


def of_slides(found: datasets.Dataset, root: Path) -> dict[str, str | None]:
    """Slide id -> its annotations."""
    return {
        source.slide_id: source.mask.relative_to(root).as_posix() if source.mask else None for source in found.sources
    }


def test_annotations_in_a_folder(tmp_path: Path) -> None:
    slides = touched(tmp_path, "in/a.svs", "in/b.tiff", "in/c.svs", "in/d.svs")
    touched(tmp_path, "drawn/a.geojson", "drawn/b.xml", "drawn/d_mask.json", "drawn/other.geojson", "drawn/c.txt")
    found = datasets.slides(slides, tmp_path / "drawn")
    assert of_slides(found, tmp_path) == {
        "a": "drawn/a.geojson",
        "b": "drawn/b.xml",
        "c": None,
        "d": "drawn/d_mask.json",
    }
    assert found.remarks == (f"3 of 4 slides have annotations or a mask in {tmp_path / 'drawn'}",)
    assert found.class_names == GLEASON_CLASSES
    assert {source.scheme for source in found.sources} == {GLEASON_ANNOTATIONS}


def test_masks_beside_the_slides_are_no_slides(tmp_path: Path) -> None:
    touched(tmp_path, "a.svs", "a_mask.png", "b.tiff", "b_mask.tif", "c.png", "c.geojson")
    binary = Scheme(("no", "yes"), (0, 1), ("no", "yes"), {0: 0, 1: 1}, {"yes": 1})
    found = datasets.slides([tmp_path], tmp_path, binary)
    assert of_slides(found, tmp_path) == {"a": "a_mask.png", "b": "b_mask.tif", "c": "c.geojson"}
    assert found.class_names == ("no", "yes")


def test_masks_without_a_class_map(tmp_path: Path) -> None:
    touched(tmp_path, "a.svs", "a_mask.png")
    with pytest.raises(
        UsageError, match=r"a_mask\.png: what a mask's values mean is not known; give it with --class-map"
    ):
        datasets.slides([tmp_path], tmp_path)


def test_annotations_that_are_not_clear(tmp_path: Path) -> None:
    slides = touched(tmp_path, "in/a.svs")
    touched(tmp_path, "drawn/a.geojson", "drawn/a.xml")
    with pytest.raises(UsageError, match=r"a\.svs: slide has two annotations, .*a\.geojson and .*a\.xml; leave one"):
        datasets.slides(slides, tmp_path / "drawn")
    with pytest.raises(UsageError, match="gone: no such folder"):
        datasets.slides(slides, tmp_path / "gone")


def test_annotations_of_slides_that_share_a_name(tmp_path: Path) -> None:
    slides = touched(tmp_path, "in/c1/he.svs", "in/c2/he.svs")
    touched(tmp_path, "drawn/c1/he.geojson", "drawn/c2/he.geojson")
    found = datasets.slides(slides, tmp_path / "drawn")
    assert of_slides(found, tmp_path) == {"c1_he": "drawn/c1/he.geojson", "c2_he": "drawn/c2/he.geojson"}
    (tmp_path / "drawn" / "c2" / "he.geojson").unlink()
    with pytest.raises(UsageError, match=r"he\.geojson: annotations fit two slides, .*c1.* and .*c2"):
        datasets.slides(slides, tmp_path / "drawn")


def test_sources_are_small_on_the_wire(cohort: Path) -> None:
    for source in datasets.panda(cohort).sources:
        data = ForkingPickler.dumps(source)
        assert len(data) < 3000
        assert ForkingPickler.loads(data) == source
