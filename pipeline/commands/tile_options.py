"""The options of ``bony tile``: words to a data set and settings."""

from argparse import BooleanOptionalAction, Namespace
from dataclasses import fields, replace
from pathlib import Path

from pipeline.commands.parser import OneLineParser, command_parser, part_of
from pipeline.commands.slide_limits import add_limits
from tiling import datasets, patches
from tiling.codec import CODECS
from tiling.datasets import Dataset
from tiling.errors import UsageError
from tiling.filters import Thresholds
from tiling.labels import read_class_map
from tiling.settings import TileSettings

DATASETS = ("panda", "sicapv2", "pairs", "tiles", "medmnist")
# Chosen and labelled by others: such tiles are measured, not filtered.
IMPORTED = ("sicapv2", "pairs", "tiles", "medmnist")
_FILTERS = {
    "min_tissue": ("SHARE", "least share of the tissue mask under a tile (0: off)"),
    "max_empty": ("SHARE", "most near-white pixels (1: off)"),
    "min_edges": ("SHARE", "least share of edges (0: off)"),
    "min_texture": ("GREY", "least local contrast (0: off)"),
    "min_sharpness": ("X", "least sharpness; blurred tiles have less (0: off)"),
    "max_pen": ("SHARE", "most pen-marked pixels (1: off)"),
    "max_dark": ("SHARE", "most black pixels of the scanner's border (1: off)"),
}


def tile_parser() -> OneLineParser:
    """The parser."""
    parser = command_parser(
        "tile",
        "Cut slides into tissue tiles. Finished slides are skipped, so the same command continues a stopped run. "
        "Exit code 3: some slides were left out or damaged; STORE/quarantine.jsonl says which and why.",
        "bony tile slides/ --out store --workers 8",
        "bony tile slides/ --out look --preview",
        "bony tile --dataset panda --root /data/panda --out store --workers 8",
        "srun --mpi=pmi2 bony tile --dataset panda --root /data/panda --out store --mpi",
        "bony tile --dataset panda --root /data/panda --out store --part $SLURM_ARRAY_TASK_ID/100",
        "bony tile slide.svs --mpp native --codec zstd --out store",
        "bony tile slides/ --annotations qupath/ --class-map classes.yaml --out store",
        "bony tile --dataset tiles --root tiles/ --slide-pattern '^([0-9a-f]+)_' --mpp 0.5 --out store",
    )
    add = parser.add_argument
    add("slides", nargs="*", type=Path, metavar="SLIDE_OR_DIR", help="slide files, and folders searched for slides")
    add("--out", type=Path, required=True, metavar="STORE", help="the TileStore to make or to continue")
    add("--preview", action="store_true", help="write STORE/preview.html only: what these settings would keep")
    add("--dataset", choices=DATASETS, help="read a data set's own layout under --root")
    add("--root", type=Path, help="the data set's folder; slides given as well choose among its slides")
    add("--codec", choices=CODECS, default=TileSettings.codec, help="jpeg keeps the source's tables; zstd is lossless")
    add("--tile-px", type=int, metavar="PX", help=f"side of a tile (default: {TileSettings.tile_px}; medmnist's own)")
    _add_drivers(parser)
    _add_scale_and_filters(parser)
    _add_labels(parser)
    add_limits(parser)
    return parser


def _add_drivers(parser: OneLineParser) -> None:
    group = parser.add_argument_group("who tiles", "All give the same store, byte for byte.")
    who = group.add_mutually_exclusive_group()
    who.add_argument("--workers", type=int, default=1, metavar="N", help="processes, one slide each")
    who.add_argument("--mpi", action="store_true", help="the ranks of an MPI world; the first hands out slides")
    group.add_argument("--part", type=part_of, metavar="I/N", help="only the I-th of N equal shares")
    group = parser.add_argument_group(
        "de-identification",
        "Slide ids that are not public ones of their data set become keyed hashes. Key and list of names lie beside "
        "the store: private files.",
    )
    group.add_argument("--deidentify", action=BooleanOptionalAction, default=True, help="replace ids and file names")
    group.add_argument("--id-key", type=Path, metavar="FILE", help="the key (default: STORE.id-key); made when missing")


def _add_scale_and_filters(parser: OneLineParser) -> None:
    base, limits = TileSettings(), Thresholds()
    add = parser.add_argument_group("scale").add_argument
    add("--mpp", help=f"target um per pixel, or native for each slide's own level 0 (default: {TileSettings.mpp})")
    add("--mpp-tolerance", type=float, default=base.mpp_tolerance, metavar="SHARE", help="difference used as it is")
    add("--slide-mpp", type=float, metavar="M", help="um per level-0 pixel of all slides, overriding the files")
    text = "A tile must pass all of them. Imported data sets are measured, not filtered."
    add = parser.add_argument_group("filters", text).add_argument
    for name, (unit, about) in _FILTERS.items():
        add(f"--{name.replace('_', '-')}", type=float, default=getattr(limits, name), metavar=unit, help=about)


def _add_labels(parser: OneLineParser) -> None:
    add = parser.add_argument_group("labels").add_argument
    least = TileSettings.min_label_share
    add("--min-label-share", type=float, default=least, metavar="SHARE", help="least share of its class")
    about = "folder of masks, QuPath GeoJSON or ASAP XML, named like the slides"
    add("--annotations", type=Path, metavar="DIR", help=about)
    add("--class-map", type=Path, metavar="FILE", help="JSON or YAML: what mask values and annotations' names mean")
    add = parser.add_argument_group("--dataset tiles, pairs").add_argument
    add("--slides-csv", type=Path, metavar="CSV", help="CSV with a path column and the slide of each image")
    add("--slide-column", default="slide_id", metavar="NAME", help="the slide's column in that CSV")
    add("--slide-pattern", metavar="REGEX", help="regular expression for the slide id in a file name")


def dataset_of(args: Namespace) -> Dataset:
    """What to tile.

    Raises:
        UsageError: Something is missing, or not what it should be.
    """
    scheme = read_class_map(args.class_map) if args.class_map else None
    if args.dataset is None:
        if not args.slides:
            raise UsageError("no slides given", do="name slide files or folders, or use --dataset with --root")
        return datasets.slides(args.slides, args.annotations, scheme)
    if args.root is None:
        raise UsageError(f"--dataset {args.dataset} needs --root PATH")
    if args.dataset == "panda":
        return _chosen(datasets.panda(args.root), args)
    if args.dataset == "sicapv2":
        return patches.sicapv2(args.root)
    if args.dataset == "medmnist":
        return patches.medmnist(args.root)
    how = (args.slides_csv, args.slide_column, args.slide_pattern)
    if args.dataset == "pairs":
        return patches.pairs(args.root, scheme, *how)
    return patches.tile_folders(args.root, *how)


def _chosen(found: Dataset, args: Namespace) -> Dataset:
    """The data set's slides that are named on the command line; all, if none is."""
    if not args.slides:
        return found
    wanted = {source.images[0].resolve() for source in datasets.slides(args.slides).sources}
    sources = tuple(source for source in found.sources if source.images[0].resolve() in wanted)
    if len(sources) != len(wanted):
        raise UsageError(f"{len(wanted) - len(sources)} of the given slides are not in train.csv", args.root)
    return replace(found, sources=sources, remarks=(*found.remarks, f"{len(sources)} of them chosen"))


def settings_of(args: Namespace, dataset: Dataset) -> TileSettings:
    """The settings, with the data set's own defaults.

    Raises:
        UsageError: A value is out of range.
    """
    try:
        mpp = dataset.mpp if args.mpp is None else None if args.mpp == "native" else float(args.mpp)
    except ValueError as error:
        raise UsageError(f"--mpp is {args.mpp!r}, must be a number or native") from error
    limits = Thresholds(**{field.name: getattr(args, field.name) for field in fields(Thresholds)})
    return TileSettings(
        tile_px=args.tile_px or dataset.tile_px,
        mpp=mpp,
        mpp_tolerance=args.mpp_tolerance,
        slide_mpp=args.slide_mpp,
        codec=args.codec,
        thresholds=None if dataset.name in IMPORTED else limits,
        min_label_share=args.min_label_share,
    )
