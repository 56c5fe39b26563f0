"""The real on-disk layouts, as lists of slides to tile.

A *source* is one future folder of the store: a slide file, or a set of tile images that belong to one slide. It is the
unit of splitting.
"""

import csv
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tiling.annotations import ANNOTATION_SUFFIXES
from tiling.dicom import DICOM_SUFFIX, one_per_series
from tiling.errors import UsageError
from tiling.labels import GLEASON_ANNOTATIONS, GLEASON_CLASSES, SCHEMES, Scheme
from tiling.settings import TileSettings
from tiling.slide import SLIDE_SUFFIXES

MASK_SUFFIXES = frozenset({".tif", ".tiff", ".png"})
MASK_ENDING = "_mask"
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_PANDA_COLUMNS = ("image_id", "data_provider", "isup_grade", "gleason_score")


@dataclass(frozen=True)
class Source:
    """One slide to tile: paths and ids, small enough to be sent to any process.

    Args:
        slide_id: Name of its folder in the store.
        images: The slide file; or the tile images of one slide in order; or the archive that holds them.
        mask: Its mask or annotations, if it has any.
        provider: PANDA's provider, a key of ``labels.SCHEMES``.
        isup_grade: Slide-level grade, where known.
        gleason_score: Slide-level score, where known; benign is ``0+0``.
        image_labels: Class of each tile image; None for a slide file.
        split: Official part, where the data set has one.
        scheme: What the values of its masks mean; needed with ``mask`` and ``image_masks``.
        image_masks: Mask of each tile image, where the data set has them.
        mpp: um per pixel of the tile images, where the data set says it and the files do not.
        fold: Official part of a cross-validation inside the training part, where the data set has one.
    """

    slide_id: str
    images: tuple[Path, ...]
    mask: Path | None = None
    provider: str | None = None
    isup_grade: int | None = None
    gleason_score: str | None = None
    image_labels: tuple[int, ...] | None = None
    split: str | None = None
    scheme: Scheme | None = None
    image_masks: tuple[Path, ...] | None = None
    mpp: float | None = None
    fold: str | None = None


@dataclass(frozen=True)
class Dataset:
    """What was found.

    Args:
        name: Which layout it has.
        sources: Sorted by slide id.
        class_names: Names of the classes; empty without labels.
        remarks: For the reader.
        tile_px: Side of its tiles where the user does not say it.
        mpp: um per tile pixel where the user does not say it; None takes its images as they are.
        scheme: What the values of all its masks mean, where the user may say so.
        ids: How slide ids came about (``tiling.store.Description``).
    """

    name: str
    sources: tuple[Source, ...]
    class_names: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    tile_px: int = TileSettings.tile_px
    mpp: float | None = TileSettings.mpp
    scheme: Scheme | None = None
    ids: str = "as given"


def safe_id(name: str) -> str:
    """A slide id that is safe as a folder name.

    >>> safe_id("case 7/slide#2")
    'case_7_slide_2'
    """
    return _UNSAFE.sub("_", name).strip("._") or "slide"


def unique(sources: Iterable[Source], where: Path | str) -> tuple[Source, ...]:
    """Sorted by slide id; the same id twice is an error, since one would overwrite the other.

    Raises:
        UsageError: An id stands for two sources.
    """
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


def slides(paths: Sequence[Path], annotations: Path | None = None, scheme: Scheme | None = None) -> Dataset:
    """Slide files and folders of slides (searched recursively).

    A slide's id is its file name without suffix; where several slides of the run share it, their folders' names are
    put before it, as many as tell them apart (``case1_slide``).

    Args:
        paths: Files and folders.
        annotations: Folder of annotations and masks, one a slide: STEM or STEM_mask, with .geojson, .json, .xml, .tif,
            .tiff or .png. It may be the slides' own folder; masks there must be named STEM_mask.
        scheme: What their values and classes mean; Gleason annotations by name where not given.

    Raises:
        UsageError: A path does not exist, is no slide by its suffix, a folder holds none, or a slide's annotations are
            not clear.
    """
    distinct = {file.resolve(): file for path in paths for file in _slide_files(path)}
    if annotations is None:
        ids = slide_ids(list(distinct.values()))
        return Dataset("slides", unique((Source(ids[file], (file,)) for file in ids), "slides"))
    of_slide = matching_annotations(list(distinct.values()), annotations)
    used = {file.resolve() for file in of_slide.values()}
    ids = slide_ids([file for path, file in distinct.items() if path not in used])
    meaning = scheme or GLEASON_ANNOTATIONS
    images = sorted(file for file in of_slide.values() if file.suffix.lower() not in ANNOTATION_SUFFIXES)
    if images and not meaning.pixels:
        raise UsageError("what a mask's values mean is not known", images[0], "give it with --class-map FILE")
    sources = [Source(ids[file], (file,), of_slide.get(file), scheme=meaning) for file in ids]
    with_labels = sum(source.mask is not None for source in sources)
    remark = f"{with_labels} of {len(sources)} slides have annotations or a mask in {annotations}"
    return Dataset("slides", unique(sources, "slides"), meaning.class_names, (remark,), scheme=meaning)


def _slide_files(path: Path) -> list[Path]:
    """The slides that a path given by the user stands for."""
    known = ", ".join(sorted(SLIDE_SUFFIXES))
    if path.is_dir():
        inside = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in SLIDE_SUFFIXES]
        if not inside:
            raise UsageError("folder holds no slides", path, f"slides end in {known}")
        instances = [file for file in inside if file.suffix.lower() == DICOM_SUFFIX]
        return sorted({*inside} - {*instances} | {*one_per_series(instances)})
    if not path.exists():
        raise UsageError("no such file or folder", path)
    if path.suffix.lower() not in SLIDE_SUFFIXES:
        raise UsageError(f"not a slide: its name ends in {path.suffix!r}", path, f"slides end in {known}")
    return [path]


def slide_ids(files: Sequence[Path]) -> dict[Path, str]:
    """An id for each of some files: the stem, and folders' names before it as far as needed.

    What is one folder's twice (slide.svs, slide.tiff) keeps its suffix.

    >>> list(slide_ids([Path("/a/x/s.svs"), Path("/a/y/s.svs"), Path("/a/y/t.svs")]).values())
    ['x_s', 'y_s', 't']
    """
    in_folder = Counter((file.resolve().parent, safe_id(file.stem)) for file in files)
    names = {
        file: (
            *file.resolve().parent.parts[1:],
            file.name if in_folder[file.resolve().parent, safe_id(file.stem)] > 1 else file.stem,
        )
        for file in files
    }
    parts = dict.fromkeys(files, 1)
    while True:
        ids = {file: safe_id("_".join(names[file][-parts[file] :])) for file in files}
        same = Counter(ids.values())
        longer = [file for file in files if same[ids[file]] > 1 and parts[file] < len(names[file])]
        if not longer:
            return ids
        for file in longer:
            parts[file] += 1


def matching_annotations(files: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """The annotation or mask of each slide that has one.

    Where slides of several folders share a stem, the annotations' own folders must have the slides' folders' names.

    Raises:
        UsageError: There is no such folder, two files fit one slide, or one file two slides.
    """
    if not folder.is_dir():
        raise UsageError("no such folder", folder)
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in ANNOTATION_SUFFIXES | MASK_SUFFIXES:
            by_stem[file.stem.removesuffix(MASK_ENDING)].append(file)
    found: dict[Path, Path] = {}
    slide_of: dict[Path, Path] = {}
    for slide in files:
        fit = [file for file in by_stem[slide.stem] if _may_annotate(file, slide)]
        fit = [file for file in fit if file.parent.name == slide.parent.name] or fit
        if len(fit) > 1:
            raise UsageError(f"slide has two annotations, {fit[0]} and {fit[1]}", slide, "leave one of them")
        for file in fit:
            other = slide_of.setdefault(file, slide)
            if other is not slide:
                raise UsageError(
                    f"annotations fit two slides, {other} and {slide}",
                    file,
                    "put them into folders named like the slides' folders",
                )
            found[slide] = file
    return found


def _may_annotate(file: Path, slide: Path) -> bool:
    """An image of a slide's own name in its own folder is another slide, or itself."""
    beside = file.resolve().parent == slide.resolve().parent
    return file.suffix.lower() in ANNOTATION_SUFFIXES or file.stem.endswith(MASK_ENDING) or not beside


def csv_rows(path: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a CSV that must have certain columns.

    Raises:
        UsageError: It is missing, is no CSV, or lacks a column or a value of one.
    """
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
    listed = csv_rows(root / "train.csv", _PANDA_COLUMNS)
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
                scheme=SCHEMES[provider],
            )
        )
    if not sources:
        raise UsageError(f"none of the {len(listed)} slides of train.csv is in train_images", root)
    remarks = [f"{len(sources)} slides of {len(listed)} in train.csv"]
    if absent:
        remarks.append(f"{absent} listed slides are not in train_images")
    if without_mask:
        remarks.append(f"{without_mask} slides have no mask: their tiles are unlabelled")
    return Dataset("panda", unique(sources, root), GLEASON_CLASSES, tuple(remarks))
