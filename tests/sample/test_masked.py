"""The sampler of `mar`: every token once, in order, conditioned on what was drawn before."""

import itertools

import torch

import ecar_dist.sample.guided as module
from ecar_dist.flow.unmasking import masked_counts
from ecar_dist.models.layers import patchify
from ecar_dist.rng import Purpose, normal, uniform
from ecar_dist.sample.generate import generate
from tests.sample.test_generate import INDICES, LABELS, SEED, make_plan
from tests.train.test_objective import make_config, make_model

TOKENS = 64  # 8 x 8 latents in patches of 1


def mar():
    return make_model(make_config("mar", num_stages=1)).eval()


def plan(**changes):
    return make_plan(1, **{"kind": "mar", "tau": None, **changes})


def watch(model, name):
    """The arguments of every call of a method of the model."""
    seen, original = [], getattr(model, name)

    def watching(*arguments):
        seen.append(arguments)
        return original(*arguments)

    setattr(model, name, watching)
    return seen


def test_each_step_reveals_the_scheduled_tokens_in_the_samples_own_order():
    model = mar()
    passes = watch(model, "conditions")
    (drawn,) = generate(model, plan(ar_steps=5), LABELS, INDICES, SEED)
    counts, order = masked_counts(TOKENS, 5), uniform(SEED, INDICES, Purpose.GENERATE_ORDER, (TOKENS,)).argsort(1)
    final = patchify(drawn, 1)
    assert len(passes) == 5
    for (tokens, mask, _), count in zip(passes, counts, strict=False):
        expected = torch.zeros(4, TOKENS, dtype=torch.bool).scatter(1, order[:, :count], True)
        assert torch.equal(mask, expected)
        assert torch.equal(tokens[~mask], final[~mask])  # a drawn token does not change
        assert not tokens[mask].any()


def test_one_step_is_the_flow_of_every_token_from_its_noise():
    """All tokens at once, none visible: the ODE of the head, by Euler, conditioned on the class alone."""
    model = mar()
    (ours,) = generate(model, plan(ar_steps=1, solver="euler", steps_per_stage=(4,)), LABELS, INDICES, SEED)
    with torch.no_grad():
        x = patchify(normal(SEED, INDICES, Purpose.GENERATE_START, (4, 8, 8)), 1)
        condition = model.conditions(torch.zeros_like(x), torch.ones(4, TOKENS, dtype=torch.bool), LABELS)
        for step in range(4):
            x = x + 0.25 * model.velocity(x, torch.full((1, 1), step / 4), condition)
    torch.testing.assert_close(patchify(ours, 1), x)


def test_the_head_is_called_for_the_tokens_of_the_step_and_twice_where_guided():
    model = mar()
    calls = watch(model, "velocity")
    counts = masked_counts(TOKENS, 3)
    sizes = [before - after for before, after in itertools.pairwise(counts)]
    generate(model, plan(ar_steps=3, solver="midpoint", steps_per_stage=(2,)), LABELS, INDICES, SEED)
    assert [tuple(x.shape) for x, _, _ in calls] == [(4, size, 4) for size in sizes for _ in range(4)]
    calls.clear()
    generate(model, plan(ar_steps=3, guidance_scale=2.0), LABELS, INDICES, SEED)
    assert [len(x) for x, _, _ in calls] == [8] * 12


def test_guidance_0_is_the_unconditional_model_and_its_scale_grows_over_the_steps(monkeypatch):
    model = mar()
    null = generate(model, plan(), torch.full_like(LABELS, 10), INDICES, SEED)[-1]
    zero = generate(model, plan(guidance_scale=0.0, guidance_ramp="constant"), LABELS, INDICES, SEED)[-1]
    assert torch.allclose(zero, null, atol=1e-4)
    scales, original = [], module.guide
    monkeypatch.setattr(module, "guide", lambda a, b, scale: scales.append(scale) or original(a, b, scale))
    generate(model, plan(ar_steps=4, solver="euler", steps_per_stage=(1,), guidance_scale=3.0), LABELS, INDICES, SEED)
    shares = [1 - count / TOKENS for count in masked_counts(TOKENS, 4)[1:]]
    assert scales == [1 + 2 * share for share in shares]
    assert shares[-1] == 1.0


def test_bf16_draws_about_the_same():
    model = mar()
    full, half = (generate(model, plan(bf16=bf16), LABELS, INDICES, SEED)[0] for bf16 in (False, True))
    assert half.dtype == torch.float32
    assert 0 < float((full - half).norm()) < 0.1 * float(full.norm())
