"""The sampler of `hybrid`: each code once, in the steps of the schedule, and then the residuals of all tokens."""

import itertools

import pytest
import torch

from ecar_dist.flow.unmasking import arccosine, masked_counts
from ecar_dist.models.layers import patchify
from ecar_dist.rng import Purpose, normal
from ecar_dist.sample.generate import generate
from ecar_dist.sample.tokens.hybrid import reveal
from tests.sample.test_masked import watch
from tests.sample.tokens.test_grouped import INDICES, LABELS, make_config, make_model, plan_of

TOKENS = 64


def make_hybrid(**sample):
    return make_config(kind="hybrid", steps_per_stage=2, **sample)


def test_the_schedule_of_the_paper_in_twelve_steps():
    counts = masked_counts(256, 12, arccosine)
    assert len(counts) == 13
    assert (counts[0], counts[-1]) == (256, 0)
    assert counts[1:4] == (242, 228, 214)  # floor(256 arccos(k/12) 2/pi)
    assert all(before > after for before, after in itertools.pairwise(counts))
    assert masked_counts(5, 12, arccosine) == (5, 4, 3, 2, 1, 0)  # never more steps than tokens


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_each_step_unmasks_the_scheduled_tokens_once_and_masks_none_again(guidance_scale):
    config = make_hybrid(guidance_scale=guidance_scale)
    model = make_model(config)
    passes, calls = watch(model, "hidden"), watch(model, "velocity")
    (latent,) = generate(model, plan_of(config), LABELS, INDICES, 0)
    counts = masked_counts(TOKENS, 12, arccosine)
    assert len(passes) == 12
    assert len(calls) == 4  # two steps of the midpoint rule
    masks = [mask[:3] for _, mask, _ in passes]
    assert [mask.sum(1).tolist() for mask in masks] == [[count] * 3 for count in counts[:-1]]
    shown = [codes[:3] for codes, _, _ in passes]
    for (codes, mask), (later, later_mask) in itertools.pairwise(zip(shown, masks, strict=True)):
        assert not (later_mask & ~mask).any()
        assert torch.equal(later[~mask], codes[~mask])  # a drawn token does not change
    assert {len(x) for x, _, _ in calls} == {3 if guidance_scale == 1.0 else 6}
    assert latent.shape == (3, 4, 8, 8)


def test_residuals_are_added_to_the_codes():
    """Without residuals the tokens are codes; with a head of zero velocity, they are codes plus scaled noise."""
    config = make_hybrid()
    model = make_model(config)
    torch.nn.init.zeros_(model.head.output.weight), torch.nn.init.zeros_(model.head.output.bias)
    torch.nn.init.constant_(model.residual_scale.scale, 0.5)
    full = generate(model, plan_of(config), LABELS, INDICES, 0)[0]
    codes = generate(model, plan_of(make_hybrid(residuals=False)), LABELS, INDICES, 0)[0]
    tokens = patchify(codes, 1)
    assert torch.equal(model.codebook(model.codebook(tokens)), tokens)
    noise = normal(0, INDICES, Purpose.GENERATE_START, (4, 8, 8))
    torch.testing.assert_close(full, codes + 0.5 * noise)


def test_the_least_confident_tokens_stay_masked():
    codes, drawn = torch.zeros(1, 4, dtype=torch.int64), torch.tensor([[5, 6, 7, 8]])
    mask, confidence = torch.tensor([[True, True, False, True]]), torch.tensor([[0.1, 0.9, -5.0, 0.2]])
    after, still = reveal(codes, mask, drawn, confidence, 2)
    assert still.tolist() == [[True, False, False, True]]
    assert after.tolist() == [[0, 6, 0, 0]]
    after, still = reveal(after, still, drawn, confidence, 0)
    assert after.tolist() == [[5, 6, 0, 8]]
    assert not still.any()
