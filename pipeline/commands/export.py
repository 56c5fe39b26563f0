"""``bony export``: a checkpoint, and a decoder, to a bundle that may leave the building."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.commands.parser import command_parser


def run(words: Sequence[str]) -> int:
    """Run the command."""
    parser = command_parser(
        "export",
        "Write a bundle: the teacher of a run's newest checkpoint for timm, for the original DINO code and for `bony "
        "predict`, with a model card, a self-test and checksums. It holds no patient data: no slide names, no paths.",
        "bony export run --out bundle",
        "bony export run --decoder result --out bundle",
        "bony export run/checkpoints/step-00030000 --out bundle",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a RUN, or one of its checkpoints")
    parser.add_argument("--out", type=Path, required=True, metavar="BUNDLE", help="the folder to make")
    parser.add_argument("--decoder", type=Path, metavar="RESULT", help="also its decoder and class names")
    args = parser.parse_args(words)
    from pipeline.export import export

    print(export(args.run, args.out, args.decoder))
    return 0
