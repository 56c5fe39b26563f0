"""jpeglib: tiles cut out of a slide's JPEG coefficients, the fewest bytes that lose nothing. Runs in jpeglib's own
environment; FOLDER holds ``cut.json`` and one JPEG file per segment; prints one line of JSON.

Tiles lie on the grid of JPEG blocks, so quantised coefficients are copied, never recomputed; Huffman tables are
libjpeg's default ones, as in Bony's tiles.
"""

import json
import sys
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import jpeglib
import numpy as np

BLOCK = 8


@lru_cache(maxsize=128)
def read(path: str) -> jpeglib.DCTJPEG:
    return jpeglib.read_dct(path)


def plane(grid: np.ndarray, name: str, box: tuple[int, int, int], side: tuple[int, int]) -> np.ndarray:
    """Blocks of one colour plane under a square box of level pixels, out of the segments it touches.

    Args:
        grid: Paths of the level's segments, object (rows, columns).
        name: "Y", "Cb" or "Cr".
        box: Left, top and side.
        side: Width and height of a segment.
    """
    left, top, span = box
    rows = range(top // side[1], (top + span - 1) // side[1] + 1)
    columns = range(left // side[0], (left + span - 1) // side[0] + 1)
    joined = np.concatenate(
        [np.concatenate([getattr(read(grid[row, column]), name) for column in columns], axis=1) for row in rows]
    )
    shrink = len(rows) * side[1] // BLOCK // joined.shape[0]  # 2 where chroma is halved
    step = BLOCK * shrink
    y, x = (top - rows[0] * side[1]) // step, (left - columns[0] * side[0]) // step
    return joined[y : y + span // step, x : x + span // step]


def main(folder: Path) -> None:
    """Run it."""
    plan = json.loads((folder / "cut.json").read_text())
    grid = np.array([[str(folder / f"{row}-{column}.jpg") for column in range(plan["columns"])]
                     for row in range(plan["rows"])], object)  # fmt: skip
    sizes = []
    for left, top in plan["corners"]:
        box = left, top, plan["px"]
        first = read(grid[top // plan["segment"][1], left // plan["segment"][0]])
        planes = {name: plane(grid, name, box, plan["segment"]) for name in ("Y", "Cb", "Cr")}
        cut = jpeglib.from_dct(**planes, qt=first.qt, quant_tbl_no=first.quant_tbl_no)
        cut.jpeg_color_space = first.jpeg_color_space
        cut.write_dct(str(folder / "tile.jpg"))
        sizes.append((folder / "tile.jpg").stat().st_size)
    print(json.dumps({"bytes": sizes, "version": version("jpeglib")}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
