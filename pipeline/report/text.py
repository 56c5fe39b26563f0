"""Values as a reader sees them; what was not measured is a dash."""

import math
from collections.abc import Mapping

from pipeline.report.page import Link, Table

DASH = "-"


def count(number: int) -> str:
    """A whole number.

    >>> count(2850000)
    '2,850,000'
    """
    return f"{number:,}"


def counted(number: int, what: str) -> str:
    """A whole number of something.

    >>> counted(1, "slide"), counted(1200, "slide")
    ('1 slide', '1,200 slides')
    """
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def decimal(value: float | None, digits: int = 3) -> str:
    """A measured value.

    >>> decimal(0.61803), decimal(None), decimal(math.nan)
    ('0.618', '-', '-')
    """
    return DASH if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def share(part: int, whole: int) -> str:
    """A part in percent.

    >>> share(1, 8), share(0, 0)
    ('12.5 %', '-')
    """
    return f"{100 * part / whole:.1f} %" if whole else DASH


def duration(seconds: float) -> str:
    """A time span in the two largest units that matter.

    >>> duration(42.4), duration(3 * 3600 + 61), duration(2 * 86400)
    ('42 s', '3 h 1 min', '48 h 0 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def identity(sha256: str) -> Link:
    """The beginning of a sha256, which leads to the box that it is of; a dash where none is known."""
    return Link(sha256[:12] or DASH, sha256)


def software(versions: Mapping[str, str]) -> str:
    """Names and versions.

    >>> software({"bony": "0.1.0", "torch": "2.15.0"})
    'bony 0.1.0, torch 2.15.0'
    """
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def facts(caption: str, values: Mapping[str, str | Link]) -> Table:
    """A table of names and values."""
    return Table(caption, (), tuple(values.items()))
