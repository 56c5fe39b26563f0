"""Patch data sets as lists of sources: images that others have cut, chosen and labelled become stores as they are.

Folders of classes, image + mask pairs, SICAPv2, MedMNIST. ``tiling.imported`` cuts them.
"""

import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl

from tiling.datasets import MASK_ENDING, MASK_SUFFIXES, Dataset, Source, csv_rows, safe_id, unique
from tiling.errors import UsageError
from tiling.imported import PARTS, array_header
from tiling.labels import GLEASON_CLASSES, UNLABELLED, Scheme
from tiling.settings import MAX_TILE_PX
from tiling.slide import IMAGE_SUFFIXES

_PATCH_SUFFIXES = IMAGE_SUFFIXES | MASK_SUFFIXES
# The usual binary mask: 0 and 255.
FOREGROUND = Scheme(
    ("background", "foreground"), (0, 1), ("background", "foreground"), {0: 0, 255: 1}, advice="give --class-map FILE"
)
# 0 is all that is no cancer: benign glands, stroma, glass.
SICAPV2 = Scheme(
    ("background", "gleason3", "gleason4", "gleason5"),
    (0, 2, 3, 4),
    pixels={0: 0, 3: 1, 4: 2, 5: 3},
    advice="SICAPv2's masks hold 0, 3, 4 and 5",
)
# 10x of a 40x scan at 0.25 um/px (Silva-Rodriguez et al. 2020).
SICAPV2_MPP = 1.0
_SICAPV2_COLUMNS = ("image_name", "NC")
_SICAPV2_FOLDS = ("Val1", "Val2", "Val3", "Val4")
_HEALTHY = GLEASON_CLASSES.index("healthy")
# Names of the classes of MedMNIST's sets of microscopy and skin (Yang et al. 2023), by file name.
MEDMNIST_CLASSES = {
    "bloodmnist": ("basophil", "eosinophil", "erythroblast", "immature granulocyte", "lymphocyte", "monocyte",
                   "neutrophil", "platelet"),
    "dermamnist": ("actinic keratosis", "basal cell carcinoma", "benign keratosis", "dermatofibroma", "melanoma",
                   "melanocytic nevus", "vascular lesion"),
    "pathmnist": ("adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle", "normal colon mucosa",
                  "cancer-associated stroma", "colorectal adenocarcinoma epithelium"),
}  # fmt: skip


def _images(folder: Path) -> list[Path]:
    """Images anywhere under a folder, sorted."""
    return [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in _PATCH_SUFFIXES]


def _slide_ids_from_csv(files: Sequence[Path], root: Path, csv_file: Path, column: str) -> dict[Path, str]:
    """Slide id of each image, from a CSV with a ``path`` column relative to ``root``."""
    of_path = {row["path"]: row[column] for row in csv_rows(csv_file, ("path", column))}
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


def _by_slide(ids: dict[Path, str]) -> dict[str, list[Path]]:
    """Images of each slide, in order."""
    groups: dict[str, list[Path]] = defaultdict(list)
    for file, slide_id in sorted(ids.items()):
        groups[safe_id(slide_id)].append(file)
    return groups


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
    files = {file: number for number, folder in enumerate(folders) for file in _images(folder)}
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
    sources = [
        Source(slide_id, tuple(images), image_labels=tuple(files[image] for image in images))
        for slide_id, images in _by_slide(ids).items()
    ]
    remark = f"{len(files)} images of {len(sources)} slides in {len(folders)} classes"
    return Dataset("tiles", unique(sources, root), tuple(folder.name for folder in folders), (remark,))


def pairs(
    root: Path,
    scheme: Scheme | None = None,
    csv_file: Path | None = None,
    slide_column: str = "slide_id",
    slide_pattern: str | None = None,
) -> Dataset:
    """Image + mask pairs, as DeepGleason and MoNuSeg have them: ROOT/images/NAME.*, ROOT/masks/NAME.* or NAME_mask.*.

    Args:
        root: Folder of both.
        scheme: What the masks' values mean; 0 background and 255 foreground where not given.
        csv_file: CSV with a ``path`` column (relative to ``root`` or its parent) and a slide column.
        slide_column: Name of that column.
        slide_pattern: Regular expression whose first group, searched in the image's name, is the slide id.

    Raises:
        UsageError: No pair, two masks of one image, or an image whose slide is not known.
    """
    masks = _masks(root)
    images = _images(root / "images")
    paired = [image for image in images if _name(image, root / "images") in masks]
    if not paired:
        raise UsageError("no image with a mask", root, "expected ROOT/images/NAME.png and ROOT/masks/NAME.png")
    remarks = [f"{len(paired)} pairs of image and mask"]
    if len(paired) < len(images):
        remarks.append(f"{len(images) - len(paired)} images have no mask: left out")
    if scheme is None:
        remarks.append("no --class-map: mask value 0 is background, 255 foreground")
    if csv_file is not None:
        ids = _slide_ids_from_csv(paired, root, csv_file, slide_column)
    elif slide_pattern is not None:
        ids = _slide_ids_from_names(paired, slide_pattern)
    else:
        ids = {image: _name(image, root / "images").replace("/", "_") for image in paired}
        remarks.append(
            "each image counts as a slide of its own: give --slides-csv or --slide-pattern if some share one"
        )
    meaning = scheme or FOREGROUND
    sources = [
        Source(
            slide_id,
            tuple(files),
            image_labels=(UNLABELLED,) * len(files),
            scheme=meaning,
            image_masks=tuple(masks[_name(file, root / "images")] for file in files),
        )
        for slide_id, files in _by_slide(ids).items()
    ]
    return Dataset("pairs", unique(sources, root), meaning.class_names, tuple(remarks), scheme=meaning)


def _name(image: Path, folder: Path) -> str:
    """What an image shares with its mask: its path without folder and suffix."""
    return image.relative_to(folder).with_suffix("").as_posix()


def _masks(root: Path) -> dict[str, Path]:
    """Masks of a data set by the name of their image."""
    found: dict[str, Path] = {}
    for mask in _images(root / "masks"):
        other = found.setdefault(_name(mask, root / "masks").removesuffix(MASK_ENDING), mask)
        if other is not mask:
            raise UsageError(f"two masks of one image, {other.name} and {mask.name}", root, "leave one of them")
    return found


def sicapv2(root: Path) -> Dataset:
    """SICAPv2: images/, masks/ and the official patient-wise parts in partition/ (Silva-Rodriguez et al. 2020).

    A slide is the name before ``_Block_``. ``split`` is train or test; ``fold`` says in which of Val1 to Val4 a
    training slide is held out. A patch's mask says where Gleason patterns are; a tile without one is
    healthy if the lists call its patch non-cancerous (NC), and unlabelled otherwise.

    Raises:
        UsageError: A list is missing or malformed, a slide is in two parts, or no listed image is there.
    """
    parts = {part: _listed(root / "partition" / "Test" / f"{part.title()}.xlsx") for part in ("train", "test")}
    folds = {
        fold: _listed(root / "partition" / "Validation" / fold / "Test.xlsx")
        for fold in _SICAPV2_FOLDS
        if (root / "partition" / "Validation" / fold).is_dir()
    }
    split_of, fold_of = _part_of_slides(parts, root), _part_of_slides(folds, root)
    masks = _masks(root)
    there = {file.stem: file for file in _images(root / "images")}
    healthy = {name for listed in parts.values() for name, is_healthy in listed.items() if is_healthy}
    names = sorted(name for listed in parts.values() for name in listed)
    ids = {there[name]: _slide_of(name) for name in names if name in there and name in masks}
    if not ids:
        raise UsageError(f"none of the {len(names)} listed images is in images/ with a mask in masks/", root)
    sources = [
        Source(
            slide_id,
            tuple(files),
            image_labels=tuple(_HEALTHY if file.stem in healthy else UNLABELLED for file in files),
            split=split_of[slide_id],
            scheme=SICAPV2,
            image_masks=tuple(masks[file.stem] for file in files),
            mpp=SICAPV2_MPP,
            fold=fold_of.get(slide_id),
        )
        for slide_id, files in _by_slide(ids).items()
    ]
    counts = Counter(source.split for source in sources)
    remarks = [f"{len(ids)} images of {len(sources)} slides: {counts['train']} to train, {counts['test']} to test"]
    if len(ids) < len(names):
        remarks.append(f"{len(names) - len(ids)} of {len(names)} listed images have no file or no mask: left out")
    if len(there) > len(ids):
        remarks.append(f"{len(there) - len(ids)} images are in no list, or have no mask: left out")
    return Dataset("sicapv2", unique(sources, root), GLEASON_CLASSES, tuple(remarks), mpp=SICAPV2_MPP)


def _slide_of(image_name: str) -> str:
    return safe_id(image_name.split("_Block_")[0])


def _part_of_slides(parts: dict[str, dict[str, bool]], root: Path) -> dict[str, str]:
    """Part of each slide; parts are by patient, so that none may be in two."""
    found: dict[str, str] = {}
    for part, listed in parts.items():
        for name in listed:
            other = found.setdefault(_slide_of(name), part)
            if other != part:
                raise UsageError(f"slide {_slide_of(name)} is in both {other} and {part}", root / "partition")
    return found


def _listed(path: Path) -> dict[str, bool]:
    """Images of an official list, without suffix: whether each is non-cancerous."""
    if not path.is_file():
        raise UsageError("no such file", path, "SICAPv2 has partition/Test/{Train,Test}.xlsx")
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        rows: list[tuple[Any, ...]] = list(book.worksheets[0].iter_rows(values_only=True))
        book.close()
    except Exception as error:
        # openpyxl lets through whatever zip and XML raise.
        raise UsageError(f"cannot be read as a spreadsheet ({type(error).__name__})", path) from error
    header = [str(value) for value in rows[0]] if rows else []
    missing = [name for name in _SICAPV2_COLUMNS if name not in header]
    if missing:
        raise UsageError(f"column {missing[0]!r} is missing", path, f"it has {', '.join(header) or 'no columns'}")
    name, healthy = (header.index(column) for column in _SICAPV2_COLUMNS)
    return {Path(str(row[name])).stem: row[healthy] in (1, "1") for row in rows[1:] if row[name]}


def medmnist(path: Path) -> Dataset:
    """A MedMNIST archive: {train,val,test}_{images,labels} in one .npz; the official parts are the slides.

    Its images have no scale. Greyscale becomes RGB.

    Args:
        path: The archive, or a folder with just one.

    Raises:
        UsageError: No archive, an array is missing, or has another shape than one class per 2D image needs.
    """
    archives = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if len(archives) != 1 or not archives[0].is_file():
        raise UsageError(f"{len(archives)} .npz files, one is needed", path, "name the file itself with --root")
    (archive,) = archives
    labels, side = {}, 0
    try:
        with zipfile.ZipFile(archive) as members, np.load(archive, allow_pickle=False) as arrays:
            for part in PARTS:
                shape = array_header(members, f"{part}_images")
                labels[part] = np.asarray(arrays[f"{part}_labels"])
                side = _image_side(shape, labels[part], archive)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError(f"not a MedMNIST archive ({error})", archive) from error
    count = 1 + max(int(found.max()) for found in labels.values())
    known = MEDMNIST_CLASSES.get(archive.stem.split("_")[0], ())
    names = known if len(known) == count else tuple(str(number) for number in range(count))
    sources = [
        Source(part, (archive,), image_labels=tuple(found.ravel().astype(int).tolist()), split=part)
        for part, found in labels.items()
    ]
    remark = f"{archive.name}: {', '.join(f'{len(found)} to {part}' for part, found in labels.items())}; no scale known"
    return Dataset("medmnist", unique(sources, archive), names, (remark,), tile_px=side, mpp=None)


def _image_side(shape: tuple[int, ...], labels: np.ndarray, archive: Path) -> int:
    """Side of the images of a part that has one class per square image."""
    if len(shape) not in (3, 4) or shape[1] != shape[2] or (len(shape) == 4 and shape[3] != 3):
        raise UsageError(f"images of shape {shape}, (N, side, side) or (N, side, side, 3) is read", archive)
    if labels.shape not in ((shape[0],), (shape[0], 1)) or not len(labels) or labels.dtype.kind not in "iu":
        raise UsageError(f"labels of shape {labels.shape}, one class for each of {shape[0]} images is read", archive)
    if shape[1] > MAX_TILE_PX:
        raise UsageError(f"images of {shape[1]} px, at most {MAX_TILE_PX} are read", archive)
    if labels.min() < 0:
        raise UsageError(f"label {labels.min()}, classes are counted from 0", archive)
    return shape[1]
