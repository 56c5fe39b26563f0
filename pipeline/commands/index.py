"""``bony index``: rebuild a TileStore's index from its slides."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.commands.parser import command_parser
from tiling.index import INDEX, build_index
from tiling.store import read_description


def run(words: Sequence[str]) -> int:
    """Run the command."""
    parser = command_parser("index", "Rebuild STORE/index.parquet from the slides' own rows.")
    parser.add_argument("store", type=Path, metavar="STORE")
    args = parser.parse_args(words)
    read_description(args.store)
    table = build_index(args.store)
    print(f"{args.store / INDEX}: {len(table)} tiles")
    return 0
