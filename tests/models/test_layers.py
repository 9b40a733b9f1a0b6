import math

import pytest
import torch

from ecar_dist.flow.pyramid import downsample
from ecar_dist.models import layers
from ecar_dist.models.layers import (
    Linear,
    RMSNorm,
    TimeEmbedding,
    modulated_norm,
    patchify,
    position_table,
    sinusoid,
    unpatchify,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_unpatchify_inverts_patchify(patch_size):
    x = torch.randn(2, 3, 8, 8)
    tokens = patchify(x, patch_size)
    assert tokens.shape == (2, (8 // patch_size) ** 2, 3 * patch_size**2)
    assert torch.equal(unpatchify(tokens, patch_size), x)


def test_tokens_are_patches_in_row_major_order():
    x = torch.arange(32.0).reshape(1, 2, 4, 4)
    tokens = patchify(x, 2)
    assert torch.equal(tokens[0, 1], x[0, :, 0:2, 2:4].flatten())
    assert torch.equal(tokens[0, 2], x[0, :, 2:4, 0:2].flatten())


def test_positions_are_distinct_and_rows_are_not_columns():
    table = position_table(16, 64, CPU)
    assert table.shape == (256, 64)
    assert torch.pdist(table).min() > 0.1
    assert torch.equal(table[3, :32], table[0, :32])  # same row
    assert torch.equal(table[3 * 16, 32:], table[0, 32:])  # same column
    assert not torch.equal(table[3], table[3 * 16])


def test_coarse_positions_lie_amid_the_finer_ones_they_cover():
    """A low frequency is nearly linear over a token, so its mean over 2 x 2 finer tokens is the coarse value."""
    coarse, fine = (position_table(side, 64, CPU).T.reshape(1, 64, side, side) for side in (8, 16))
    slowest = 15  # of the 16 cosines of the row
    assert torch.allclose(downsample(fine)[:, slowest], coarse[:, slowest], atol=1e-3)
    assert not torch.allclose(fine[:, slowest, ::2, ::2], coarse[:, slowest], atol=1e-3)


def test_position_table_first_met_while_sampling_serves_training():
    layers._position_table.cache_clear()
    with torch.inference_mode():
        position_table(2, 8, CPU)
    weight = torch.ones(8, requires_grad=True)
    (position_table(2, 8, CPU) * weight).sum().backward()
    assert weight.grad is not None


def test_sinusoid_has_the_stated_frequencies():
    out = sinusoid(torch.tensor([3.0]), 2, ratio=100.0)[0]
    expected = [math.cos(3), math.cos(0.3), math.sin(3), math.sin(0.3)]
    assert torch.allclose(out, torch.tensor(expected), atol=1e-6)


def test_time_embedding_tells_neighbouring_times_apart_in_bf16():
    """999 and 1000 are one number in bf16; the sinusoid must see float32 even when the weights do not."""
    seen = []
    embedding = TimeEmbedding(16).bfloat16()
    embedding.mlp[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    embedding(torch.tensor([0.999, 1.0]))
    assert seen[0].dtype == torch.float32
    assert torch.allclose(seen[0][0], sinusoid(torch.tensor([999.0]), 128, ratio=10_000.0)[0], atol=1e-3)
    assert (seen[0][0] - seen[0][1]).abs().max() > 0.5


def test_rms_norm_and_modulated_norm_compute_in_float32():
    x = (torch.randn(2, 5, 64) * 3).bfloat16()
    exact = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    assert torch.equal(RMSNorm(64).bfloat16()(x), exact.to(torch.bfloat16))
    shift, scale = torch.randn(2, 1, 64), torch.randn(2, 1, 64)
    centred = x.double() - x.double().mean(-1, keepdim=True)
    expected = centred / centred.square().mean(-1, keepdim=True).sqrt() * (1 + scale) + shift
    assert torch.allclose(modulated_norm(x, shift, scale).double(), expected, atol=1e-5)


def test_linear_takes_float32_with_bf16_weights():
    layer = Linear(4, 8).bfloat16()
    assert layer(torch.randn(2, 4)).dtype == torch.bfloat16


def test_linear_init_is_seeded_and_narrow():
    torch.manual_seed(3)
    first = Linear(256, 256).weight
    torch.manual_seed(3)
    assert torch.equal(first, Linear(256, 256).weight)
    assert first.std().item() == pytest.approx(0.02, rel=0.05)
