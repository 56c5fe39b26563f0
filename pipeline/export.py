"""A checkpoint, and a decoder, to a bundle that partner sites verify, load offline and run on their own slides."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from torch import nn

from pipeline import bundle, checkpoint
from pipeline.boxes import BUNDLE
from pipeline.bundle import Decoder
from pipeline.data.haar import input_side
from pipeline.downstream import tasks
from pipeline.models import facebook
from pipeline.models.encoders import create_options, width
from pipeline.models.frozen import FrozenEncoder, encoder_of, head_sizes, resolve_checkpoint
from pipeline.palette import class_colours
from tiling import atomic, phantom
from tiling.errors import CheckpointError, UsageError
from tiling.filters import Thresholds
from tiling.grid import tile_corners
from tiling.settings import TileSettings

TEMPLATES = {"MODEL_CARD.md": "model_card.md", "NOTICE.md": "notice.md"}
_CPU = torch.device("cpu")
_TILES_PER_GRADE = 2
# Keys of a run's config that say where something lies, which is nobody's business elsewhere.
_PATHS = ("data", "out", "model.init_from", "monitor.probe")


@dataclass(frozen=True)
class _Exported:
    """What a bundle is made of: encoder, config.json's values, and where the decoder lies."""

    encoder: FrozenEncoder
    about: dict[str, Any]
    result: Path | None


def export(run: Path, out: Path, result: Path | None = None) -> Path:
    """Write a bundle.

    Args:
        run: A RUN, of which the newest sound checkpoint is taken, or one checkpoint.
        out: The folder to make.
        result: A RESULT whose decoder goes along; it must have been trained on this very encoder's features.

    Returns:
        ``out``.

    Raises:
        UsageError: ``out`` exists, or ``run`` is no run.
        DamageError: A file of the checkpoint or of the result is damaged.
        CheckpointError: The decoder belongs to another encoder, or the bundle fails its self-test.
    """
    if out.exists():
        raise UsageError("exists already", out, "choose another --out, or remove it")
    folder = resolve_checkpoint(run)
    state = checkpoint.read_state(folder)
    encoder = encoder_of(folder, state, _CPU)
    decoder = _decoder_section(result, encoder, run) if result is not None else None
    parts = _Exported(encoder, _about(state, encoder, decoder), result)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic.building(out, out.parent / f".{out.name}.work", atomic.SUMS) as work:
        _write(work, parts)
        _require_self_test(work)
    return out


def _about(state: Mapping[str, Any], encoder: FrozenEncoder, decoder: dict[str, Any] | None) -> dict[str, Any]:
    """BUNDLE/config.json: what timm reads, and beside it what Bony reads. No paths, no slide ids."""
    config = {key: value for key, value in state["config"].items() if key not in _PATHS}
    tiling = TileSettings.from_json(state["tiling"])
    # Slides are cut at the true scale of the training tiles; imported tiles came without thresholds of their own.
    tiling = replace(tiling, mpp=encoder.mpp, slide_mpp=None, thresholds=tiling.thresholds or Thresholds())
    values = {
        **_timm_config(encoder, tiling.tile_px),
        "mpp": encoder.mpp,
        "input": encoder.input,
        "tiling": tiling.to_json(),
        "head": head_sizes(config),
        "decoder": decoder,
        "training": {
            "encoder_sha256": encoder.sha256,
            **{key: state[key] for key in (
                "store_fingerprint", "dataset", "slides", "tiles", "step", "samples_seen", "global_batch", "software",
            )},
            "from_other_weights": state["config"].get("model.init_from") is not None,
            "config": config,
        },
        "software": {"bony": version("bony"), "torch": torch.__version__, "timm": version("timm")},
    }  # fmt: skip
    return BUNDLE.describe(values)


def _timm_config(encoder: FrozenEncoder, px: int) -> dict[str, Any]:
    """What ``timm.create_model("local-dir:...", pretrained=True)`` needs, with our mean and std."""
    known: Any = encoder.backbone.pretrained_cfg
    side = input_side(px, encoder.input)
    pretrained = {
        "input_size": [3, side, side], "mean": list(encoder.mean), "std": list(encoder.std), "num_classes": 0,
        "crop_pct": 1.0, "interpolation": "bicubic", "license": "see NOTICE.md",
        **{key: known[key] for key in ("fixed_input_size", "first_conv", "classifier")},
    }  # fmt: skip
    return {
        "architecture": encoder.name,
        "num_classes": 0,
        "num_features": width(encoder.backbone),
        "model_args": create_options(encoder.name),
        "pretrained_cfg": pretrained,
    }


def _decoder_section(result: Path, encoder: FrozenEncoder, run: Path) -> dict[str, Any]:
    """What config.json says of the decoder: classes, and how it was trained and judged."""
    about = tasks.read_result(result)
    features = about["features"]
    if features["encoder_sha256"] != encoder.sha256:
        raise CheckpointError(
            f"its decoder reads features of encoder {features['encoder_sha256'][:12]}, {run} is {encoder.sha256[:12]}",
            result,
            "export the checkpoint that was embedded (RUN/checkpoints/step-...), or embed and evaluate again",
        )
    names = about["class_names"]
    return {
        "task": about["task"], "protocol": about["protocol"], "tap": about["tap"],
        "in_features": features["taps"][about["tap"]], "class_names": names, "colours": class_colours(names),
        "counts": about["counts"], "test": about["metrics"]["test"], "warnings": about["warnings"],
    }  # fmt: skip


def _write(work: Path, parts: _Exported) -> None:
    """All files of a bundle but SHA256SUMS."""
    encoder, about = parts.encoder, parts.about
    if encoder.head is None:
        raise CheckpointError("the encoder has no head", work)
    atomic.write_json(work / bundle.CONFIG, about)
    checkpoint.write_tensors(work / f"{bundle.MODEL}.safetensors", encoder.backbone.state_dict())
    checkpoint.write_tensors(work / f"{bundle.HEAD}.safetensors", encoder.head.state_dict())
    if parts.result is not None:
        shutil.copyfile(parts.result / tasks.DECODER, work / f"{bundle.DECODER}.safetensors")
    teacher = facebook.teacher_state(encoder.backbone.state_dict(), encoder.head.state_dict())
    torch.save({"teacher": teacher}, work / bundle.FACEBOOK)
    _write_self_test(work)
    environment = Environment(
        loader=PackageLoader("pipeline", "cards"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,  # Markdown, not HTML
    )  # fmt: skip
    facts = {"about": about, "parameters": _count(encoder.backbone), "decoder": about["decoder"]}
    for name, template in TEMPLATES.items():
        (work / name).write_text(environment.get_template(template).render(**facts))


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def made_tiles(px: int) -> list[np.ndarray]:
    """Tiles of made slides of every grade, uint8 (px, px, 3) each: nobody's tissue, so they may go anywhere."""
    side = max(512, -(-2 * px // 16) * 16)
    tiles = []
    for seed, grade in enumerate(phantom.GRADES):
        image = phantom.make_slide(seed, grade, size=(side, side)).image
        cut = [image[y : y + px, x : x + px] for x, y in tile_corners(side, side, px)]
        tiles += sorted(cut, key=np.std, reverse=True)[:_TILES_PER_GRADE]
    return tiles


def _write_self_test(work: Path) -> None:
    """Made tiles as PNG, and what they must give: computed in float64 from the files just written."""
    folder = work / bundle.SELF_TEST
    folder.mkdir()
    opened = bundle.assemble(work, "", _CPU)
    for number, tile in enumerate(made_tiles(opened.tiling.tile_px)):
        Image.fromarray(tile).save(folder / f"tile-{number}.png")
    decoder: Decoder | None = opened.decoder.double() if opened.decoder else None
    expected = bundle.outputs(opened.encoder.double(), decoder, bundle.self_test_tiles(work))
    checkpoint.write_tensors(folder / bundle.EXPECTED, expected)


def _require_self_test(work: Path) -> None:
    """The finished files must give what they promise, before they get their name."""
    found = bundle.self_test_problems(bundle.assemble(work, "", _CPU))
    if found:
        raise CheckpointError(found[0], do="the networks give no figures that can be repeated: check run and result")
