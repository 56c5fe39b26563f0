"""Options that raise what a slide's header may claim, for the commands that open slides."""

from argparse import ArgumentParser, Namespace
from dataclasses import fields

from tiling.errors import UsageError
from tiling.limits import Limits

_ABOUT = {
    "pages": "images in a file, levels of a pyramid",
    "segments": "compressed segments on a level",
    "level_pixels": "pixels of a level",
    "segment_pixels": "pixels of a segment, or of a plain image",
    "total_bytes": "decoded bytes of all levels",
    "ratio": "decoded bytes per byte of the file",
    "free_bytes": "decoded bytes up to which the ratio is not asked",
}


def add_limits(parser: ArgumentParser) -> None:
    """Add ``--max-pages`` and so on."""
    text = "Decompression bombs are refused from their header; raise a limit for a sound slide."
    add = parser.add_argument_group("limits", text).add_argument
    for field in fields(Limits):
        kind = float if field.name == "ratio" else int
        add(
            f"--max-{field.name.replace('_', '-')}",
            type=kind,
            default=field.default,
            metavar="N",
            help=_ABOUT[field.name],
        )


def limits_of(args: Namespace) -> Limits:
    """The limits.

    Raises:
        UsageError: One is below 1.
    """
    values = {field.name: getattr(args, f"max_{field.name}") for field in fields(Limits)}
    for name, value in values.items():
        if not value >= 1:
            raise UsageError(f"--max-{name.replace('_', '-')} is {value}, must be at least 1")
    return Limits(**values)
