"""Ways to tile one slide, each measured the same way: tiles, and the CPU seconds of this process, all its threads.

All but Bony get the places of the candidates for nothing: Bony's, which the tissue mask left.
"""

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import imagecodecs
import numpy as np
import openslide
import pyarrow.parquet as pq
import tifffile
import zarr
from PIL import Image
from zarr.codecs import ZstdCodec

from tiling import codec, filters
from tiling.datasets import Source
from tiling.settings import TileSettings
from tiling.slide import open_slide
from tiling.store import Description, prepare
from tiling.write import Job, write_source

PEERS = Path(__file__).with_name("peers")
SHARD = 1024
PEER_QUALITY = 95


@dataclass(frozen=True)
class Result:
    """Tiles made, and the CPU seconds it took."""

    tiles: int
    cpu_s: float

    @property
    def rate(self) -> float:
        """Tiles per CPU-second."""
        return self.tiles / self.cpu_s


@dataclass(frozen=True)
class Case:
    """One slide to tile.

    Args:
        name: For the reader.
        source: The slide; its mask, if it is to be used.
        class_names: Of the data set.
        work: Folder for what the contenders write; every one leaves it as it was.
    """

    name: str
    source: Source
    class_names: tuple[str, ...]
    work: Path
    settings: TileSettings = field(default_factory=TileSettings)

    @property
    def path(self) -> Path:
        """The slide file."""
        return self.source.images[0]

    @cached_property
    def stored(self) -> Path:
        """The slide's folder in a store that Bony wrote, kept for what is measured on it."""
        store = self.work / f"bony-kept {self.name}"
        _fresh_store(self, store)
        write_source(Job(store, self.settings, self.class_names), self.source)
        return store / "slides" / self.source.slide_id

    @cached_property
    def candidates(self) -> np.ndarray:
        """Corners of the candidates that were decoded, level-0 pixels, int64 (N, 2), in row order."""
        rows = pq.read_table(self.stored / "rows.parquet", columns=["x", "y", "empty"])
        corners = np.stack([rows["x"], rows["y"]], axis=1).astype(np.int64)
        return np.asarray(corners[~np.array(rows["empty"].is_null())])

    @cached_property
    def kept(self) -> np.ndarray:
        """Corners of the kept tiles, level-0 pixels, int64 (N, 2), in row order."""
        rows = pq.read_table(self.stored / "rows.parquet", columns=["x", "y", "kept"])
        return np.asarray(np.stack([rows["x"], rows["y"]], axis=1).astype(np.int64)[np.array(rows["kept"])])

    @cached_property
    def page(self) -> tifffile.TiffPage:
        """Level 0 of the slide, which must be JPEG."""
        page = tifffile.TiffFile(self.path).pages.first
        assert page.is_tiled, "the limits are defined for tiles"
        assert page.compression == tifffile.COMPRESSION.JPEG, "the limits are defined for JPEG"
        return page

    def segments(self, corners: np.ndarray) -> dict[tuple[int, int], bytes]:
        """Compressed bytes of level 0's segments under some tiles, by (row, column)."""
        page, last = self.page, self.settings.tile_px - 1
        columns = -(-page.imagewidth // page.tilewidth)
        touched = {
            (int(row), int(column))
            for x, y in corners
            for row in {y // page.tilelength, (y + last) // page.tilelength}
            for column in {x // page.tilewidth, (x + last) // page.tilewidth}
        }
        with self.path.open("rb") as file:
            found = {}
            for row, column in sorted(touched):
                number = row * columns + column
                file.seek(page.dataoffsets[number])
                found[row, column] = file.read(page.databytecounts[number])
        return found


MEASURED_AT_ONCE = 24
Contender = Callable[[Case], Result]


def _fresh_store(case: Case, store: Path) -> None:
    shutil.rmtree(store, ignore_errors=True)
    prepare(store, Description(case.settings, "benchmark", case.class_names))


def bony(case: Case) -> Result:
    """``tiling.write.write_source``: open, mask, decode, filter, encode, write, checksum, fsync, rename, pictures."""
    store = case.work / "bony"
    _fresh_store(case, store)
    start = time.process_time()
    outcome = write_source(Job(store, case.settings, case.class_names), case.source)
    used = time.process_time() - start
    shutil.rmtree(store)
    return Result(outcome.kept, used)


def _read_and_filter(case: Case, keep: Callable[[np.ndarray], None]) -> int:
    """Read every candidate with OpenSlide, filter it as Bony does, pass on what is kept."""
    px, limits, kept = case.settings.tile_px, case.settings.thresholds, 0
    assert limits is not None
    with openslide.OpenSlide(case.path) as slide:
        for first in range(0, len(case.candidates), MEASURED_AT_ONCE):
            corners = case.candidates[first : first + MEASURED_AT_ONCE].tolist()
            tiles = [np.asarray(slide.read_region((x, y), 0, (px, px)).convert("RGB")) for x, y in corners]
            verdicts = filters.verdicts(filters.measure(np.stack(tiles)), limits)
            for tile, reason in zip(tiles, verdicts, strict=True):
                if not reason:
                    keep(tile)
                    kept += 1
    return kept


def openslide_zarr(case: Case) -> Result:
    """OpenSlide per tile, zarr-python: sharded as Bony's, zstd, a shard written whole."""
    out, px = case.work / "openslide.zarr", case.settings.tile_px
    shutil.rmtree(out, ignore_errors=True)
    start = time.process_time()
    array = zarr.create_array(
        out,
        shape=(len(case.candidates), px, px, 3),
        chunks=(1, px, px, 3),
        shards=(SHARD, px, px, 3),
        dtype="uint8",
        compressors=ZstdCodec(level=codec.ZSTD_LEVEL),
    )
    held: list[np.ndarray] = []
    written = 0

    def flush() -> None:
        nonlocal written
        if held:
            array[written : written + len(held)] = np.stack(held)
            written += len(held)
            held.clear()

    def keep(tile: np.ndarray) -> None:
        held.append(tile)
        if len(held) == SHARD:
            flush()

    kept = _read_and_filter(case, keep)
    flush()
    array.resize((kept, px, px, 3))
    used = time.process_time() - start
    shutil.rmtree(out)
    return Result(kept, used)


def openslide_jpeg(case: Case) -> Result:
    """OpenSlide per tile, Pillow, one JPEG file of quality 95 per tile."""
    out = case.work / "openslide-jpeg"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    start = time.process_time()
    names = iter(range(len(case.candidates)))
    kept = _read_and_filter(
        case, lambda tile: Image.fromarray(tile).save(out / f"{next(names):06}.jpg", quality=PEER_QUALITY)
    )
    used = time.process_time() - start
    shutil.rmtree(out)
    return Result(kept, used)


def _decode(case: Case, data: bytes) -> np.ndarray:
    page = case.page
    space = "RGB" if page.photometric == tifffile.PHOTOMETRIC.RGB else None
    return np.asarray(imagecodecs.jpeg8_decode(data, tables=page.jpegtables, colorspace=space, outcolorspace="RGB"))


def decode_once(case: Case) -> Result:
    """The ceiling: every segment under a kept tile decoded once, from memory, and forgotten; nothing else."""
    raw = case.segments(case.kept)
    start = time.process_time()
    for data in raw.values():
        _decode(case, data)  # the next one takes the same memory: fresh pages would cost half as much again
    return Result(len(case.kept), time.process_time() - start)


def decode_and_encode(case: Case) -> Result:
    """The floor of the time: the ceiling's work, and every kept tile, in memory, encoded with Bony's settings."""
    used = decode_once(case).cpu_s
    decoded = {place: _decode(case, data) for place, data in case.segments(case.kept).items()}
    tiles = [_cut_from(case, decoded, corner) for corner in case.kept]
    with open_slide(case.path) as slide:
        jpeg = slide.jpeg(0)
    start = time.process_time()
    for tile in tiles:
        codec.encode(tile, "jpeg", jpeg)
    return Result(len(tiles), used + time.process_time() - start)


def _cut_from(case: Case, decoded: dict[tuple[int, int], np.ndarray], corner: np.ndarray) -> np.ndarray:
    """One tile's pixels, (px, px, 3), out of decoded segments."""
    px, (height, width) = case.settings.tile_px, (case.page.tilelength, case.page.tilewidth)
    x, y = (int(value) for value in corner)
    rows = range(y // height, (y + px - 1) // height + 1)
    columns = range(x // width, (x + px - 1) // width + 1)
    joined = np.concatenate([np.concatenate([decoded[row, column] for column in columns], axis=1) for row in rows])
    top, left = y - rows[0] * height, x - columns[0] * width
    return np.ascontiguousarray(joined[top : top + px, left : left + px])


def in_own_environment(name: str, peers_dir: Path) -> Contender:
    """A peer whose script runs in ``peers_dir/NAME``; it measures itself, its imports left out."""

    def run(case: Case) -> Result:
        """The peer's own figures."""
        out = case.work / name
        shutil.rmtree(out, ignore_errors=True)
        command = [peers_dir / name / "bin" / "python", PEERS / f"{name}_tiles.py", case.path, out]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        shutil.rmtree(out, ignore_errors=True)
        if done.returncode:
            raise RuntimeError(f"{name} failed: {done.stderr.strip().splitlines()[-1]}")
        said = json.loads(done.stdout.strip().splitlines()[-1])
        return Result(said["tiles"], said["cpu_s"])

    return run
