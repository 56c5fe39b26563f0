"""The heat map: every tile in its class's colour over the slide's overview, with legend and scale bar, as PNG."""

import io
import json
import math

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageOps
from PIL.PngImagePlugin import PngInfo

from pipeline.regions import ClassMap
from tiling.pictures import font

OPACITY = 0.45
SIDE = 1200
# The PNG's text chunk of this name says where in the picture the slide lies: left, top, width, height, as JSON.
PLACE = "slide"
_LEAST_WIDTH, _LONGEST_BAR = 900, 300
_MARGIN, _LINE, _SWATCH = 12, 36, 22
_TITLE_SIZE, _FONT, _SMALL_FONT = 27, font(23), font(20)
_BLACK, _GREY, _FRAME, _WHITE = (0, 0, 0), (110, 110, 110), (200, 200, 200), (255, 255, 255)


def heat_map(overview: np.ndarray, size: tuple[int, int], tiles: ClassMap, title: str, note: str) -> bytes:
    """The picture, as PNG.

    Args:
        overview: The whole slide, reduced, uint8 (H, W, 3).
        size: Width and height of its level 0.
        tiles: Classes of its tiles.
        title: Headline.
        note: Said below the picture.
    """
    picture = Image.fromarray(_painted(_fitted(overview), size, tiles))
    width = max(picture.width, _LEAST_WIDTH)
    header = _header(title, tiles, width)
    footer = _footer(note, tiles.mpp * size[0] / picture.width, width)
    place = {"left": _MARGIN, "top": header.height + 2 * _MARGIN, "width": picture.width, "height": picture.height}
    bottom = place["top"] + picture.height + _MARGIN
    image = Image.new("RGB", (width + 2 * _MARGIN, bottom + footer.height + _MARGIN), _WHITE)
    image.paste(header, (_MARGIN, _MARGIN))
    image.paste(ImageOps.expand(picture, 1, _FRAME), (place["left"] - 1, place["top"] - 1))
    image.paste(footer, (_MARGIN, bottom))
    info = PngInfo()
    info.add_text(PLACE, json.dumps(place))
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=info)
    return file.getvalue()


def _fitted(overview: np.ndarray) -> np.ndarray:
    """The overview (H, W, 3) with its longer side at SIDE, uint8."""
    scale = SIDE / max(overview.shape[:2])
    size = max(1, round(overview.shape[1] * scale)), max(1, round(overview.shape[0] * scale))
    return np.asarray(cv2.resize(overview, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR))


def _painted(picture: np.ndarray, size: tuple[int, int], tiles: ClassMap) -> np.ndarray:
    """The picture, uint8 (H, W, 3), in which each tile is grey mixed with its class's colour.

    Stained tissue below would shift the hue: yellow on pink looks like orange.
    """
    height, width = picture.shape[:2]
    # Edges are rounded, not sides, so that neighbours leave neither a gap nor an overlap.
    scale = np.array([width / size[0], height / size[1]] * 2)
    edges = np.rint(tiles.boxes * scale).astype(np.int64)
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[..., None]
    painted = picture.copy()
    for (x0, y0, x1, y1), number in zip(edges, tiles.classes, strict=True):
        colour = OPACITY * np.array(tiles.colours[number])
        painted[y0:y1, x0:x1] = np.rint((1 - OPACITY) * grey[y0:y1, x0:x1] + colour)
    return painted


def _header(title: str, tiles: ClassMap, width: int) -> Image.Image:
    """Title, and one entry per class with share and area, in as many lines as they need."""
    image = Image.new("RGB", (width, _LINE * (2 + len(tiles.class_names))), _WHITE)
    draw = ImageDraw.Draw(image)
    fitting = _TITLE_SIZE * width / font(_TITLE_SIZE).getlength(title)
    draw.text((0, 0), title, _BLACK, font(min(_TITLE_SIZE, int(fitting))))
    left, top = 0.0, _LINE
    for (name, found), colour in zip(tiles.per_class().items(), tiles.colours, strict=True):
        share = "no tile" if not found["tiles"] else f"{found['share']:.1%}  {found['area_mm2']:.2f} mm2"
        text = f"{name}  {share}"
        length = _SWATCH + 8 + _FONT.getlength(text)
        if left and left + length > width:
            left, top = 0.0, top + _LINE
        draw.rectangle((left, top + 3, left + _SWATCH, top + 3 + _SWATCH), colour, _GREY)
        draw.text((left + _SWATCH + 8, top), text, _BLACK if found["tiles"] else _GREY, _FONT)
        left += length + 2 * _SWATCH
    return image.crop((0, 0, width, top + _LINE))


def _footer(note: str, um_per_px: float, width: int) -> Image.Image:
    """Scale bar and note."""
    image = Image.new("RGB", (width, _LINE), _WHITE)
    draw = ImageDraw.Draw(image)
    length_mm = _round_length(_LONGEST_BAR * um_per_px / 1000)
    end = round(length_mm * 1000 / um_per_px)
    draw.rectangle((0, 12, end, 18), _BLACK)
    draw.text((end + 10, 0), f"{length_mm:g} mm", _BLACK, _FONT)
    draw.text((width, 3), note, _GREY, _SMALL_FONT, anchor="ra")
    return image


def _round_length(most: float) -> float:
    """The largest of 1, 2 and 5 times a power of ten that is at most ``most``.

    >>> [_round_length(most) for most in (0.031, 4.9, 10)]
    [0.02, 2.0, 10.0]
    """
    unit = 10.0 ** math.floor(math.log10(most))
    return max(factor * unit for factor in (1, 2, 5) if factor * unit <= most)
