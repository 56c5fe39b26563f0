"""The bundle: what leaves the building. Its SHA256SUMS is checked before anything in it is parsed.

BUNDLE/config.json            timm's ``local-dir:`` config, with all that Bony knows beside it; no patient data
BUNDLE/model.safetensors      backbone, timm's names
BUNDLE/head.safetensors       DINO head
BUNDLE/decoder.safetensors    decoder of tiles, where one was given
BUNDLE/facebook.pth           backbone and head for the original DINO + XCiT code
BUNDLE/selftest/              made tiles, and the features that they must give
BUNDLE/MODEL_CARD.md, NOTICE.md, SHA256SUMS
"""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from pipeline import checkpoint
from pipeline.boxes import BUNDLE, is_bundle
from pipeline.downstream.fit import classifier
from pipeline.models.frozen import FrozenEncoder, networks
from pipeline.palette import Colour
from tiling import atomic
from tiling.errors import CheckpointError, DamageError, UsageError
from tiling.progress import say
from tiling.settings import TileSettings

CONFIG, MODEL, HEAD, DECODER, FACEBOOK = BUNDLE.file, "model", "head", "decoder", "facebook.pth"
SELF_TEST, EXPECTED, PROBABILITIES = "selftest", "expected.safetensors", "probabilities"
# Shares of the largest expected value (at least 1) by which float32 may differ from float64. A decoder divides by the
# features' spread, which in a short run is tiny, so its probabilities magnify what the features lost to rounding.
TOLERANCE = {"cls": 1e-5, "head": 1e-5, PROBABILITIES: 1e-3}


@dataclass(frozen=True)
class Decoder:
    """A classifier of tiles by their features.

    Args:
        model: Features (N, D) -> logits (N, C), in eval mode on the encoder's device.
        tap: Which of the encoder's features it reads: ``head`` or ``cls``.
        class_names: C names, in the order of the logits.
        colours: C RGB colours.
    """

    model: nn.Module
    tap: str
    class_names: tuple[str, ...]
    colours: tuple[Colour, ...]

    @torch.no_grad()
    def probabilities(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """Class probabilities (B, C), float32, of an encoder's features of B tiles."""
        logits: torch.Tensor = self.model(features[self.tap].to(next(self.model.parameters()).dtype))
        return logits.softmax(dim=1).float()

    def double(self) -> "Decoder":
        """The same in float64."""
        return replace(self, model=copy.deepcopy(self.model).double())


@dataclass(frozen=True)
class Bundle:
    """An opened bundle.

    Args:
        path: Its folder.
        sha256: Identity of the whole bundle: sha256 of SHA256SUMS.
        encoder: The frozen encoder.
        decoder: The decoder, or None.
        tiling: How slides are to be tiled for it.
        about: All of config.json.
    """

    path: Path
    sha256: str
    encoder: FrozenEncoder
    decoder: Decoder | None
    tiling: TileSettings
    about: dict[str, Any]


def open_bundle(path: Path, device: torch.device) -> Bundle:
    """Open a bundle after every checksum is checked.

    Raises:
        UsageError: It is no bundle.
        DamageError: A file is missing, changed, a link, or not listed in SHA256SUMS.
        CheckpointError: It is of another format version, or its tensors are not what its config says.
    """
    if not is_bundle(path):
        raise UsageError("is no bundle", path, "give a folder made by `bony export`")
    atomic.require_sound(path, atomic.SUMS)
    return assemble(path, atomic.box_digest(path, atomic.SUMS), device)


def assemble(folder: Path, sha256: str, device: torch.device) -> Bundle:
    """Networks from a bundle's files, which the caller trusts; see ``open_bundle``."""
    about = BUNDLE.read(folder)
    try:
        tiling = TileSettings.from_json(about["tiling"])
        parts = networks(about["architecture"], about["head"]).to(device)
        described, training = about["pretrained_cfg"], about["training"]
        encoder = FrozenEncoder(
            name=about["architecture"], backbone=parts["backbone"], head=parts["head"], mean=tuple(described["mean"]),
            std=tuple(described["std"]), mpp=about["mpp"], sha256=training["encoder_sha256"],
            store_fingerprint=training["store_fingerprint"], input=about.get("input", "rgb"),
        )  # fmt: skip
        decoder = _decoder(about["decoder"], device) if about["decoder"] else None
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"cannot be read ({type(error).__name__}: {error})", folder / CONFIG) from error
    checkpoint.load_network(folder, MODEL, parts["backbone"])
    checkpoint.load_network(folder, HEAD, parts["head"])
    if decoder is not None:
        checkpoint.load_network(folder, DECODER, decoder.model)
    return Bundle(folder, sha256, encoder, decoder, tiling, about)


def _decoder(about: dict[str, Any], device: torch.device) -> Decoder:
    model = classifier(about["in_features"], len(about["class_names"])).eval().requires_grad_(False).to(device)
    colours = tuple((int(r), int(g), int(b)) for r, g, b in about["colours"])
    return Decoder(model, about["tap"], tuple(about["class_names"]), colours)


def outputs(encoder: FrozenEncoder, decoder: Decoder | None, tiles: torch.Tensor) -> dict[str, torch.Tensor]:
    """All that a bundle gives for uint8 tiles (B, px, px, 3): each tap and, with a decoder, ``probabilities``."""
    found = encoder.features(tiles)
    return found if decoder is None else found | {PROBABILITIES: decoder.probabilities(found)}


def self_test_tiles(folder: Path) -> torch.Tensor:
    """The bundle's made tiles, uint8, shape (N, px, px, 3)."""
    files = sorted((folder / SELF_TEST).glob("*.png"))
    return torch.from_numpy(np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files]))


def self_test(bundle: Bundle) -> dict[str, float]:
    """How far each output of the self-test tiles is from what it must be, as a share of the largest value.

    Returns:
        Largest difference by output, over the largest expected value (at least 1); compare with ``TOLERANCE``.
    """
    expected = load_file(bundle.path / SELF_TEST / EXPECTED)
    found = outputs(bundle.encoder, bundle.decoder, self_test_tiles(bundle.path))
    if found.keys() != expected.keys():
        raise CheckpointError(f"self-test expects {sorted(expected)}, the networks give {sorted(found)}", bundle.path)
    return {
        name: float((found[name] - values).abs().max() / values.abs().max().clamp(min=1))
        for name, values in expected.items()
    }


def self_test_problems(bundle: Bundle) -> list[str]:
    """Outputs of the self-test that are further off than ``TOLERANCE``, one line each; says how far all are."""
    apart = self_test(bundle)
    say("self-test: " + ", ".join(f"{name} differs by {value:.1e}" for name, value in apart.items()))
    return [
        f"self-test: {name} differs by {value:.1e} of its largest value, limit is {TOLERANCE[name]:.0e}"
        for name, value in apart.items()
        if not value <= TOLERANCE[name]  # NaN is not
    ]


def problems(path: Path) -> list[str]:
    """Everything wrong with a bundle, one line each: checksums first; when they hold, the self-test on the CPU."""
    found = atomic.damaged_files(path, atomic.SUMS)
    if found:
        return found
    try:
        return [f"{path}: {line}" for line in self_test_problems(open_bundle(path, torch.device("cpu")))]
    except (CheckpointError, DamageError) as error:
        return [str(error)]
