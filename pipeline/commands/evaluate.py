"""``bony evaluate``: train and judge a decoder on a FeatureStore."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.commands.parser import command_parser

LOG_WIDTH = 100


def run(words: Sequence[str]) -> int:
    """Run the command."""
    parser = command_parser(
        "evaluate",
        "Train a decoder on frozen features and judge it on slides it has not seen. --protocol paper repeats the "
        "report's split of single tiles and labels by any pixel.",
        "bony evaluate panda --data store --features features --out result",
    )
    parser.add_argument("task", metavar="TASK", help="panda")
    parser.add_argument("--data", type=Path, required=True, metavar="STORE", help="the TileStore with the labels")
    parser.add_argument("--features", type=Path, required=True, metavar="FEATURES", help="its FeatureStore")
    parser.add_argument("--out", type=Path, required=True, metavar="RESULT", help="the result folder to make")
    parser.add_argument("--protocol", default="default", help="default or paper: how to split, label and weigh")
    parser.add_argument("--seed", type=int, default=0, help="decides split, initial weights and order")
    args = parser.parse_args(words)
    from pipeline.downstream.tasks import RESULTS, evaluate

    show(evaluate(args.task, args.data, args.features, args.out, args.protocol, args.seed))
    print(args.out / RESULTS)
    return 0


def show(result: dict[str, Any]) -> None:
    """Print the result table."""
    test, counts = result["metrics"]["test"], result["counts"]["test"]
    place = f"test part, {counts['tiles']} tiles of {counts['slides']} slides"
    table = Table(min_width=76, title=f"{result['task']}, {result['protocol']} protocol: {place}")
    for name in ("class", "tiles", "precision", "recall", "F1"):
        table.add_column(name, justify="left" if name == "class" else "right")
    for row in test["per_class"]:
        cells = ["-" if row[key] is None else f"{row[key]:.3f}" for key in ("precision", "recall", "f1")]
        table.add_row(row["name"], str(row["support"]), *cells)
    scores = ("accuracy", "balanced_accuracy", "macro_f1")
    table.caption = "  ".join(f"{key.replace('_', ' ')} {test[key]:.3f}" for key in scores)
    console = Console() if sys.stdout.isatty() else Console(width=LOG_WIDTH)
    console.print(table)
