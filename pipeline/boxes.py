"""The boxes on disk: how each kind says what it is, and which kind a folder is. Nothing here loads torch."""

from pathlib import Path

from tiling import atomic
from tiling.described import Format
from tiling.errors import CheckpointError, EvaluationError, FeatureError, UsageError
from tiling.store import TILE_STORE

RUN = Format("run", 3, "run.json", CheckpointError, "bony pretrain")
CHECKPOINT = Format("checkpoint", 3, "state.json", CheckpointError, "bony pretrain")
FEATURE_STORE = Format("feature store", 1, "features.json", FeatureError, "bony embed")
RESULT = Format("result", 1, "results.json", EvaluationError, "bony evaluate")
BUNDLE = Format("bundle", 2, "config.json", CheckpointError, "bony export")
PREDICTIONS = Format("predictions", 1, "predictions.json", UsageError, "bony predict")

KINDS = {
    "store": TILE_STORE,
    "run": RUN,
    "features": FEATURE_STORE,
    "result": RESULT,
    "bundle": BUNDLE,
    "predictions": PREDICTIONS,
}
PART = "part"


def is_bundle(path: Path) -> bool:
    """Whether a folder is a bundle, be it one whose SHA256SUMS or config.json is what is missing."""
    return any((path / name).exists() for name in (atomic.SUMS, BUNDLE.file))


def kind_of(path: Path) -> str:
    """Kind of the box at ``path``: a key of ``KINDS``, or ``PART`` for another sealed folder, such as a checkpoint.

    Raises:
        UsageError: It is no box that bony makes.
    """
    if is_bundle(path):
        return "bundle"
    for kind, form in KINDS.items():
        if (path / form.file).exists():
            return kind
    if (path / atomic.COMPLETE).exists():
        return PART
    raise UsageError(f"is no box that bony makes ({', '.join(KINDS)})", path)
