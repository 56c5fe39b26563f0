"""The one command, ``bony``: runs a subcommand's module, and turns errors into one line and an exit code."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from tiling.errors import EXIT_FAILED, EXIT_USAGE, BonyError, UsageError

COMMANDS = {
    "demo": "the whole job, from slides to an evaluated encoder, on made slides or your own",
    "tile": "cut slides into tissue tiles in a TileStore",
    "index": "rebuild a TileStore's index",
    "verify": "check every checksum of a box of any kind",
    "pretrain": "train an encoder on a TileStore without labels",
    "compare": "runs that differ in some config keys, ranked by a probe",
    "embed": "encode a TileStore with a frozen encoder into a FeatureStore",
    "evaluate": "train and judge a decoder on a FeatureStore",
    "report": "one page, to open in a browser, from any boxes",
    "export": "a run, and a decoder, to a bundle that may leave the building",
    "predict": "run a bundle on slides: heat map, QuPath regions, summary",
}


def _usage() -> str:
    lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: bony COMMAND [OPTIONS]",
            "",
            "Prostate whole-slide images to an encoder that hospitals can use.",
            "",
            *lines,
            "",
            "`bony COMMAND --help` explains a command. --debug shows a traceback, --version the version.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (DESIGN.md section 3)."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else EXIT_USAGE
    if words[0] == "--version":
        print(f"bony {version('bony')}")
        return 0
    try:
        if words[0] not in COMMANDS:
            raise UsageError(f"no command {words[0]!r}", do=f"known are {', '.join(COMMANDS)}")
        return int(import_module(f"pipeline.commands.{words[0]}").run(words[1:]))
    except BonyError as error:
        if debug:
            raise
        _complain(str(error), everywhere=error.exit_code == EXIT_FAILED)
        return error.exit_code
    except KeyboardInterrupt:
        _complain("interrupted; run the same command again to go on")
        return 130
    except OSError as error:
        if debug:
            raise
        _complain(f"{error.filename or 'I/O'}: {error.strerror or error}")
        return EXIT_FAILED


def _complain(text: str, everywhere: bool = True) -> None:
    """One line on standard error; what every rank would say is said by the first."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" or everywhere:
        print(f"bony: error: {f'rank {rank}: ' if rank != '0' else ''}{text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
