"""``bony tile``: cut slides into tissue tiles in a TileStore."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.commands.parser import OneLineParser, command_parser
from tiling import datasets
from tiling import run as tiling_run
from tiling.codec import CODECS
from tiling.datasets import Dataset
from tiling.errors import EXIT_DONE, EXIT_PARTIAL, UsageError
from tiling.filters import Thresholds
from tiling.settings import TileSettings


def _parser() -> OneLineParser:
    limits, base = Thresholds(), TileSettings()
    parser = command_parser(
        "tile",
        "Cut slides into tissue tiles. Finished slides are skipped, so the same command continues a stopped run. "
        "Exit code 3: some slides were left out or damaged; STORE/quarantine.jsonl says which and why.",
    )
    add = parser.add_argument
    add("slides", nargs="*", type=Path, metavar="SLIDE_OR_DIR", help="slide files, and folders searched for slides")
    add("--out", type=Path, required=True, metavar="STORE", help="the TileStore to make or to continue")
    add("--dataset", choices=("panda", "tiles"), help="read a data set's own layout under --root")
    add("--root", type=Path, help="the data set's folder; slides given as well choose among its slides")
    add("--mpp", default="0.5", help="target um per pixel, or native for each slide's own level 0")
    add("--mpp-tolerance", type=float, default=base.mpp_tolerance, help="relative difference that needs no resampling")
    add("--slide-mpp", type=float, help="um per level-0 pixel of all slides, overriding the files")
    add("--codec", choices=CODECS, default=base.codec, help="jpeg keeps the source's own tables; zstd is lossless")
    add("--tile-px", type=int, default=base.tile_px, help="side of a tile")
    add("--workers", type=int, default=1, help="processes, one slide each")
    add("--min-tissue", type=float, default=limits.min_tissue, help="least share of tissue (0 turns the filter off)")
    add("--max-empty", type=float, default=limits.max_empty, help="largest share of near-white pixels (1: off)")
    add("--min-edges", type=float, default=limits.min_edges, help="least share of edge pixels (0: off)")
    add("--min-texture", type=float, default=limits.min_texture, help="least local contrast in grey levels (0: off)")
    add("--min-label-share", type=float, default=base.min_label_share, help="least share of a tile for its label")
    add("--slides-csv", type=Path, help="--dataset tiles: CSV with a path column and the slide of each image")
    add("--slide-column", default="slide_id", help="--dataset tiles: the slide's column in that CSV")
    add("--slide-pattern", help="--dataset tiles: regular expression for the slide id in a file name")
    return parser


def _settings(args: Namespace) -> TileSettings:
    try:
        mpp = None if args.mpp == "native" else float(args.mpp)
    except ValueError as error:
        raise UsageError(f"--mpp is {args.mpp!r}, must be a number or native") from error
    thresholds = Thresholds(args.min_tissue, args.max_empty, args.min_edges, args.min_texture)
    return TileSettings(
        tile_px=args.tile_px,
        mpp=mpp,
        mpp_tolerance=args.mpp_tolerance,
        slide_mpp=args.slide_mpp,
        codec=args.codec,
        # Imported tiles were chosen by others: they are measured, not filtered.
        thresholds=None if args.dataset == "tiles" else thresholds,
        min_label_share=args.min_label_share,
    )


def _dataset(args: Namespace) -> Dataset:
    if args.dataset is None:
        if not args.slides:
            raise UsageError("no slides given", do="name slide files or folders, or use --dataset with --root")
        return datasets.slides(args.slides)
    if args.root is None:
        raise UsageError(f"--dataset {args.dataset} needs --root PATH")
    if args.dataset == "tiles":
        return datasets.tile_folders(args.root, args.slides_csv, args.slide_column, args.slide_pattern)
    found = datasets.panda(args.root)
    if not args.slides:
        return found
    wanted = {source.images[0].resolve() for source in datasets.slides(args.slides).sources}
    sources = tuple(source for source in found.sources if source.images[0].resolve() in wanted)
    if len(sources) != len(wanted):
        raise UsageError(f"{len(wanted) - len(sources)} of the given slides are not in train.csv", args.root)
    return replace(found, sources=sources, remarks=(*found.remarks, f"{len(sources)} of them chosen"))


def run(words: Sequence[str]) -> int:
    """Run the command."""
    args = _parser().parse_args(words)
    summary = tiling_run.tile(_dataset(args), args.out, _settings(args), args.workers)
    kept = sum(outcome.kept for outcome in summary.outcomes)
    skipped = sum(outcome.skipped for outcome in summary.outcomes)
    print(
        f"{args.out}: {len(summary.outcomes)} slides ({skipped} were there already), {kept} new tiles in "
        f"{summary.seconds:.1f} s"
    )
    if summary.quarantined:
        print(f"{args.out / tiling_run.QUARANTINE}: {len(summary.quarantined)} slides left out or damaged")
        return EXIT_PARTIAL
    return EXIT_DONE
