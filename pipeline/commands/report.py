"""``bony report``: one HTML page about any boxes."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.commands.parser import command_parser


def run(words: Sequence[str]) -> int:
    """Run the command."""
    parser = command_parser(
        "report",
        "Write one HTML page about any boxes that bony made: what was tiled, how a run went, how well decoders do, and "
        "what to be wary of. Several runs or results are compared. The page holds all its pictures, opens from disk, "
        "and can be mailed. It reads the boxes and changes nothing in them; `bony verify` checks every byte.",
        "bony report store run features result bundle predictions --out report.html",
        "bony report run-a run-b run-c --out runs.html --title 'Three learning rates'",
    )
    add = parser.add_argument
    add("boxes", nargs="+", type=Path, metavar="BOX", help="any box that bony made, in any order")
    add("--out", type=Path, default=Path("report.html"), metavar="FILE", help="the page; an older one is replaced")
    add("--title", help="heading of the page")
    args = parser.parse_args(words)
    from pipeline.report.write import TITLE, write_report

    write_report(args.boxes, args.out, args.title or TITLE)
    print(args.out)
    return 0
