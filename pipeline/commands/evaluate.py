"""``bony evaluate``: train and judge a decoder on a FeatureStore."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.commands.parser import command_parser

TASKS = ("panda",)
PROTOCOLS = ("default", "paper")


def run(words: Sequence[str]) -> int:
    """Run the command."""
    parser = command_parser(
        "evaluate",
        "Train a decoder on frozen features and judge it on slides it has not seen. --protocol paper repeats the "
        "report's split of single tiles and labels by any pixel.",
    )
    parser.add_argument("task", choices=TASKS, metavar="TASK", help=f"one of {', '.join(TASKS)}")
    parser.add_argument("--data", type=Path, required=True, metavar="STORE", help="the TileStore with the labels")
    parser.add_argument("--features", type=Path, required=True, metavar="FEATURES", help="its FeatureStore")
    parser.add_argument("--out", type=Path, required=True, metavar="RESULT", help="the result folder to make")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="default", help="how to split, label and weigh")
    parser.add_argument("--seed", type=int, default=0, help="decides split, initial weights and order")
    args = parser.parse_args(words)
    from pipeline.downstream.tasks import RESULTS, evaluate_panda

    result = evaluate_panda(args.data, args.features, args.out, args.protocol, args.seed)
    show(result)
    print(args.out / RESULTS)
    return 0


def show(result: dict[str, Any]) -> None:
    """Print the result table."""
    test, counts = result["metrics"]["test"], result["counts"]["test"]
    title = f"{result['task']}, {result['protocol']} protocol: test part, {counts['tiles']} tiles of {counts['slides']} slides"
    table = Table(title=title)
    for name in ("class", "tiles", "precision", "recall", "F1"):
        table.add_column(name, justify="left" if name == "class" else "right")
    for row in test["per_class"]:
        scores = ["-" if row[key] is None else f"{row[key]:.3f}" for key in ("precision", "recall", "f1")]
        table.add_row(row["name"], str(row["support"]), *scores)
    table.caption = "  ".join(
        f"{key.replace('_', ' ')} {test[key]:.3f}" for key in ("accuracy", "balanced_accuracy", "macro_f1")
    )
    Console().print(table)
