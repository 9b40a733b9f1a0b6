"""Codes and scales, packed pairs, and the quantisation error."""

import math

import pytest
import torch

from ecar_dist.quantize.quantizer import noise_ratio, pack_int4, quantize_rows, sqnr, unpack_int4


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_value_is_off_by_more_than_half_a_step_and_the_largest_by_none(bits):
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-3], [1], [10], [1e4], [1]])
    codes, scale = quantize_rows(x, bits)
    largest = 2 ** (bits - 1) - 1
    assert codes.dtype == torch.int8
    assert codes.abs().amax(dim=1).tolist() == [largest] * 5
    assert ((codes * scale - x).abs() <= scale / 2 * (1 + 1e-5)).all()
    torch.testing.assert_close((codes * scale).abs().amax(dim=1), x.abs().amax(dim=1))


def test_a_row_of_zeros_stays_zero():
    codes, scale = quantize_rows(torch.zeros(2, 8), 8)
    assert (codes * scale == 0).all()


@pytest.mark.parametrize("width", [1, 2, 7, 16])
def test_every_pair_of_four_bit_values_survives_packing(width):
    values = torch.arange(-8, 8, dtype=torch.int8)
    codes = values[torch.randint(0, 16, (64, width), generator=torch.Generator().manual_seed(width))]
    codes[:16, 0] = values
    packed = pack_int4(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (64, (width + 1) // 2)
    assert torch.equal(unpack_int4(packed, width), codes)


def test_sqnr_is_ten_times_the_logarithm_of_the_powers():
    x = torch.full((10,), 2.0)
    assert noise_ratio(x, x + 0.2) == pytest.approx(0.01)
    assert sqnr(x, x + 0.2) == pytest.approx(20.0, abs=1e-4)
    assert sqnr(x, x) == math.inf
