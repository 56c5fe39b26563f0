"""The section of a bundle: what it is, and how its decoder was judged."""

from pathlib import Path
from typing import Any

from pipeline.boxes import BUNDLE
from pipeline.report.page import Note, Part, Row, Section
from pipeline.report.text import count, counted, decimal, facts, identity, software
from tiling import atomic


def bundle_section(path: Path) -> Section:
    """What a bundle says of itself; its checksums are `bony verify`'s to check.

    Raises:
        CheckpointError: It is no bundle of this format version.
    """
    about = BUNDLE.read(path)
    decoder = about["decoder"]
    classes = ", ".join(decoder["class_names"]) if decoder else "no decoder"
    tables: list[Part] = [facts("Encoder", _encoder(about))]
    if decoder:
        test = decoder["test"]
        judged = {
            "classes": classes,
            "task": f"{decoder['task']}, {decoder['protocol']} protocol",
            "reads": f"{decoder['tap']} ({decoder['in_features']})",
            "balanced accuracy, test part": f"{decimal(test['balanced_accuracy'])} ({counted(test['n'], 'tile')})",
        }
        tables.append(facts("Decoder", judged))
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    advice = f"{size / 1e6:.0f} MB. Check it with `bony verify`, or `sha256sum -c SHA256SUMS`, before use."
    summary = f"{about['architecture']}, {about['mpp']:.3g} um/px, {classes}"
    warnings = decoder["warnings"] if decoder else []
    listing = path / atomic.SUMS
    identities = [atomic.sha256_file(listing)] if listing.is_file() else []
    return Section(
        "Bundle",
        [Row(tables), Note(advice)],
        warnings if listing.is_file() else ["has no SHA256SUMS"],
        summary,
        identities,
    )


def _encoder(about: dict[str, Any]) -> dict[str, Any]:
    training = about["training"]
    return {
        "architecture": about["architecture"],
        "weights": identity(training["encoder_sha256"]),
        "scale": f"{about['mpp']:.3g} um/px, tiles of {about['tiling']['tile_px']} px",
        "trained on": f"{counted(training['tiles'], 'tile')} of {counted(training['slides'], 'slide')}",
        "store": identity(training["store_fingerprint"]),
        "steps": f"{count(training['step'])} of {counted(training['global_batch'], 'tile')}",
        "made by": software(about["software"]),
    }
