"""The tiles of one slide through a bundle's networks into tiles.parquet, a batch at a time; never all tiles in memory.

While the networks work on one batch, one thread cuts the next.
"""

import json
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.bundle import PROBABILITIES, Bundle, outputs
from tiling.cut import Candidate
from tiling.errors import EvaluationError
from tiling.index import METADATA_KEY
from tiling.progress import Advance

# Kept candidates, with their pixels -> PROBABILITIES, or with no decoder every tap: float32 (B, D).
Score = Callable[[Sequence[Candidate]], dict[str, np.ndarray]]
_Batch = tuple[list[Candidate], list[str]]


def bundle_score(bundle: Bundle) -> Score:
    """The bundle's own networks, on their device."""
    device = _device(bundle)

    def score(candidates: Sequence[Candidate]) -> dict[str, np.ndarray]:
        pixels = [candidate.tile for candidate in candidates if candidate.tile is not None]
        found = outputs(bundle.encoder, bundle.decoder, torch.from_numpy(np.stack(pixels)).to(device))
        names = found.keys() if bundle.decoder is None else (PROBABILITIES,)
        return {name: found[name].cpu().numpy() for name in names}

    return score


def score_tiles(
    candidates: Iterable[Candidate], score: Score, batch: int, table: "TileTable", advance: Advance
) -> list[str]:
    """Scores of all kept tiles go into the table.

    Args:
        candidates: All of a slide; a thread takes them one after the other.
        score: The networks.
        batch: Tiles at a time.
        table: Where the scores go.
        advance: Told how many candidates are done.

    Returns:
        What became of each candidate: its reason, "" where it was kept.
    """
    found: list[str] = []
    with closing(_ahead(_batches(candidates, batch))) as batches:
        for kept, reasons in batches:
            if kept:
                table.write(kept, score(kept))
            found += reasons
            advance(len(reasons))
    return found


def _batches(candidates: Iterable[Candidate], size: int) -> Iterator[_Batch]:
    """Kept candidates, ``size`` at a time, each time with the reasons of all candidates that were passed."""
    kept: list[Candidate] = []
    reasons: list[str] = []
    for candidate in candidates:
        reasons.append(candidate.reason)
        if candidate.reason == "":
            kept.append(candidate)
        if len(kept) == size:
            yield kept, reasons
            kept, reasons = [], []
    yield kept, reasons


def _ahead(batches: Iterator[_Batch]) -> Generator[_Batch]:
    """The same batches, each made by a thread while the one before it is at work; closing it ends the thread."""
    with ThreadPoolExecutor(1, "decode") as pool:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch


class TileTable:
    """tiles.parquet, batch by batch. Of what was written only the probabilities stay in memory.

    Args:
        path: The file.
        bundle: Says which columns there are.
        side: Tile side in level-0 pixels.
        facts: Go into the table's metadata.
    """

    def __init__(self, path: Path, bundle: Bundle, side: int, facts: dict[str, Any]) -> None:
        self._side = side
        self._names = bundle.decoder.class_names if bundle.decoder else ()
        fields = [("x", pa.int64()), ("y", pa.int64()), ("side", pa.int32())]
        if bundle.decoder:
            fields += [("class", pa.dictionary(pa.int8(), pa.string()))]
            fields += [(f"p_{name}", pa.float32()) for name in self._names]
        else:
            fields += [(tap, pa.list_(pa.float32(), width)) for tap, width in _widths(bundle).items()]
        metadata = {METADATA_KEY: json.dumps(facts, sort_keys=True).encode()}
        self._schema = pa.schema(fields, metadata)
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")
        self._probabilities = [np.zeros((0, len(self._names)), np.float32)]

    def write(self, kept: Sequence[Candidate], scores: dict[str, np.ndarray]) -> None:
        """Write one batch of kept candidates and their scores.

        Raises:
            EvaluationError: A score is not finite.
        """
        if not all(np.isfinite(values).all() for values in scores.values()):
            raise EvaluationError("the networks give scores that are not finite", do="run `bony verify` on the bundle")
        columns: dict[str, Any] = {"x": [tile.x for tile in kept], "y": [tile.y for tile in kept]}
        columns["side"] = [self._side] * len(kept)
        if self._names:
            rows = scores[PROBABILITIES]
            best = pa.array(rows.argmax(axis=1), pa.int8())
            columns["class"] = pa.DictionaryArray.from_arrays(best, pa.array(self._names))
            columns |= {f"p_{name}": rows[:, number] for number, name in enumerate(self._names)}
            self._probabilities.append(rows)
        else:
            columns |= {
                tap: pa.FixedSizeListArray.from_arrays(rows.ravel(), rows.shape[1]) for tap, rows in scores.items()
            }
        self._writer.write_table(pa.table(columns, schema=self._schema))

    def probabilities(self) -> np.ndarray:
        """Of all tiles written, float32 (N, C)."""
        return np.concatenate(self._probabilities)

    def __enter__(self) -> "TileTable":
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()


def _device(bundle: Bundle) -> torch.device:
    return next(bundle.encoder.backbone.parameters()).device


def _widths(bundle: Bundle) -> dict[str, int]:
    """Width of each tap, found by trying one black tile."""
    px = bundle.tiling.tile_px
    found = bundle.encoder.features(torch.zeros((1, px, px, 3), dtype=torch.uint8, device=_device(bundle)))
    return {tap: int(values.shape[1]) for tap, values in found.items()}
