"""What a stored tile costs and loses: bytes beside a coefficient-exact cut, PSNR against the source's pixels."""

import json
import subprocess
import tempfile
from pathlib import Path

import imagecodecs.zarr
import numpy as np
import openslide
import zarr

from benchmarks.contenders import PEERS, Case

SAMPLE = 400


def fidelity(case: Case, peers_dir: Path) -> dict[str, float]:
    """Figures of up to SAMPLE kept tiles, evenly taken.

    Returns:
        ``stored_bytes`` per tile; ``psnr_db`` of pooled squared error against OpenSlide's pixels; where jpeglib's
        environment is there, ``exact_cut_bytes`` per tile and ``bytes_ratio``.
    """
    imagecodecs.zarr.register_codecs(verbose=False)
    chosen = np.unique(np.linspace(0, len(case.kept) - 1, SAMPLE).round().astype(int))
    array = zarr.open_array(case.stored / "tiles.zarr", mode="r")
    assert array.shape[0] == len(case.kept)
    px, error = case.settings.tile_px, 0.0
    with openslide.OpenSlide(case.path) as slide:
        for row in chosen:
            x, y = (int(value) for value in case.kept[row])
            source = np.asarray(slide.read_region((x, y), 0, (px, px)).convert("RGB"), np.int32)
            error += float(((np.asarray(array[row], np.int32) - source) ** 2).mean())
    sizes = _stored_sizes(case.stored / "tiles.zarr")[chosen]
    psnr = 10 * np.log10(255**2 / (error / len(chosen))) if error else np.inf
    found = {"stored_bytes": float(sizes.mean()), "psnr_db": float(psnr)}
    python = peers_dir / "jpeglib" / "bin" / "python"
    if python.exists():
        exact = np.mean(_exact_cut(case, case.kept[chosen], python))
        found |= {"exact_cut_bytes": float(exact), "bytes_ratio": float(sizes.mean() / exact)}
    return found


def _stored_sizes(folder: Path) -> np.ndarray:
    """Bytes of every tile, its crc32c and its place in the shard's index included, read out of the shards' indexes."""
    per_shard = json.loads((folder / "zarr.json").read_text())["chunk_grid"]["configuration"]["chunk_shape"][0]
    shards = sorted((folder / "c").iterdir(), key=lambda path: int(path.name))
    sizes = []
    for shard in shards:
        data = (shard / "0" / "0" / "0").read_bytes()
        index = np.frombuffer(data[-16 * per_shard - 4 : -4], "<u8").reshape(-1, 2)
        sizes.append(index[index[:, 0] != 2**64 - 1, 1].astype(np.int64) + 16)
    return np.concatenate(sizes)


def _exact_cut(case: Case, corners: np.ndarray, python: Path) -> list[int]:
    """Bytes of each tile as a JPEG made of the source's own coefficients."""
    page = case.page
    with tempfile.TemporaryDirectory(dir=case.work) as name:
        folder = Path(name)
        for (row, column), data in case.segments(corners).items():
            # A TIFF keeps the tables apart: a stream without its end, before a stream without its start.
            whole = page.jpegtables[:-2] + data[2:] if page.jpegtables else data
            (folder / f"{row}-{column}.jpg").write_bytes(whole)
        plan = {
            "px": case.settings.tile_px,
            "segment": [page.tilewidth, page.tilelength],
            "columns": -(-page.imagewidth // page.tilewidth),
            "rows": -(-page.imagelength // page.tilelength),
            "corners": corners.tolist(),
        }
        (folder / "cut.json").write_text(json.dumps(plan))
        command = [python, PEERS / "coefficient_cut.py", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"jpeglib failed: {done.stderr.strip().splitlines()[-1]}")
        return list(json.loads(done.stdout.strip().splitlines()[-1])["bytes"])
