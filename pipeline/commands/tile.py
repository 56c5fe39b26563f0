"""``bony tile``: cut slides into tissue tiles in a TileStore."""

from argparse import Namespace
from collections.abc import Sequence

from pipeline.commands.slide_limits import limits_of
from pipeline.commands.tile_options import dataset_of, settings_of, tile_parser
from tiling import drivers
from tiling import run as tiling_run
from tiling.datasets import Dataset
from tiling.drivers import Driver
from tiling.errors import EXIT_DONE, EXIT_PARTIAL
from tiling.identity import deidentified, private_files
from tiling.progress import say
from tiling.quarantine import QUARANTINE
from tiling.store import DESCRIPTION, read_description
from tiling.summary import PAGE, Pace, print_table


def run(words: Sequence[str]) -> int:
    """Run the command."""
    args = tile_parser().parse_args(words)
    if not args.mpi:
        return _run(args, drivers.processes(args.workers))
    with drivers.mpi() as driver:
        return EXIT_DONE if driver is None else _run(args, driver)


def _run(args: Namespace, driver: Driver) -> int:
    dataset = dataset_of(args)
    settings = settings_of(args, dataset)
    if args.preview:
        from tiling.preview import preview

        print(preview(dataset, settings, args.out, limits=limits_of(args)))
        return EXIT_DONE
    if args.deidentify:
        dataset = _deidentified(args, dataset)
    summary = tiling_run.tile(dataset, args.out, settings, driver, args.part or (1, 1), limits_of(args))
    for outcome in summary.held:
        say(f"{outcome.slide_id}: left to the job that holds it")
    kept = sum(outcome.kept for outcome in summary.outcomes)
    print_table(summary.totals, Pace(kept, summary.seconds))
    skipped = sum(outcome.skipped for outcome in summary.outcomes)
    print(f"{args.out}: {len(summary.outcomes)} slides ({skipped} were there already), {kept} new tiles")
    if summary.missing:
        print(f"{summary.missing} slides are still to come: the last part, or job, to end makes the index")
    else:
        print(f"{args.out / PAGE}: the same with pictures")
    if summary.quarantined:
        print(f"{args.out / QUARANTINE}: {len(summary.quarantined)} slides left out or damaged")
        if args.deidentify and dataset.ids:
            print(f"{private_files(args.out, args.id_key)[1]}: which files they are (private)")
    return EXIT_PARTIAL if summary.quarantined or summary.held else EXIT_DONE


def _deidentified(args: Namespace, dataset: Dataset) -> Dataset:
    key, names = private_files(args.out, args.id_key)
    made_with = read_description(args.out).ids or None if (args.out / DESCRIPTION).exists() else None
    return deidentified(dataset, key, names, made_with)
