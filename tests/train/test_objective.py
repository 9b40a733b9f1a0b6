"""One micro-batch of the production objective, without any rank."""

from functools import partial

import pytest
import torch

import ecar_dist.train.objective as module
from ecar_dist.config_file import config_from_dict
from ecar_dist.flow.path import model_time
from ecar_dist.flow.schedule import StageSchedule
from ecar_dist.models.build import build_model
from ecar_dist.rng import Purpose, normal, uniform
from ecar_dist.train.objective import FlowObjective
from ecar_dist.vae.codec import EncoderIdentity, normalise

IDENTITY = EncoderIdentity("kl", "test", "0", "0", 4, 8, 0.5, 0.1, deterministic=False)


def make_config(**flow):
    return config_from_dict(
        {
            "run": {"name": "test"},
            "model": {"preset": "T", "patch_size": 1},
            "flow": flow,
            "vae": {"kind": "dct"},
            "data": {"latents": "none", "num_classes": 10, "latent_channels": 4, "latent_size": 8},
            "train": {"total_samples": 1},
        }
    )


class Recorder(torch.nn.Module):
    """Stands for the model: remembers what it was shown and predicts zero."""

    def forward(self, contexts, states, times, labels):
        self.seen = (contexts, states, times, labels)
        return [torch.zeros_like(state) for state in states]


def objective(config, model, precision="fp32"):
    schedule = StageSchedule(config.flow.resolved_ends, config.flow.gamma)
    return FlowObjective(model, schedule, partial(normalise, IDENTITY), config, precision)


def batch(positions):
    """Moments and labels that depend on the position alone, like those of a data set."""
    positions = torch.as_tensor(positions)
    return normal(99, positions, Purpose.GENERATE_START, (8, 8, 8)).half(), positions % 10, positions


def test_a_sample_is_shown_the_same_whatever_batch_it_comes_in():
    config = make_config(num_stages=3)
    whole, part = Recorder(), Recorder()
    objective(config, whole)(*batch(range(8)))
    objective(config, part)(*batch([5, 2]))
    for group in range(3):
        for ours, theirs in zip(part.seen[group], whole.seen[group], strict=True):
            assert torch.equal(ours, theirs[[5, 2]])
    assert torch.equal(part.seen[3], whole.seen[3][[5, 2]])


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_the_loss_is_the_weighted_mean_over_micro_batches(num_stages):
    config = make_config(num_stages=num_stages)
    torch.manual_seed(0)
    model = build_model(config, StageSchedule(config.flow.resolved_ends).context_scales(0.3))
    for parameter in model.parameters():  # zero gates would hide the inputs
        torch.nn.init.normal_(parameter, std=0.05)
    compute = objective(config, model)
    with torch.no_grad():
        loss, per_stage, _ = compute(*batch(range(8)))
        halves = [compute(*batch(range(start, start + 4))) for start in (0, 4)]
    assert float(loss) == pytest.approx(float(halves[0][0] + halves[1][0]) / 2, abs=1e-6)
    assert torch.allclose(per_stage, torch.cat([half[1] for half in halves]), atol=1e-5)
    assert float(loss) == pytest.approx(float(per_stage.mean()), abs=1e-6)


def test_the_times_are_those_of_the_losses_stage_by_stage():
    config = make_config(num_stages=3)
    recorder, schedule = Recorder(), StageSchedule(config.flow.resolved_ends, config.flow.gamma)
    _, per_stage, times = objective(config, recorder)(*batch(range(16)))
    assert times.shape == per_stage.shape == (16, 3)
    for k, shown in enumerate(recorder.seen[2]):
        assert torch.equal(model_time(schedule, k, times[:, k]), shown)


def test_labels_are_dropped_to_the_null_label_at_the_configured_rate():
    recorder = Recorder()
    positions = range(4000)
    objective(make_config(num_stages=1), recorder)(*batch(positions))
    labels = recorder.seen[3]
    kept = labels != 10
    assert abs(float((~kept).float().mean()) - 0.1) < 0.02
    assert torch.equal(labels[kept], (torch.as_tensor(positions) % 10)[kept])


def test_one_stage_is_plain_flow_matching():
    """E16: with K = 1 the objective is that of SiT, x_u = (1-u) n + u z and d = z - n, to the last bit."""
    config, recorder = make_config(num_stages=1), Recorder()
    moments, labels, positions = batch(range(16))
    loss, _, times = objective(config, recorder)(moments, labels, positions)
    z = normalise(IDENTITY, moments, normal(0, positions, Purpose.POSTERIOR, (4, 8, 8)))
    n = normal(0, positions, Purpose.NOISE, (4, 8, 8))
    u = uniform(0, positions, Purpose.TIME)
    contexts, (state,), (time,), _ = recorder.seen
    assert contexts == []
    assert torch.equal(state, (1 - u.view(-1, 1, 1, 1)) * n + u.view(-1, 1, 1, 1) * z)
    assert torch.equal(time, u)
    assert torch.equal(times, u.unsqueeze(1))
    assert torch.equal(time, model_time(StageSchedule((1.0,)), 0, u))
    assert float(loss) == pytest.approx(float((z - n).square().mean()), rel=1e-6)


def test_the_fed_back_state_is_noisy_and_its_noise_is_its_own():
    exact, noisy = Recorder(), Recorder()
    objective(make_config(num_stages=3, context={"tau": 0.0, "allow_unsafe": True}), exact)(*batch(range(64)))
    objective(make_config(num_stages=3, context={"tau": 0.3}), noisy)(*batch(range(64)))
    for clean, context in zip(exact.seen[0], noisy.seen[0], strict=True):
        assert float((context - clean).std()) == pytest.approx(0.3, rel=0.05)
    assert all(torch.equal(a, b) for a, b in zip(exact.seen[1], noisy.seen[1], strict=True))  # the states are not


def test_bf16_touches_the_network_alone():
    config = make_config(num_stages=2)
    torch.manual_seed(0)
    model = build_model(config, StageSchedule(config.flow.resolved_ends).context_scales(0.3))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    with torch.no_grad():
        full, *_ = objective(config, model)(*batch(range(8)))
        half, *_ = objective(config, model, "bf16")(*batch(range(8)))
    assert half.dtype == torch.float32
    assert 0 < abs(float(full - half)) < 0.02 * float(full)


def test_every_draw_has_its_own_stream(monkeypatch):
    """Stages, purposes: no two draws of a sample use the same numbers."""
    keys = []
    for name in ("normal", "uniform"):
        original = getattr(module, name)

        def spy(seed, positions, purpose, *shape, stream=0, original=original):
            keys.append((seed, purpose, stream))
            return original(seed, positions, purpose, *shape, stream=stream)

        monkeypatch.setattr(module, name, spy)
    config = make_config(num_stages=3)
    config = config.model_copy(update={"run": config.run.model_copy(update={"seed": 5})})
    objective(config, Recorder())(*batch(range(4)))
    expected = [(Purpose.POSTERIOR, 0), (Purpose.LABEL_DROP, 0)]
    expected += [(purpose, k) for purpose in (Purpose.NOISE, Purpose.TIME) for k in range(3)]
    expected += [(Purpose.CONTEXT, k) for k in range(2)]
    assert sorted(keys) == sorted((5, purpose, stream) for purpose, stream in expected)


def test_stage_weights_weigh():
    loss, per_stage, _ = objective(make_config(num_stages=2, stage_weights=[0.0, 3.0]), Recorder())(*batch(range(8)))
    assert float(loss) == pytest.approx(3 * float(per_stage[:, 1].mean()), rel=1e-6)
