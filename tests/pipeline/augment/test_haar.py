"""What networks are fed: the approximation of the Haar transform against closed forms, and its normalisation."""

import numpy as np
import pytest
import pywt
import torch
from torchvision.transforms.v2 import functional as reference

from pipeline.data.augment import make_views
from pipeline.data.haar import approximation, input_side, network_input
from pipeline.data.views import colour_spec, view_specs
from tiling.errors import UsageError

MEAN, STD = (0.7, 0.5, 0.6), (0.2, 0.25, 0.15)


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(621), dtype=torch.float64)


def low_pass(n: int) -> np.ndarray:
    """Rows of the orthonormal Haar transform that make the approximation: (n / 2, n)."""
    return np.kron(np.eye(n // 2), np.full((1, 2), 1 / np.sqrt(2)))


def test_approximation_is_the_low_pass_half_of_the_orthonormal_transform() -> None:
    image = images(3, 3, 10, 16)
    rows, columns = low_pass(10), low_pass(16)
    np.testing.assert_allclose(rows @ rows.T, np.eye(5), atol=1e-15)
    found = approximation(image.clone())
    np.testing.assert_allclose(found, rows @ image.numpy() @ columns.T, atol=1e-14)
    # Orthonormal: the way back is the transpose, and what was made from an approximation alone has that one.
    smooth = torch.from_numpy(rows.T @ found.numpy() @ columns)
    np.testing.assert_allclose(approximation(smooth), found, atol=1e-14)
    np.testing.assert_allclose((smooth**2).sum(), (found**2).sum(), rtol=1e-14)


def test_approximation_is_that_of_pywavelets() -> None:
    image = images(2, 3, 12, 8)
    expected, _ = pywt.dwt2(image.numpy(), "haar")
    np.testing.assert_allclose(approximation(image), expected, atol=1e-14)


def test_rgb_is_normalised_as_torchvision_does() -> None:
    image = images(2, 3, 9, 8).float()
    expected = reference.normalize(image, list(MEAN), list(STD))
    assert torch.allclose(network_input(image.clone(), "rgb", MEAN, STD), expected, atol=1e-6)


def test_the_approximation_is_normalised_to_the_mean_of_four_normalised_pixels() -> None:
    image = images(2, 3, 10, 8)
    expected = torch.nn.functional.avg_pool2d(reference.normalize(image, list(MEAN), list(STD)), 2)
    assert torch.allclose(network_input(image.clone(), "haar", MEAN, STD), expected, atol=1e-12)


@pytest.mark.parametrize("preset", ["original", "histology"])
def test_views_are_approximations_of_the_same_views(preset: str) -> None:
    tiles = (images(5, 40, 40, 3) * 255).byte()
    ids, epochs, colour = np.arange(5), np.zeros(5, int), colour_spec(preset)
    specs = view_specs(1, 2, 32, 18, (0.4, 1.0), (0.05, 0.4), preset)
    rgb = make_views(tiles, ids, epochs, specs, colour, 1, (0.0,) * 3, (1.0,) * 3)
    haar = make_views(tiles, ids, epochs, specs, colour, 1, MEAN, STD, torch.float32, "haar")
    assert [view.shape for view in haar] == [(5, 3, 16, 16), (5, 3, 9, 9), (5, 3, 9, 9)]
    for found, view in zip(haar, rgb, strict=True):
        expected = reference.normalize(approximation(view), [2 * m for m in MEAN], [2 * s for s in STD])
        assert torch.allclose(found, expected, atol=1e-5)


def test_the_approximation_keeps_its_type() -> None:
    image = images(1, 3, 8, 8)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert network_input(image.to(dtype), "haar", MEAN, STD).dtype == dtype


def test_odd_sides_are_refused() -> None:
    for shape in ((1, 3, 7, 8), (1, 3, 8, 7)):
        with pytest.raises(UsageError, match="side is 7 px, must be even"):
            approximation(torch.zeros(shape))
    tiles, specs = torch.zeros(1, 40, 40, 3, dtype=torch.uint8), view_specs(1, 0, 33, 8, (1, 1), (1, 1), "original")
    with pytest.raises(UsageError, match="side is 33 px, must be even"):
        make_views(
            tiles, np.zeros(1, int), np.zeros(1, int), specs, colour_spec("original"), 1, MEAN, STD, input="haar"
        )  # fmt: skip


def test_unknown_input_is_refused() -> None:
    with pytest.raises(UsageError, match="input is 'wavelet', must be rgb or haar"):
        input_side(224, "wavelet")
    assert (input_side(96, "rgb"), input_side(97, "rgb"), input_side(96, "haar")) == (96, 97, 48)
