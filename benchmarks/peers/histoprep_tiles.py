"""HistoPrep: SLIDE to OUT as JPEG files. Runs in HistoPrep's own environment; prints one line of JSON.

Tissue by HistoPrep's Otsu, tiles of 224 px with at most half background, quality 95, no worker processes, no metrics.
"""

import json
import sys
from importlib.metadata import version

import cv2
from cpu_time import cpu_seconds
from histoprep import SlideReader

cv2.setNumThreads(1)


def main(slide: str, out: str) -> None:
    """Run it."""
    start = cpu_seconds()
    reader = SlideReader(slide)
    _, tissue = reader.get_tissue_mask()
    tiles = reader.get_tile_coordinates(tissue, width=224, max_background=0.5, out_of_bounds=False)
    rows = reader.save_regions(out, tiles, quality=95, num_workers=1, verbose=False)
    print(json.dumps({"tiles": len(rows), "cpu_s": cpu_seconds() - start, "version": version("histoprep")}))


if __name__ == "__main__":
    main(*sys.argv[1:])
