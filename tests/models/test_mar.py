"""`mar`: what the trunk sees, what the head sees, and that every weight learns."""

import pytest
import torch

from ecar_dist.kinds.flow_head import TrunkSize
from ecar_dist.models.mar import MAR

CHANNELS, NUM_CLASSES, TOKENS, DRAWS = 3, 5, 16, 2  # 8 x 8 latents in patches of 2: 12 numbers per token


def make_model(*, trained=True, recompute=False):
    torch.manual_seed(0)
    model = MAR(
        TrunkSize(2, 32, 2, 2),
        latent_size=8,
        latent_channels=CHANNELS,
        patch_size=2,
        num_classes=NUM_CLASSES,
        recompute=recompute,
    )
    if trained:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def batch():
    """(tokens, mask, states, times, labels): the first sample has 5 tokens masked, the second, of the null class, 9."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, TOKENS, 12, generator=generator)
    mask = torch.arange(TOKENS)[None] < torch.tensor([[5], [9]])
    states = torch.randn(2, DRAWS, TOKENS, 12, generator=generator)
    times = torch.rand(2, DRAWS, TOKENS, generator=generator)
    return tokens, mask, states, times, torch.tensor([2, NUM_CLASSES])


def test_the_velocity_is_exactly_zero_at_the_start(batch):
    velocity = make_model(trained=False)(*batch)
    assert velocity.shape == (2, DRAWS, TOKENS, 12)
    assert not velocity.any()


def test_masked_tokens_are_not_looked_at_and_the_others_are_seen_from_everywhere(batch):
    model, (tokens, mask, _, _, labels) = make_model(), batch
    tokens.requires_grad_()
    conditions = model.conditions(tokens, mask, labels)
    for place in range(TOKENS):
        (gradient,) = torch.autograd.grad(conditions[:, place].square().sum(), tokens, retain_graph=True)
        assert torch.equal(gradient.abs().sum(-1) > 0, ~mask), place


def test_a_tokens_velocity_is_of_its_own_state_and_time_alone(batch):
    model, (tokens, mask, states, times, labels) = make_model(), batch
    states.requires_grad_(), times.requires_grad_()
    velocity = model(tokens, mask, states, times, labels)
    by_state, by_time = torch.autograd.grad(velocity[1, 0, 3].square().sum(), (states, times))
    own = torch.zeros(2, DRAWS, TOKENS, dtype=torch.bool)
    own[1, 0, 3] = True
    assert torch.equal(by_state.abs().sum(-1) > 0, own)
    assert torch.equal(by_time.abs() > 0, own)


def test_places_classes_and_masks_matter(batch):
    model, (tokens, mask, _, _, labels) = make_model(), batch
    nothing = torch.ones_like(mask)
    blind = model.conditions(tokens, nothing, labels)
    assert (blind[:, 0] - blind[:, 1]).abs().max() > 1e-3  # the same mask vector at another place
    assert (model.conditions(tokens, nothing, labels.flip(0)) - blind).abs().max() > 1e-3
    assert (model.conditions(tokens, mask, labels) - blind).abs().max() > 1e-3
    assert torch.equal(model.conditions(tokens + 1, nothing, labels), blind)


def test_every_weight_learns(batch):
    """Output first, then gates, then the rest: after a few steps nothing is cut off by the zero start."""
    model = make_model(trained=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        (model(*batch) - 1.0 - batch[2]).square().mean().backward()
        optimizer.step()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.abs().max() > 0] == []


def test_one_pass_of_the_trunk_serves_all_draws(batch):
    model, (tokens, mask, states, times, labels) = make_model(), batch
    together = model(tokens, mask, states, times, labels)
    for draw in range(DRAWS):
        alone = model(tokens, mask, states[:, draw : draw + 1], times[:, draw : draw + 1], labels)
        torch.testing.assert_close(together[:, draw : draw + 1], alone)


def test_recomputing_gives_the_same_gradients(batch):
    gradients = []
    for recompute in (False, True):
        model = make_model(recompute=recompute)
        model(*batch).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("mode", ["autocast", "weights"])
def test_bf16_stays_near_float32(batch, mode):
    model = make_model()
    exact = model(*batch)
    if mode == "weights":
        model = model.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        velocity = model(*batch)
    velocity.sum().backward()
    assert velocity.dtype == torch.float32
    assert (velocity - exact).norm() < 0.05 * exact.norm()
