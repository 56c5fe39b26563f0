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
from tiling.quarantine import QUARANTINE
from tiling.settings import TileSettings


def _parser() -> OneLineParser:
    limits, base = Thresholds(), TileSettings()
    parser = command_parser(
        "tile",
        "Cut slides into tissue tiles. Finished slides are skipped, so the same command continues a stopped run. "
        "Exit code 3: some slides were left out or damaged; STORE/quarantine.jsonl says which and why.",
        "bony tile slides/ --out store --workers 8",
        "bony tile --dataset panda --root /data/panda --out store --workers 8",
        "bony tile slide.svs --mpp native --codec zstd --out store",
        "bony tile --dataset tiles --root tiles/ --slide-pattern '^([0-9a-f]+)_' --mpp 0.5 --out store",
    )
    add = parser.add_argument
    add("slides", nargs="*", type=Path, metavar="SLIDE_OR_DIR", help="slide files, and folders searched for slides")
    add("--out", type=Path, required=True, metavar="STORE", help="the TileStore to make or to continue")
    add("--dataset", choices=("panda", "tiles"), help="read a data set's own layout under --root")
    add("--root", type=Path, help="the data set's folder; slides given as well choose among its slides")
    add("--workers", type=int, default=1, metavar="N", help="processes, one slide each")
    add("--codec", choices=CODECS, default=base.codec, help="jpeg keeps the source's own tables; zstd is lossless")
    add("--tile-px", type=int, default=base.tile_px, metavar="PX", help="side of a tile")
    add = parser.add_argument_group("scale").add_argument
    add("--mpp", default="0.5", help="target um per pixel, or native for each slide's own level 0")
    add("--mpp-tolerance", type=float, default=base.mpp_tolerance, metavar="SHARE", help="difference used as it is")
    add("--slide-mpp", type=float, metavar="M", help="um per level-0 pixel of all slides, overriding the files")
    add = parser.add_argument_group("filters", "A tile must pass all of them.").add_argument
    add("--min-tissue", type=float, default=limits.min_tissue, metavar="SHARE", help="least share of tissue (0: off)")
    add("--max-empty", type=float, default=limits.max_empty, metavar="SHARE", help="most near-white pixels (1: off)")
    add("--min-edges", type=float, default=limits.min_edges, metavar="SHARE", help="least share of edges (0: off)")
    add("--min-texture", type=float, default=limits.min_texture, metavar="GREY", help="least local contrast (0: off)")
    add = parser.add_argument_group("labels").add_argument
    add("--min-label-share", type=float, default=base.min_label_share, metavar="SHARE", help="least share of its class")
    add = parser.add_argument_group(
        "--dataset tiles", "Folders of images, one per class; none is filtered."
    ).add_argument
    add("--slides-csv", type=Path, metavar="CSV", help="CSV with a path column and the slide of each image")
    add("--slide-column", default="slide_id", metavar="NAME", help="the slide's column in that CSV")
    add("--slide-pattern", metavar="REGEX", help="regular expression for the slide id in a file name")
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
        print(f"{args.out / QUARANTINE}: {len(summary.quarantined)} slides left out or damaged")
        return EXIT_PARTIAL
    return EXIT_DONE
