"""S5: planted patient data does not leave with any box or log, through the commands as real processes.

Every place where a scanner or a hospital writes who the patient is gets a word of its own; afterwards each byte of the
boxes and of what was printed is searched for each of them, packed or not.
"""

import base64
import io
import os
import re
import stat
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image, ImageDraw

from tiling import phantom
from tiling.quarantine import read_quarantine

BONY = Path(sys.executable).with_name("bony")
CONFIG = Path(__file__).parents[1] / "jobs/configs/demo.yaml"
SIZE = (1024, 1536)
GREEN = (0, 255, 0)  # of label and macro image: no tissue has it

WORDS = {
    place: f"Zq{place.capitalize()}x7"
    for place in (
        "ward", "case", "sound", "cut", "broken", "nonsense", "mirax", "dicom", "picture", "mask", "filename", "title",
        "user", "scanner", "label", "macro", "artist", "host", "software", "content",
    )
}  # fmt: skip
WORDS |= {"date": "04/23/37", "time": "05:17:43", "datetime": "1937:04:23 05:17:43"}
DESCRIPTION = (
    "Aperio Image Library v11.2.1\r\n{width}x{height} ({kind}) JPEG/RGB Q=90|AppMag = 20|MPP = 0.5"
    "|Filename = {filename}|Title = {title}|Date = {date}|Time = {time}|User = {user}|ScanScope ID = {scanner}"
)
SMALL = {
    "method.out_dim": 64, "method.hidden_dim": 32, "method.bottleneck_dim": 16, "views.local_crops": 2,
    "views.global_size": 64, "views.local_size": 32, "train.batch_per_rank": 2, "train.steps": 2,
    "train.log_every": 1, "optim.warmup_steps": 1,
}  # fmt: skip


def write_svs(path: Path, seed: int) -> None:
    """A slide as an Aperio scanner writes it, with label and macro image, every text about the patient in its place."""
    pixels = phantom.make_slide(seed, "3", "radboud", SIZE).image
    tags = [(number, 2, None, WORDS[word], True) for number, word in ((315, "artist"), (316, "host"))]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(path) as tiff:

        def write(image: np.ndarray, kind: str, **options: Any) -> None:
            text = DESCRIPTION.format(width=image.shape[1], height=image.shape[0], kind=kind, **WORDS)
            about = {"software": WORDS["software"], "datetime": WORDS["datetime"], "extratags": tags}
            tiff.write(image, photometric="rgb", description=text, metadata=None, **about, **options)

        jpeg = {"compression": "jpeg", "compressionargs": {"level": 90}, "subsampling": (2, 2), "tile": (256, 256)}
        write(pixels, "slide", **jpeg)
        write(np.ascontiguousarray(pixels[::8, ::8]), "thumbnail", rowsperstrip=16)
        write(np.ascontiguousarray(pixels[::4, ::4]), "level", **jpeg)
        for kind, subfiletype in (("label", 1), ("macro", 9)):
            picture = Image.new("RGB", (300, 200), GREEN)
            ImageDraw.Draw(picture).text((10, 10), WORDS[kind], fill=(0, 0, 0))
            image = np.array(picture)
            image.reshape(-1)[-900:] = np.resize(np.frombuffer(WORDS[kind].encode(), np.uint8), 900)
            write(image, kind, subfiletype=subfiletype, rowsperstrip=200)


def plant(root: Path) -> None:
    """A hospital's folder: two sound slides, one cut, one with a broken segment, four files that are no slides."""
    folder = root / WORDS["ward"] / WORDS["case"]
    for seed, word in enumerate(("sound", "filename", "cut", "broken")):
        write_svs(folder / f"{WORDS[word]}.svs", seed)
    cut, broken = (folder / f"{WORDS[word]}.svs" for word in ("cut", "broken"))
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    with tifffile.TiffFile(broken) as tiff:
        page = tiff.pages[0]
        # One segment, of the middle: others are as they were.
        at, size = page.dataoffsets[14], page.databytecounts[14]
    data = bytearray(broken.read_bytes())
    data[at : at + size] = os.urandom(size)
    broken.write_bytes(data)
    for word, suffix in (("nonsense", "tiff"), ("mirax", "mrxs"), ("dicom", "dcm"), ("picture", "png")):
        (folder / f"{WORDS[word]}.{suffix}").write_text(f"{WORDS['content']} is no slide\n" * 40)


def plant_masked(root: Path) -> None:
    """An own cohort in PANDA's layout, whose ids are no public ones: a sound slide and one with a mask that is none."""
    rows = ["image_id,data_provider,isup_grade,gleason_score"]
    for word in ("sound", "mask"):
        write_svs(root / "train_images" / f"{WORDS[word]}.tiff", 9)
        mask = root / "train_label_masks" / f"{WORDS[word]}_mask.tiff"
        mask.parent.mkdir(exist_ok=True)
        tags = [(315, 2, None, WORDS["artist"], True)]
        tifffile.imwrite(mask, np.ones((*SIZE, 3), np.uint8), photometric="rgb", tile=(256, 256), extratags=tags)
        rows.append(f"{WORDS[word]},radboud,1,3+3")
    mask.write_text(WORDS["content"])
    (root / "train.csv").write_text("\n".join(rows))


def views(data: bytes) -> Iterator[bytes]:
    """The bytes, and what is packed in them: base64, zstd, zlib, Parquet; over and over."""
    yield data
    if data[:4] == b"PAR1" == data[-4:]:
        table = pq.read_table(pa.BufferReader(data))
        yield f"{table.schema.metadata} {table.to_pydict()}".encode()
    for found in re.finditer(rb"base64,([A-Za-z0-9+/=]+)", data):
        yield from views(base64.b64decode(found[1]))
    for found in re.finditer(rb"\x28\xb5\x2f\xfd", data):
        try:
            yield imagecodecs.zstd_decode(data[found.start() :])
        except (imagecodecs.ZstdError, RuntimeError, ValueError):
            continue  # not the start of a frame
    for found in re.finditer(rb"\x78[\x01\x5e\x9c\xda]", data):
        try:
            yield zlib.decompressobj().decompress(data[found.start() :])
        except zlib.error:
            continue


def words_in(data: bytes) -> set[str]:
    """The planted words, by place, in any case and encoding."""
    found = set()
    for view in views(data):
        lower = view.lower()
        for place, word in WORDS.items():
            forms = (word.lower().encode(encoding) for encoding in ("utf-8", "utf-16-le", "utf-16-be"))
            if any(form in lower for form in forms):
                found.add(place)
    return found


def leaks(folder: Path) -> list[str]:
    """Every file under a folder whose bytes or name hold a planted word."""
    found = []
    for path in sorted(folder.rglob("*")):
        places = words_in(str(path.relative_to(folder)).encode())
        places |= words_in(path.read_bytes()) if path.is_file() else set()
        found += [f"{path.relative_to(folder)}: {place}" for place in sorted(places)]
    return found


def bony(log: Path, *words: object, code: int = 0) -> str:
    """One command; what it prints goes to the log as well."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    command = [str(BONY), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=log.parent, check=False)
    with log.open("a") as file:
        file.write(done.stdout + done.stderr)
    assert done.returncode == code, f"{command} gave {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hospital")
    plant(root / "plain")
    plant_masked(root / "own")
    return root


@pytest.fixture(scope="module")
def tiled(hospital: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both cohorts tiled by default; OUT/boxes is what may be given away."""
    out = tmp_path_factory.mktemp("out")
    boxes, log = out / "boxes", out / "log"
    (out / "private").mkdir()
    boxes.mkdir()
    key = ("--id-key", out / "private/key")
    bony(log, "tile", hospital / "plain", "--out", out / "store", "--workers", 2, code=3)
    own = ("tile", "--dataset", "panda", "--root", hospital / "own", "--out", boxes / "own", "--workers", 2, *key)
    bony(log, *own, code=3)
    (boxes / "own.ids.csv").rename(out / "private/own.ids.csv")
    bony(log, "index", out / "store")
    bony(log, "verify", out / "store")
    (out / "store").rename(boxes / "store")
    return out


def test_the_planted_words_would_be_found(hospital: Path, tmp_path: Path) -> None:
    """The check can fail: each word is in the slides, and is found however it is packed."""
    assert {line.rsplit(": ", 1)[1] for line in leaks(hospital)} == WORDS.keys()
    word = WORDS["user"]
    table = pa.table({"a": [f"x{word}"]}).replace_schema_metadata({"about": word.upper()})
    pq.write_table(table, tmp_path / "rows.parquet", compression="zstd")
    Image.new("RGB", (8, 8)).save(picture := io.BytesIO(), "JPEG", comment=word)
    page = f'<img src="data:image/jpeg;base64,{base64.b64encode(picture.getvalue()).decode()}">'
    (tmp_path / "page.html").write_text(page)
    (tmp_path / "wide").write_bytes(b"1" + word.lower().encode("utf-16"))
    (tmp_path / "chunk").write_bytes(b"123" + imagecodecs.zstd_encode(word.upper().encode() * 9) + b"456")
    (tmp_path / "deflated").write_bytes(b"123" + zlib.compress(word.encode() * 9))
    assert {line.split(":")[0] for line in leaks(tmp_path)} == {path.name for path in tmp_path.iterdir()}


def test_stores_and_logs_name_nobody(tiled: Path) -> None:
    assert leaks(tiled / "boxes") == []
    assert words_in((tiled / "log").read_bytes()) == set()


def test_the_faults_were_told_and_only_their_slides_lost(tiled: Path) -> None:
    names = {path: (tiled / path).read_text() for path in ("store.ids.csv", "private/own.ids.csv")}
    by_word = {
        (store, row.split(",")[1].split(".")[0]): row.split(",")[0]
        for store, text in zip(("store", "own"), names.values(), strict=True)
        for row in text.splitlines()[1:]
    }
    lines = {
        store: {line["slide_id"]: line for line in read_quarantine(tiled / "boxes" / store)}
        for store in ("store", "own")
    }
    left_out = {word for (store, word), slide_id in by_word.items() if lines[store].get(slide_id, {}).get("left_out")}
    assert left_out == {WORDS[word] for word in ("cut", "nonsense", "mirax", "dicom", "picture", "mask")}
    assert lines["store"][by_word["store", WORDS["broken"]]]["left_out"] is False
    for store, count in (("store", 3), ("own", 1)):
        folders = {path.name for path in (tiled / "boxes" / store / "slides").iterdir()}
        assert len(folders) == count
        assert folders < set(by_word.values())
    log = (tiled / "log").read_text()
    assert all(line["reason"] in log for found in lines.values() for line in found.values())


def test_key_and_names_are_private_and_outside(tiled: Path) -> None:
    for path in (tiled / "store.id-key", tiled / "store.ids.csv", tiled / "private/key", tiled / "private/own.ids.csv"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    secrets = [(tiled / name).read_text().strip() for name in ("store.id-key", "private/key")]
    assert len(set(secrets)) == 2
    everything = [path.read_bytes() for path in (tiled / "boxes").rglob("*") if path.is_file()]
    assert not any(secret.encode() in data for secret in secrets for data in everything)
    with (tiled / "store.ids.csv").open() as file:
        assert all(WORDS["ward"] in line for line in list(file)[1:])


def test_pictures_hold_tissue_only(tiled: Path) -> None:
    """Nothing of the green label and macro images, and no segment in a JPEG but those that decoding needs."""
    pictures = sorted((tiled / "boxes").rglob("*.jpg"))
    assert len(pictures) == 2 * 4
    for path in pictures:
        with Image.open(path) as picture:
            rgb = np.asarray(picture.convert("RGB")).astype(int)
            assert picture.getexif() == {}
            assert set(picture.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
        assert ((rgb[..., 1] - rgb[..., [0, 2]].max(axis=2)) > 100).sum() == 0
    shards = [path for path in (tiled / "boxes").rglob("tiles.zarr/c/**/*") if path.is_file()]
    starts = [(data, at.start()) for data in map(Path.read_bytes, shards) for at in re.finditer(rb"\xff\xd8\xff", data)]
    assert len(starts) > 20
    for data, at in starts:
        assert markers(data[at:]) <= {0xE0, 0xEE, 0xDB, 0xC0, 0xC4, 0xDD}  # JFIF, Adobe's colour, tables, frame


def markers(jpeg: bytes) -> set[int]:
    """Markers of a JPEG's header."""
    found, at = set(), 2
    while jpeg[at + 1] != 0xDA:
        found.add(jpeg[at + 1])
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return found


def test_a_folder_that_moved_is_the_same_slides(tiled: Path, hospital: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.symlink_to(hospital / "plain")
    before = sorted(path.name for path in (tiled / "boxes/store/slides").iterdir())
    log = tmp_path / "log"
    words = ("tile", moved, "--out", tiled / "boxes/store", "--id-key")
    bony(log, *words, tiled / "store.id-key", code=3)
    assert sorted(path.name for path in (tiled / "boxes/store/slides").iterdir()) == before
    (tiled / "boxes/store.ids.csv").unlink()
    assert "key" in bony(log, *words, tmp_path / "another-key", code=2)
    assert sorted(path.name for path in (tiled / "boxes/store/slides").iterdir()) == before
    assert words_in(log.read_bytes()) == set()


def test_names_are_kept_when_asked_for(hospital: Path, tmp_path: Path) -> None:
    """The other half of the check: the same words are found when nothing is hidden."""
    out = ("--out", tmp_path / "boxes/store")
    bony(tmp_path / "log", "tile", hospital / "plain", *out, "--no-deidentify", code=3)
    assert {path.name for path in tmp_path.iterdir()} == {"boxes", "log"}
    found = leaks(tmp_path / "boxes")
    for place in ("sound", "cut", "nonsense"):
        assert any(line.endswith(f": {place}") for line in found)
    assert any(line.startswith("store/index.parquet") for line in found)
    assert "cut" in words_in((tmp_path / "log").read_bytes())


@pytest.mark.slow
def test_nothing_that_is_made_of_a_store_names_anybody(tiled: Path) -> None:
    boxes, log = tiled / "boxes", tiled / "log"
    changes = [word for key, value in SMALL.items() for word in (f"--{key}", value)]
    store, run, features = ("--data", boxes / "store"), boxes / "run", boxes / "features"
    bony(log, "pretrain", "--config", CONFIG, *store, "--out", run, *changes)
    bony(log, "embed", "--encoder", run, *store, "--out", features)
    bony(log, "export", run, "--out", boxes / "bundle")
    named = [boxes / name for name in ("store", "own", "run", "features", "bundle")]
    bony(log, "report", *named, "--out", boxes / "report.html")
    bony(log, "verify", boxes / "bundle")
    assert (boxes / "report.html").stat().st_size > 50_000
    assert leaks(boxes) == []
    assert words_in(log.read_bytes()) == set()
