"""What a slide's header may claim before anything is decoded: a bomb is refused from its header."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tiling.errors import SlideError

_RGB = 3


@dataclass(frozen=True)
class Limits:
    """Limits on what a file claims. Real slides stay far below all of them; each can be raised for one that does not.

    Decoding is bounded as well: a segment never decodes to more pixels than the header gives it.

    Args:
        pages: Images in a file (a TIFF's IFDs, SubIFDs among them), and levels of a pyramid.
        segments: Segments of a level. Slides have some 600,000, tiles of one pixel billions.
        level_pixels: Pixels of a level.
        segment_pixels: Pixels of a segment, which is decoded as one; a plain image is one segment.
        total_bytes: Decoded bytes of all levels.
        ratio: Decoded bytes per byte of the file. Baseline JPEG of one flat colour has 512, tissue 10 to 30.
        free_bytes: Decoded bytes up to which ``ratio`` is not asked: small white slides may compress as they like.
    """

    pages: int = 1024
    segments: int = 1 << 22
    level_pixels: int = 1 << 36
    segment_pixels: int = 1 << 29
    total_bytes: int = 1 << 38
    ratio: float = 512.0
    free_bytes: int = 1 << 30

    def check_pages(self, count: int, path: Path) -> None:
        """Raise SlideError where there are too many images in a file."""
        self._check("pages", count, "pages", path)

    def check_segments(self, count: int, path: Path) -> None:
        """Raise SlideError where a level has too many segments."""
        self._check("segments", count, "segments on a level", path)

    def check_levels(self, sizes: Sequence[tuple[int, int]], path: Path) -> None:
        """Raise SlideError where (width, height) of the levels are none, empty or too large."""
        self.check_pages(len(sizes), path)
        for width, height in sizes:
            if width < 1 or height < 1:
                raise SlideError(f"a level claims {width} x {height} px", path)
            self._check("level_pixels", width * height, f"px on a level ({width} x {height})", path)
        self._check("total_bytes", sum(w * h for w, h in sizes) * _RGB, "decoded bytes", path)

    def check_segment(self, width: int, height: int, path: Path) -> None:
        """Raise SlideError where a segment, decoded as one, is empty or too large."""
        if width < 1 or height < 1:
            raise SlideError(f"a segment claims {width} x {height} px", path)
        self._check("segment_pixels", width * height, f"px in a segment ({width} x {height})", path)

    def check_ratio(self, pixels: int, stored: int, path: Path) -> None:
        """Raise SlideError where the pixels of all segments that are there are too many for ``stored`` bytes."""
        claimed = pixels * _RGB
        if claimed > self.free_bytes and claimed > self.ratio * stored:
            raise SlideError(
                f"claims {claimed:,} decoded bytes, {claimed / stored:,.0f} times the file's {stored:,}; limit is "
                f"{self.ratio:g} times beyond {self.free_bytes:,}",
                path,
                "raise it with --max-ratio if the slide is sound",
            )

    def _check(self, field: str, claimed: int, what: str, path: Path) -> None:
        limit = getattr(self, field)
        if claimed > limit:
            option = f"--max-{field.replace('_', '-')}"
            raise SlideError(
                f"claims {claimed:,} {what}, limit is {limit:,}", path, f"raise it with {option} if the slide is sound"
            )


DEFAULT_LIMITS = Limits()
