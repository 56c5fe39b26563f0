"""What is drawn for a view: the presets, and drawing as a pure function of seed, epoch, sample and view."""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import MethodConfig, ModelConfig, PretrainConfig, ViewsConfig
from pipeline.data.views import ViewParameters, ViewSpec, colour_spec, draw, view_specs
from pipeline.methods.dino import Dino
from pipeline.runtime import Runtime
from tiling.errors import UsageError

SpecOf = Callable[..., ViewSpec]
DrawnFrom = Callable[..., ViewParameters]

PX = 40


# --- presets ---------------------------------------------------------------------------------------------------------


def test_original_preset_is_that_of_dino() -> None:
    views = view_specs(2, 3, 224, 96, (0.4, 1.0), (0.05, 0.4), "original")
    assert [view.name for view in views] == ["global0", "global1", "local0", "local1", "local2"]
    assert [view.is_global for view in views] == [True, True, False, False, False]
    assert [view.size for view in views] == [224, 224, 96, 96, 96]
    assert [view.blur for view in views] == [1.0, 0.1, 0.5, 0.5, 0.5]
    assert [view.solarise for view in views] == [0.0, 0.2, 0.0, 0.0, 0.0]
    assert {view.scale for view in views[:2]} == {(0.4, 1.0)}
    assert {view.scale for view in views[2:]} == {(0.05, 0.4)}
    colour = colour_spec("original")
    assert (colour.brightness, colour.contrast, colour.saturation, colour.hue) == (0.4, 0.4, 0.2, 0.1)
    assert (colour.jitter, colour.greyscale, colour.blur_sigma) == (0.8, 0.2, (0.1, 2.0))
    assert (colour.rot90, colour.vertical_flip) == (False, False)
    assert (colour.stain, colour.stain_shift) == (0, 0)


def test_histology_preset_is_milder_and_has_no_upright() -> None:
    ours, theirs = colour_spec("histology"), colour_spec("original")
    assert ours.rot90
    assert ours.vertical_flip
    for name in ("brightness", "contrast", "saturation", "hue", "greyscale", "blur_sigma"):
        assert getattr(ours, name) < getattr(theirs, name)
    assert {view.solarise for view in view_specs(2, 2, 32, 16, (0.4, 1), (0.1, 0.4), "histology")} == {0.0}
    assert (ours.stain, ours.stain_shift) == (0.2, 0.05)


def test_numbers_sizes_and_scales_of_views_come_from_the_config() -> None:
    views = ViewsConfig(3, 4, 64, 32, (0.5, 0.9), (0.1, 0.3), "original")
    method = MethodConfig(out_dim=8, hidden_dim=8, bottleneck_dim=4)
    config = PretrainConfig(model=ModelConfig("xcit_nano_12_p16_224"), method=method, views=views)
    specs = Dino(config, Runtime(0, 1, torch.device("cpu")), None).views
    assert specs == view_specs(3, 4, 64, 32, (0.5, 0.9), (0.1, 0.3), "original")
    assert [(spec.size, spec.scale, spec.is_global) for spec in specs] == (
        3 * [(64, (0.5, 0.9), True)] + 4 * [(32, (0.1, 0.3), False)]
    )


def test_streams_are_unique_and_do_not_depend_on_the_number_of_views() -> None:
    few, many = (view_specs(n, n, 32, 16, (0.4, 1.0), (0.1, 0.4), "original") for n in (2, 9))
    assert len({view.stream for view in many}) == len(many)
    streams = {view.name: view.stream for view in many}
    assert all(streams[view.name] == view.stream for view in few)


def test_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="'stain' is not one of original, histology"):
        view_specs(1, 1, 32, 16, (0.4, 1.0), (0.1, 0.4), "stain")
    with pytest.raises(UsageError, match="'stain' is not one of original, histology"):
        colour_spec("stain")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": (0.5, 0.4)}, r"global0: scale is \(0.5, 0.4\)"),
        ({"scale": (0.0, 0.4)}, "must rise within 0 to 1"),
        ({"size": 6}, "size is 6 px"),
        ({"blur": 1.5}, "blur is 1.5, must lie in 0 to 1"),
        ({"solarise": -0.1}, "solarise is -0.1"),
    ],
)
def test_impossible_views_are_refused(changes: dict[str, Any], message: str, spec_of: SpecOf) -> None:
    with pytest.raises(UsageError, match=message):
        spec_of(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hue": 0.6}, "hue is 0.6"),
        ({"jitter": 2.0}, "jitter is 2.0"),
        ({"blur_sigma": (0.1, 3.0)}, "0 to 2 px"),
        ({"stain": 1.2}, "stain is 1.2"),
        ({"stain_shift": -0.1}, "stain_shift is -0.1"),
    ],
)
def test_impossible_colours_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(colour_spec("original"), **changes)


@pytest.mark.parametrize("counts", [(0, 0), (-1, 2)])
def test_no_views_are_refused(counts: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="need at least one view"):
        view_specs(*counts, 32, 16, (0.4, 1.0), (0.1, 0.4), "original")


# --- drawing ---------------------------------------------------------------------------------------------------------


@given(
    st.integers(8, 600),
    st.tuples(st.floats(0.01, 1.0), st.floats(0.01, 1.0)).map(lambda pair: (min(pair), max(pair))),
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**63 - 1),
)
def test_boxes_lie_in_the_tile_with_the_area_and_ratio_asked_for(
    spec_of: SpecOf, px: int, scale: tuple[float, float], seed: int, first_id: int
) -> None:
    ids = first_id + np.arange(64, dtype=np.uint64)
    params = draw(spec_of(scale=scale), colour_spec("original"), seed, np.zeros(64, int), ids.astype(np.int64), px)
    y0, x0, height, width = params.box.T
    assert (params.box == np.round(params.box)).all()
    assert (y0 >= 0).all()
    assert (x0 >= 0).all()
    assert (height >= 1).all()
    assert (width >= 1).all()
    assert (y0 + height <= px).all()
    assert (x0 + width <= px).all()
    # Each side is rounded by half a pixel at most.
    assert ((height + 0.51) * (width + 0.51) >= scale[0] * px**2).all()
    least = np.maximum(height - 0.51, 0) * np.maximum(width - 0.51, 0)
    assert (least <= scale[1] * px**2).all()
    assert ((height - 0.51) / (width + 0.51) <= 4 / 3).all()
    assert ((width - 0.51) / (height + 0.51) <= 4 / 3).all()


def test_areas_are_uniform_and_ratios_log_uniform(spec_of: SpecOf, drawn_from: DrawnFrom) -> None:
    params = drawn_from(spec_of(scale=(0.1, 0.5)), colour_spec("original"), 20_000, tile_px=10_000)
    y0, x0, height, width = params.box.T
    for values, low, high in (
        (height * width / 1e8, 0.1, 0.5),
        (np.log(width / height), -math.log(4 / 3), math.log(4 / 3)),
        (y0 / (10_000 - height), 0.0, 1.0),
        (x0 / (10_000 - width), 0.0, 1.0),
    ):
        deciles = np.quantile(values, np.linspace(0.1, 0.9, 9))
        assert np.allclose((deciles - low) / (high - low), np.linspace(0.1, 0.9, 9), atol=0.015)


def test_boxes_reach_every_edge(spec_of: SpecOf, drawn_from: DrawnFrom) -> None:
    y0, x0, height, width = drawn_from(spec_of(scale=(0.2, 0.6)), colour_spec("original"), 4000, tile_px=12).box.T
    for start, length in ((y0, height), (x0, width)):
        eights = start[length == 8]
        assert np.abs(np.bincount(eights.astype(int), minlength=5) / len(eights) - 0.2).max() < 0.06


def test_decisions_do_not_depend_on_each_other(spec_of: SpecOf, drawn_from: DrawnFrom) -> None:
    n = 20_000
    spec, colour = spec_of(scale=(0.1, 0.5), blur=0.5, solarise=0.5), colour_spec("histology")
    params = drawn_from(spec, replace(colour, jitter=0.5, greyscale=0.5), n, tile_px=10_000)
    y0, x0, height, width = params.box.T
    stains = (*params.stain_scale.T, *params.stain_shift.T)
    apart = ("box", "blur_sigma", "stain_scale", "stain_shift")
    others = {name: array for name, array in vars(params).items() if name not in apart}
    blurred = params.blur_sigma > 0
    places = (y0 / (10_000 - height), x0 / (10_000 - width), height * width, width / height)
    columns = np.stack([*places, *others.values(), *stains, blurred, np.where(blurred, params.blur_sigma - 0.55, 0)])
    correlations = np.corrcoef(columns)[np.triu_indices(len(columns), k=1)]
    assert np.abs(correlations).max() < 4.5 / math.sqrt(n)


def test_the_whole_tile_is_a_square_box(spec_of: SpecOf, drawn_from: DrawnFrom) -> None:
    params = drawn_from(spec_of(scale=(1.0, 1.0)), colour_spec("original"), 100, tile_px=PX)
    assert (params.box == [0, 0, PX, PX]).all()


@pytest.mark.parametrize("index", [0, 1, 2])
def test_original_probabilities_and_strengths_are_met(index: int, drawn_from: DrawnFrom) -> None:
    n = 20_000
    spec = view_specs(2, 1, 224, 96, (0.4, 1.0), (0.05, 0.4), "original")[index]
    params = drawn_from(spec, colour_spec("original"), n)
    shares = {
        "flip_h": 0.5,
        "flip_v": 0.0,
        "jitter": 0.8,
        "greyscale": 0.2,
        "blur": (1.0, 0.1, 0.5)[index],
        "solarise": (0.0, 0.2, 0.0)[index],
    }
    blurred = params.blur_sigma > 0
    for name, share in shares.items():
        found = (blurred if name == "blur" else getattr(params, name)).mean()
        assert abs(found - share) < 4 * math.sqrt(share * (1 - share) / n) + 1e-12, name
    assert not params.quarter_turns.any()
    for values, low, high in (
        (params.brightness, 0.6, 1.4),
        (params.contrast, 0.6, 1.4),
        (params.saturation, 0.8, 1.2),
        (params.hue, -0.1, 0.1),
        (params.blur_sigma[blurred], 0.1, 2.0),
    ):
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.03 * (high - low)


def test_stains_are_changed_as_strongly_as_told_and_in_original_not_at_all(
    spec_of: SpecOf, drawn_from: DrawnFrom
) -> None:
    params = drawn_from(spec_of(), colour_spec("histology"), 20_000)
    assert params.stain_scale.shape == params.stain_shift.shape == (20_000, 3)
    for values, low, high in ((params.stain_scale, 0.8, 1.2), (params.stain_shift, -0.05, 0.05)):
        deciles = np.quantile(values, np.linspace(0, 1, 11), axis=0)
        assert np.allclose((deciles - low) / (high - low), np.linspace(0, 1, 11)[:, None], atol=0.015)
        assert values.min() >= low
        assert values.max() <= high
    params = drawn_from(spec_of(), colour_spec("original"), 100)
    assert (params.stain_scale == 1).all()
    assert (params.stain_shift == 0).all()


def test_draws_are_pinned() -> None:
    # A change here changes every run that is resumed with a newer Bony. Before stains these were the same.
    spec = view_specs(1, 0, 224, 96, (0.4, 1.0), (0.05, 0.4), "histology")[0]
    params = draw(spec, colour_spec("histology"), 621, np.array([0, 3]), np.array([100, 2**40]), 224)
    expected: dict[str, list[Any]] = {
        "box": [[51, 58, 146, 140], [29, 16, 190, 203]],
        "flip_h": [True, True],
        "flip_v": [True, False],
        "quarter_turns": [0, 0],
        "jitter": [False, True],
        "brightness": [0.8900329297489967, 0.8321411808607706],
        "contrast": [1.1700537804053235, 0.9467609553167792],
        "saturation": [0.9827416698364259, 0.9146955220080276],
        "hue": [-0.005345085780396399, 0.0163719402179142],
        "greyscale": [False, False],
        "blur_sigma": [0.5208298113021147, 0.44498178920391995],
        "solarise": [False, False],
        "stain_scale": [
            [1.1972011017231212, 0.8888828002996692, 0.8199456486895194],
            [0.8354587271070724, 0.8617765003975915, 0.9855971098680312],
        ],
        "stain_shift": [
            [0.004191063152642127, -0.0078794761161323, 0.030077757333515476],
            [-0.03222527956352666, -0.009768639302233506, 0.02426018585867884],
        ],
    }
    assert list(expected) == [field.name for field in fields(ViewParameters)]
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(params, name), values, rtol=1e-12, err_msg=name)


def test_histology_draws_all_eight_orientations_alike(spec_of: SpecOf, drawn_from: DrawnFrom) -> None:
    params = drawn_from(spec_of(), colour_spec("histology"), 16_000)
    # A mirror and a half turn make the other flip: sixteen draws give each of eight orientations twice.
    draws = params.flip_h + 2 * params.flip_v + 4 * params.quarter_turns
    assert np.abs(np.bincount(draws, minlength=16) - 1000).max() < 130


def test_drawing_does_not_depend_on_the_batch(spec_of: SpecOf) -> None:
    spec, colour = spec_of(blur=0.5, solarise=0.5), colour_spec("histology")
    ids, epochs = np.array([5, 900, 2**62, 0, 7, 7]), np.array([0, 1, 2, 3, 4, 5])
    whole = draw(spec, colour, 3, epochs, ids, 224)
    order = np.array([3, 0, 5, 1])
    part = draw(spec, colour, 3, epochs[order], ids[order], 224)
    assert part.digest() == whole.take(order).digest()
    assert part.digest() != whole.take(order[::-1]).digest()
    assert ViewParameters.join([whole.take(slice(0, 2)), whole.take(slice(2, 6))]).digest() == whole.digest()


def test_seed_epoch_sample_and_view_all_change_the_draw(spec_of: SpecOf) -> None:
    colour, zero = colour_spec("original"), np.zeros(1, int)
    digests = {
        draw(spec_of(stream=stream), colour, seed, zero + epoch, zero + sample, 224).digest()
        for stream in (0, 1)
        for seed in (0, 1)
        for epoch in (0, 1)
        for sample in (0, 1)
    }
    assert len(digests) == 16


@pytest.mark.parametrize("name", [field.name for field in fields(ViewParameters)])
def test_digest_covers_every_field(name: str, spec_of: SpecOf, drawn_from: DrawnFrom) -> None:
    params = drawn_from(spec_of(), colour_spec("histology"), 3)
    changed = np.array(getattr(params, name))
    changed[-1] = ~changed[-1] if changed.dtype == bool else changed[-1] + 1
    assert replace(params, **{name: changed}).digest() != params.digest()
