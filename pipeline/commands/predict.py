"""``bony predict``: a bundle at work on slides."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from pipeline.commands.parser import OneLineParser, command_parser
from pipeline.commands.slide_limits import add_limits, limits_of
from tiling import datasets
from tiling.errors import EXIT_DONE, EXIT_PARTIAL, UsageError
from tiling.quarantine import QUARANTINE

LOG_WIDTH = 124


def _parser() -> OneLineParser:
    parser = command_parser(
        "predict",
        "Tile slides as the bundle wants them, score every tile, and write per slide DIR/<slide>/: tiles.parquet "
        "(class and probabilities of each tile), heatmap.png (classes over the slide), regions.geojson (drag it onto "
        "the slide in QuPath) and summary.json (area per class, highest grade). A bundle without a decoder gives "
        "embeddings only. DIR/summary.csv has a row per slide. Finished slides are skipped, so the same command "
        "continues a stopped run. Exit code 3: some slides were left out or damaged; DIR/quarantine.jsonl says which "
        "and why. For research use, not a diagnosis.",
        "bony predict slide.svs --bundle bundle --out predictions",
        "bony predict slides/ more/slide.tiff --bundle bundle --out predictions",
        "bony predict scan.jpg --slide-mpp 0.5 --bundle bundle --out predictions",
    )
    add = parser.add_argument
    add("slides", nargs="+", type=Path, metavar="SLIDE_OR_DIR", help="slide files, and folders searched for slides")
    add("--bundle", type=Path, required=True, metavar="BUNDLE", help="what `bony export` made")
    add("--out", type=Path, required=True, metavar="DIR", help="the folder to make or to continue")
    add(
        "--slide-mpp",
        type=float,
        metavar="M",
        help="um per level-0 pixel of all slides, overriding the files; recorded",
    )
    add("--batch", type=int, default=64, metavar="N", help="tiles at a time: fewer need less memory")
    add_limits(parser)
    return parser


def run(words: Sequence[str]) -> int:
    """Run the command."""
    args = _parser().parse_args(words)
    for path in args.slides:
        if path.is_dir() and args.out.resolve().is_relative_to(path.resolve()):
            raise UsageError(
                f"lies inside {path}, where its pictures would count as slides", args.out, "choose another --out"
            )
    slides = datasets.slides(args.slides)
    from pipeline.bundle import open_bundle  # torch takes seconds to import: bad options should not
    from pipeline.predict import predict
    from pipeline.runtime import one_device

    bundle = open_bundle(args.bundle, one_device())
    done = predict(slides, bundle, args.out, args.slide_mpp, args.batch, limits=limits_of(args))
    show(done.summaries)
    print(f"{args.out}: {len(done.summaries)} of {len(slides.sources)} slides")
    if done.quarantined:
        print(f"{args.out / QUARANTINE}: {len(done.quarantined)} slides left out or damaged")
        return EXIT_PARTIAL
    return EXIT_DONE


def show(summaries: Sequence[dict[str, Any]]) -> None:
    """Print one row per slide."""
    classes = list(summaries[0].get("classes", {})) if summaries else []
    graded = any("highest_grade" in summary for summary in summaries)
    caption = "share of the tiles by class; for research use, not a diagnosis" if classes else None
    table = Table(Column("slide", overflow="fold"), caption=caption)
    for name in ("tiles", "mm2", *classes, *(["highest grade"] if graded else [])):
        table.add_column(name, justify="right")
    for summary in summaries:
        shares = [_percent(found["share"]) for found in summary.get("classes", {}).values()]
        highest = summary.get("highest_grade")
        grade = [f"{highest['name']} {_percent(highest['share'])}" if highest else "-"] if graded else []
        area = f"{summary['tissue_area_mm2']:.2f}"
        table.add_row(summary["slide_id"], str(summary["tiles"]["kept"]), area, *shares, *grade)
    console = Console() if sys.stdout.isatty() else Console(width=LOG_WIDTH)
    console.print(table)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
