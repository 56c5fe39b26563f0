"""``bony pretrain``: train an encoder on a TileStore without labels."""

import os
from collections.abc import Sequence

from pipeline.commands.parser import pretrain_config


def run(words: Sequence[str]) -> int:
    """Run the command."""
    config = pretrain_config(words)
    from pipeline.pretrain import pretrain  # torch takes seconds to import: --help and bad options should not

    out = pretrain(config)
    if os.environ.get("RANK", "0") == "0":
        print(out)
    return 0
