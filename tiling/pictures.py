"""Pictures of a tiled slide: the overview with every candidate outlined, and a sheet of kept and rejected tiles."""

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tiling.codec import encode_jpeg
from tiling.grid import Cut

# One colour per fate of a candidate, told apart by colour-blind readers too (Okabe & Ito 2008).
COLOURS = {
    "": (0, 114, 178),
    "tissue": (170, 170, 170),
    "empty": (230, 159, 0),
    "edges": (213, 94, 0),
    "texture": (204, 121, 167),
    "damaged": (0, 0, 0),
}
_NAMES = {
    "": "kept",
    "tissue": "too little tissue",
    "empty": "mostly empty",
    "edges": "too few edges",
    "texture": "too homogeneous",
}
THUMBNAIL_SIDE = 1200
SHEET_COLUMNS, SHEET_TILE = 8, 128
_STRIP, _CAPTION = 38, 24
_LEGEND_FONT, _CAPTION_FONT = 24, 17
_WHITE = (255, 255, 255)


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font: figures look the same on every machine."""
    return ImageFont.load_default(size)


def fit_overview(overview: np.ndarray) -> np.ndarray:
    """The overview (H, W, 3) with its longer side at THUMBNAIL_SIDE, uint8."""
    scale = THUMBNAIL_SIDE / max(overview.shape[:2])
    size = max(1, round(overview.shape[1] * scale)), max(1, round(overview.shape[0] * scale))
    return np.asarray(cv2.resize(overview, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR))


def thumbnail(overview: np.ndarray, cut: Cut, corners: np.ndarray, reasons: Sequence[str]) -> bytes:
    """The overview with the outline of every candidate, coloured by its fate, and a legend with counts, as JPEG.

    Args:
        overview: uint8, shape (H, W, 3).
        cut: How the tiles were cut.
        corners: Candidates' corners in pixels of the cut level, shape (N, 2).
        reasons: Why each was rejected; "" for kept ones.
    """
    fitted = fit_overview(overview)
    height, width = fitted.shape[:2]
    picture = np.full((height + _STRIP, max(width, 700), 3), 255, np.uint8)
    picture[_STRIP:, :width] = fitted
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    to_picture = width / cut.level.width
    order = sorted(range(len(corners)), key=lambda n: reasons[n] == "")  # kept ones are drawn last, on top
    for number in order:
        x, y = corners[number] * to_picture
        side = cut.span * to_picture
        reason = reasons[number]
        box = (x + 1, y + 1 + _STRIP, x + side - 1, y + side - 1 + _STRIP)
        draw.rectangle(box, outline=COLOURS[reason], width=2 if reason == "" else 1)
    _legend(draw, reasons)
    return encode_jpeg(np.asarray(image), None)


def _legend(draw: ImageDraw.ImageDraw, reasons: Sequence[str]) -> None:
    left = 6
    for reason, colour in COLOURS.items():
        count = sum(1 for other in reasons if other == reason)
        if not count and reason != "":
            continue
        draw.rectangle((left, 9, left + 18, 27), outline=colour, width=4)
        text = f"{_NAMES.get(reason, reason)} {count}"
        draw.text((left + 26, 4), text, fill=(0, 0, 0), font=font(_LEGEND_FONT))
        left += 50 + round(draw.textlength(text, font=font(_LEGEND_FONT)))


def contact_sheet(kept: Sequence[tuple[np.ndarray, str]], rejected: Sequence[tuple[np.ndarray, str]]) -> bytes:
    """A sheet of tiles, kept ones above and rejected ones below, each with its caption, as JPEG.

    Args:
        kept: Tiles, uint8 (px, px, 3), with their label's name.
        rejected: Tiles with the reason.
    """
    strips = [_strip(f"kept ({len(kept)} shown)", kept)]
    if rejected:
        named = [(tile, _NAMES.get(why, why)) for tile, why in rejected]
        strips.append(_strip(f"rejected by a filter ({len(rejected)} shown)", named))
    return encode_jpeg(np.concatenate(strips), None)


def _strip(title: str, tiles: Sequence[tuple[np.ndarray, str]]) -> np.ndarray:
    """Title line and rows of captioned tiles, uint8 (H, W, 3)."""
    step = SHEET_TILE + _CAPTION
    rows = -(-len(tiles) // SHEET_COLUMNS)
    image = Image.new("RGB", (SHEET_COLUMNS * (SHEET_TILE + 4), _STRIP + rows * step), _WHITE)
    draw = ImageDraw.Draw(image)
    draw.text((4, 6), title, fill=(0, 0, 0), font=font(_LEGEND_FONT - 2))
    for number, (tile, caption) in enumerate(tiles):
        row, column = divmod(number, SHEET_COLUMNS)
        small = cv2.resize(tile, (SHEET_TILE, SHEET_TILE), interpolation=cv2.INTER_AREA)
        x, y = column * (SHEET_TILE + 4), _STRIP + row * step
        image.paste(Image.fromarray(small), (x, y))
        draw.text((x + 2, y + SHEET_TILE + 1), caption, fill=(60, 60, 60), font=font(_CAPTION_FONT))
    return np.asarray(image)
