"""The JSON file with which every box says what it is: its kind, its format version, and the rest.

Another version is refused rather than guessed at; the caller's error type says which box is meant.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiling.errors import BonyError


def described(kind: str, version: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """The description of a box of ``kind`` (such as "tile store") in its format ``version``."""
    return {"format": _format(kind), "format_version": version, **values}


def _format(kind: str) -> str:
    return f"bony-{kind.replace(' ', '-')}"


def read_described(
    path: Path, kind: str, version: int, error: type[BonyError], advice: tuple[str, str]
) -> dict[str, Any]:
    """Read a description and check that it is of this kind and version.

    Args:
        path: The JSON file.
        kind: What the box should be.
        version: The format version that this software reads.
        error: Type of the errors raised.
        advice: What to do when there is none, and when it is of another version.

    Returns:
        What ``described`` was given, without kind and version.

    Raises:
        error: The file is missing, unreadable, of another kind or of another version.
    """
    try:
        value: dict[str, Any] = json.loads(path.read_bytes())
        stated, found = value.pop("format"), value.pop("format_version")
    except FileNotFoundError as cause:
        raise error(f"not a {kind}: it has no {path.name}", path.parent, advice[0]) from cause
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as cause:
        raise error(f"cannot be read ({type(cause).__name__}: {cause})", path) from cause
    if stated != _format(kind) or found != version:
        found = found if stated == _format(kind) else "unknown"
        raise error(f"{kind} has format version {found}, this software reads {version}", path, advice[1])
    return value
