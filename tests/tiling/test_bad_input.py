"""What `bony tile` says to a user's mistake: one line, the right exit code, and nothing written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from pipeline.cli import main

Files = Callable[[Path], dict[str, str]]
Said = pytest.CaptureFixture[str]


@pytest.fixture
def complaint(capfd: Said) -> Callable[..., str]:
    """Runs `bony tile`, checks the exit code and that its last words are one line; returns them."""

    def run(exit_code: int, *words: str | Path) -> str:
        assert main(["tile", *map(str, words), "--no-deidentify"]) == exit_code
        lines = capfd.readouterr().err.splitlines()
        assert [line for line in lines if line.startswith("bony: error: ")] == lines[-1:]
        assert not [line for line in lines if "Traceback" in line]
        return lines[-1].removeprefix("bony: error: ")

    return run


@pytest.fixture
def slide(cohort: Path) -> Path:
    return sorted((cohort / "train_images").iterdir())[0]


@pytest.fixture
def photo(tmp_path: Path, slide: Path) -> Path:
    """A JPEG, which says nothing of its scale."""
    with tifffile.TiffFile(slide) as tiff:
        Image.fromarray(tiff.pages[0].asarray()).save(tmp_path / "photo.jpeg", quality=90)
    return tmp_path / "photo.jpeg"


def test_no_slide(tmp_path: Path, complaint: Callable[..., str]) -> None:
    out = tmp_path / "store"
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    assert "notes.txt: not a slide: its name ends in '.txt'" in complaint(2, tmp_path / "notes.txt", "--out", out)
    assert "empty: folder holds no slides; slides end in" in complaint(2, tmp_path / "empty", "--out", out)
    assert "gone.svs: no such file or folder" in complaint(2, tmp_path / "gone.svs", "--out", out)
    assert "no slides given; name slide files or folders" in complaint(2, "--out", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--mpp", "nonsense"], "--mpp is 'nonsense', must be a number or native"),
        (["--mpp", "0"], "mpp is 0.0, must lie in 0.05 to 10.0 um/px"),
        (["--mpp", "-0.5"], "mpp is -0.5, must lie in 0.05 to 10.0 um/px"),
        (["--mpp", "nan"], "mpp is nan, must lie in 0.05 to 10.0 um/px"),
        (["--mpp", "inf"], "mpp is inf, must lie in"),
        (["--mpp-tolerance", "2"], "mpp_tolerance is 2.0, must lie in 0 to 1"),
        (["--mpp-tolerance", "some"], "argument --mpp-tolerance: invalid float value: 'some'; see `bony tile --help`"),
        (["--slide-mpp", "50"], "slide_mpp is 50.0, must lie in 0.05 to 10.0 um/px"),
        (["--workers", "0"], "--workers is 0, must be at least 1"),
        (["--workers", "-3"], "--workers is -3, must be at least 1"),
        (["--workers", "two"], "argument --workers: invalid int value: 'two'"),
        (["--codec", "webp"], "argument --codec: invalid choice: 'webp'"),
        (["--tile-px", "4"], "tile_px is 4, must lie in 16 to 4096"),
        (["--min-tissue", "1.5"], "min_tissue is 1.5, must lie in 0 to 1"),
        (["--min-label-share", "-1"], "min_label_share is -1.0, must lie in 0 to 1"),
        (["--dataset", "nothing"], "argument --dataset: invalid choice: 'nothing'"),
        (["--dataset", "panda"], "--dataset panda needs --root PATH"),
        (["--unknown"], "unrecognized arguments: --unknown; see `bony tile --help`"),
        (["--work", "2"], "unrecognized arguments: --work"),
    ],
)
def test_wrong_options(words: list[str], text: str, slide: Path, tmp_path: Path, complaint: Callable[..., str]) -> None:
    assert text in complaint(2, slide, "--out", tmp_path / "store", *words)
    assert list(tmp_path.iterdir()) == []


def test_no_out(slide: Path, complaint: Callable[..., str]) -> None:
    assert complaint(2, slide) == "the following arguments are required: --out; see `bony tile --help`"


def test_out_that_is_something_else(slide: Path, tmp_path: Path, complaint: Callable[..., str]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("more work")
    for name in ("folder", "file"):
        assert complaint(1, slide, "--out", tmp_path / name) == (
            f"{tmp_path / name}: exists and is no tile store; choose another --out"
        )
    assert (tmp_path / "folder" / "thesis.tex").read_text() == "years of work"
    assert (tmp_path / "file").read_text() == "more work"


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        (
            "format_version",
            99,
            "tile store has format version 99, this software reads 2; make it again, or use the version",
        ),
        ("format", "something", "tile store has format version unknown, this software reads 2"),
        ("settings", {}, "cannot be read (KeyError: 'thresholds')"),
        ("settings", None, "cannot be read (TypeError: "),
    ],
)
def test_store_of_another_format(
    key: str, value: object, text: str, slide: Path, own_store: Path, complaint: Callable[..., str], files: Files
) -> None:
    description = json.loads((own_store / "store.json").read_text())
    (own_store / "store.json").write_text(json.dumps(description | {key: value}))
    content = files(own_store)
    assert complaint(1, slide, "--out", own_store).startswith(f"{own_store / 'store.json'}: {text}")
    assert files(own_store) == content


def test_other_settings(cohort: Path, own_store: Path, complaint: Callable[..., str], files: Files) -> None:
    content = files(own_store)
    words = ["--dataset", "panda", "--root", cohort, "--out", own_store]
    assert "store was made with codec = jpeg, not zstd; use the same" in complaint(1, *words, "--codec", "zstd")
    assert "store was made with min_edges = 0.03, not 0.5" in complaint(1, *words, "--min-edges", "0.5")
    assert files(own_store) == content


def test_missing_scale(photo: Path, tmp_path: Path, complaint: Callable[..., str]) -> None:
    text = complaint(1, photo, "--out", tmp_path / "store")
    assert "photo: the file does not say its scale (um per pixel); give it with --slide-mpp" in text
    assert not (tmp_path / "store").exists()
    assert main(["tile", str(photo), "--out", str(tmp_path / "store"), "--slide-mpp", "0.5", "--no-deidentify"]) == 0


def test_scale_that_is_too_coarse(photo: Path, tmp_path: Path, complaint: Callable[..., str]) -> None:
    text = complaint(1, photo, "--out", tmp_path / "store", "--slide-mpp", "1.0")
    assert "finest level has 1 um/px, coarser than the 0.5 um/px asked for" in text
    assert "choose a coarser --mpp or --mpp native" in text
    assert not (tmp_path / "store").exists()


def test_scale_that_is_absurd(tmp_path: Path, complaint: Callable[..., str]) -> None:
    path = tmp_path / "absurd.tiff"
    pixels = np.zeros((512, 512, 3), np.uint8)
    tifffile.imwrite(path, pixels, photometric="rgb", tile=(256, 256), resolution=(72, 72), resolutionunit="INCH")
    text = complaint(1, path, "--out", tmp_path / "store")
    assert "its header says 352.8 x 352.8 um/px, 0.05 to 10 is believed; give the true scale with --slide-mpp" in text
    tifffile.imwrite(path, pixels, photometric="rgb", tile=(256, 256), resolution=(2e4, 4e4), resolutionunit=3)
    assert "pixels are not square: 0.5 x 0.25 um" in complaint(1, path, "--out", tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("alone", [True, False])
def test_mask_that_does_not_fit(
    alone: bool, own_cohort: Path, tmp_path: Path, complaint: Callable[..., str], capfd: Said
) -> None:
    mask = sorted((own_cohort / "train_label_masks").iterdir())[0]
    slide_id = mask.stem.removesuffix("_mask")
    tifffile.imwrite(mask, np.zeros((1000, 1536), np.uint8), tile=(512, 512))
    text = (
        "mask is 1536 x 1000 px, its slide 1536 x 1024 px; masks must have the slide's level-0 size, "
        "or a whole fraction of it"
    )
    words = ["--dataset", "panda", "--root", own_cohort, "--out", tmp_path / "store"]
    if alone:
        assert text in complaint(1, own_cohort / "train_images" / f"{slide_id}.tiff", *words)
        assert not (tmp_path / "store").exists()
        return
    assert main(["tile", *map(str, words)]) == 3
    assert f"{slide_id}: {text}" in capfd.readouterr().err.splitlines()
    assert not (tmp_path / "store" / "slides" / slide_id).exists()
    assert not (tmp_path / "store" / "work").exists()


def test_mask_of_the_other_provider(own_cohort: Path, tmp_path: Path, complaint: Callable[..., str]) -> None:
    text = (own_cohort / "train.csv").read_text()
    (own_cohort / "train.csv").write_text(text.replace(",radboud,", ",karolinska,"))
    slide = sorted(own_cohort.glob("train_images/*"))[0]
    slide_id = next(line.split(",")[0] for line in text.splitlines() if ",radboud," in line)
    slide = own_cohort / "train_images" / f"{slide_id}.tiff"
    said = complaint(1, slide, "--dataset", "panda", "--root", own_cohort, "--out", tmp_path / "store")
    assert "known are 0 to 2 (background, benign, cancer); check data_provider in train.csv" in said
    assert not (tmp_path / "store").exists()


def test_slide_that_the_list_does_not_name(
    own_cohort: Path, tmp_path: Path, slide: Path, complaint: Callable[..., str]
) -> None:
    stranger = shutil.copyfile(slide, own_cohort / "stranger.tiff")
    text = complaint(2, stranger, "--dataset", "panda", "--root", own_cohort, "--out", tmp_path / "store")
    assert text == f"{own_cohort}: 1 of the given slides are not in train.csv"
    assert not (tmp_path / "store").exists()


def test_command_that_is_not_there(capsys: Said) -> None:
    assert main(["tyle"]) == 2
    assert capsys.readouterr().err.startswith("bony: error: no command 'tyle'; known are ")
    assert main([]) == 2
    assert capsys.readouterr().out.startswith("usage: bony COMMAND")


def test_index_of_no_store(tmp_path: Path, capsys: Said) -> None:
    assert main(["index", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        f"bony: error: {tmp_path}: not a tile store: it has no store.json; make one with `bony tile`\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_help_needs_nothing(capsys: Said) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["tile", "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    for option in ("--out", "--mpp", "--slide-mpp", "--workers", "--codec", "--dataset"):
        assert option in out
