"""FeatureStore: the features of a TileStore's tiles, slide by slide, with the identity of encoder and store.

FEATURES/features.json says which encoder, store, normalisation and scale; FEATURES/slides/<slide_id>/ holds one Zarr
array per tap (``head``, ``cls``) whose rows are the slide's kept tiles, and is whole or not there at all.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from pipeline.boxes import FEATURE_STORE
from tiling import atomic
from tiling.errors import FeatureError
from tiling.store import TileStore

DESCRIPTION, SLIDES, WORK = FEATURE_STORE.file, "slides", "work"
_ROWS_PER_CHUNK = 256


@dataclass(frozen=True)
class FeatureDescription:
    """What FEATURES/features.json says.

    Args:
        encoder: Architecture.
        encoder_sha256: Identity of the weights.
        store_fingerprint: Identity of the TileStore's content.
        encoder_store_fingerprint: Identity of the store the encoder was pretrained on.
        taps: Width of each tap.
        mean: Normalisation that was used.
        std: Normalisation that was used.
        mpp: um/px of the tiles.
        encoder_mpp: um/px the encoder was trained at.
        mpp_override: Whether a mismatch of the two was overridden by hand.
    """

    encoder: str
    encoder_sha256: str
    store_fingerprint: str
    encoder_store_fingerprint: str
    taps: dict[str, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mpp: float
    encoder_mpp: float
    mpp_override: bool

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        values = asdict(self) | {"mean": list(self.mean), "std": list(self.std)}
        return FEATURE_STORE.describe(values)


def read_description(path: Path) -> FeatureDescription:
    """Read FEATURES/features.json.

    Raises:
        FeatureError: It is missing, unreadable, or of another format version.
    """
    value = FEATURE_STORE.read(path)
    try:
        return FeatureDescription(**{**value, "mean": tuple(value["mean"]), "std": tuple(value["std"])})
    except (KeyError, TypeError) as error:
        raise FeatureError(f"cannot be read ({type(error).__name__}: {error})", path / DESCRIPTION) from error


def slide_folder(path: Path, slide_id: str) -> Path:
    """FEATURES/slides/<slide_id>."""
    return path / SLIDES / slide_id


def write_slide(path: Path, slide_id: str, features: dict[str, np.ndarray]) -> None:
    """Write one slide's arrays, each float32 (N, width), as one sealed folder."""
    with atomic.building(slide_folder(path, slide_id), path / WORK) as folder:
        for tap, values in features.items():
            zarr.create_array(
                store=folder / f"{tap}.zarr",
                data=values,
                chunks=(min(_ROWS_PER_CHUNK, max(len(values), 1)), values.shape[1]),
                compressors=[ZstdCodec(level=1), Crc32cCodec()],
            )


def problems(path: Path) -> list[str]:
    """Everything wrong with a feature store, one line each; empty when it is sound."""
    read_description(path)
    folders = sorted((path / SLIDES).glob("*"))
    return [line for folder in folders for line in atomic.damaged_files(folder)]


def read_features(path: Path, store: TileStore, tap: str) -> np.ndarray:
    """One tap's features of every tile of a store, in the store's order, after every checksum is checked.

    Args:
        path: The FeatureStore.
        store: The TileStore it was made from.
        tap: ``head`` or ``cls``.

    Returns:
        float32, shape (N, width).

    Raises:
        FeatureError: The features are of another store or state of it, incomplete, not finite, or lack the tap.
        DamageError: A file is damaged.
    """
    about = read_description(path)
    if about.store_fingerprint != store.fingerprint:
        raise FeatureError(
            f"features are of another store or an older state of it, not of {store.path}",
            path,
            "embed that store again into a new folder",
        )
    if tap not in about.taps:
        raise FeatureError(f"no tap {tap!r}, it has {', '.join(about.taps)}", path)
    out = np.empty((len(store), about.taps[tap]), np.float32)
    for number, slide_id in enumerate(store.slide_ids):
        folder = slide_folder(path, slide_id)
        if not folder.is_dir():
            raise FeatureError(f"slide {slide_id} is missing", path, "run the same `bony embed` again to finish it")
        atomic.require_sound(folder)
        rows = store.rows_of_slide(number)
        values = zarr.open_array(folder / f"{tap}.zarr", mode="r")[:]
        if np.shape(values) != (len(rows), out.shape[1]):
            raise FeatureError(f"{np.shape(values)} features for {len(rows)} tiles", folder, "embed the store again")
        out[rows] = values
    if not np.isfinite(out).all():
        raise FeatureError(
            f"{int((~np.isfinite(out)).any(axis=1).sum())} tiles have features that are not finite", path
        )
    return out
