"""``bony verify``: check every checksum of a box of any kind."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.boxes import kind_of
from pipeline.commands.parser import command_parser
from tiling import atomic
from tiling.audit import listing_problems, repair, store_problems
from tiling.errors import EXIT_DONE, EXIT_FAILED, UsageError


def problems(path: Path) -> list[str]:
    """Everything wrong with a box of any kind, one line each.

    Raises:
        UsageError: It is no box that bony makes.
    """
    kind = kind_of(path)
    if kind == "store":
        return store_problems(path)
    if kind == "features":
        from pipeline import features

        return features.problems(path)
    if kind == "bundle":
        from pipeline import bundle

        return bundle.problems(path)
    if kind == "predictions":
        from pipeline import predict

        return predict.problems(path)
    if kind == "run":
        return [line for folder in sorted(path.glob("checkpoints/step-*")) for line in atomic.damaged_files(folder)]
    return atomic.damaged_files(path)


def run(words: Sequence[str]) -> int:
    """Run the command."""
    parser = command_parser(
        "verify",
        "Check every checksum of a store, run, checkpoint, feature store, result, bundle or predictions; a bundle also "
        "embeds its self-test tiles. Exit code 0: sound; 1: damaged, each damaged file is named.",
        "bony verify store",
    )
    parser.add_argument("path", type=Path, metavar="STORE_OR_RUN_OR_FEATURES_OR_BUNDLE")
    about = "a store: move damaged slides aside, so that `bony tile` makes them again, and rebuild its index"
    parser.add_argument("--repair", action="store_true", help=about)
    args = parser.parse_args(words)
    if args.repair:
        if kind_of(args.path) != "store":
            raise UsageError("only a store can be repaired", args.path, "make that box again")
        for line in repair(args.path):
            print(line)
        found = listing_problems(args.path)  # the slides that are left were found sound a moment ago
    else:
        found = problems(args.path)
    for line in found:
        print(line)
    print(f"{args.path}: {'sound' if not found else f'{len(found)} problems'}")
    return EXIT_FAILED if found else EXIT_DONE
