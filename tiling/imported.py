"""Images that others have cut, chosen and labelled, to candidates: larger ones are cut, none is filtered.

A broken image is left out and named; the others are not touched by it. MedMNIST's archives are read as a stream: one
batch of images in memory, whatever the archive's size.
"""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import IO

import cv2
import numpy as np

from tiling import filters
from tiling.codec import JpegSettings
from tiling.cut import Candidate, row_reader
from tiling.datasets import Source
from tiling.errors import SlideError
from tiling.grid import Cut, Level, choose_cut, tile_corners
from tiling.labels import UNLABELLED
from tiling.limits import DEFAULT_LIMITS, Limits
from tiling.masks import open_mask_file, tile_labels
from tiling.settings import TileSettings
from tiling.slide import Slide, open_slide

ARCHIVE_SUFFIX = ".npz"
PARTS = ("train", "val", "test")
_MCU = 16
_BATCH_BYTES = 1 << 22


class ImportedTiles:
    """Tiles of a source whose images others have chosen: iterate once, then read what was found.

    Yields candidates, all of them kept, each with the settings of its image's own JPEG compression where it is cut from
    one pixel for pixel. x and y are pixels of the image.

    Attributes:
        broken: One line per image that was left out.
        mpp: True scale of the tiles, um/px; None when nobody knows it.

    Args:
        source: A source with ``image_labels``.
        settings: Tile side, scale and label share.
        limits: What an image's header may claim.

    Raises:
        SlideError: While iterating: no image gives a tile, or an archive is damaged.
        GridError: While iterating: the images are coarser than the target.
    """

    def __init__(self, source: Source, settings: TileSettings, limits: Limits = DEFAULT_LIMITS) -> None:
        self.broken: list[str] = []
        self.mpp: float | None = None
        self._source, self._settings, self._limits = source, settings, limits

    def __iter__(self) -> Iterator[tuple[Candidate, JpegSettings | None]]:
        in_archive = self._source.images[0].suffix.lower() == ARCHIVE_SUFFIX
        count = 0
        for found in self._of_archive() if in_archive else self._of_files():
            count += 1
            yield found
        if not count:
            reason = self.broken[0] if self.broken else f"images are smaller than {self._settings.tile_px} px"
            raise SlideError(f"no tile can be cut: {reason}", self._source.images[0])

    def damage(self) -> str:
        """What was left out, in a line; "" when nothing was."""
        if len(self.broken) < 2:
            return "".join(self.broken)
        return f"{len(self.broken)} of {len(self._source.images)} images left out; the first: {self.broken[0]}"

    def _of_files(self) -> Iterator[tuple[Candidate, JpegSettings | None]]:
        for number in range(len(self._source.images)):
            try:
                candidates, jpeg = self._cut_file(number)
            except SlideError as error:
                self.broken.append(str(error))
                continue
            yield from ((candidate, jpeg) for candidate in candidates)

    def _cut_file(self, number: int) -> tuple[list[Candidate], JpegSettings | None]:
        """Candidates of one image file."""
        source, settings = self._source, self._settings
        path = source.images[number]
        with ExitStack() as opened:
            image = opened.enter_context(open_slide(path, settings.slide_mpp or source.mpp, self._limits))
            image.mpp = image.mpp or settings.mpp
            if image.mpp is None:
                raise SlideError("tile images do not say their scale", path, "give it with --mpp or --slide-mpp")
            cut = choose_cut(image.levels, image.mpp, settings.tile_px, settings.mpp, settings.mpp_tolerance)
            corners = _corners(cut)
            tiles = _tiles(image, cut, corners)
            candidates = self._candidates(corners, tiles, number)
            if source.image_masks is not None and source.scheme is not None:
                mask = open_mask_file(source.image_masks[number], source.scheme, image, cut, self._limits)
                opened.enter_context(closing(mask))
                for place, (x, y) in enumerate(corners.tolist()):
                    found = tile_labels(mask, x, y, cut, source.scheme, settings.min_label_share)
                    if found is None:
                        raise SlideError("mask is damaged", source.image_masks[number])
                    label = candidates[place].label if found.label == UNLABELLED else found.label
                    candidates[place] = replace(
                        candidates[place], mask=found.mask, coverage=found.coverage, label=label
                    )
            self.mpp = cut.mpp
            return candidates, None if cut.resampled else image.jpeg(cut.level.index)

    def _of_archive(self) -> Iterator[tuple[Candidate, None]]:
        """Candidates of one part of a MedMNIST archive."""
        source, settings = self._source, self._settings
        first = 0
        for images in _stream(source.images[0], f"{source.split}_images"):
            side = images.shape[1]
            level, mpp = Level(0, side, side, 1.0), settings.slide_mpp or source.mpp or settings.mpp
            cut = Cut(level, settings.tile_px, settings.tile_px, nan)
            if mpp is not None:
                cut = choose_cut([level], mpp, settings.tile_px, settings.mpp, settings.mpp_tolerance)
                self.mpp = cut.mpp
            corners = _corners(cut)
            for number, image in enumerate(images, start=first):
                tiles = np.array([_to_size(image[y : y + cut.span, x : x + cut.span], cut) for x, y in corners])
                yield from ((candidate, None) for candidate in self._candidates(corners, tiles, number))
            first += len(images)

    def _candidates(self, corners: np.ndarray, tiles: np.ndarray, number: int) -> list[Candidate]:
        """Kept candidates of one image, measured, with the image's own label."""
        if not len(corners):
            return []
        label = (self._source.image_labels or ())[number]
        metrics = filters.measure(tiles)
        return [
            Candidate(x, y, nan, metrics=metrics[place], tile=tiles[place], image=number, label=label)
            for place, (x, y) in enumerate(corners.tolist())
        ]


def _corners(cut: Cut) -> np.ndarray:
    """Corners of all whole tiles; what is left over is shared between both sides, on the JPEG's 16-pixel grid."""
    size = cut.level.width, cut.level.height
    left, top = (side % cut.span // 2 // _MCU * _MCU if side >= cut.span else 0 for side in size)
    return tile_corners(*size, cut.span, (left, top))


def _tiles(image: Slide, cut: Cut, corners: np.ndarray) -> np.ndarray:
    """Tiles of an image, uint8 (n, px, px, 3)."""
    reader = row_reader(image, cut.level)
    out = np.empty((len(corners), cut.px, cut.px, 3), np.uint8)
    for place, (x, y) in enumerate(corners.tolist()):
        tile = reader.cut(x, y, cut.span)
        if tile is None:
            raise SlideError(next(iter(reader.damaged.values())), image.path)
        out[place] = _to_size(tile, cut)
    return out


def _to_size(tile: np.ndarray, cut: Cut) -> np.ndarray:
    """A tile at its stored size, by area mean."""
    return np.asarray(cv2.resize(tile, (cut.px, cut.px), interpolation=cv2.INTER_AREA)) if cut.resampled else tile


def array_header(archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    """Shape of an array of bytes in an .npz archive, without reading it.

    Raises:
        KeyError: There is no such array.
        ValueError: It is no array of uint8 in C order.
    """
    with archive.open(f"{name}.npy") as member:
        return _read_header(member, name)


def _read_header(member: IO[bytes], name: str) -> tuple[int, ...]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(member)
    if dtype != np.uint8 or fortran:
        raise ValueError(f"{name} is {dtype}, uint8 in C order is read")
    return tuple(shape)


def _stream(path: Path, name: str) -> Iterator[np.ndarray]:
    """Batches of an array of images, as RGB, uint8 (n, side, side, 3).

    Raises:
        SlideError: The archive is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
            count, *shape = _read_header(member, name)
            size = int(np.prod(shape))
            batch = max(1, _BATCH_BYTES // size)
            for first in range(0, count, batch):
                wanted = min(batch, count - first)
                data = member.read(wanted * size)
                if len(data) < wanted * size:
                    raise SlideError(f"{name} ends after {first + len(data) // size} of {count} images", path)
                images = np.frombuffer(data, np.uint8).reshape(wanted, *shape)
                yield images if images.ndim == 4 else np.repeat(images[..., None], 3, axis=3)
    except (OSError, KeyError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise SlideError(f"archive is damaged ({type(error).__name__}: {error})", path) from error
