"""Frozen encoding of a TileStore into a FeatureStore; finished slides are skipped."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from pipeline import features
from pipeline.boxes import is_bundle
from pipeline.bundle import open_bundle
from pipeline.features import FeatureDescription
from pipeline.models.frozen import FrozenEncoder, load_encoder, load_original
from pipeline.runtime import one_device
from tiling import atomic
from tiling.errors import FeatureError, StoreError, UsageError
from tiling.grid import MPP_TOLERANCE
from tiling.progress import progress
from tiling.store import TileStore

ORIGINAL_SUFFIXES = (".pth", ".pt")


def open_encoder(path: Path, device: torch.device, original_mpp: float | None = None) -> FrozenEncoder:
    """The encoder that a path means: of a RUN or a checkpoint, a bundle, or a file of the original DINO code.

    Args:
        path: The folder or file.
        device: Where to put it.
        original_mpp: um/px that an original file was trained at.

    Raises:
        UsageError: It is none of these, or a file without ``original_mpp``.
        DamageError: A file is damaged.
        CheckpointError: It does not fit the architecture it names.
    """
    if path.suffix in ORIGINAL_SUFFIXES:
        if original_mpp is None:
            raise UsageError("such a file does not say its scale", path, "give um per pixel with --encoder-mpp")
        return load_original(path, original_mpp, device)
    if is_bundle(path):
        return open_bundle(path, device).encoder
    return load_encoder(path, device)


def embed(
    encoder_path: Path,
    data: Path,
    out: Path,
    batch: int = 64,
    threads: int = 2,
    any_mpp: bool = False,
    original_mpp: float | None = None,
) -> FeatureDescription:
    """Encode every tile of a store with a frozen encoder.

    Args:
        encoder_path: What ``open_encoder`` takes.
        data: The TileStore.
        out: The FeatureStore to make or to continue.
        batch: Tiles per forward pass.
        threads: Threads that read and decode tiles.
        any_mpp: Accept tiles of another scale than the encoder's; recorded in the FeatureStore.
        original_mpp: um/px that a file of the original DINO code was trained at.

    Raises:
        FeatureError: The scales differ, or ``out`` holds features of another encoder or store.
        StoreError: The store has no tiles.
    """
    device = one_device()
    encoder = open_encoder(encoder_path, device, original_mpp)
    with TileStore(data, threads) as store:
        if len(store) == 0:
            raise StoreError("no kept tile in this store", data)
        about = _describe(encoder, store, device, any_mpp)
        _prepare(out, about)
        with progress("embedding", len(store), "tiles") as advance:
            for number, slide_id in enumerate(store.slide_ids):
                rows = store.rows_of_slide(number)
                if not atomic.stands(features.slide_folder(out, slide_id), out / features.WORK):
                    parts = list(_encode(encoder, store, rows, batch, device))
                    joined = {tap: np.concatenate([part[tap] for part in parts]) for tap in about.taps}
                    features.write_slide(out, slide_id, joined)
                advance(len(rows), note=slide_id)
    return about


def _encode(
    encoder: FrozenEncoder, store: TileStore, rows: np.ndarray, batch: int, device: torch.device
) -> Iterator[dict[str, np.ndarray]]:
    for first in range(0, len(rows), batch):
        tiles = torch.from_numpy(store.read(rows[first : first + batch])).to(device)
        yield {tap: values.cpu().numpy() for tap, values in encoder.features(tiles).items()}


def _describe(encoder: FrozenEncoder, store: TileStore, device: torch.device, any_mpp: bool) -> FeatureDescription:
    apart = abs(store.mpp / encoder.mpp - 1)
    if not apart <= MPP_TOLERANCE and not any_mpp:  # the scale of some tiles is not known: nan
        raise FeatureError(
            f"tiles have {store.mpp:.3g} um/px, the encoder was trained at {encoder.mpp:.3g}",
            str(store.path),
            f"tile again with --mpp {encoder.mpp:.3g}, or accept it with --any-mpp",
        )
    px = store.tile_px
    taps = encoder.features(torch.zeros((1, px, px, 3), dtype=torch.uint8, device=device))
    return FeatureDescription(
        encoder=encoder.name,
        encoder_sha256=encoder.sha256,
        store_fingerprint=store.fingerprint,
        encoder_store_fingerprint=encoder.store_fingerprint,
        taps={tap: int(values.shape[1]) for tap, values in taps.items()},
        mean=encoder.mean,
        std=encoder.std,
        mpp=store.mpp,
        encoder_mpp=encoder.mpp,
        mpp_override=apart > MPP_TOLERANCE,
    )


def _prepare(out: Path, about: FeatureDescription) -> None:
    """Make a new FeatureStore, or check that an existing one is of the same encoder and store."""
    if (out / features.DESCRIPTION).exists():
        known = features.read_description(out)
        for key, what in (("encoder_sha256", "encoder"), ("store_fingerprint", "store")):
            if getattr(known, key) != getattr(about, key):
                raise FeatureError(f"holds features of another {what}", out, "choose another --out")
        return
    if out.exists() and any(out.iterdir()):
        raise FeatureError("exists and is no feature store", out, "choose another --out")
    (out / features.SLIDES).mkdir(parents=True)
    atomic.write_json(out / features.DESCRIPTION, about.to_json())
