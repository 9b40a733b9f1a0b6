import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ecar_dist.models.attention import block_causal_attention


def cached_token_maps(model, contexts, labels):
    cache = model.start_cache()
    sources = [None, *contexts]
    return [model.next_token_map(stage, source, labels, cache) for stage, source in enumerate(sources)]


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize("feeds_state", [True, False])
def test_cached_masked_and_mask_free_token_maps_agree(make_model, make_batch, num_stages, feeds_state):
    """E13: three ways to run the AR transformer, one result."""
    model = make_model(num_stages, feeds_state=feeds_state)
    contexts, _, _, labels = make_batch(num_stages)
    fast = model.token_maps(contexts, labels)
    assert [token_map.shape for token_map in fast] == [(2, 4 * 4**k, 32) for k in range(num_stages)]
    for other in (model.token_maps(contexts, labels, masked=True), cached_token_maps(model, contexts, labels)):
        for a, b in zip(fast, other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_token_maps_see_coarser_contexts_only(make_model, make_batch, masked):
    """E12: context j feeds block j + 1, so d M_k / d C_j is exactly zero for j >= k, and not zero for j < k."""
    model = make_model(4)
    contexts, _, _, labels = make_batch(4)
    contexts = [context.requires_grad_() for context in contexts]
    for k, token_map in enumerate(model.token_maps(contexts, labels, masked=masked)):
        weights = torch.randn(token_map.shape)
        gradients = torch.autograd.grad((token_map * weights).sum(), contexts, retain_graph=True, allow_unused=True)
        for j, gradient in enumerate(gradients):
            reached = gradient is not None and bool(gradient.abs().amax() > 0)
            assert reached == (j < k), f"stage {k}, context {j}"


def test_context_is_scaled(make_model, make_batch):
    contexts, _, _, labels = make_batch(2)
    model = make_model(2)
    before = model.token_maps(contexts, labels)
    model.ar.context_scales = (0.4,)
    after = model.token_maps([2.0 * context for context in contexts], labels)
    torch.testing.assert_close(before, after)


def test_class_only_ignores_contexts(make_model, make_batch):
    model = make_model(feeds_state=False)
    contexts, states, times, labels = make_batch()
    changed = [context + 1 for context in contexts]
    torch.testing.assert_close(model(contexts, states, times, labels), model(changed, states, times, labels))


@pytest.mark.parametrize("adaln", ["per_block", "shared"])
def test_velocity_is_exactly_zero_at_the_start(make_model, make_batch, adaln):
    model = make_model(trained=False, adaln=adaln)
    contexts, states, times, labels = make_batch()
    velocities = model(contexts, states, times, labels)
    for velocity, state in zip(velocities, states, strict=True):
        assert velocity.shape == state.shape
        assert not velocity.any()


def test_single_stage_needs_no_context(make_model, make_batch):
    model = make_model(1)
    _, states, times, labels = make_batch(1)
    (velocity,) = model([], states, times, labels)
    assert velocity.shape == states[0].shape
    assert velocity.abs().max() > 0


def test_forward_is_the_sampling_path(make_model, make_batch):
    """Training and sampling call the same parts: forward equals cache, condition and velocity, stage by stage."""
    model = make_model()
    contexts, states, times, labels = make_batch()
    trained = model(contexts, states, times, labels)
    for stage, token_map in enumerate(cached_token_maps(model, contexts, labels)):
        sampled = model.velocity(states[stage], times[stage], stage, model.condition(token_map), labels)
        torch.testing.assert_close(sampled, trained[stage], atol=1e-5, rtol=1e-5)


def test_cache_refuses_a_skipped_stage(make_model, make_batch):
    model = make_model()
    contexts, _, _, labels = make_batch()
    with pytest.raises(AssertionError, match="holds 0 stages"):
        model.next_token_map(1, contexts[0], labels, model.start_cache())


def train_steps(model, batch, count):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(count):
        loss = sum((v - 1.0 - x).square().mean() for v, x in zip(model(*batch), batch[1], strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("adaln", ["per_block", "shared"])
def test_every_weight_learns_and_every_input_matters(make_model, make_batch, adaln):
    """Output first, then heads and gates, then all: after three steps nothing is cut off by the zero start."""
    model = make_model(trained=False, adaln=adaln)
    batch = make_batch()
    train_steps(model, batch, 3)
    contexts, states, times, labels = batch
    loss = sum(velocity.square().mean() for velocity in model(*batch))
    loss.backward()
    still = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().max() > 0]
    assert still == []
    base = model(*batch)
    for changed in (
        model(contexts, states, times, labels.flip(0)),
        model(contexts, states, [1 - time for time in times], labels),
    ):
        assert all((a - b).abs().max() > 1e-4 for a, b in zip(base, changed, strict=True))
    fed = model([context + 1 for context in contexts], states, times, labels)
    assert [bool((a - b).abs().max() > 1e-4) for a, b in zip(base, fed, strict=True)] == [False, True, True]


def test_label_and_stage_matter_after_one_step(make_model, make_batch):
    model = make_model(1, trained=False)
    _, states, times, labels = batch = make_batch(1)
    train_steps(model, batch, 1)
    (a,), (b,) = model([], states, times, labels), model([], states, times, labels.flip(0))
    assert (a - b).abs().max() > 1e-4


def test_stage_embedding_reaches_the_velocity(make_model, make_batch):
    """The same tokens at the same time have a different velocity in a different stage, even on the same grid."""
    model = make_model(2)
    model.flow.grid_sides = (4, 4)
    contexts, states, times, labels = make_batch(2)
    condition = model.condition(model.token_maps(contexts, labels)[1])
    first = model.velocity(states[1], times[1], 0, condition, labels)
    second = model.velocity(states[1], times[1], 1, condition, labels)
    assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["autocast", "weights"])
def test_bf16_stays_near_float32(make_model, make_batch, mode):
    """Autocast over float32 weights, and bf16 weights without autocast (DeepSpeed's bf16): both run, both finite."""
    model = make_model()
    batch = make_batch()
    exact = model(*batch)
    if mode == "weights":
        model = model.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        velocities = model(*batch)
    sum(velocity.sum() for velocity in velocities).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    for velocity, expected in zip(velocities, exact, strict=True):
        assert velocity.dtype == torch.float32
        assert (velocity - expected).norm() < 0.05 * expected.norm()


def test_blocks_can_be_recomputed(make_model):
    model = make_model()
    block, attend = model.ar.transformer.blocks[0], block_causal_attention(model.ar.stage_tokens)
    x, conditioning = torch.randn(2, 84, 32), torch.randn(2, 1, 6 * 32)
    block(x, conditioning, attend).square().sum().backward()
    kept = [parameter.grad.clone() for parameter in block.parameters()]
    block.zero_grad()
    checkpoint(block, x, conditioning, attend, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close([parameter.grad for parameter in block.parameters()], kept)
