"""``bony verify``: check every checksum of a store, run, feature store or result."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.commands.parser import command_parser
from tiling import atomic
from tiling.audit import store_problems
from tiling.errors import EXIT_DONE, EXIT_FAILED, UsageError


def problems(path: Path) -> list[str]:
    """Everything wrong with a box of any kind, one line each.

    Raises:
        UsageError: It is no box that bony makes.
    """
    if (path / "store.json").exists():
        return store_problems(path)
    if (path / "features.json").exists():
        from pipeline import features

        return features.problems(path)
    if (path / "run.json").exists():
        return [line for folder in sorted(path.glob("checkpoints/step-*")) for line in atomic.damaged_files(folder)]
    if (path / atomic.COMPLETE).exists() or (path / "results.json").exists():
        return atomic.damaged_files(path)
    raise UsageError("is no store, run, feature store or result", path)


def run(words: Sequence[str]) -> int:
    """Run the command."""
    parser = command_parser(
        "verify", "Check every checksum. Exit code 0: sound; 1: damaged, each damaged file is named."
    )
    parser.add_argument("path", type=Path, metavar="STORE_OR_RUN_OR_FEATURES_OR_RESULT")
    args = parser.parse_args(words)
    found = problems(args.path)
    for line in found:
        print(line)
    print(f"{args.path}: {'sound' if not found else f'{len(found)} problems'}")
    return EXIT_FAILED if found else EXIT_DONE
