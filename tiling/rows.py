"""rows.parquet: one row per candidate of a slide, and the slide's facts in the table's metadata."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tiling.cut import Candidate
from tiling.filters import METRICS
from tiling.index import COVERAGE, METADATA_KEY

_PLACE = {
    "image": pa.int32(), "x": pa.int64(), "y": pa.int64(), "tissue_fraction": pa.float32(), "label": pa.int16(),
}  # fmt: skip
_UNSEEN = np.full(len(METRICS), np.nan, np.float32)


class Rows:
    """The rows of one slide's candidates, as they come.

    Attributes:
        reasons: What became of each; "" for kept ones.
    """

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self._places: list[tuple[int, int, int, float, int]] = []
        self._metrics: list[np.ndarray] = []
        self._coverage: list[tuple[float, ...]] = []

    def add(self, candidate: Candidate) -> None:
        """Take a candidate's row; its pixels are not kept."""
        self.reasons.append(candidate.reason)
        self._places.append((candidate.image, candidate.x, candidate.y, candidate.tissue_fraction, candidate.label))
        self._metrics.append(_UNSEEN if candidate.metrics is None else candidate.metrics)
        self._coverage.append(candidate.coverage)

    def table(self, split: str | None, coverage_names: tuple[str, ...], facts: dict[str, Any]) -> pa.Table:
        """All of them as a table.

        Args:
            split: The slide's official part.
            coverage_names: Names of the mask's values; empty without a mask.
            facts: Slide-level facts, stored in the table's metadata.
        """
        places = zip(*self._places, strict=True) if self._places else [()] * len(_PLACE)
        columns = {name: pa.array(values, kind) for (name, kind), values in zip(_PLACE.items(), places, strict=True)}
        columns["reason"] = pa.array(self.reasons, pa.string())
        columns["kept"] = pc.equal(columns["reason"], "")
        columns["split"] = pa.repeat(pa.scalar(split, pa.string()), len(self.reasons))
        metrics = np.array(self._metrics, np.float32).reshape(-1, len(METRICS))
        for name, values in zip(METRICS, metrics.T, strict=True):
            columns[name] = pa.array(values, mask=np.isnan(values))
        for position, name in enumerate(coverage_names):
            shares = [shares[position] if shares else None for shares in self._coverage]
            columns[f"{COVERAGE}{name}"] = pa.array(shares, pa.float32())
        return pa.table(columns).replace_schema_metadata({METADATA_KEY: json.dumps(facts, sort_keys=True).encode()})
