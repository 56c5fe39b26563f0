"""Pictures of a tiled slide: the overview with every candidate outlined, and a sheet of kept and rejected tiles."""

from collections.abc import Sequence
from functools import cache

import cv2
import imagecodecs
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tiling.grid import Cut

# One colour per fate of a candidate, told apart by colour-blind readers too (Okabe & Ito 2008).
COLOURS = {
    "": (0, 114, 178),
    "tissue": (170, 170, 170),
    "empty": (230, 159, 0),
    "edges": (213, 94, 0),
    "texture": (204, 121, 167),
    "flat": (210, 210, 210),
    "blur": (86, 180, 233),
    "pen": (0, 158, 115),
    "dark": (120, 90, 40),
    "damaged": (0, 0, 0),
}
NAMES = {
    "": "kept",
    "tissue": "too little tissue",
    "flat": "nothing but background",
    "empty": "mostly empty",
    "edges": "too few edges",
    "texture": "too homogeneous",
    "blur": "out of focus",
    "pen": "pen mark",
    "dark": "black border",
    "damaged": "damaged in the file",
}
LEAST_SIDE, MOST_SIDE = 800, 1500
SHEET_COLUMNS, SHEET_TILE, SHEET_KEPT, SHEET_REJECTED_EACH = 8, 112, 32, 8
_QUALITY = 85
_STRIP, _CAPTION, _GAP = 38, 24, 4
_LEGEND_FONT, _CAPTION_FONT = 24, 17


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font: figures look the same on every machine."""
    return ImageFont.load_default(size)


def to_look_at(overview: np.ndarray) -> np.ndarray:
    """The overview (H, W, 3) at a size to look at, uint8: reduced or enlarged a whole number of times, or as it is."""
    height, width = overview.shape[:2]
    longer = max(height, width)
    if longer > MOST_SIDE:
        factor = -(-longer // MOST_SIDE)
        size = max(1, width // factor), max(1, height // factor)
        return np.asarray(cv2.resize(overview, size, interpolation=cv2.INTER_AREA))
    factor = -(-LEAST_SIDE // longer)
    size = width * factor, height * factor
    return np.asarray(cv2.resize(overview, size, interpolation=cv2.INTER_LINEAR)) if factor > 1 else overview


def encoded(picture: np.ndarray) -> bytes:
    """A picture to look at, uint8 (H, W, 3), as JPEG."""
    return bytes(imagecodecs.jpeg8_encode(picture, level=_QUALITY))


def thumbnail(overview: np.ndarray, cut: Cut, corners: np.ndarray, reasons: Sequence[str]) -> bytes:
    """The overview with the outline of every candidate, coloured by its fate, and a legend with counts, as JPEG.

    Args:
        overview: uint8, shape (H, W, 3).
        cut: How the tiles were cut.
        corners: Candidates' corners in pixels of the cut level, shape (N, 2).
        reasons: Why each was rejected; "" for kept ones.
    """
    fitted = to_look_at(overview)
    height, width = fitted.shape[:2]
    picture = np.full((height + _STRIP, max(width, 700), 3), 255, np.uint8)
    picture[_STRIP:, :width] = fitted
    to_picture = width / cut.level.width
    first = np.rint(corners * to_picture + (1, _STRIP + 1)).astype(int).tolist()
    last = np.rint((corners + cut.span) * to_picture + (-2, _STRIP - 2)).astype(int).tolist()
    order = sorted(range(len(corners)), key=lambda n: reasons[n] == "")  # kept ones are drawn last, on top
    for number in order:
        (x0, y0), (x1, y1), reason = first[number], last[number], reasons[number]
        for inset in range(2 if reason == "" else 1):
            corner, opposite = (x0 + inset, y0 + inset), (x1 - inset, y1 - inset)
            cv2.rectangle(picture, corner, opposite, COLOURS[reason], 1)
    image = Image.fromarray(picture)
    _legend(ImageDraw.Draw(image), reasons)
    return encoded(np.asarray(image))


def _legend(draw: ImageDraw.ImageDraw, reasons: Sequence[str]) -> None:
    left = 6
    for reason, colour in COLOURS.items():
        count = sum(1 for other in reasons if other == reason)
        if not count and reason != "":
            continue
        draw.rectangle((left, 9, left + 18, 27), outline=colour, width=4)
        text = f"{NAMES.get(reason, reason)} {count}"
        draw.text((left + 26, 4), text, fill=(0, 0, 0), font=font(_LEGEND_FONT))
        left += 50 + round(draw.textlength(text, font=font(_LEGEND_FONT)))


def small(tile: np.ndarray) -> np.ndarray:
    """A tile (px, px, 3) at the size at which sheets show it."""
    return np.asarray(cv2.resize(tile, (SHEET_TILE, SHEET_TILE), interpolation=cv2.INTER_AREA))


class Sheet:
    """A contact sheet: kept tiles above, a few of those that each filter rejected below, each with its caption."""

    def __init__(self) -> None:
        self._kept: list[tuple[np.ndarray, str]] = []
        self._rejected: dict[str, list[np.ndarray]] = {}

    def keep(self, tile: np.ndarray, caption: str) -> None:
        """Show a kept tile; ``small`` already, or not."""
        self._kept.append((tile, caption))

    def reject(self, tile: np.ndarray, reason: str) -> None:
        """Show a rejected tile, if there are not SHEET_REJECTED_EACH of its reason yet."""
        shown = self._rejected.setdefault(reason, [])
        if len(shown) < SHEET_REJECTED_EACH:
            shown.append(small(tile))

    def draw(self) -> bytes:
        """The sheet as JPEG."""
        strips = [_strip(f"kept ({len(self._kept)} shown)", self._kept)]
        rejected = [(tile, NAMES.get(why, why)) for why, tiles in sorted(self._rejected.items()) for tile in tiles]
        if rejected:
            strips.append(_strip(f"rejected by a filter ({len(rejected)} shown)", rejected))
        return encoded(np.concatenate(strips))


def _strip(title: str, tiles: Sequence[tuple[np.ndarray, str]]) -> np.ndarray:
    """Title line and rows of captioned tiles, uint8 (H, W, 3)."""
    captions = _CAPTION if any(caption for _, caption in tiles) else _GAP
    rows = -(-len(tiles) // SHEET_COLUMNS)
    size = _STRIP + rows * (SHEET_TILE + captions), SHEET_COLUMNS * (SHEET_TILE + _GAP)
    picture = np.full((*size, 3), 255, np.uint8)
    places = []
    for number, (tile, _) in enumerate(tiles):
        row, column = divmod(number, SHEET_COLUMNS)
        x, y = column * (SHEET_TILE + _GAP), _STRIP + row * (SHEET_TILE + captions)
        picture[y : y + SHEET_TILE, x : x + SHEET_TILE] = tile if len(tile) == SHEET_TILE else small(tile)
        places.append((x + 2, y + SHEET_TILE + 1))
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    draw.text((4, 6), title, fill=(0, 0, 0), font=font(_LEGEND_FONT - 2))
    for place, (_, caption) in zip(places, tiles, strict=True):
        if caption:
            draw.text(place, caption, fill=(60, 60, 60), font=font(_CAPTION_FONT))
    return np.asarray(image)
