"""The whole main job in one command, on made slides or on a PANDA-layout folder, ending with a page to look at."""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.commands.parser import pretrain_config
from pipeline.downstream.tasks import evaluate
from pipeline.embed import embed
from pipeline.pretrain import pretrain
from pipeline.report.page import Section, write_page
from pipeline.report.sections import result_section, run_section, store_section
from tiling import audit, datasets, phantom
from tiling import run as tiling_run
from tiling.errors import BonyError, UsageError
from tiling.progress import progress, say
from tiling.settings import TileSettings

PAGE = "index.html"
_CONFIG = Path("jobs/configs/demo.yaml")


@dataclass(frozen=True)
class Size:
    """How much the demo does."""

    slides_per_grade: int
    steps: int | None


FULL, QUICK = Size(slides_per_grade=4, steps=None), Size(slides_per_grade=3, steps=6)


def config_file() -> Path:
    """The demo's config: in the repository, or where an installed wheel puts it."""
    for root in (Path(__file__).parents[1], Path(sys.prefix) / "share/bony"):
        if (root / _CONFIG).is_file():
            return root / _CONFIG
    raise BonyError(f"{_CONFIG} is neither in the repository nor in this installation", do="install bony again")


def demo(out: Path, slides: Path | None, quick: bool) -> dict[str, Any]:
    """Slides to an evaluated encoder; what is finished already is not done again.

    Args:
        out: Folder for slides, store, run, features, result and page.
        slides: A PANDA-layout folder; None makes a cohort.
        quick: A minute instead of minutes: fewer slides and steps, and figures that mean nothing.

    Returns:
        What the result's results.json holds.
    """
    size = QUICK if quick else FULL
    if (out / "result").exists():
        raise UsageError("holds a finished demo", out, "remove it, or choose another --out")
    root = slides or _cohort(out / "slides", size)
    dataset = datasets.panda(root)
    say(f"1/4 tiling {root} -> {out / 'store'}")
    tiling_run.tile(dataset, out / "store", TileSettings(), workers=len(os.sched_getaffinity(0)))
    found = audit.store_problems(out / "store")
    if found:
        raise BonyError(f"the store is damaged: {found[0]}")
    say(f"2/4 pretraining -> {out / 'run'}")
    words = ["--config", str(config_file()), "--data", str(out / "store"), "--out", str(out / "run")]
    config = pretrain_config(words)
    if size.steps is not None:
        warmup = min(config.optim.warmup_steps, size.steps - 1)
        config = replace(
            config, optim=replace(config.optim, warmup_steps=warmup), train=replace(config.train, steps=size.steps)
        )
    pretrain(config)
    say(f"3/4 features -> {out / 'features'}")
    embed(out / "run", out / "store", out / "features")
    say(f"4/4 decoder -> {out / 'result'}")
    result = evaluate("panda", out / "store", out / "features", out / "result")
    write_page(out / PAGE, "Bony demo", _subtitle(root, slides is None, quick), _sections(out))
    return result


def _cohort(root: Path, size: Size) -> Path:
    """The made cohort; train.csv is written last, so its presence says that all is there."""
    if not (root / "train.csv").is_file():
        count = len(phantom.GRADES) * size.slides_per_grade + 1
        with progress("making slides", count, "slides") as advance:
            phantom.make_cohort(root, size.slides_per_grade, on_slide=lambda done, total: advance())
    return root


def _sections(out: Path) -> list[Section]:
    return [store_section(out / "store"), run_section(out / "run"), result_section(out / "result")]


def _subtitle(root: Path, made: bool, quick: bool) -> str:
    drawn = "made slides (drawn, not scanned): figures show that the chain works, not what the method can do"
    short = " Quick run: too short to learn." if quick else ""
    return f"Slides to an evaluated encoder, on {drawn if made else root}.{short}"
