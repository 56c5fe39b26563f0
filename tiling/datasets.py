"""The real on-disk layouts, as lists of slides to tile.

A *source* is one future folder of the store: a slide file, or a set of tile images that belong to one slide. It is the
unit of splitting.
"""

import csv
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tiling.errors import UsageError
from tiling.labels import GLEASON_CLASSES, SCHEMES
from tiling.slide import IMAGE_SUFFIXES, SLIDE_SUFFIXES

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_PANDA_COLUMNS = ("image_id", "data_provider", "isup_grade", "gleason_score")


@dataclass(frozen=True)
class Source:
    """One slide to tile.

    Args:
        slide_id: Name of its folder in the store.
        images: The slide file, or the tile images of one slide in order.
        mask: Its mask, if it has one.
        provider: Key of ``labels.SCHEMES``: what the mask's values mean.
        isup_grade: Slide-level grade, where known.
        gleason_score: Slide-level score, where known; benign is ``0+0``.
        image_labels: Class of each tile image; None for a slide file.
        split: Official part, where the data set has one.
    """

    slide_id: str
    images: tuple[Path, ...]
    mask: Path | None = None
    provider: str | None = None
    isup_grade: int | None = None
    gleason_score: str | None = None
    image_labels: tuple[int, ...] | None = None
    split: str | None = None


@dataclass(frozen=True)
class Dataset:
    """What was found: sources sorted by slide id, class names, and remarks for the reader."""

    name: str
    sources: tuple[Source, ...]
    class_names: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def safe_id(name: str) -> str:
    """A slide id that is safe as a folder name.

    >>> safe_id("case 7/slide#2")
    'case_7_slide_2'
    """
    return _UNSAFE.sub("_", name).strip("._") or "slide"


def _unique(sources: Sequence[Source], where: Path | str) -> tuple[Source, ...]:
    """Sorted by slide id; the same id twice is an error, since one would overwrite the other."""
    by_id: dict[str, Source] = {}
    for source in sources:
        other = by_id.setdefault(source.slide_id, source)
        if other is not source:
            raise UsageError(
                f"slide id {source.slide_id!r} stands for both {other.images[0]} and {source.images[0]}",
                where,
                "rename one of the files",
            )
    return tuple(by_id[slide_id] for slide_id in sorted(by_id))


def slides(paths: Sequence[Path]) -> Dataset:
    """Slide files and folders of slides (searched recursively).

    Raises:
        UsageError: A path does not exist, is no slide by its suffix, or a folder holds none.
    """
    known = ", ".join(sorted(SLIDE_SUFFIXES))
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in SLIDE_SUFFIXES]
            if not inside:
                raise UsageError("folder holds no slides", path, f"slides end in {known}")
            found += inside
        elif not path.exists():
            raise UsageError("no such file or folder", path)
        elif path.suffix.lower() not in SLIDE_SUFFIXES:
            raise UsageError(f"not a slide: its name ends in {path.suffix!r}", path, f"slides end in {known}")
        else:
            found.append(path)
    distinct = {file.resolve(): file for file in found}.values()
    return Dataset("slides", _unique([Source(safe_id(file.stem), (file,)) for file in distinct], "slides"))


def _rows(path: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a CSV that must have certain columns."""
    if not path.is_file():
        raise UsageError("no such file", path)
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        try:
            columns, rows = reader.fieldnames or (), list(reader)
        except (csv.Error, UnicodeDecodeError) as error:
            raise UsageError(f"cannot be read as CSV ({error})", path, "save it as comma-separated UTF-8") from error
    missing = [name for name in needed if name not in columns]
    if missing:
        raise UsageError(f"column {missing[0]!r} is missing", path, f"it has {', '.join(columns) or 'no columns'}")
    for number, row in enumerate(rows, start=2):
        short = [name for name in needed if row[name] is None]
        if short:
            raise UsageError(f"no {short[0]} in this row", f"{path}, line {number}")
    return rows


def panda(root: Path) -> Dataset:
    """PANDA's layout: train.csv, train_images/ID.tiff, train_label_masks/ID_mask.tiff.

    Raises:
        UsageError: train.csv is missing or malformed, names an unknown provider, or no listed slide is there.
    """
    listed = _rows(root / "train.csv", _PANDA_COLUMNS)
    sources, without_mask, absent = [], 0, 0
    for number, row in enumerate(listed, start=2):
        image = root / "train_images" / f"{row['image_id']}.tiff"
        provider = row["data_provider"].strip().lower()
        if provider not in SCHEMES:
            raise UsageError(
                f"data_provider {row['data_provider']!r}, known are {', '.join(SCHEMES)}",
                f"{root / 'train.csv'}, line {number}",
            )
        if not re.fullmatch(r"[0-5]", row["isup_grade"].strip()):
            raise UsageError(
                f"isup_grade {row['isup_grade']!r}, must be 0 to 5", f"{root / 'train.csv'}, line {number}"
            )
        if safe_id(row["image_id"]) != row["image_id"]:
            raise UsageError(f"image_id {row['image_id']!r} is no file name", f"{root / 'train.csv'}, line {number}")
        if not image.is_file():
            absent += 1
            continue
        mask = root / "train_label_masks" / f"{row['image_id']}_mask.tiff"
        without_mask += not mask.is_file()
        score = row["gleason_score"].strip()
        sources.append(
            Source(
                slide_id=row["image_id"],
                images=(image,),
                mask=mask if mask.is_file() else None,
                provider=provider,
                isup_grade=int(row["isup_grade"]),
                gleason_score="0+0" if score == "negative" else score,
            )
        )
    if not sources:
        raise UsageError(f"none of the {len(listed)} slides of train.csv is in train_images", root)
    remarks = [f"{len(sources)} slides of {len(listed)} in train.csv"]
    if absent:
        remarks.append(f"{absent} listed slides are not in train_images")
    if without_mask:
        remarks.append(f"{without_mask} slides have no mask: their tiles are unlabelled")
    return Dataset("panda", _unique(sources, root), GLEASON_CLASSES, tuple(remarks))


def _slide_ids_from_csv(files: Sequence[Path], root: Path, csv_file: Path, column: str) -> dict[Path, str]:
    """Slide id of each image, from a CSV with a ``path`` column relative to ``root``."""
    of_path = {row["path"]: row[column] for row in _rows(csv_file, ("path", column))}
    ids = {}
    for file in files:
        relative = file.relative_to(root).as_posix()
        slide_id = of_path.get(relative) or of_path.get((Path(root.name) / relative).as_posix())
        if not slide_id:
            raise UsageError(f"image {relative} has no row", csv_file, "its path column must be relative to --root")
        ids[file] = slide_id
    return ids


def _slide_ids_from_names(files: Sequence[Path], pattern: str) -> dict[Path, str]:
    """Slide id of each image: the pattern's first group, or its whole match, in the file name."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--slide-pattern {pattern!r} is no regular expression ({error})") from error
    ids = {}
    for file in files:
        match = expression.search(file.name)
        if not match:
            raise UsageError(f"name does not match --slide-pattern {pattern!r}", file)
        ids[file] = match[1] if expression.groups else match[0]
    return ids


def tile_folders(
    root: Path, csv_file: Path | None = None, slide_column: str = "slide_id", slide_pattern: str | None = None
) -> Dataset:
    """Folders of tile images, one folder per class: ROOT/CLASS/*.png.

    Args:
        root: Folder of class folders; class names are the folders' names, sorted.
        csv_file: CSV with a ``path`` column (relative to ``root`` or its parent) and a slide column.
        slide_column: Name of that column.
        slide_pattern: Regular expression whose first group, searched in the file name, is the slide id.

    Raises:
        UsageError: No class folders, no images, or an image whose slide is not known.
    """
    if not root.is_dir():
        raise UsageError("no such folder", root)
    folders = [folder for folder in sorted(root.iterdir()) if folder.is_dir()]
    files = {
        file: number
        for number, folder in enumerate(folders)
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in IMAGE_SUFFIXES
    }
    if not files:
        raise UsageError("no class folders with images", root, "expected ROOT/CLASS/image.png or .jpg")
    if csv_file is not None:
        ids = _slide_ids_from_csv(list(files), root, csv_file, slide_column)
    elif slide_pattern is not None:
        ids = _slide_ids_from_names(list(files), slide_pattern)
    else:
        raise UsageError(
            "tiles must be told apart by slide",
            root,
            "give --slides-csv FILE [--slide-column NAME], or --slide-pattern REGEX (use '(.+)[.]' if every image "
            "is a slide of its own)",
        )
    groups: dict[str, list[Path]] = defaultdict(list)
    for file, slide_id in ids.items():
        groups[safe_id(slide_id)].append(file)
    sources = [
        Source(slide_id, tuple(images), image_labels=tuple(files[image] for image in images))
        for slide_id, images in ((name, sorted(group)) for name, group in groups.items())
    ]
    remark = f"{len(files)} images of {len(sources)} slides in {len(folders)} classes"
    return Dataset("tiles", _unique(sources, root), tuple(folder.name for folder in folders), (remark,))
