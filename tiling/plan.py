"""Which slide is tiled when, and by which array task: by compressed bytes, the same wherever it is computed."""

import heapq
from collections.abc import Sequence
from pathlib import Path

from tiling.datasets import Source


def _bytes(path: Path) -> int:
    """Size of a file; of one that is not there 0: it takes no time."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def largest_first(sources: Sequence[Source]) -> list[tuple[int, Source]]:
    """Sources with their compressed bytes, in the order in which they are best begun: no large one comes last."""
    sized = [(sum(_bytes(path) for path in source.images), source) for source in sources]
    return sorted(sized, key=lambda pair: (-pair[0], pair[1].slide_id))


def share(sources: Sequence[Source], part: int, parts: int) -> list[Source]:
    """The sources of one of ``parts`` array tasks, largest first; ``part`` counts from 1.

    Each source, largest first, goes to the task that has the fewest bytes (Graham 1969): no task gets more than 4/3 of
    what the best division would give it.
    """
    loads = [(0, task) for task in range(1, parts + 1)]
    mine = []
    for size, source in largest_first(sources):
        load, task = heapq.heappop(loads)
        heapq.heappush(loads, (load + size, task))
        if task == part:
            mine.append(source)
    return mine
