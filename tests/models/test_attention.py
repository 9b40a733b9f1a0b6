import torch

from ecar_dist.models.attention import (
    Attention,
    KVCache,
    block_causal_attention,
    block_causal_mask,
    full_attention,
    group_mask,
    masked_attention,
)


def test_group_mask_serves_the_relatives():
    causal = group_mask(torch.arange(5))
    assert torch.equal(causal, torch.ones(5, 5, dtype=torch.bool).tril())
    assert group_mask(torch.zeros(5, dtype=torch.long)).all()


def test_block_causal_mask_shows_own_and_coarser_stages():
    expected = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    assert torch.equal(block_causal_mask((1, 3)), expected)
    assert round(block_causal_mask((16, 64, 256)).float().mean().item(), 2) == 0.81


def test_mask_free_calls_equal_the_mask():
    q, k, v = torch.randn(3, 2, 4, 21, 8)
    tokens = (1, 4, 16)
    reference = masked_attention(block_causal_mask(tokens))(q, k, v)
    assert torch.allclose(block_causal_attention(tokens)(q, k, v), reference, atol=1e-6)
    assert not torch.allclose(full_attention(q, k, v), reference, atol=1e-2)


def test_cache_keeps_layers_apart():
    cache = KVCache(num_layers=2)
    first, second = cache.attends()
    q, k, v = torch.randn(3, 1, 2, 4, 8)
    first(q, k, v)
    assert torch.equal(second(q, k, v), full_attention(q, k, v))
    both = full_attention(q, torch.cat((k, k + 1), 2), torch.cat((v, v - 1), 2))
    assert torch.allclose(first(q, k + 1, v - 1), both, atol=1e-6)


def test_attention_ignores_the_size_of_queries_and_keys():
    """QK-norm: scaling the projections of q and k does not change the output."""
    torch.manual_seed(0)
    attention = Attention(16, 2)
    torch.nn.init.normal_(attention.qkv.weight)
    x = torch.randn(2, 6, 16)
    before = attention(x, full_attention)
    with torch.no_grad():
        attention.qkv.weight[:32] *= 50.0
    assert torch.allclose(attention(x, full_attention), before, atol=1e-5)
