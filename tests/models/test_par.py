"""`par` and `par_cont`: which token sees which, the cache, plain AR as n = 1, and that every weight learns."""

from itertools import accumulate, pairwise

import pytest
import torch
import torch.nn.functional as F

from ecar_dist.flow.discrete.region_order import group_sizes, inverse_order, region_order
from ecar_dist.kinds.flow_head import TrunkSize
from ecar_dist.models.attention import KVCache, causal_attention, group_mask, grouped_attention, masked_attention
from ecar_dist.models.layers import position_table
from ecar_dist.models.tokens.par import PAR, ContinuousPAR

CHANNELS, NUM_CLASSES, CODES, SIDE = 3, 5, 24, 8  # 16 x 16 latents in patches of 2: 12 numbers per token
TOKENS = SIDE**2
SIZE = TrunkSize(2, 32, 2, 2)


def make_model(group, *, kind=PAR, trained=True, recompute=False):
    torch.manual_seed(0)
    more = {"num_codes": CODES} if kind is PAR else {}
    model = kind(
        SIZE,
        group=group,
        latent_size=16,
        latent_channels=CHANNELS,
        patch_size=2,
        num_classes=NUM_CLASSES,
        recompute=recompute,
        **more,
    )
    if trained:  # gates and outputs start at zero and would hide every dependence
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "codebook" not in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def tokens():
    return torch.randn(2, TOKENS, 12, generator=torch.Generator().manual_seed(1))


LABELS = torch.tensor([2, NUM_CLASSES])  # the second is the null label


@pytest.mark.parametrize("group", [1, 4, 16])
def test_attention_follows_the_rule_of_groups(group):
    sizes = group_sizes(TOKENS, group)
    q, k, v = torch.randn(3, 2, 4, TOKENS, 8)
    numbers = torch.tensor([j if j < group else group + (j - group) // group for j in range(TOKENS)])
    reference = masked_attention(group_mask(numbers))(q, k, v)
    torch.testing.assert_close(grouped_attention(sizes)(q, k, v), reference)
    assert (causal_attention(q, k, v) - reference).abs().max() > 0.1 or group == 1


@pytest.mark.parametrize("group", [1, 4, 16])
def test_no_logit_sees_a_token_of_its_own_group_or_a_later_one(group, tokens):
    """The leak test: each token in turn is replaced by one with a different code."""
    model = make_model(group)
    order = region_order(SIDE, group)
    with torch.no_grad():
        before, codes = model(tokens, LABELS)
        ends = [0, *accumulate(group_sizes(TOKENS, group))]
        for start, end in pairwise(ends):
            for position in range(start, end, max(1, (end - start) // 2)):
                other = (codes[:, position] + 1) % CODES
                changed = tokens.clone()
                changed[:, order[position]] = model.codebook(other)
                after, _ = model(changed, LABELS)
                assert torch.equal(after[:, :end], before[:, :end]), position
                assert end == TOKENS or (after[:, end:] - before[:, end:]).abs().max() > 1e-4, position


@pytest.mark.parametrize("group", [1, 4, 16])
def test_cached_steps_equal_one_pass(group, tokens):
    model = make_model(group)
    with torch.no_grad():
        expected, codes = model(tokens, LABELS)
        cache = model.trunk.start_cache()
        ends = [0, *accumulate(group_sizes(TOKENS, group))]
        steps = [model.next_logits(codes[:, :start], LABELS, start, stop, cache) for start, stop in pairwise(ends)]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=1e-5, rtol=0)


def test_several_groups_in_one_cached_step_equal_one_pass(tokens):
    """What the Jacobi sampler does: a window of single tokens, some of which are dropped afterwards."""
    model = make_model(1)
    with torch.no_grad():
        expected, codes = model(tokens, LABELS)
        cache = model.trunk.start_cache()
        first = model.next_logits(codes[:, :20], LABELS, 0, 20, cache)
        cache.keep(7)
        second = model.next_logits(codes[:, :30], LABELS, 7, 30, cache)
    torch.testing.assert_close(first, expected[:, :20], atol=1e-5, rtol=0)
    torch.testing.assert_close(second, expected[:, 7:30], atol=1e-5, rtol=0)


def test_one_region_is_plain_autoregression_to_the_bit(tokens):
    """The same weights in the plainest form: raster order, the token before, a causal triangle."""
    model = make_model(1)
    trunk = model.trunk
    with torch.no_grad():
        ours, codes = model(tokens, LABELS)
        classes = trunk.class_embedding(LABELS)[:, None]
        raster = (tokens[:, :, None] - model.codebook.codes).square().sum(-1).argmin(-1)
        x = torch.cat((classes, model.code_embedding(raster[:, :-1])), dim=1)
        x = x + position_table(SIDE, 32, x.device) + trunk.positions.weight
        plain = model.output(trunk.transformer(x, classes, [causal_attention] * 2))
    assert torch.equal(codes, raster)
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("group", [1, 4])
def test_codes_in_the_order_become_tokens_of_the_grid(group, tokens):
    model = make_model(group)
    _, codes = model(tokens, LABELS)
    restored = model.tokens_of(codes)
    assert torch.equal(restored, model.codebook.codes[model.codebook(tokens)])
    assert torch.equal(codes[:, list(inverse_order(region_order(SIDE, group)))], model.codebook(tokens))


def test_the_logits_are_uniform_at_the_start(tokens):
    logits, _ = make_model(4, trained=False)(tokens, LABELS)
    assert not logits.any()


@pytest.mark.parametrize("group", [1, 4])
def test_every_weight_but_the_codebook_learns(group, tokens):
    model = make_model(group, trained=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    before = model.codebook.codes.clone()
    for _ in range(4):
        optimizer.zero_grad()
        logits, codes = model(tokens, LABELS)
        F.cross_entropy(logits.flatten(0, 1), codes.flatten()).backward()
        optimizer.step()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert still == ["codebook.codes"]
    assert torch.equal(model.codebook.codes, before)


def test_recomputing_gives_the_same_gradients(tokens):
    gradients = []
    for recompute in (False, True):
        model = make_model(4, recompute=recompute)
        logits, codes = model(tokens, LABELS)
        F.cross_entropy(logits.flatten(0, 1), codes.flatten()).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_bf16_finds_the_codes_of_float32(tokens):
    model = make_model(4)
    logits, codes = model(tokens, LABELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, same = model(tokens, LABELS)
    cast, same_too = model.bfloat16()(tokens, LABELS)
    assert torch.equal(codes, same)
    assert torch.equal(codes, same_too)
    assert (rounded - logits).norm() < 0.05 * logits.norm()
    assert (cast - logits).norm() < 0.05 * logits.norm()


@pytest.mark.parametrize("group", [1, 4])
def test_a_continuous_token_is_conditioned_on_earlier_groups_alone(group, tokens):
    model = make_model(group, kind=ContinuousPAR)
    order, sizes = region_order(SIDE, group), group_sizes(TOKENS, group)
    group_of = torch.zeros(TOKENS, dtype=torch.int64)  # by place
    group_of[list(order)] = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    states, times = torch.randn(2, 3, TOKENS, 12), torch.rand(2, 3, TOKENS)
    tokens.requires_grad_()
    velocity = model(tokens, states, times, LABELS)
    for place in (0, 1, 9, 30, TOKENS - 1):
        (gradient,) = torch.autograd.grad(velocity[:, :, place].square().sum(), tokens, retain_graph=True)
        assert torch.equal(gradient.abs().sum((0, 2)) > 0, group_of < group_of[place]), place


@pytest.mark.parametrize("group", [1, 4])
def test_cached_conditions_equal_one_pass(group, tokens):
    model = make_model(group, kind=ContinuousPAR)
    ordered = tokens[:, list(region_order(SIDE, group))]
    ends = [0, *accumulate(group_sizes(TOKENS, group))]
    with torch.no_grad():
        expected = model.head.condition_projection(model.trunk(model.state_projection(ordered), LABELS))
        cache = KVCache(2)
        steps = [
            model.next_conditions(ordered[:, :start], LABELS, start, stop, cache) for start, stop in pairwise(ends)
        ]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=1e-5, rtol=0)
