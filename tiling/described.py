"""The JSON file with which every box says what it is: its kind, its format version, and the rest.

Another version is refused rather than guessed at; the caller's error type says which box is meant.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tiling.byte_ranges import Place
from tiling.errors import BonyError


@dataclass(frozen=True)
class Format:
    """How the boxes of one kind say what they are.

    Args:
        kind: Such as "tile store".
        version: The format version that this software writes and reads.
        file: The JSON file.
        error: Type of the errors raised.
        made_by: The command that makes such a box.
    """

    kind: str
    version: int
    file: str
    error: type[BonyError]
    made_by: str

    def describe(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What the JSON file of such a box holds."""
        return {"format": self._name, "format_version": self.version, **values}

    @property
    def _name(self) -> str:
        return f"bony-{self.kind.replace(' ', '-')}"

    def read(self, folder: Place) -> dict[str, Any]:
        """What ``describe`` was given, without kind and version.

        Raises:
            BonyError: Of type ``error``: the file is missing, unreadable, of another kind or of another version.
        """
        path = folder / self.file
        try:
            value: dict[str, Any] = json.loads(path.read_bytes())
            stated, found = value.pop("format"), value.pop("format_version")
        except FileNotFoundError as cause:
            what = f"not a {self.kind}: it has no {self.file}"
            raise self.error(what, str(folder), f"make one with `{self.made_by}`") from cause
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as cause:
            raise self.error(f"cannot be read ({type(cause).__name__}: {cause})", str(path)) from cause
        if stated != self._name or found != self.version:
            found = found if stated == self._name else "unknown"
            what = f"{self.kind} has format version {found}, this software reads {self.version}"
            raise self.error(what, str(path), "make it again, or use the version of bony that wrote it")
        return value
