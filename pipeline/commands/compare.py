"""``bony compare``: runs that differ in some config keys, ranked by a probe."""

import os
from collections.abc import Sequence
from pathlib import Path

from pipeline.commands.parser import command_parser, part_of
from pipeline.sweep import CONFIGS, plan, write_configs
from tiling.errors import UsageError


def run(words: Sequence[str]) -> int:
    """Run the command."""
    parser = command_parser(
        "compare",
        "Train one encoder for every combination of the values in a plan's grid, judge each by its nearest neighbours "
        "on a labelled store, and print a table, the best first. What is finished is not done again. A cell is an "
        "ordinary RUN in DIR/cells; trained elsewhere, as by torchrun on DIR/configs/CELL.yaml, it is only judged. "
        "Other options change the base config of all cells: --any.field value.",
        "bony compare --config jobs/configs/sweep_out_dim.yaml --data store --out sweep",
        "bony compare --config plan.yaml --data store --probe labelled --out DIR --part $SLURM_ARRAY_TASK_ID/4",
        "bony compare --config plan.yaml --data store --out DIR --train.steps 3000",
    )
    add = parser.add_argument
    add("--config", type=Path, required=True, metavar="PLAN", help="YAML: base (a config beside it), set, grid")
    add("--data", type=Path, required=True, metavar="STORE", help="the TileStore to train on")
    add("--probe", type=Path, metavar="STORE", help="the labelled TileStore to judge on (default: that of --data)")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the comparison; one that exists is continued")
    add("--part", type=part_of, metavar="I/N", help="train only the I-th of N shares of the cells")
    add("--plan", action="store_true", help="only write DIR/configs, and name the cells")
    args, overrides = parser.parse_known_args(words)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        do = f"train DIR/{CONFIGS}/CELL.yaml by `torchrun -m pipeline.pretrain`, then compare"
        raise UsageError("bony compare is one process", do=do)
    cells = plan(args.config, args.data, args.out, overrides)
    write_configs(cells, args.out)
    if args.plan:
        print("\n".join(str(args.out / CONFIGS / f"{cell.name}.yaml") for cell in cells))
        return 0
    from pipeline.compare import TABLE, compare, table  # torch takes seconds to import: bad plans should not

    print(table(compare(cells, args.out, args.probe or args.data, args.part or (1, 1))))
    print(args.out / TABLE)
    return 0
