"""Typed errors: each says what is wrong, where, and what to do, in one line, and carries its exit code.

Exit codes (DESIGN.md section 3): 0 done, 1 failed, 2 wrong usage or config, 3 partial.
"""

from pathlib import Path

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_PARTIAL = 0, 1, 2, 3


class BonyError(Exception):
    """Base of every error that a user is meant to read.

    Args:
        what: What is wrong, with the value and the limit.
        where: The file, slide, step or key it was found in.
        do: What the reader can do about it.
    """

    exit_code = EXIT_FAILED

    def __init__(self, what: str, where: str | Path | None = None, do: str | None = None) -> None:
        place = f"{where}: " if where is not None else ""
        advice = f"; {do}" if do else ""
        super().__init__(" ".join(f"{place}{what}{advice}".split()))
        self.what, self.where, self.do = what, where, do

    def __reduce__(self) -> tuple[type, tuple[str, str | Path | None, str | None]]:
        # Worker processes send errors by pickle; the default would lose `where` and `do`.
        return type(self), (self.what, self.where, self.do)


class UsageError(BonyError):
    """Wrong arguments, config keys or values: nothing was started."""

    exit_code = EXIT_USAGE


class SlideError(BonyError):
    """A slide that cannot be opened or decoded; the run goes on without it."""


class MaskError(SlideError):
    """A mask that does not fit its slide, or holds values its provider does not know."""


class GridError(BonyError):
    """Impossible tile geometry."""


class StoreError(BonyError):
    """A TileStore that is missing, of another format version or settings, or incomplete."""


class DamageError(BonyError):
    """Bytes that do not match their checksum."""


class CheckpointError(BonyError):
    """A checkpoint that is damaged, belongs to another model or cannot be written."""


class FeatureError(BonyError):
    """Features that are missing, stale or of another store."""


class EvaluationError(BonyError):
    """Data that a decoder cannot be trained or judged on."""
