"""The section of a FeatureStore: which encoder saw which tiles, and how far it came."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.features import SLIDES, read_description
from pipeline.report.page import Link, Section
from pipeline.report.text import counted, facts, identity
from tiling import atomic


def features_section(path: Path) -> Section:
    """What a FeatureStore holds.

    Raises:
        FeatureError: It is no feature store of this format version.
    """
    about = read_description(path)
    values = about.to_json()
    slides = sum((folder / atomic.COMPLETE).is_file() for folder in (path / SLIDES).glob("*"))
    warnings = [] if slides else ["no slide is encoded yet"]
    if about.mpp_override:
        warnings.append(mpp_warning(values))
    taps = ", ".join(f"{tap} ({width})" for tap, width in about.taps.items())
    shown = provenance(values) | {"taps": taps, "slides encoded": f"{slides:,}"}
    summary = f"{about.encoder}, {taps}, {counted(slides, 'slide')}"
    return Section("Features", [facts("Encoder and tiles", shown)], warnings, summary, [feature_identity(values)])


def feature_identity(about: Mapping[str, Any]) -> str:
    """Identity of features by what made them: a result names the features it was made from by the same values."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def mpp_warning(about: Mapping[str, Any]) -> str:
    """What a reader must know of features whose scale was accepted by hand."""
    return f"tiles have {about['mpp']:.3g} um/px, the encoder was trained at {about['encoder_mpp']:.3g}"


def provenance(about: Mapping[str, Any]) -> dict[str, str | Link]:
    """Encoder, store and scale, from what features.json holds."""
    mean, std = (" ".join(f"{value:.3g}" for value in about[key]) for key in ("mean", "std"))
    return {
        "encoder": about["encoder"],
        "encoder's weights": identity(about["encoder_sha256"]),
        "trained on store": identity(about["encoder_store_fingerprint"]),
        "tiles of store": identity(about["store_fingerprint"]),
        "scale": f"{about['mpp']:.3g} um/px, encoder trained at {about['encoder_mpp']:.3g}",
        "mean": mean,
        "standard deviation": std,
    }
