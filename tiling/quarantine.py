"""quarantine.jsonl: the slides of a store, or of predictions, that were left out or are doubtful, and why."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tiling import atomic

QUARANTINE = "quarantine.jsonl"


def entry(slide_id: str, left_out: bool, reason: str) -> dict[str, Any]:
    """One line: ``left_out`` is False where a finished folder stands, though something is wrong with it."""
    return {"slide_id": slide_id, "left_out": left_out, "reason": reason}


def read_quarantine(folder: Path) -> list[dict[str, Any]]:
    """All lines, none where there is no such file."""
    path = folder / QUARANTINE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def update_quarantine(
    folder: Path, entries: Sequence[dict[str, Any]], looked_at: Collection[str]
) -> list[dict[str, Any]]:
    """Write the lines of the slides that were looked at now; older ones of other slides stay.

    Returns:
        All lines, by slide id.
    """
    older = [line for line in read_quarantine(folder) if line["slide_id"] not in looked_at]
    lines = sorted([*older, *entries], key=lambda line: line["slide_id"])
    path = folder / QUARANTINE
    if lines or path.exists():
        atomic.write_bytes(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return lines
