"""Print the table and draw the figure of docs/filters.md.

    python docs/make_filter_figure.py ../shared/data docs/filters.jpg

The tiles are real; blur, black borders and most ink are made here, from real tiles.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw

from tiling.cut import cut_slide, plan_slide
from tiling.filters import METRICS, REASONS, Thresholds, measure, verdicts
from tiling.grid import tile_corners
from tiling.pictures import font
from tiling.settings import TileSettings
from tiling.slide import open_slide
from tiling.tissue import tissue_fraction, tissue_mask

PX = 224
# Transmittance of a full layer of marker ink in red, green and blue.
INKS = {
    "blue": (0.25, 0.45, 0.85), "navy": (0.12, 0.16, 0.45), "green": (0.20, 0.55, 0.40), "cyan": (0.15, 0.60, 0.75),
    "black": (0.15, 0.15, 0.17), "red": (0.80, 0.15, 0.25),
}  # fmt: skip
SIGMAS = (1.5, 2.0, 3.0, 4.0)
JPEG_QUALITY = 88


def read(path: Path) -> np.ndarray:
    """An image file as RGB, uint8 (H, W, 3)."""
    return np.asarray(Image.open(path).convert("RGB"))


def tiles_of(image: np.ndarray) -> np.ndarray:
    """All whole tiles of an image, uint8 (n, PX, PX, 3)."""
    corners = tile_corners(image.shape[1], image.shape[0], PX)
    return np.array([image[y : y + PX, x : x + PX] for x, y in corners], np.uint8).reshape(-1, PX, PX, 3)


def _all(paths: Iterator[Path]) -> np.ndarray:
    return np.concatenate([tiles_of(read(path)) for path in sorted(paths)])


def panda_tiles(data: Path) -> np.ndarray:
    """The middle of every PANDA tile: chosen as tissue by others."""
    paths = sorted((data / "panda_gleason_tiles/tiles").rglob("*.jpeg"))
    return np.stack([read(path)[16 : 16 + PX, 16 : 16 + PX] for path in paths])


def glass_tiles(data: Path) -> np.ndarray:
    """Tiles of the tissue microarray's picture under which the tissue mask finds nothing at all."""
    image = read(data / "wsi/histoprep_tma_spots.jpeg")
    step = PX // 4
    corners = np.array(
        [(x, y) for y in range(0, image.shape[0] - PX, step) for x in range(0, image.shape[1] - PX, step)]
    )
    share = tissue_fraction(tissue_mask(image), np.concatenate([corners, corners + PX], axis=1), (1, 1))
    return np.stack([image[y : y + PX, x : x + PX] for x, y in corners[share == 0]])


def candidates(paths: Iterator[Path]) -> np.ndarray:
    """Tiles of slides with enough tissue under them, as ``bony tile`` cuts them."""
    found = []
    settings = TileSettings(tile_px=PX)
    for path in sorted(paths):
        with open_slide(path) as slide:
            found += [
                one.tile for one in cut_slide(slide, plan_slide(slide, settings), settings) if one.tile is not None
            ]
    return np.stack(found)


def real_sets(data: Path) -> dict[str, np.ndarray]:
    """Real tiles by source, uint8 (n, PX, PX, 3) each."""
    crc = data / "crc_val_he_test70/images"
    return {
        "PANDA tiles": panda_tiles(data),
        "PANDA slides": candidates((data / "panda_stitched/train_images").glob("*.tiff")),
        "CMU-1 SVS": candidates((data / "wsi").glob("*.svs")),
        "HistoPrep prostate": tiles_of(read(data / "wsi/histoprep_slide.jpeg")),
        "CRC-VAL-HE": _all(crc.glob("*.jpg")),
        "CRC, adipose only": _all(crc.glob("ADI*.jpg")),
        "CRC, mucus only": _all(crc.glob("MUC*.jpg")),
        "CRC, lymphocytes only": _all(crc.glob("LYM*.jpg")),
        "MoNuSeg (40x)": _all((data / "monuseg14/images").iterdir()),
        "LC25000 (enlarged)": _all((data / "lc25000_test100/images").iterdir()),
        "IHC, DAB and haematoxylin": tiles_of(read(data / "pypi_images/skimage_ihc.png")),
        "StarDist H&E": tiles_of(read(data / "pypi_images/stardist_histo.jpg")),
    }


def _saved(tile: np.ndarray) -> np.ndarray:
    """A tile after JPEG: what was changed has been compressed like the rest."""
    _, data = cv2.imencode(".jpg", tile[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))[..., ::-1]


def blurred(tiles: np.ndarray, sigma: float) -> np.ndarray:
    """Tiles out of focus: Gaussian blur of ``sigma`` pixels."""
    return np.stack([_saved(cv2.GaussianBlur(tile, (0, 0), sigma)) for tile in tiles])


def _half_plane(rng: np.random.Generator, share: float, wave: float) -> np.ndarray:
    """A mask of ``share`` of a tile behind a wavy edge, float32 (PX, PX): strokes of a marker are wider than tiles."""
    y, x = np.mgrid[:PX, :PX]
    angle = rng.uniform(0, 2 * np.pi)
    across, along = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    depth = across + wave * np.sin(along / 9)
    return np.asarray(depth <= np.quantile(depth, share), np.float32)


def inked(tiles: np.ndarray, ink: str, layer: float = 1.0, share: float = 0.5, seed: int = 0) -> np.ndarray:
    """Tiles with a streaky stroke of marker over ``share`` of them; Beer-Lambert: ink takes its share of the light."""
    rng = np.random.default_rng(seed)
    found = []
    for tile in tiles:
        streaks = cv2.GaussianBlur(rng.standard_normal((PX, PX), np.float32), (0, 0), 6)
        amount = layer * cv2.GaussianBlur(_half_plane(rng, share, 4), (0, 0), 2) * (1 + 1.5 * streaks)
        found.append(_saved((tile * np.array(INKS[ink]) ** amount[..., None]).clip(0, 255).astype(np.uint8)))
    return np.stack(found)


def bordered(tiles: np.ndarray, share: float = 0.3, seed: int = 0) -> np.ndarray:
    """Tiles that reach over the scanned field: ``share`` of them is black, with a little noise."""
    rng = np.random.default_rng(seed)
    found = []
    for tile in tiles:
        outside = np.arange(PX)[:, None] < share * PX
        black = rng.integers(0, 12, tile.shape, np.uint8)
        turned = np.rot90(np.where(outside[..., None], black, tile), rng.integers(4))
        found.append(_saved(np.ascontiguousarray(turned)))
    return np.stack(found)


def degraded_sets(tiles: np.ndarray, data: Path) -> dict[str, np.ndarray]:
    """What the filters are there for, made from real tissue tiles."""
    found = {"glass": glass_tiles(data)}
    found |= {f"blurred, sigma {sigma:g} px": blurred(tiles, sigma) for sigma in SIGMAS}
    for layer, name in ((1.0, "ink"), (0.7, "thin ink")):
        found |= {f"{name}, {ink}, on half of the tile": inked(tiles, ink, layer) for ink in INKS}
    found |= {f"black border on {share:.0%}": bordered(tiles, share) for share in (0.15, 0.3, 0.6)}
    return found


def table(real: dict[str, np.ndarray], degraded: dict[str, np.ndarray]) -> str:
    """What becomes of every set with the default thresholds, as Markdown."""
    lines = ["| tiles | number | kept | " + " | ".join(REASONS) + " |", "|---" * (3 + len(REASONS)) + "|"]
    for name, tiles in (*real.items(), *degraded.items()):
        count = Counter(verdicts(measure(tiles), Thresholds()))
        cells = [str(count[reason] or "") for reason in REASONS]
        lines.append(f"| {name} | {len(tiles)} | {count[''] / len(tiles):.1%} | {' | '.join(cells)} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Row:
    """One filter of the figure.

    Args:
        metric: Which of METRICS.
        title: What it rejects.
        measures: What the number is, in a few lines.
        limit: The default threshold.
        most: Whether larger values are rejected.
        form: Format of a value.
    """

    metric: str
    title: str
    measures: str
    limit: float
    most: bool
    form: str


def rows() -> list[Row]:
    """The filters in the order of the figure."""
    base = Thresholds()
    return [
        Row("empty", "mostly empty", "share of near-white,\nunsaturated pixels", base.max_empty, True, "{:.0%}"),
        Row("edges", "too few edges", "share of pixels on\na steep gradient", base.min_edges, False, "{:.1%}"),
        Row("texture", "too homogeneous", "local standard deviation,\ngrey levels", base.min_texture, False, "{:.1f}"),
        Row("sharpness", "out of focus", "Laplacian against\ntexture", base.min_sharpness, False, "{:.2f}"),
        Row("pen", "ink", "share of pixels in\ncolours of ink", base.max_pen, True, "{:.0%}"),
        Row("dark", "black border", "share of near-black\npixels", base.max_dark, True, "{:.0%}"),
    ]


SHOWN, SIDE, GAP, TOP, LEFT, CAPTION = 4, 122, 6, 56, 212, 38
MIDDLE = 34
REJECTED, KEPT = (196, 62, 0), (0, 114, 178)
_Pool = list[tuple[np.ndarray, str]]


def _chosen(pool: _Pool, row: Row, kept: bool) -> list[tuple[np.ndarray, str, float]]:
    """Up to SHOWN tiles of one side of the threshold, from bad to good, at even steps of the value.

    Rejected ones go from the worst to the threshold; kept ones, which pass all filters, from there to the median.
    """
    metrics = measure(np.stack([tile for tile, _ in pool]))
    values = metrics[:, METRICS.index(row.metric)]
    bad = values > row.limit if row.most else values < row.limit
    fits = np.flatnonzero(~bad & (np.array(verdicts(metrics, Thresholds())) == "") if kept else bad)
    near, far = np.quantile(values[fits], (1, 0.5 if kept else 0) if row.most == kept else (0, 0.5 if kept else 1))
    picked: list[int] = []
    for wanted in np.linspace(*((near, far) if kept else (far, near)), min(SHOWN, len(fits))):
        left = np.setdiff1d(fits, picked)
        picked.append(int(left[np.abs(values[left] - wanted).argmin()]))
    return [(*pool[number], float(values[number])) for number in picked]


def draw(pools: Callable[[str], tuple[_Pool, _Pool]]) -> Image.Image:
    """The figure; ``pools`` gives the tiles to choose rejected and kept ones from, with their origin, for a metric."""
    step = SIDE + CAPTION + GAP
    width = LEFT + 2 * SHOWN * (SIDE + GAP) + MIDDLE
    picture = Image.new("RGB", (width, TOP + len(rows()) * step), "white")
    canvas = ImageDraw.Draw(picture)
    middle = LEFT + SHOWN * (SIDE + GAP)
    canvas.text((middle - GAP, 12), "rejected", REJECTED, font(26), anchor="ra")
    canvas.text((middle + MIDDLE, 12), "kept", KEPT, font(26))
    for number, row in enumerate(rows()):
        top = TOP + number * step
        canvas.text((10, top + 8), row.title, "black", font(23))
        canvas.multiline_text((10, top + 40), row.measures, (70, 70, 70), font(16), spacing=3)
        limit = f"{'at most' if row.most else 'at least'} {row.form.format(row.limit)}"
        canvas.text((10, top + 88), limit, "black", font(19))
        canvas.line((middle + MIDDLE / 2 - GAP / 2, top, middle + MIDDLE / 2 - GAP / 2, top + SIDE), "black", 3)
        for pool, kept, colour, left in zip(
            pools(row.metric), (False, True), (REJECTED, KEPT), (LEFT, middle + MIDDLE), strict=True
        ):
            tiles = _chosen(pool, row, kept)
            for place, (tile, origin, value) in enumerate(tiles, start=0 if kept else SHOWN - len(tiles)):
                x = left + place * (SIDE + GAP)
                small = cv2.resize(tile, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
                picture.paste(Image.fromarray(small), (x, top))
                canvas.rectangle((x, top, x + SIDE - 1, top + SIDE - 1), outline=colour, width=2)
                canvas.text((x + 1, top + SIDE + 1), row.form.format(value), colour, font(18))
                canvas.text((x + 1, top + SIDE + 21), origin, (90, 90, 90), font(13))
    return picture


def pools_of(real: dict[str, np.ndarray], degraded: dict[str, np.ndarray]) -> Callable[[str], tuple[_Pool, _Pool]]:
    """Where the tiles of the figure come from: real ones wherever there are such."""

    def taken(sets: dict[str, np.ndarray], start: str, origin: str, most: int | None = None) -> _Pool:
        return [(tile, origin) for name, tiles in sets.items() if name.startswith(start) for tile in tiles[:most]]

    panda = taken(real, "PANDA tiles", "PANDA")
    tissue = [
        *panda,
        *taken(real, "HistoPrep", "HistoPrep"),
        *taken(real, "CRC-", "CRC"),
        *taken(real, "LC", "LC25000"),
    ]
    blur = [
        pair for sigma in SIGMAS for pair in taken(degraded, f"blurred, sigma {sigma:g} ", f"blurred, {sigma:g} px")
    ]
    ink = taken(real, "PANDA slides", "PANDA, real ink") + taken(degraded, "ink", "ink drawn", 2)
    rejected = {
        "empty": tissue + taken(degraded, "glass", "glass", 1), "edges": tissue, "texture": tissue, "sharpness": blur,
        "pen": ink, "dark": taken(degraded, "black border", "border drawn"),
    }  # fmt: skip
    kept = {"empty": tissue, "edges": tissue, "texture": tissue, "sharpness": blur + panda, "pen": panda, "dark": panda}
    return lambda metric: (rejected[metric], kept[metric])


if __name__ == "__main__":
    real = real_sets(Path(sys.argv[1]))
    degraded = degraded_sets(real["PANDA tiles"][::4], Path(sys.argv[1]))
    print(table(real, degraded))
    draw(pools_of(real, degraded)).save(sys.argv[2], quality=88)
