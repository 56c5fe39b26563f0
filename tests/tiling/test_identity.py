"""Slide ids that may be seen, the key and the list behind them, and messages without names."""

import csv
import json
import multiprocessing
import os
import stat
import unicodedata
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiling.datasets import Dataset, Source, safe_id
from tiling.errors import UsageError
from tiling.identity import FOLDER, deidentified, hashed_id, key_fingerprint, private_files, public_text

FOLDER_OF_CASES = Path("/hospital/SMITH^JOHN_1960/2024")
NAMES = "abcdefghijklmnopqrstuvwxyzABCXYZ0123456789 _-^,'\"äłé中%#+()[]\\"


def slides(*names: str, folder: Path = FOLDER_OF_CASES, dataset: str = "slides") -> Dataset:
    return Dataset(dataset, tuple(Source(safe_id(name), (folder / f"{name}.svs",)) for name in names))


def ids(dataset: Dataset) -> list[str]:
    return [source.slide_id for source in dataset.sources]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(
    ("dataset", "name", "kept"),
    [
        ("panda", "30b5ee6b12c39a6b22f0ed0875e0452d", True),
        ("panda", "30B5EE6B12C39A6B22F0ED0875E0452D", False),
        ("panda", "30b5ee6b12c39a6b22f0ed0875e0452d_SMITH", False),
        ("slides", "30b5ee6b12c39a6b22f0ed0875e0452d", False),  # may be the MD5 of a case number
        ("tiles", "30b5ee6b12c39a6b22f0ed0875e0452d", False),
        ("sicapv2", "16B0001851", True),
        ("sicapv2", "18B0001159D", True),
        ("slides", "16B0001851", False),
        ("sicapv2", "SMITH", False),
        ("slides", "TCGA-EJ-A46H", True),
        ("slides", "TCGA-EJ-A46H-01Z-00-DX1", True),
        ("pairs", "TCGA-02-0001-01C-01-TS1", True),
        ("tiles", "TCGA-EJ-A46H-01Z-00-DX1.0aa1b2c3-0011-2233-4455-66778899aabb", True),
        ("slides", "TCGA-EJ-A46H-SMITH", False),
        ("slides", "TCGA-EJ-A46H-01Z-00-DX1-SMITH", False),
        ("medmnist", "train", True),
        ("slides", "train", False),
        ("a data set that nobody knows", "train", False),
    ],
)
def test_only_public_ids_are_kept(tmp_path: Path, dataset: str, name: str, kept: bool) -> None:
    found = ids(deidentified(slides(name, dataset=dataset), tmp_path / "key", tmp_path / "names.csv"))
    assert (found == [name]) is kept
    assert kept or (len(found[0]) == 16 and set(found[0]) <= set("0123456789abcdef"))
    # A key is made, and a name listed, only where it is needed.
    assert (tmp_path / "key").exists() is (tmp_path / "names.csv").exists() is not kept


def test_ids_depend_on_key_and_name_alone(tmp_path: Path) -> None:
    key, names = tmp_path / "key", tmp_path / "names.csv"
    first = deidentified(slides("a", "b", "c"), key, names)
    assert ids(first) == sorted(ids(first))
    assert len({*ids(first), "a", "b", "c"}) == 6
    elsewhere = deidentified(slides("c", "a", folder=Path("/moved")), key, tmp_path / "others.csv")
    assert set(ids(elsewhere)) < set(ids(first))
    by_name = {source.images[0].stem: source.slide_id for source in first.sources}
    assert by_name["a"] == hashed_id(bytes.fromhex(key.read_text()), "a")
    assert not set(ids(first)) & set(ids(deidentified(slides("a", "b", "c"), tmp_path / "other-key", names)))


def test_everything_but_the_id_stays(tmp_path: Path) -> None:
    source = Source("x 1", (Path("/s/x 1.tiff"),), Path("/m/x 1.png"), "radboud", 3, "4+3", split="train")
    (found,) = deidentified(Dataset("slides", (source,), ("a", "b")), tmp_path / "key", tmp_path / "n.csv").sources
    assert replace(found, slide_id=source.slide_id) == source


def test_key_and_list_are_for_the_owner_only(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        found = deidentified(slides("SMITH, JOHN"), tmp_path / "keys/key", tmp_path / "names.csv")
    finally:
        os.umask(umask)
    assert mode(tmp_path / "keys/key") == mode(tmp_path / "names.csv") == 0o600
    assert len(bytes.fromhex((tmp_path / "keys/key").read_text())) == 32
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["key", "keys", "names.csv"]
    with (tmp_path / "names.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    path = str(FOLDER_OF_CASES / "SMITH, JOHN.svs")
    assert rows == [{"slide_id": ids(found)[0], "name": "SMITH, JOHN.svs", "path": path}]


def test_list_grows_and_follows_a_folder_that_moves(tmp_path: Path) -> None:
    key, names = tmp_path / "key", tmp_path / "names.csv"
    deidentified(slides("a", "b"), key, names)
    deidentified(slides("b", "c", folder=Path("/moved")), key, names)
    before = names.stat().st_mtime_ns
    deidentified(slides("c", folder=Path("/moved")), key, names)
    assert names.stat().st_mtime_ns == before  # nothing new: a hundred tasks need not write it again
    with names.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["path"] for row in rows) == [str(FOLDER_OF_CASES / "a.svs"), "/moved/b.svs", "/moved/c.svs"]
    assert [row["slide_id"] for row in rows] == sorted(row["slide_id"] for row in rows)


def test_a_name_that_is_no_unicode_is_listed(tmp_path: Path) -> None:
    odd = Path(os.fsdecode(b"/hospital/M\xfcller.svs"))
    deidentified(Dataset("slides", (Source("M_ller", (odd,)),)), tmp_path / "key", tmp_path / "names.csv")
    assert b"/hospital/M\xfcller.svs" in (tmp_path / "names.csv").read_bytes()
    deidentified(slides("b"), tmp_path / "key", tmp_path / "names.csv")
    assert b"/hospital/M\xfcller.svs" in (tmp_path / "names.csv").read_bytes()


def _race(folder: Path, worker: int) -> list[str]:
    """One array task: the same first slide as all others, and one of its own, for 15 stores in turn."""
    found = []
    for number in range(15):
        data = slides("same", f"own {worker}")
        done = deidentified(data, folder / f"{number}.key", folder / f"{number}.csv")
        found += [source.slide_id for source in done.sources if source.images[0].stem == "same"]
    return found


def test_processes_agree_on_one_key_and_lose_no_name(tmp_path: Path) -> None:
    workers = 4
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(_race, [tmp_path] * workers, range(workers)))
    assert all(other == found[0] for other in found)
    assert len(set(found[0])) == 15
    for number in range(15):
        assert (tmp_path / f"{number}.csv").read_text().count("\n") == 1 + 1 + workers
    assert len(list(tmp_path.iterdir())) == 2 * 15


@pytest.mark.parametrize("lost", [True, False])
def test_another_key_than_the_stores_is_refused(tmp_path: Path, lost: bool) -> None:
    key, names = tmp_path / "key", tmp_path / "names.csv"
    assert key_fingerprint(key) is None
    deidentified(slides("a"), key, names)
    made_with = key_fingerprint(key)
    assert made_with is not None
    assert made_with not in key.read_text()
    assert ids(deidentified(slides("a"), key, names, made_with)) == ids(deidentified(slides("a"), key, names))
    key.unlink()
    names.unlink()
    if not lost:
        deidentified(slides("b"), key, names)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UsageError, match="is missing" if lost else f"not the key that .* {made_with}"):
        deidentified(slides("a"), key, names, made_with)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    public = "TCGA-EJ-A46H"
    assert ids(deidentified(slides(public), key, names, made_with)) == [public]  # needs no key


@pytest.mark.parametrize("text", ["", "password\n", "0" * 63 + "\n", "0" * 64, "é" * 64])
def test_what_is_no_key_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "key").write_text(text)
    with pytest.raises(UsageError, match=r"key"):
        deidentified(slides("a"), tmp_path / "key", tmp_path / "names.csv")
    assert (tmp_path / "key").read_text() == text


@pytest.mark.parametrize("text", ["id,name\n", "slide_id,name,path\na,b\n", "slide_id,name,path\na,b,c,d\n", ""])
def test_what_is_no_list_is_refused_and_left(tmp_path: Path, text: str) -> None:
    (tmp_path / "names.csv").write_text(text)
    with pytest.raises(UsageError, match="is no list of slide ids"):
        deidentified(slides("a"), tmp_path / "key", tmp_path / "names.csv")
    assert (tmp_path / "names.csv").read_text() == text


def test_private_files_lie_beside_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "a/store"
    assert private_files(store, None) == (tmp_path / "a/store.id-key", tmp_path / "a/store.ids.csv")
    assert private_files(store, tmp_path / "key") == (tmp_path / "key", tmp_path / "a/store.ids.csv")
    store.mkdir(parents=True)
    monkeypatch.chdir(store)
    assert private_files(Path(), None) == private_files(store, None)
    for inside in (store / "key", Path("key"), tmp_path / "a/../a/store/slides/key"):
        with pytest.raises(UsageError, match="inside the store"):
            private_files(store, inside)


SOURCE = Source(
    "0123456789abcdef",
    (FOLDER_OF_CASES / "S24-00123 A&B.svs",),
    mask=Path("/masks/ANNE/S24-00123 A&B_mask.tiff"),
)


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (f"{SOURCE.images[0]}: file is cut", "0123456789abcdef: file is cut"),
        (f"{SOURCE.mask}: file is cut", "0123456789abcdef: file is cut"),
        ("cannot open 'SMITH^JOHN_1960/2024/S24-00123 A&B.svs'", "cannot open '0123456789abcdef'"),
        ("no such file: s24-00123 a&b.SVS", "no such file: 0123456789abcdef"),
        ("id S24-00123_A_B", "id 0123456789abcdef"),
        ("S24-00123 A&Blabel", "0123456789abcdeflabel"),
        (f"file://{quote(str(SOURCE.images[0]))}", "file://0123456789abcdef"),
        (quote(str(SOURCE.images[0]), safe=""), "0123456789abcdef"),
        (f"{FOLDER_OF_CASES}/Slidedat.ini: no such file", f"{FOLDER}/Slidedat.ini: no such file"),
        ("/elsewhere/SMITH^JOHN_1960/x", f"/elsewhere/{FOLDER}/x"),
        ("line\\nANNE", f"line\\n{FOLDER}"),  # behind the n of an escaped line end
        ("level 2024 of hospital", f"level {FOLDER} of hospital"),
        ("byte 12024 of 20245", "byte 12024 of 20245"),
        ("segment 7 of level 0 is damaged", "segment 7 of level 0 is damaged"),
    ],
)
def test_messages_name_the_slide_id_only(said: str, shown: str) -> None:
    assert public_text(said, SOURCE) == shown


@pytest.mark.parametrize("name", ["slide", "a", "12", "level", "x"])
def test_words_of_a_message_stay(name: str) -> None:
    source = Source("0123456789abcdef", (Path(f"/data/Slides/{name}.svs"),))
    said = "level 12: a slide of 12 x 12 px has no data"
    assert public_text(said, source) == said
    found = public_text(f"{said} ('{name}', /mnt/{name}/Slidedat.ini, /data/Slides/{name}.svs)", source)
    assert found == f"{said} ('{source.slide_id}', /mnt/{source.slide_id}/Slidedat.ini, {source.slide_id})"


def test_an_image_is_told_by_its_number() -> None:
    images = tuple(Path(f"/tiles/G3/S24-7_{number}.png") for number in range(12))
    source = Source("0123456789abcdef", images, image_labels=(0,) * 12)
    said = "; ".join(f"{images[number]}: damaged" for number in (3, 11, 0))
    assert public_text(said, source) == "; ".join(f"0123456789abcdef#{n}: damaged" for n in (3, 11, 0))


def test_a_relative_path_is_hidden_as_it_was_given_and_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "KOWALSKI-55").mkdir()
    monkeypatch.chdir(tmp_path / "KOWALSKI-55")
    source = Source("0123456789abcdef", (Path("x.svs"),))
    assert public_text("x.svs: cut", source) == "0123456789abcdef: cut"
    assert public_text(f"{tmp_path}/KOWALSKI-55/x.svs", source) == "0123456789abcdef"
    assert "KOWALSKI" not in public_text(f"{tmp_path}/KOWALSKI-55/work", source)


def _said(path: Path) -> list[str]:
    """How a message may name a path."""
    whole = str(path)
    return [
        *(whole, f"{path!r}", path.name, path.stem, safe_id(path.stem), path.stem.upper(), path.name.lower()),
        *(ascii(whole), repr(os.fsencode(path)), json.dumps(whole), quote(whole), quote(whole, safe="")),
        *(unicodedata.normalize("NFD", whole), " ".join(whole.split()), path.relative_to("/cases").as_posix()),
    ]


@given(
    st.text(NAMES, min_size=4, max_size=20).map(lambda text: f"{text.strip()}7-".replace("/", "_")),
    st.text(NAMES, min_size=4, max_size=20).map(lambda text: f"{text.strip()}_8".replace("/", "_")),
    st.sampled_from([".svs", ".ome.tiff", ".TIFF"]),
    st.integers(0, 14),
    st.sampled_from(["", "\\n", "not a slide: ", "OSError(2, '", "x"]),
)
def test_no_spelling_of_a_name_gets_through(folder: str, stem: str, suffix: str, form: int, before: str) -> None:
    path = Path("/cases") / folder / f"{stem}{suffix}"
    source = Source("+", (path,))
    said = _said(path)[form]
    shown = public_text(f"{before}{said}: damaged", source)
    assert shown.endswith(": damaged")
    for private in {folder, stem, stem.upper(), safe_id(stem), ascii(stem)[1:-1], quote(stem), quote(folder, safe="")}:
        assert private.lower() not in shown.lower()


def test_remarks_hide_names_but_not_the_layout(tmp_path: Path) -> None:
    folder = tmp_path / "WARD-3/train_images"
    public = "30b5ee6b12c39a6b22f0ed0875e0452d"
    remarks = (
        "2 slides of 3 in train.csv",
        "1 listed slides are not in train_images",
        f"{folder / 'SMITH.tiff'} and WARD-3/x have no mask",
        f"{public} has",
    )
    sources = tuple(Source(name, (folder / f"{name}.tiff",)) for name in (public, "SMITH"))
    found = deidentified(Dataset("panda", sources, remarks=remarks), tmp_path / "key", tmp_path / "names.csv")
    (hidden,) = set(ids(found)) - {public}
    assert found.remarks == (*remarks[:2], f"{hidden} and {FOLDER}/x have no mask", remarks[3])
