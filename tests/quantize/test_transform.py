"""Balance and rotation leave the product unchanged, and the ladder of ViDiT-Q rises."""

import pytest
import torch

from ecar_dist.quantize.quantizer import quantize_rows, sqnr
from ecar_dist.quantize.transform import (
    balance_factors,
    block_width,
    hadamard,
    incoherence,
    random_signs,
    rotate,
)

WIDTHS = [64, 96, 63, 144]


@pytest.fixture
def layer():
    """Activations [512, 768] with channels that are always large and channels that are sometimes large; W."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 768, generator=generator)
    x[:, :12] *= 30.0
    for start in range(0, 512, 64):
        x[start : start + 64, torch.randint(12, 768, (8,), generator=generator)] *= 15.0
    return x, torch.randn(256, 768, generator=generator) * 0.02


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_the_matrix_is_orthogonal_and_symmetric(size):
    matrix = hadamard(size)
    torch.testing.assert_close(matrix @ matrix, torch.eye(size), atol=1e-6, rtol=0)
    assert torch.equal(matrix, matrix.t())


@pytest.mark.parametrize("width", WIDTHS)
def test_two_small_products_are_the_block_diagonal_matrix(width):
    block = {64: 64, 96: 32, 63: 1, 144: 16}[width]
    assert block_width(width) == block
    whole = torch.block_diag(*[hadamard(block)] * (width // block))
    x = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(rotate(x), x @ whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(rotate(rotate(x)), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_both_transforms_leave_the_product_as_it_is(width, alpha):
    generator = torch.Generator().manual_seed(width)
    x, weight = torch.randn(9, width, generator=generator), torch.randn(7, width, generator=generator)
    x[:, 0] *= 50.0
    x[:, 1] = 0.0  # a channel that is never used
    s = balance_factors(x.abs().amax(0), weight.abs().amax(0), alpha)
    signs = random_signs(width, seed=3)
    expected = x @ weight.t()
    found = rotate(x / s * signs) @ rotate(weight * s * signs).t()
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5
    assert torch.isfinite(s).all()
    assert s[1] == 1.0


def test_factors_are_the_formula_up_to_a_common_one():
    activation, weight = torch.tensor([1.0, 4.0, 16.0]), torch.tensor([1.0, 1.0, 4.0])
    s = balance_factors(activation, weight, 0.5)
    expected = activation.sqrt() / weight.sqrt()
    torch.testing.assert_close(s / s[0], expected / expected[0])
    assert s.log().sum().abs() < 1e-6


def test_signs_depend_on_the_seed_alone():
    assert torch.equal(random_signs(64, 5), random_signs(64, 5))
    assert not torch.equal(random_signs(64, 5), random_signs(64, 6))
    assert set(random_signs(64, 5).tolist()) == {-1.0, 1.0}


def test_rotation_spreads_a_large_channel():
    x = torch.ones(4, 64)
    x[:, 3] = 100.0
    rotated = rotate(x * random_signs(64, 0))
    assert incoherence(x.abs().amax(0)) > 30
    assert incoherence(rotated.abs().amax(0)) < 3


@pytest.mark.parametrize("bits", [4, 8])
def test_the_ladder_rises_from_static_to_dynamic_to_both(layer, bits):
    x, weight = layer
    expected = x @ weight.t()

    def error(x, weight, static=None):
        codes, scale = quantize_rows(weight, bits)
        step = None if static is None else static / 127
        seen, steps = quantize_rows(x, 8) if static is None else ((x / step).round().clamp(-127, 127), step)
        return sqnr(expected, (seen.float() * steps) @ (codes.float() * scale).t())

    s = balance_factors(x.abs().amax(0), weight.abs().amax(0), 0.5)
    signs = random_signs(768, 0)
    static = error(x, weight, static=x.abs().max())
    dynamic = error(x, weight)
    both = error(rotate(x / s * signs), rotate(weight * s * signs))
    assert both > dynamic + 3
    assert dynamic > static + 0.5
