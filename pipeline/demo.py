"""The whole main job in one command, on made slides or on a PANDA-layout folder, ending with a page to look at."""

import os
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import bundle
from pipeline.commands.parser import pretrain_config
from pipeline.downstream.tasks import evaluate, read_result
from pipeline.embed import embed
from pipeline.export import export
from pipeline.predict import predict
from pipeline.pretrain import pretrain
from pipeline.report.write import write_report
from pipeline.runtime import one_device
from tiling import audit, datasets, phantom
from tiling import run as tiling_run
from tiling.datasets import Dataset
from tiling.drivers import processes
from tiling.errors import BonyError, UsageError
from tiling.progress import progress, say
from tiling.settings import TileSettings

PAGE = "report.html"
# The boxes of a demo, in the order in which they are made.
STORE, RUN, FEATURES, RESULT, BUNDLE, PREDICTIONS = "store", "run", "features", "result", "bundle", "predictions"
_CONFIG = Path("jobs/configs/demo.yaml")
_NEW_SLIDE = (1, "4")  # seed and grade of the slide that nothing was trained on


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
    """Slides to a prediction on a slide that was left out; what is finished already is not done again.

    Args:
        out: Folder for slides, all boxes and the page.
        slides: A PANDA-layout folder; None makes a cohort.
        quick: A minute instead of minutes: fewer slides and steps, and figures that mean nothing.

    Returns:
        What the result's results.json holds.
    """
    size = QUICK if quick else FULL
    if (out / PAGE).exists():
        raise UsageError("holds a finished demo", out, "remove it, or choose another --out")
    dataset, new_slide = _slides(out / "slides", slides, size)
    _pretrained(out, dataset, size)
    say(f"3/6 features -> {out / FEATURES}")
    embed(out / RUN, out / STORE, out / FEATURES)
    say(f"4/6 decoder -> {out / RESULT}")
    if not (out / RESULT).exists():
        evaluate("panda", out / STORE, out / FEATURES, out / RESULT)
    say(f"5/6 bundle -> {out / BUNDLE}")
    if not (out / BUNDLE).exists():
        export(out / RUN, out / BUNDLE, out / RESULT)
    _require_sound(bundle.problems(out / BUNDLE))
    say(f"6/6 prediction on {new_slide.name} -> {out / PREDICTIONS}")
    opened = bundle.open_bundle(out / BUNDLE, one_device())
    predict(datasets.slides([new_slide]), opened, out / PREDICTIONS)
    boxes = [out / box for box in (STORE, RUN, FEATURES, RESULT, BUNDLE, PREDICTIONS)]
    write_report(boxes, out / PAGE, "Bony demo", _notes(slides, quick))
    return read_result(out / RESULT)


def _slides(made: Path, given: Path | None, size: Size) -> tuple[Dataset, Path]:
    """What is learnt from, and one slide that is left out of it."""
    if given is None:
        return datasets.panda(_cohort(made, size)), _new_slide(made / "new")
    found = datasets.panda(given)
    # Of the commonest grade, which can spare one.
    grade, _ = Counter(source.isup_grade for source in found.sources).most_common(1)[0]
    new = [source for source in found.sources if source.isup_grade == grade][-1]
    rest = tuple(source for source in found.sources if source is not new)
    return replace(found, sources=rest), new.images[0]


def _pretrained(out: Path, dataset: Dataset, size: Size) -> None:
    """Store and run."""
    say(f"1/6 tiling {len(dataset.sources)} slides -> {out / STORE}")
    tiling_run.tile(dataset, out / STORE, TileSettings(), processes(len(os.sched_getaffinity(0))))
    _require_sound(audit.store_problems(out / STORE))
    say(f"2/6 pretraining -> {out / RUN}")
    words = ["--config", str(config_file()), "--data", str(out / STORE), "--out", str(out / RUN)]
    config = pretrain_config(words)
    if size.steps is not None:
        warmup = min(config.optim.warmup_steps, size.steps - 1)
        config = replace(
            config, optim=replace(config.optim, warmup_steps=warmup), train=replace(config.train, steps=size.steps)
        )
    pretrain(config)


def _require_sound(problems: list[str]) -> None:
    if problems:
        raise BonyError(problems[0])


def _new_slide(folder: Path) -> Path:
    """A made slide outside the cohort."""
    seed, grade = _NEW_SLIDE
    slide = phantom.make_slide(seed, grade)
    path = folder / "train_images" / f"{slide.image_id}.tiff"
    if not path.is_file():
        phantom.write_slide(slide, folder)
    return path


def _cohort(root: Path, size: Size) -> Path:
    """The made cohort; train.csv is written last, so its presence says that all is there."""
    if not (root / "train.csv").is_file():
        count = len(phantom.GRADES) * size.slides_per_grade + 1
        with progress("making slides", count, "slides") as advance:
            phantom.make_cohort(root, size.slides_per_grade, on_slide=lambda done, total: advance())
    return root


def _notes(given: Path | None, quick: bool) -> list[str]:
    drawn = "made slides (drawn, not scanned): figures show that the chain works, not what the method can do"
    notes = [f"Slides to a prediction, on {given or drawn}."]
    return [*notes, "Quick run: too short to learn."] if quick else notes
