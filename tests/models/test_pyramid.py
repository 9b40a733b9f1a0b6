"""`pyramid` and `dit`, and E16: with one stage they are the same model, and equal ECAR without its AR transformer."""

import pytest
import torch

from ecar_dist.kinds.presets import Preset
from ecar_dist.models.ecar import ECAR
from ecar_dist.models.pyramid import Pyramid
from tests.kernels import Kernels

CHANNELS, NUM_CLASSES = 3, 5
SIZE = Preset(2, 32, 2, 2, 48, 4)
COMMON = {"latent_channels": CHANNELS, "patch_size": 2, "num_classes": NUM_CLASSES}


def shaken(model, seed=0):
    """As if trained: no weight is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def make_pyramid(num_stages):
    torch.manual_seed(0)
    return Pyramid(SIZE, stage_sizes=[4 * 2**k for k in range(num_stages)], **COMMON)


@pytest.mark.parametrize("num_stages", [1, 3])
def test_the_velocity_is_exactly_zero_at_the_start_and_contexts_are_not_looked_at(make_batch, num_stages):
    contexts, states, times, labels = make_batch(num_stages)
    model = make_pyramid(num_stages)
    assert not any(velocity.any() for velocity in model(contexts, states, times, labels))
    shaken(model)
    with_contexts, without = model(contexts, states, times, labels), model([], states, times, labels)
    for a, b, state in zip(with_contexts, without, states, strict=True):
        assert torch.equal(a, b)
        assert a.shape == state.shape
        assert a.abs().max() > 1e-3


def test_every_weight_learns_and_time_class_and_stage_matter(make_batch):
    model, (_, states, times, labels) = make_pyramid(2), make_batch(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        sum(
            (v - 1.0 - x).square().mean() for v, x in zip(model([], states, times, labels), states, strict=True)
        ).backward()
        optimizer.step()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.abs().max() > 0] == []
    base = model([], states, times, labels)
    for other in (model([], states, times, labels.flip(0)), model([], states, [1 - t for t in times], labels)):
        assert all((a - b).abs().max() > 1e-4 for a, b in zip(base, other, strict=True))
    model.flow.grid_sides = (4, 4)
    stages = [model.velocity(states[1], times[1], stage, None, labels) for stage in (0, 1)]
    assert (stages[0] - stages[1]).abs().max() > 1e-4


def test_sampling_calls_what_training_calls(make_batch):
    model, (_, states, times, labels) = shaken(make_pyramid(3)), make_batch(3)
    cache = model.start_cache()
    for stage, trained in enumerate(model([], states, times, labels)):
        condition = model.begin_stage(stage, None, labels, cache)
        alone = model.velocity(states[stage], times[stage], stage, condition, labels)
        torch.testing.assert_close(alone, trained, rtol=1e-6, atol=1e-6)


def test_stages_in_one_pass_are_stages_in_a_pass_each(make_batch):
    """Velocities and gradients, in fewer kernels: each weight has one gradient instead of a sum of three."""
    model, (_, states, times, labels) = shaken(make_pyramid(3)), make_batch(3)

    def separate():
        parts = zip(states, times, strict=True)
        return [model.velocity(x, time, stage, None, labels) for stage, (x, time) in enumerate(parts)]

    def together():
        return model([], states, times, labels)

    found = []
    for velocities in (separate, together):
        model.zero_grad()
        with Kernels() as kernels:
            outputs = velocities()
            sum(output.square().mean() for output in outputs).backward()
        found.append((outputs, [parameter.grad for parameter in model.parameters()], kernels.count))
    (outputs, gradients, count), (packed_outputs, packed_gradients, packed_count) = found
    torch.testing.assert_close(packed_outputs, outputs, rtol=1e-6, atol=1e-6)
    for packed, gradient in zip(packed_gradients, gradients, strict=True):
        assert float((packed - gradient).norm()) <= 1e-6 * float(gradient.norm())
    assert packed_count < 0.7 * count


def test_dit_is_ecar_of_one_stage_without_its_ar_transformer(make_batch):
    """E16, to the last bit: `dit` is the pyramid of one stage, and ECAR's velocity network has the same weights."""
    _, states, times, labels = make_batch(1)
    dit = shaken(make_pyramid(1))
    ecar = shaken(ECAR(SIZE, stage_sizes=[4], context_scales=(), feeds_state=True, **COMMON), seed=1)
    before = ecar([], states, times, labels)[0]
    without_ar(ecar, dit)
    (expected,) = dit([], states, times, labels)
    assert torch.equal(ecar([], states, times, labels)[0], expected)
    assert not torch.allclose(before, expected, atol=1e-2)


def without_ar(ecar, dit):
    """Copy the velocity network of `dit` into `ecar`, and cut it off from the AR transformer."""
    odd = ecar.flow.load_state_dict(dit.flow.state_dict(), strict=False)
    assert odd.missing_keys == ["condition_projection.weight", "condition_projection.bias"]
    assert odd.unexpected_keys == []
    torch.nn.init.zeros_(ecar.flow.condition_projection.weight)
    torch.nn.init.zeros_(ecar.flow.condition_projection.bias)
