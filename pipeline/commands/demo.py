"""``bony demo``: the whole job, from slides to an evaluated encoder."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.commands.evaluate import show
from pipeline.commands.parser import command_parser


def run(words: Sequence[str]) -> int:
    """Run the command."""
    parser = command_parser(
        "demo",
        "Make slides (or take yours), tile them, pretrain a nano XCiT, encode, train a decoder, and write a page. "
        "Minutes on a laptop; uses a GPU where there is one.",
        "bony demo --out demo",
        "bony demo --slides /data/panda --out demo",
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="folder for everything")
    parser.add_argument("--quick", action="store_true", help="about a minute; too short to learn anything")
    parser.add_argument("--slides", type=Path, metavar="DIR", help="a folder in PANDA's layout instead of made slides")
    args = parser.parse_args(words)
    from pipeline.demo import PAGE, demo

    show(demo(args.out, args.slides, args.quick))
    print(args.out / PAGE)
    return 0
