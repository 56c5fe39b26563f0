"""Batches of tiles, from a folder and from URLs: the same pixels, and damage named in the same words."""

import io
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import imagecodecs.zarr
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from tiling import byte_ranges, shard
from tiling.errors import DamageError, StoreError
from tiling.store import TileStore


@pytest.fixture(scope="module")
def pixels(cohort_store: Path) -> np.ndarray:
    """All tiles, each read on its own."""
    with TileStore(cohort_store) as store:
        return np.concatenate([store.read(np.array([row])) for row in range(len(store))])


@settings(max_examples=25)
@given(data=st.data(), threads=st.sampled_from([1, 2, 5]), at_once=st.sampled_from([1, 50_000, 1 << 20]))
def test_any_batch_in_any_order(
    cohort_store: Path, pixels: np.ndarray, data: st.DataObject, threads: int, at_once: int
) -> None:
    rows = data.draw(st.lists(st.integers(0, len(pixels) - 1), max_size=40))
    with pytest.MonkeyPatch.context() as patch, TileStore(cohort_store, threads) as store:
        patch.setattr(shard, "_MOST_AT_ONCE", at_once)
        assert np.array_equal(store.read(np.array(rows)), pixels[np.array(rows, int)])


def test_neighbours_are_fetched_together(cohort_store: Path, pixels: np.ndarray) -> None:
    """However a batch is ordered, its tiles are read as they lie: all tiles of a slide in a read or two."""
    rows = np.random.default_rng(2).permutation(len(pixels))
    with TileStore(cohort_store) as store:
        store.read(rows)  # the shards' indexes are known from now on
        reads = []
        read = store._files.read
        store._files.read = lambda *words: reads.append(words) or read(*words)  # type: ignore[func-returns-value, method-assign]
        assert np.array_equal(store.read(rows), pixels[rows])
        slides = len(store.slide_ids)
    total = sum(length for *_, length in reads)
    assert slides <= len(reads) <= slides + total / (shard._MOST_AT_ONCE // 2)
    assert len({path for path, *_ in reads}) == slides


def test_out_is_filled(cohort_store: Path, pixels: np.ndarray) -> None:
    out = np.zeros((5, 224, 224, 3), np.uint8)
    with TileStore(cohort_store, 2) as store:
        assert store.read(np.arange(5), out) is out
        assert np.array_equal(out, pixels[:5])
        for wrong in (out[:4], out.astype(np.int16), np.zeros((5, 224, 3, 224), np.uint8).transpose(0, 1, 3, 2)):
            with pytest.raises(ValueError, match="out must be contiguous uint8 of shape"):
                store.read(np.arange(5), wrong)


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_few_files_stay_open(cohort_store: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_ranges, "_OPEN_FILES", 1)
    before = open_files()
    rows = np.random.default_rng(0).permutation(len(pixels))
    with TileStore(cohort_store, threads=4) as store:
        for _ in range(3):
            assert np.array_equal(store.read(rows), pixels[rows])
        assert open_files() <= before + 1
    assert open_files() == before


class _Ranges(SimpleHTTPRequestHandler):
    """What http.server lacks and every object store has: ranges of bytes."""

    ranges = True

    def send_head(self) -> Any:
        asked = self.headers.get("Range")
        path = Path(self.translate_path(self.path))
        if not asked or not self.ranges or not path.is_file():
            return super().send_head()
        data = path.read_bytes()
        first, last = asked.removeprefix("bytes=").split("-")
        start, end = (int(first), int(last) + 1) if first else (max(0, len(data) - int(last)), len(data))
        part = data[start:end]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(data)}")
        self.end_headers()
        return io.BytesIO(part)

    def log_message(self, *_: object) -> None:
        """Nothing."""


class _NoRanges(_Ranges):
    ranges = False


def _serve(folder: Path, handler: type[SimpleHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def own_url(request: pytest.FixtureRequest, own_store: Path) -> Iterator[str]:
    """The URL of a store that may be spoilt on disk: by file:// or from a real HTTP server."""
    if request.param == "file":
        yield f"file://{own_store}"
    else:
        yield from _serve(own_store, _Ranges)


@pytest.mark.parametrize("own_url", ["file", "http"], indirect=True)
def test_a_url_gives_the_same(own_url: str, own_store: Path, pixels: np.ndarray) -> None:
    rows = np.random.default_rng(1).permutation(len(pixels))[:20]
    with TileStore(own_url, threads=2) as far, TileStore(own_store) as near:
        assert np.array_equal(far.read(rows), pixels[rows])
        assert np.array_equal(far.read_mask(3), near.read_mask(3))
        assert far.index.equals(near.index)
        assert (far.fingerprint, far.mpp, far.tile_px) == (near.fingerprint, near.mpp, near.tile_px)
        slide = far.slide_ids[0]
        expected = far.read(far.rows_of_slide(0))
    imagecodecs.zarr.register_codecs(verbose=False)
    plain = zarr.open_array(f"{own_url}/slides/{slide}/tiles.zarr", mode="r")
    assert np.array_equal(plain[:], expected)


def test_memory_is_a_url_too(cohort_store: Path, pixels: np.ndarray) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(cohort_store), "/bucket/store", recursive=True)
    try:
        with TileStore("memory://bucket/store") as store:
            assert np.array_equal(store.read(np.arange(9)), pixels[:9])
    finally:
        memory.rm("/bucket", recursive=True)


@pytest.mark.parametrize("own_url", ["file", "http"], indirect=True)
def test_damage_behind_a_url_is_named(own_url: str, own_store: Path, pixels: np.ndarray) -> None:
    slide = sorted((own_store / "slides").iterdir())[0]
    path = slide / "tiles.zarr/c/0/0/0/0"
    sound = path.read_bytes()
    whole = f"^{own_url}: slide {slide.name}, tile "
    for data, says in (
        (bytes([sound[0] ^ 4]) + sound[1:], "0: .*bytes do not match their crc32c"),
        (sound[:-5], "0: .*shard index does not match its crc32c"),
        (sound[:9], "0: .*shard index does not match its crc32c"),
        (None, "0: .*shard is missing"),
    ):
        if data is None:
            path.unlink()
        else:
            path.write_bytes(data)
        with TileStore(own_url) as store, pytest.raises(DamageError, match=whole + says):
            store.read(np.arange(3))
    with TileStore(own_url) as store:
        other = store.rows_of_slide(1)
        assert np.array_equal(store.read(other), pixels[other])


@pytest.mark.parametrize("own_url", ["file", "http"], indirect=True)
def test_a_damaged_index_behind_a_url(own_url: str, own_store: Path) -> None:
    index = own_store / "index.parquet"
    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(StoreError, match=rf"^{own_url}/index\.parquet: sha256 differs"):
        TileStore(own_url)
    index.unlink()
    with pytest.raises(StoreError, match=f"^{own_url}: the store has no index"):
        TileStore(own_url)
    shutil.rmtree(own_store)
    with pytest.raises(StoreError, match=f"^{own_url}: not a tile store"):
        TileStore(own_url)


def test_a_server_without_ranges_is_told_so(cohort_store: Path) -> None:
    for url in _serve(cohort_store, _NoRanges):
        with TileStore(url) as store, pytest.raises(DamageError, match=r"tile 0: .*whole file instead of the range"):
            store.read(np.array([0]))


@pytest.mark.parametrize("url", ["nonsense://somewhere", "s3://bucket/store"])
def test_a_url_that_fsspec_cannot_open(url: str) -> None:
    if url.startswith("s3") and find_spec("s3fs"):
        pytest.skip("left out: s3fs is there")
    with pytest.raises(StoreError, match=f"^{url}: cannot be opened"):
        TileStore(url)
