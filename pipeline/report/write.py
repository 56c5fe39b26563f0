"""Boxes of any kinds, in any order, to one page."""

import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from pipeline.boxes import kind_of
from pipeline.report.bundles import bundle_section
from pipeline.report.features import features_section
from pipeline.report.page import BoxSection, Section, write_page
from pipeline.report.predictions import predictions_section
from pipeline.report.results import compare_results, result_section
from pipeline.report.runs import compare_runs, run_section
from pipeline.report.stores import store_section
from tiling.errors import BonyError, UsageError

TITLE = "Bony report"

# How each kind of box (pipeline.boxes.KINDS) is shown, and what is shown of several of a kind together.
SECTIONS: dict[str, Callable[[Path], Section]] = {
    "store": store_section,
    "run": run_section,
    "features": features_section,
    "result": result_section,
    "bundle": bundle_section,
    "predictions": predictions_section,
}
COMPARISONS: dict[str, Callable[[Mapping[str, Path]], Section]] = {"run": compare_runs, "result": compare_results}


def write_report(paths: Sequence[Path], out: Path, title: str = TITLE, notes: Sequence[str] = ()) -> None:
    """Write one self-contained page about some boxes; an older page is replaced.

    Args:
        paths: Boxes of any kinds, in the order of the page.
        out: The HTML file.
        title: Heading of the page.
        notes: Lines below the heading.

    Raises:
        UsageError: A path is no box, or ``out`` is a folder or lies inside a box.
        BonyError: A box is damaged, or of another version.
    """
    boxes = {path: kind_of(path) for path in {path.resolve(): path for path in paths}.values()}
    if out.is_dir():
        raise UsageError("is a folder", out, "name the HTML file to write")
    inside = [path for path in boxes if out.resolve().is_relative_to(path.resolve())]
    if inside:
        raise UsageError(f"lies inside the box {inside[0]}, which must not change", out, "choose another --out")
    names = short_names(list(boxes))
    sections = [BoxSection(names[path], path, kind, _section(path, kind)) for path, kind in boxes.items()]
    comparisons = []
    for kind, compare in COMPARISONS.items():
        alike = {names[path]: path for path, its_kind in boxes.items() if its_kind == kind}
        if len(alike) > 1:
            comparisons.append(compare(alike))
    software = f"bony {version('bony')}, Python {platform.python_version()}"
    made = f"Made {datetime.now(UTC):%Y-%m-%d %H:%M} UTC with {software}."
    out.parent.mkdir(parents=True, exist_ok=True)
    write_page(out, title, [*notes, made], comparisons, sections)


def short_names(paths: Sequence[Path]) -> dict[Path, str]:
    """The shortest end of each path that no other path has.

    >>> short_names([Path("/a/run"), Path("/b/run"), Path("/b/store")])
    {PosixPath('/a/run'): 'a/run', PosixPath('/b/run'): 'b/run', PosixPath('/b/store'): 'store'}
    """
    whole = [str(path.resolve()) for path in paths]
    names = {}
    for path in paths:
        own = path.resolve().parts
        ends = ("/".join(own[-length:]) for length in range(1, len(own)))
        names[path] = next((end for end in ends if sum(text.endswith(f"/{end}") for text in whole) == 1), str(path))
    return names


def _section(path: Path, kind: str) -> Section:
    if kind not in SECTIONS:
        raise UsageError("is a part of a box", path, "give the whole box")
    try:
        return SECTIONS[kind](path)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise BonyError(f"does not hold what a {kind} does ({type(error).__name__}: {error})", path) from error
