"""hs2p: SLIDE to OUT as a tar of JPEGs. Runs in hs2p's own environment; prints one line of JSON.

Tissue by hs2p's own segmentation on its default thumbnail, tiles of 224 px with at least half tissue, OpenSlide, Pillow
at quality 95, one worker, no previews.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import hs2p
from cpu_time import cpu_seconds
from hs2p.api import extract_tiles_to_tar

cv2.setNumThreads(1)


def main(slide: str, out: str) -> None:
    """Run it."""
    start = cpu_seconds()
    tiling = hs2p.TilingConfig(
        requested_spacing_um=0.5, requested_tile_size_px=224, tolerance=0.12, overlap=0.0, backend="openslide"
    )
    result = hs2p.tile_slide(
        hs2p.SlideSpec(sample_id="slide", image_path=Path(slide)),
        tiling=tiling,
        segmentation=hs2p.SegmentationConfig(method="hsv"),
        masks=replace(hs2p.DEFAULT_MASK_SAMPLING, min_coverage={"tissue": 0.5}),
    )
    hs2p.save_tiling_result(result, output_dir=Path(out))
    _, result = extract_tiles_to_tar(result, Path(out), jpeg_quality=95, num_workers=1)
    print(json.dumps({"tiles": result.num_tiles, "cpu_s": cpu_seconds() - start, "version": hs2p.__version__}))


if __name__ == "__main__":
    main(*sys.argv[1:])
