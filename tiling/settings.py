"""What decides a store's content: the same settings on the same slides give the same store, byte for byte."""

from dataclasses import asdict, dataclass, field
from typing import Any

from tiling.codec import CODECS
from tiling.errors import UsageError
from tiling.filters import Thresholds
from tiling.grid import MPP_RANGE, MPP_TOLERANCE

MIN_TILE_PX, MAX_TILE_PX = 16, 4096


@dataclass(frozen=True)
class TileSettings:
    """Settings of one tiling run.

    Args:
        tile_px: Side of a stored tile.
        mpp: Target um/px; None tiles every slide at its own level 0.
        mpp_tolerance: Relative difference up to which a level is used as it is.
        slide_mpp: um per level-0 pixel of every slide, overriding what the files say.
        codec: "jpeg" (near-lossless, the source's own tables) or "zstd" (lossless).
        thresholds: What a tile must satisfy; None keeps every tile (imported tiles, chosen by others).
        min_label_share: Least share of a tile that its label's class covers.
    """

    tile_px: int = 224
    mpp: float | None = 0.5
    mpp_tolerance: float = MPP_TOLERANCE
    slide_mpp: float | None = None
    codec: str = "jpeg"
    thresholds: Thresholds | None = field(default_factory=Thresholds)
    min_label_share: float = 0.05

    def __post_init__(self) -> None:
        low, high = MPP_RANGE
        if not MIN_TILE_PX <= self.tile_px <= MAX_TILE_PX:
            raise UsageError(f"tile_px is {self.tile_px}, must lie in {MIN_TILE_PX} to {MAX_TILE_PX}")
        for name, value in (("mpp", self.mpp), ("slide_mpp", self.slide_mpp)):
            if value is not None and not low <= value <= high:
                raise UsageError(f"{name} is {value}, must lie in {low} to {high} um/px")
        if not 0 <= self.mpp_tolerance < 1:
            raise UsageError(f"mpp_tolerance is {self.mpp_tolerance}, must lie in 0 to 1")
        if self.codec not in CODECS:
            raise UsageError(f"codec is {self.codec!r}, known are {', '.join(CODECS)}")
        if not 0 <= self.min_label_share <= 1:
            raise UsageError(f"min_label_share is {self.min_label_share}, must lie in 0 to 1")

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> "TileSettings":
        """Inverse of ``to_json``."""
        limits = value["thresholds"]
        return TileSettings(**{**value, "thresholds": None if limits is None else Thresholds(**limits)})
