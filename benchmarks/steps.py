"""Which step of tiling takes how much CPU time: functions of ``tiling`` wrapped by a timer while a slide is tiled."""

import importlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Step -> what is timed, as module:attribute, in the module that calls it. A call inside another step's counts for
# itself alone; one inside a step of WHOLE counts for that step.
STEPS = {
    "open": ["tiling.write:open_slide"],
    "overview, mask, plan": ["tiling.write:plan_slide"],
    "decode": ["tiling.slide_tiff:TiffSlide.read_segment"],
    "cut": ["tiling.segments:RowReader.cut"],
    "filter": ["tiling.filters:halve", "tiling.filters:measure_halves", "tiling.filters:verdicts"],
    "label mask": ["tiling.cut:tile_labels"],
    "encode": ["tiling.codec:encode"],
    "write, crc32c": ["tiling.shard:ArrayWriter.append", "tiling.shard:ArrayWriter.close"],
    "sha256, fsync, rename": ["tiling.atomic:seal"],
    "rows": ["tiling.rows:Rows.add", "tiling.rows:Rows.table", "pyarrow.parquet:write_table"],
    "stains": ["tiling.stain:tile_sample", "tiling.stain:slide_stains"],
    "pictures": ["tiling.pictures:thumbnail", "tiling.pictures:small", "tiling.pictures:Sheet.draw"],
}
WHOLE = ("overview, mask, plan", "label mask", "pictures")
REST = "the rest"


class Clock:
    """CPU seconds by step; what a nested step takes is not its caller's."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[tuple[str, float]] = []

    def wrap(self, step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed for a step."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            """The function, timed; inside a step of WHOLE it counts for that step."""
            if self._open and self._open[-1][0] in WHOLE:
                return function(*args, **kwargs)
            self._turn()
            self._open.append((step, time.process_time()))
            try:
                return function(*args, **kwargs)
            finally:
                self._turn()
                self._open.pop()
                if self._open:
                    self._open[-1] = self._open[-1][0], time.process_time()

        return timed

    def _turn(self) -> None:
        """Book the time since the last turn for the innermost open step."""
        if self._open:
            step, since = self._open[-1]
            self.seconds[step] += time.process_time() - since


@contextmanager
def timed_steps() -> Iterator[dict[str, float]]:
    """CPU seconds by step of what runs inside; the rest is the caller's to work out.

    Raises:
        LookupError: A name in STEPS is no longer there.
    """
    clock, undo = Clock(), []
    try:
        for step, names in STEPS.items():
            for name in names:
                module, _, attribute = name.partition(":")
                owner: Any = importlib.import_module(module)
                *path, last = attribute.split(".")
                try:
                    for part in path:
                        owner = getattr(owner, part)
                    original = getattr(owner, last)
                except AttributeError as error:
                    raise LookupError(f"step {step!r}: {name} is gone; correct STEPS in {__file__}") from error
                undo.append((owner, last, original))
                setattr(owner, last, clock.wrap(step, original))
        yield clock.seconds
    finally:
        for owner, last, original in undo:
            setattr(owner, last, original)
