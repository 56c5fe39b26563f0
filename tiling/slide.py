"""Open any slide: what it is decides how it is read. Label and macro images are never touched.

TIFF-family slides (PANDA TIFF, SVS, NDPI, OME-TIFF, generic pyramids) are read through tifffile and imagecodecs,
segment by segment; formats that only OpenSlide knows through OpenSlide; plain images whole. Headers are checked against
limits before anything is decoded. docs/formats.md says which formats were tried on which files.
"""

from pathlib import Path

import openslide

from tiling.errors import SlideError
from tiling.limits import DEFAULT_LIMITS, Limits
from tiling.pyramid import COPY_AGAIN, Slide
from tiling.slide_image import ImageSlide
from tiling.slide_openslide import OpenSlideSlide
from tiling.slide_tiff import TiffSlide
from tiling.tiff_codec import LayoutError
from tiling.tiff_pages import check_pages, is_tiff

__all__ = ["IMAGE_SUFFIXES", "OPENSLIDE_SUFFIXES", "SLIDE_SUFFIXES", "TIFF_SUFFIXES", "Slide", "open_slide"]

TIFF_SUFFIXES = frozenset({".tif", ".tiff", ".svs", ".ndpi"})
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})
OPENSLIDE_SUFFIXES = frozenset({".mrxs", ".scn", ".bif", ".vms", ".vmu", ".dcm"})
SLIDE_SUFFIXES = TIFF_SUFFIXES | IMAGE_SUFFIXES | OPENSLIDE_SUFFIXES

# OpenSlide's names of TIFF kinds whose tiles overlap, are missing or lie in an order that only OpenSlide knows.
_OPENSLIDE_KINDS = frozenset({"philips", "trestle", "ventana", "leica"})
_TIFF_KINDS = frozenset({"generic-tiff", "aperio", "hamamatsu"})


def open_slide(path: Path, mpp: float | None = None, limits: Limits = DEFAULT_LIMITS) -> Slide:
    """Open a slide by its suffix, or by what OpenSlide takes it for where its suffix says nothing.

    Args:
        path: A slide's file; of a slide of several files the one that OpenSlide opens.
        mpp: um per level-0 pixel, overriding what the file says.
        limits: What its header may claim.

    Raises:
        SlideError: The file is missing, empty, not what its suffix says, or over a limit.
    """
    if not path.is_file():
        raise SlideError("no such file", path)
    if path.stat().st_size == 0:
        raise SlideError("file is empty (0 bytes)", path, COPY_AGAIN)
    slide = _opened(path, limits)
    slide.mpp = mpp
    return slide


def _opened(path: Path, limits: Limits) -> Slide:
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return ImageSlide(path, limits)
    if suffix in TIFF_SUFFIXES or is_tiff(path):
        check_pages(path, limits)
    kind = None if suffix in OPENSLIDE_SUFFIXES else _kind(path)
    if suffix in OPENSLIDE_SUFFIXES or kind in _OPENSLIDE_KINDS:
        return OpenSlideSlide(path, limits)
    if suffix in TIFF_SUFFIXES or kind in _TIFF_KINDS:
        return _opened_tiff(path, limits)
    if kind is None:
        raise SlideError(f"not a slide: OpenSlide knows no format like it; slides end in {_listed()}", path)
    return OpenSlideSlide(path, limits)


def _opened_tiff(path: Path, limits: Limits) -> Slide:
    """A TIFF through tifffile, else through OpenSlide, whose complaint says less than tifffile's."""
    try:
        return TiffSlide(path, limits)
    except LayoutError as unread:
        try:
            return OpenSlideSlide(path, limits)
        except SlideError:
            raise unread from None


def _kind(path: Path) -> str | None:
    """What OpenSlide takes a file for, by its first bytes and tags."""
    try:
        kind = openslide.OpenSlide.detect_format(path)
    except openslide.OpenSlideError:
        return None
    return None if kind is None else str(kind)


def _listed() -> str:
    return ", ".join(sorted(SLIDE_SUFFIXES))
