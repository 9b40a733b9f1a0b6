"""The masks of training and the schedule of sampling."""

import itertools
import math

import pytest
import torch
from scipy import stats

from ecar_dist.flow.loss import masked_loss
from ecar_dist.flow.masking import mask_ratio, random_mask, random_order, token_points
from ecar_dist.flow.unmasking import masked_counts, masked_guidance_scales
from ecar_dist.rng import Purpose, uniform


def uniforms(count, shape=(), purpose=Purpose.MASK_RATIO):
    return uniform(0, torch.arange(count), purpose, shape)


def test_ratios_have_the_published_distribution():
    """A normal distribution with mean 1 and std 0.25, truncated to [0.7, 1]."""
    u = torch.linspace(0.001, 0.999, 999)
    published = stats.truncnorm((0.7 - 1.0) / 0.25, 0.0, loc=1.0, scale=0.25)
    assert mask_ratio(u).numpy() == pytest.approx(published.ppf(u.double().numpy()), abs=1e-9)
    ratios = mask_ratio(uniforms(20_000))
    assert 0.7 < float(ratios.min()) < 0.701
    assert 0.999 < float(ratios.max()) < 1.0
    assert float(ratios.mean()) == pytest.approx(published.mean(), abs=2e-3)


@pytest.mark.parametrize("num_tokens", [1, 16, 256])
def test_a_mask_has_its_share_of_tokens_anywhere(num_tokens):
    u, ratio = uniforms(2000, (num_tokens,), Purpose.MASK_ORDER), mask_ratio(uniforms(2000))
    mask = random_mask(u, ratio)
    assert torch.equal(mask.sum(1), (ratio * num_tokens).ceil().long())
    assert int(mask.sum(1).min()) >= math.ceil(0.7 * num_tokens)
    places = mask.double().mean(0)
    assert float((places - mask.double().mean()).abs().max()) < 0.04  # no place is preferred


def test_an_order_is_a_permutation_whatever_the_ties():
    u = torch.tensor([[0.5, 0.5, 0.1, 0.5], [0.9, 0.8, 0.7, 0.6]])
    assert random_order(u).tolist() == [[2, 0, 1, 3], [3, 2, 1, 0]]


def test_token_points_are_those_of_one_stage():
    tokens, noise, u = torch.randn(2, 5, 3), torch.randn(2, 4, 5, 3), torch.rand(2, 4, 5)
    states, targets = token_points(tokens, noise, u)
    assert states.shape == targets.shape == (2, 4, 5, 3)
    for draw in range(4):
        torch.testing.assert_close(targets[:, draw], tokens - noise[:, draw])
        torch.testing.assert_close(states[:, draw], noise[:, draw] + u[:, draw, :, None] * targets[:, draw])


def test_the_loss_is_that_of_masked_tokens_sample_by_sample():
    velocities, targets = torch.randn(2, 4, 5, 3), torch.randn(2, 4, 5, 3)
    mask = torch.tensor([[True, False, False, True, False], [True] * 5])
    expected = [(velocities[b][:, mask[b]] - targets[b][:, mask[b]]).square().mean() for b in range(2)]
    torch.testing.assert_close(masked_loss(velocities, targets, mask), torch.stack(expected))


def test_counts_follow_the_cosine():
    counts = masked_counts(256, 64)
    assert (len(counts), counts[0], counts[-1]) == (65, 256, 0)
    for step, count in enumerate(counts[1:48], start=1):
        assert count == math.floor(256 * math.cos(math.pi / 2 * step / 64)) or counts[step - 1] - count == 1
    assert counts[32] == math.floor(256 * math.cos(math.pi / 4))
    assert counts[1] == 255  # a slow start: the cosine has barely fallen


@pytest.mark.parametrize(("num_tokens", "ar_steps"), [(1, 64), (16, 1), (16, 5), (16, 64), (256, 64), (256, 256)])
def test_every_step_draws_at_least_one_token_and_all_are_drawn(num_tokens, ar_steps):
    counts = masked_counts(num_tokens, ar_steps)
    assert len(counts) == 1 + min(num_tokens, ar_steps)
    assert (counts[0], counts[-1]) == (num_tokens, 0)
    assert all(before > after for before, after in itertools.pairwise(counts))


def test_guidance_grows_with_the_share_of_tokens_drawn():
    counts = masked_counts(16, 4)
    assert counts == (16, 14, 11, 6, 0)
    assert masked_guidance_scales(3.0, counts, "linear") == pytest.approx((1.25, 1.625, 2.25, 3.0))
    assert masked_guidance_scales(3.0, counts, "constant") == (3.0,) * 4
    assert masked_guidance_scales(1.0, counts, "linear") == (1.0,) * 4
    assert masked_guidance_scales(0.0, counts, "linear") == (0.0,) * 4  # the unconditional model
