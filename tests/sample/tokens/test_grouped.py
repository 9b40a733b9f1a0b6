"""The samplers of `par` and `par_cont`: laws, steps, guidance, and Jacobi's iteration, which changes no token."""

from collections import Counter

import pytest
import torch

from ecar_dist.config.read import config_from_dict
from ecar_dist.errors import ConfigError
from ecar_dist.flow.discrete.categorical import draw_codes
from ecar_dist.flow.discrete.region_order import region_order
from ecar_dist.kinds.table import kind_of
from ecar_dist.models.layers import patchify
from ecar_dist.sample.generate import generate
from ecar_dist.sample.sampling_plan import SamplingPlan
from ecar_dist.sample.tokens.grouped import code_noise
from ecar_dist.sample.tokens.jacobi import jacobi_codes

CPU = torch.device("cpu")
LABELS, INDICES = torch.tensor([0, 3, 9]), torch.tensor([5, 6, 7])


def make_config(group=1, *, kind="par", codes=16, side=8, **sample):
    return config_from_dict(
        {
            "run": {"name": "test"},
            "model": {"kind": kind, "ar_depth": 1, "flow_depth": 1, "patch_size": 1, "codebook_size": codes},
            "par": {"group": group},
            "flow": {"num_stages": 1},
            "vae": {"kind": "dct"},
            "data": {"latents": "none", "num_classes": 10, "latent_channels": 4, "latent_size": side},
            "train": {"total_samples": 1},
            "sample": {"guidance_scale": 1.0, **sample},
        }
    )


def make_model(config, std=0.15):
    """As if trained: the logits differ, and depend on the tokens before."""
    torch.manual_seed(0)
    model = kind_of(config).build_model(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


def plan_of(config):
    return SamplingPlan.from_config(config, CPU)


@pytest.mark.parametrize("group", [1, 4, 16])
def test_every_token_is_drawn_from_the_logits_of_one_pass(group):
    """The codes of the cached sampler, passed through the network at once, give the logits they were drawn from."""
    config = make_config(group, temperature=0.7, top_k=5)
    model = make_model(config)
    passes = []
    model.trunk.register_forward_hook(lambda *_: passes.append(1))
    step, original = [], model.next_logits
    model.next_logits = lambda *arguments: step.append(arguments[2:4]) or original(*arguments)
    (latent,) = generate(model, plan_of(config), LABELS, INDICES, 0)
    assert len(step) == {1: 64, 4: 4 + 15, 16: 16 + 3}[group]
    with torch.no_grad():
        logits, codes = model(patchify(latent, 1), LABELS)
    expected = draw_codes(logits, code_noise(0, INDICES, 0, 64, 16), temperature=0.7, top_k=5)
    assert torch.equal(codes, expected)
    assert len(set(codes.flatten().tolist())) > 4


def test_the_draws_have_the_law_of_the_logits():
    """Chi-square over 5 codes; with top_k = 2 only the two likeliest, with their odds."""
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0])
    count = 20_000
    u = code_noise(3, torch.arange(count), 0, 1, 5)[:, 0]
    for temperature, top_k in ((1.0, 0), (0.5, 0), (1.0, 2)):
        kept = logits if not top_k else logits.masked_fill(logits < 1.0, -torch.inf)
        shares = torch.softmax(kept / temperature, 0)
        found = torch.bincount(
            draw_codes(logits.expand(count, 5), u, temperature=temperature, top_k=top_k), minlength=5
        )
        expected = count * shares
        seen = expected > 0
        assert not found[~seen].any()
        chi_square = ((found - expected).square() / expected)[seen].sum()
        assert chi_square < 20  # 4 degrees of freedom: p < 0.0005
    assert (draw_codes(logits.expand(9, 5), u[:9], temperature=0.0) == 4).all()


def test_guidance_0_is_the_null_model_and_1_the_conditional_one():
    config = make_config(4)
    model = make_model(config)
    null = generate(model, plan_of(config), torch.full_like(LABELS, 10), INDICES, 0)[0]
    zero = generate(model, plan_of(make_config(4, guidance_scale=0.0)), LABELS, INDICES, 0)[0]
    assert torch.equal(null, zero)
    strong = generate(model, plan_of(make_config(4, guidance_scale=4.0)), LABELS, INDICES, 0)[0]
    plain = generate(model, plan_of(config), LABELS, INDICES, 0)[0]
    assert not torch.equal(strong, plain)


def test_continuous_tokens_flow_from_the_noise_of_their_places():
    """A head with zero velocity leaves the noise unchanged, whatever the order."""
    config = make_config(4, kind="par_cont", steps_per_stage=1)
    model = make_model(config)
    torch.nn.init.zeros_(model.head.output.weight), torch.nn.init.zeros_(model.head.output.bias)
    (latent,) = generate(model, plan_of(config), LABELS, INDICES, 0)
    from ecar_dist.rng import Purpose, normal

    assert torch.equal(latent, normal(0, INDICES, Purpose.GENERATE_START, (4, 8, 8)))
    assert region_order(8, 4)[:2] == (0, 4)


@pytest.mark.parametrize("window", [2, 5, 64, 100])
@pytest.mark.parametrize(
    "sample",
    [
        {"temperature": 0.0},
        {},
        {"guidance_scale": 3.0, "temperature": 0.8, "top_k": 6},
        {"guidance_scale": 0.0},
    ],
)
def test_jacobi_draws_the_tokens_of_plain_autoregression(window, sample):
    config = make_config(side=4, **sample)
    model = make_model(config)
    plain = generate(model, plan_of(config), LABELS, INDICES, 2)[0]
    windowed = plan_of(make_config(side=4, jacobi_window=window, **sample))
    assert torch.equal(generate(model, windowed, LABELS, INDICES, 2)[0], plain)


def test_jacobi_takes_one_pass_for_the_window_where_guesses_are_right_and_never_more_than_plain():
    config = make_config(side=4, jacobi_window=8)
    blind = make_model(config)
    torch.nn.init.zeros_(blind.output.weight)  # the logits do not depend on the tokens, so each guess is right at once
    _, passes = jacobi_codes(blind, plan_of(config), LABELS, INDICES, 0)
    assert passes <= 3  # the first guesses are made without logits
    _, passes = jacobi_codes(make_model(config, std=0.5), plan_of(config), LABELS, INDICES, 0)
    assert 3 < passes <= 16


def test_jacobi_has_the_law_of_the_network():
    """Two tokens of three codes: chi-square against the products of the network's own probabilities."""
    config = make_config(codes=3, side=2, jacobi_window=4)
    model = make_model(config, std=0.4)
    count = 4000
    labels = torch.zeros(count, dtype=torch.int64)
    with torch.no_grad():
        codes, _ = jacobi_codes(model, plan_of(config), labels, torch.arange(count), 0)
        pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
        tokens = model.tokens_of(torch.cat((pairs, torch.zeros(9, 2, dtype=torch.int64)), dim=1))
        logits, back = model(tokens, labels[:9])
        shares = torch.softmax(logits, -1).gather(2, back[..., None])[:, :2, 0].prod(1)
    found = Counter(map(tuple, codes[:, :2].tolist()))
    counts = torch.tensor([found[tuple(pair)] for pair in pairs.tolist()])
    assert float(shares.sum()) == pytest.approx(1.0, abs=1e-5)
    assert ((counts - count * shares).square() / (count * shares)).sum() < 28  # 8 degrees of freedom: p < 0.0005


def test_jacobi_says_how_many_passes_it_took(capsys):
    config = make_config(side=4, jacobi_window=8)
    generate(make_model(config), plan_of(config), LABELS, INDICES, 0)
    assert "passes for 16 tokens" in capsys.readouterr().out


def test_jacobi_needs_single_tokens():
    with pytest.raises(ConfigError, match=r"sample.jacobi_window=4 .*par.group=4"):
        make_config(4, jacobi_window=4)


def test_a_grid_that_the_groups_do_not_divide_is_one_line_with_the_fix():
    with pytest.raises(ConfigError, match=r"par\.group=16 .*6 x 6 .*set par\.group=1") as refused:
        make_config(16, side=6)
    assert "\n" not in str(refused.value)
