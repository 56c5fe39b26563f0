"""``bony embed``: encode a TileStore with a frozen encoder into a FeatureStore."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.commands.parser import command_parser


def run(words: Sequence[str]) -> int:
    """Run the command."""
    parser = command_parser(
        "embed",
        "Encode every tile with a frozen encoder. Finished slides are skipped: the same command continues.",
        "bony embed --encoder run --data store --out features",
        "bony embed --encoder bundle --data store --out features",
        "bony embed --encoder checkpoint.pth --encoder-mpp 0.5 --data store --out features",
    )
    parser.add_argument(
        "--encoder", type=Path, required=True, metavar="RUN_OR_BUNDLE_OR_SPEC",
        help="a RUN, one of its checkpoints, a BUNDLE, or a .pth file of the original DINO code",
    )  # fmt: skip
    parser.add_argument("--encoder-mpp", type=float, metavar="M", help="um per pixel a .pth file was trained at")
    parser.add_argument("--data", type=Path, required=True, metavar="STORE", help="the TileStore")
    parser.add_argument("--out", type=Path, required=True, metavar="FEATURES", help="the FeatureStore to make")
    parser.add_argument("--batch", type=int, default=64, help="tiles per forward pass")
    parser.add_argument("--threads", type=int, default=2, help="threads that read and decode tiles")
    parser.add_argument("--any-mpp", action="store_true", help="accept tiles of another scale; this is recorded")
    args = parser.parse_args(words)
    from pipeline.embed import embed

    about = embed(args.encoder, args.data, args.out, args.batch, args.threads, args.any_mpp, args.encoder_mpp)
    print(f"{args.out}: {', '.join(f'{tap} ({width})' for tap, width in about.taps.items())} of {about.encoder}")
    return 0
