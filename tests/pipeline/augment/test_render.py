"""Pixels of views: every batched step, and whole views, against a slow reference per sample; batches and devices."""

import colorsys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as reference

from pipeline.data import augment, colour
from pipeline.data.augment import make_views, render
from pipeline.data.views import ViewParameters, ViewSpec, colour_spec, draw, view_specs

SpecOf = Callable[..., ViewSpec]
DrawnFrom = Callable[..., ViewParameters]
Pixels = Callable[..., torch.Tensor]

NONE, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
MEAN, STD = (0.7, 0.5, 0.6), (0.2, 0.25, 0.15)
PX = 40


def made_tiles(n: int, px: int = PX) -> torch.Tensor:
    """Smooth coloured blobs with grain: hues of every kind, black and white corners."""
    generator = torch.Generator().manual_seed(621)
    coarse = torch.rand(n, 3, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(px, px), mode="bicubic")
    tiles = (smooth + 0.1 * torch.randn(n, 3, px, px, generator=generator)).mul(300).sub(20).clamp(0, 255)
    tiles[:, :, :2, :2], tiles[:, :, -2:, -2:] = 0, 255
    return tiles.byte().permute(0, 2, 3, 1).contiguous()


def plain(n: int, px: int = PX, **changes: Any) -> ViewParameters:
    """Parameters that change nothing, but for what is given."""
    off, zero, one = np.zeros(n, bool), np.zeros(n), np.ones(n)
    box = np.tile([0.0, 0.0, px, px], (n, 1))
    turns = np.zeros(n, np.int64)
    same = ViewParameters(
        box, off, off, turns, off, one, one, one, zero, off, zero, off, np.ones((n, 3)), np.zeros((n, 3))
    )  # fmt: skip
    return replace(same, **changes)


@pytest.fixture(scope="module")
def pixels(spec_of: SpecOf) -> Pixels:
    """Views of tiles as parameters say, not normalised."""

    def rendered(tiles: torch.Tensor, params: ViewParameters, size: int = PX) -> torch.Tensor:
        return render(tiles, params, spec_of(size), NONE, ONE)

    return rendered


def planes(tiles: torch.Tensor) -> torch.Tensor:
    return tiles.permute(0, 3, 1, 2) / 255


# --- geometry --------------------------------------------------------------------------------------------------------


def test_nothing_asked_for_is_the_tile_itself(pixels: Pixels) -> None:
    tiles = made_tiles(3)
    assert torch.equal(pixels(tiles, plain(3)).mul(255).round().byte(), planes(tiles).mul(255).round().byte())


@pytest.mark.parametrize("size", [16, PX, 56])
def test_crops_agree_with_torchvision(size: int, spec_of: SpecOf, drawn_from: DrawnFrom, pixels: Pixels) -> None:
    tiles = made_tiles(8)
    box = drawn_from(spec_of(scale=(0.02, 0.9)), colour_spec("original"), 8, tile_px=PX).box
    box[0], box[1] = (3, 7, 1, 9), (0, 31, 40, 9)
    found = pixels(tiles, plain(8, box=box), size)
    for tile, (y0, x0, height, width), view in zip(planes(tiles), box.astype(int).tolist(), found, strict=True):
        expected = reference.resized_crop(tile, y0, x0, height, width, [size, size], antialias=False)
        assert torch.allclose(view, expected, atol=1e-4)


def test_no_pixel_from_outside_the_box_is_mixed_in(spec_of: SpecOf, drawn_from: DrawnFrom, pixels: Pixels) -> None:
    box = drawn_from(spec_of(scale=(0.1, 0.9)), colour_spec("original"), 32, tile_px=PX).box
    tiles = torch.full((32, PX, PX, 3), 255, dtype=torch.uint8)
    for tile, (y0, x0, height, width) in zip(tiles, box.astype(int).tolist(), strict=True):
        tile[y0 : y0 + height, x0 : x0 + width] = 0
    flips = np.arange(32) % 2 == 0
    params = plain(32, box=box, flip_h=flips, quarter_turns=np.arange(32) % 4)
    assert pixels(tiles, params, 64).max() < 1e-4


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("flip_v", [False, True])
@pytest.mark.parametrize("flip_h", [False, True])
def test_flips_and_turns_are_those_of_torch(flip_h: bool, flip_v: bool, turns: int, pixels: Pixels) -> None:
    tiles, box = made_tiles(2), np.array([[5.0, 2, 30, 24], [0, 9, 20, 26]])
    upright = pixels(tiles, plain(2, box=box), 24)
    params = plain(
        2, box=box, flip_h=np.full(2, flip_h), flip_v=np.full(2, flip_v), quarter_turns=np.full(2, turns, np.int64)
    )
    dims = [3] * flip_h + [2] * flip_v
    expected = torch.rot90(torch.flip(upright, dims), turns, dims=(2, 3))
    assert torch.allclose(pixels(tiles, params, 24), expected, atol=1e-4)


def test_flips_and_turns_of_a_whole_tile_are_exact(pixels: Pixels) -> None:
    tiles = made_tiles(16)
    number = np.arange(16)
    params = plain(16, flip_h=number % 2 == 1, flip_v=number // 2 % 2 == 1, quarter_turns=number // 4)
    found = pixels(tiles, params).mul(255).round().byte()
    for i, tile in enumerate(tiles.permute(0, 3, 1, 2)):
        expected = torch.rot90(torch.flip(tile, [2] * (i % 2) + [1] * (i // 2 % 2)), i // 4, dims=(1, 2))
        assert torch.equal(found[i], expected)


# --- stains ----------------------------------------------------------------------------------------------------------

# Ruifrok and Johnston 2001: what one unit of haematoxylin, eosin and DAB takes from R, G and B.
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
LEVEL = 1 / 255


def slow_stain(image: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """One (3, h, w) image: to densities, to amounts of stain, and back."""
    density = -np.log((image.reshape(3, -1) + LEVEL) / (1 + LEVEL))
    amounts = np.linalg.solve(STAINS.T, density) * scale[:, None] + shift[:, None]
    changed = (1 + LEVEL) * np.exp(-(STAINS.T @ amounts)) - LEVEL
    return np.clip(changed, 0, 1).reshape(image.shape)


def changed_stains(scale: np.ndarray, shift: np.ndarray, **changes: Any) -> ViewParameters:
    return plain(len(scale), stain_scale=scale, stain_shift=shift, **changes)


def test_stains_agree_with_a_reference_that_goes_by_way_of_the_stains(pixels: Pixels) -> None:
    tiles, rng = made_tiles(5), np.random.default_rng(0)
    scale, shift = rng.uniform(0.5, 1.5, (5, 3)), rng.uniform(-0.3, 0.3, (5, 3))
    scale[1], shift[2] = 1, 0
    scale[3], shift[3] = 1, 0
    found = pixels(tiles, changed_stains(scale, shift))
    for view, tile, factors, offsets in zip(found, planes(tiles).double().numpy(), scale, shift, strict=True):
        assert np.abs(view.numpy() - slow_stain(tile, factors, offsets)).max() < 2e-5
    assert torch.allclose(found[3], planes(tiles)[3], atol=2e-5)


@pytest.mark.parametrize("stain", range(3))
def test_scaling_one_stain_scales_what_it_takes_of_the_light_and_leaves_glass_white(stain: int, pixels: Pixels) -> None:
    amounts = np.array([0.0, 0.2, 0.8, 1.5])  # natural optical density
    colours = (1 + LEVEL) * np.exp(-amounts[:, None] * STAINS[stain]) - LEVEL
    image = torch.from_numpy(colours.T[None, :, None].copy())  # (1, 3, 1, 4)
    scale = np.ones((1, 3))
    scale[0, stain] = 1.3
    mix, gain = (torch.from_numpy(numbers)[..., None, None] for numbers in colour.stain_mix(scale, np.zeros((1, 3))))
    colour.stain(image, mix, gain)
    expected = np.clip((1 + LEVEL) * np.exp(-1.3 * amounts[:, None] * STAINS[stain]) - LEVEL, 0, 1)
    np.testing.assert_allclose(image[0, :, 0].T, expected, atol=1e-12)
    np.testing.assert_allclose(image[0, :, 0, 0], 1, atol=1e-12)


def test_black_pixels_stay_finite_and_their_noise_small(pixels: Pixels) -> None:
    tiles = torch.randint(0, 3, (20, PX, PX, 3), dtype=torch.uint8)
    rng = np.random.default_rng(0)
    strongest = colour_spec("histology")
    scale = 1 + strongest.stain * rng.choice([-1, 1], (20, 3))
    shift = strongest.stain_shift * rng.choice([-1, 1], (20, 3))
    found = pixels(tiles, changed_stains(scale, shift))
    assert torch.isfinite(found).all()
    assert found.max() < 15 / 255


def test_jitter_comes_after_stains(pixels: Pixels) -> None:
    tiles, scale, shift = made_tiles(1), np.full((1, 3), 0.7), np.zeros((1, 3))
    on = np.array([True])
    found = pixels(tiles, changed_stains(scale, shift, jitter=on, brightness=np.array([1.4])))
    stained = torch.from_numpy(slow_stain(planes(tiles)[0].double().numpy(), scale[0], shift[0])).float()
    assert torch.allclose(found[0], reference.adjust_brightness(stained, 1.4), atol=2e-5)


# --- colours ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "factors", "adjust"),
    [
        ("brightness", [0.0, 0.6, 1.0, 1.4], reference.adjust_brightness),
        ("contrast", [0.0, 0.6, 1.0, 1.4], reference.adjust_contrast),
        ("saturation", [0.0, 0.8, 1.0, 1.9], reference.adjust_saturation),
        ("hue", [-0.5, -0.1, 0.0, 0.37], reference.adjust_hue),
    ],
)
def test_each_jitter_agrees_with_torchvision(name: str, factors: list[float], adjust: Any, pixels: Pixels) -> None:
    tiles = made_tiles(5)
    # The last sample has a factor too, but its jitter is off.
    params = plain(5, jitter=np.array([True] * 4 + [False]), **{name: np.array([*factors, factors[0]])})
    found = pixels(tiles, params)
    for view, tile, factor in zip(found[:4], planes(tiles), factors, strict=False):
        assert torch.allclose(view, adjust(tile, factor), atol=2e-5)
    assert torch.allclose(found[4], planes(tiles)[4], atol=2e-5)


def test_hue_of_primaries_greys_and_near_greys_is_that_of_colorsys() -> None:
    steps = torch.tensor([0, 1, 127, 128, 254, 255]) / 255
    colours = torch.cartesian_prod(steps, steps, steps).double()  # (216, 3): equal channels, ties and every order
    for shift in np.linspace(-0.5, 0.5, 13).tolist():
        hsv = [colorsys.rgb_to_hsv(*colour) for colour in colours.tolist()]
        expected = torch.tensor([colorsys.hsv_to_rgb((h + shift) % 1, s, v) for h, s, v in hsv], dtype=torch.float64)
        image = colours.T.reshape(1, 3, 12, 18).clone()
        colour.shift_hue(image, torch.full((1, 1, 1, 1), shift).double())
        assert torch.allclose(image.reshape(3, -1).T, expected, atol=1e-7)


def test_greyscale_agrees_with_torchvision(pixels: Pixels) -> None:
    tiles, chosen = made_tiles(3), np.array([True, False, True])
    found = pixels(tiles, plain(3, greyscale=chosen))
    expected = planes(tiles)
    expected[[0, 2]] = reference.rgb_to_grayscale(expected[[0, 2]], num_output_channels=3)
    assert torch.allclose(found, expected, atol=2e-5)
    assert torch.equal(pixels(tiles[:1], plain(1, greyscale=chosen[:1])), found[:1])


def kernel_width(sigma: float) -> int:
    """The kernel reaches over three sigma, rounded up to 2, 4 or 6 pixels."""
    return next(2 * reach + 1 for reach in (2, 4, 6) if reach >= 3 * sigma)


def test_blur_agrees_with_torchvision(pixels: Pixels) -> None:
    tiles, sigmas = made_tiles(7), [0.0, 0.1, 0.34, 0.8, 1.0, 1.5, 2.0]
    found = pixels(tiles, plain(7, blur_sigma=np.array(sigmas)))
    assert torch.allclose(found[0], planes(tiles)[0], atol=2e-5)
    for view, tile, sigma in zip(found[1:], planes(tiles)[1:], sigmas[1:], strict=True):
        width = kernel_width(sigma)
        assert torch.allclose(view, reference.gaussian_blur(tile, [width, width], [sigma]), atol=2e-5)


def test_the_narrowest_view_takes_the_widest_blur(pixels: Pixels) -> None:
    assert pixels(made_tiles(2), plain(2, blur_sigma=np.full(2, 2.0)), size=7).shape == (2, 3, 7, 7)


def test_solarise_agrees_with_torchvision(pixels: Pixels) -> None:
    tiles = made_tiles(2)
    found = pixels(tiles, plain(2, solarise=np.array([False, True])))
    expected = torch.stack([planes(tiles)[0], reference.solarize(planes(tiles)[1], 0.5)])
    assert torch.allclose(found, expected, atol=2e-5)


def slow_view(tile: torch.Tensor, params: ViewParameters, size: int) -> torch.Tensor:
    """One view of one (3, px, px) tile by torchvision, step by step."""
    y0, x0, height, width = params.box[0].astype(int).tolist()
    view = reference.resized_crop(tile, y0, x0, height, width, [size, size], antialias=False)
    view = torch.flip(view, [2] * bool(params.flip_h[0]) + [1] * bool(params.flip_v[0]))
    view = torch.rot90(view, int(params.quarter_turns[0]), dims=(1, 2))
    view = torch.from_numpy(slow_stain(view.double().numpy(), params.stain_scale[0], params.stain_shift[0])).float()
    if params.jitter[0]:
        view = reference.adjust_brightness(view, float(params.brightness[0]))
        view = reference.adjust_contrast(view, float(params.contrast[0]))
        view = reference.adjust_saturation(view, float(params.saturation[0]))
        view = reference.adjust_hue(view, float(params.hue[0]))
    if params.greyscale[0]:
        view = reference.rgb_to_grayscale(view, num_output_channels=3)
    if (sigma := float(params.blur_sigma[0])) > 0:
        view = reference.gaussian_blur(view, [kernel_width(sigma)] * 2, [sigma])
    if params.solarise[0]:
        view = reference.solarize(view, 0.5)
    return reference.normalize(view, list(MEAN), list(STD))


@pytest.mark.parametrize("preset", ["original", "histology"])
def test_whole_views_agree_with_torchvision(preset: str) -> None:
    n = 24
    specs = view_specs(2, 1, 48, 20, (0.4, 1.0), (0.05, 0.4), preset)
    ids, epochs, tiles = np.arange(n), np.full(n, 3), made_tiles(n)
    found = make_views(tiles, ids, epochs, specs, colour_spec(preset), 1, MEAN, STD)
    for spec, views in zip(specs, found, strict=True):
        params = draw(spec, colour_spec(preset), 1, epochs, ids, PX)
        assert views.shape == (n, 3, spec.size, spec.size)
        assert torch.equal(views, render(tiles, params, spec, MEAN, STD))
        expected = torch.stack([slow_view(planes(tiles)[i], params.take(slice(i, i + 1)), spec.size) for i in range(n)])
        assert (views - expected).abs().max() * max(STD) < 5e-4


# --- batches, types, devices -----------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(8)), st.integers(0, 1000), st.sampled_from(["original", "histology"]))
def test_a_sample_has_the_same_pixels_in_any_batch(order: list[int], epoch: int, preset: str) -> None:
    tiles, ids, epochs = made_tiles(8, 32), np.arange(100, 108), np.full(8, epoch)
    specs = view_specs(2, 2, 32, 16, (0.4, 1.0), (0.05, 0.4), preset)
    colour = colour_spec(preset)
    whole = make_views(tiles, ids, epochs, specs, colour, 1, NONE, ONE)
    for rows in (np.array(order[:4]), np.array(order[4:])):
        part = make_views(tiles[rows], ids[rows], epochs[rows], specs, colour, 1, NONE, ONE)
        for all_views, some_views in zip(whole, part, strict=True):
            assert torch.allclose(all_views[rows], some_views, atol=1e-5)  # far below 1 / 255


def test_parts_on_a_cpu_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles, ids, epochs = made_tiles(7), np.arange(7), np.zeros(7, int)
    specs, colour = view_specs(1, 2, 32, 16, (0.4, 1.0), (0.05, 0.4), "original"), colour_spec("original")
    whole = make_views(tiles, ids, epochs, specs, colour, 1, MEAN, STD)
    for values in (1, 3 * 3 * PX**2):
        monkeypatch.setattr(augment, "CPU_VALUES", values)
        parts = make_views(tiles, ids, epochs, specs, colour, 1, MEAN, STD)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_other_types_round_the_same_pixels(dtype: torch.dtype, spec_of: SpecOf, drawn_from: DrawnFrom) -> None:
    tiles, spec = made_tiles(4), spec_of(32, blur=0.5, solarise=0.5)
    params = drawn_from(spec, colour_spec("original"), 4, tile_px=PX)
    exact = render(tiles, params, spec, MEAN, STD, torch.float64)
    views = render(tiles, params, spec, MEAN, STD, dtype)
    assert views.dtype == dtype
    assert torch.allclose(views.double(), exact, atol=2e-4, rtol=2 * torch.finfo(dtype).eps)


def test_autocast_does_not_reach_the_pixels(spec_of: SpecOf, drawn_from: DrawnFrom) -> None:
    tiles, spec = made_tiles(4), spec_of(32, blur=1.0)
    params = drawn_from(spec, colour_spec("original"), 4, tile_px=PX)
    expected = render(tiles, params, spec, MEAN, STD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(render(tiles, params, spec, MEAN, STD), expected)


def test_an_empty_batch_has_empty_views() -> None:
    none = np.zeros(0, int)
    specs = view_specs(1, 1, 32, 16, (0.4, 1.0), (0.05, 0.4), "original")
    views = make_views(made_tiles(2)[:0], none, none, specs, colour_spec("original"), 1, MEAN, STD)
    assert [tuple(view.shape) for view in views] == [(0, 3, 32, 32), (0, 3, 16, 16)]


@pytest.mark.parametrize("tiles", [torch.zeros(2, PX, PX, 3), torch.zeros(2, 3, PX, PX, dtype=torch.uint8)])
def test_other_tiles_are_refused(tiles: torch.Tensor, pixels: Pixels) -> None:
    with pytest.raises(ValueError, match="must be uint8 of"):
        pixels(tiles, plain(2))


@pytest.mark.parametrize("n", [1, 3])
def test_parameters_of_other_samples_are_refused(n: int, pixels: Pixels) -> None:
    with pytest.raises(ValueError, match=r"2 tiles but parameters of \[" + str(n)):
        pixels(made_tiles(2), plain(n))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("preset", "fed"), [("original", "rgb"), ("histology", "rgb"), ("histology", "haar")])
def test_a_gpu_makes_the_same_pixels_without_being_waited_for(preset: str, fed: str) -> None:
    tiles, ids, epochs = made_tiles(32, 64), np.arange(32), np.zeros(32, int)
    specs, colour = view_specs(2, 4, 64, 32, (0.4, 1.0), (0.05, 0.4), preset), colour_spec(preset)
    expected = make_views(tiles, ids, epochs, specs, colour, 1, NONE, ONE, input=fed)
    on_device = tiles.cuda()
    make_views(on_device, ids, epochs, specs, colour, 1, NONE, ONE, input=fed)  # first use allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = make_views(on_device, ids, epochs, specs, colour, 1, NONE, ONE, input=fed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.allclose(a, b.cpu(), atol=1 / 255) for a, b in zip(expected, found, strict=True))
