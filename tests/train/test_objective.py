"""One micro-batch of the production objective, without ranks."""

from functools import partial

import pytest
import torch

import ecar_dist.train.objective as module
from ecar_dist.config.read import config_from_dict
from ecar_dist.flow.path import logit_normal_times, model_time
from ecar_dist.flow.schedule import StageSchedule
from ecar_dist.kinds.table import kind_of
from ecar_dist.rng import Purpose, draw_all, normal, uniform
from ecar_dist.vae.codec import EncoderIdentity, normalise
from tests.models.test_pyramid import without_ar

IDENTITY = EncoderIdentity("kl", "test", "0", "0", 4, 8, 0.5, 0.1, deterministic=False)


def make_config(kind="ecar", **flow):
    return config_from_dict(
        {
            "run": {"name": "test"},
            "model": {
                "kind": kind,
                "preset": "T",
                "width": 64,
                "ar_depth": 2,
                "flow_depth": 2,
                "patch_size": 1,
                "codebook_size": 32,
            },
            "flow": flow,
            "vae": {"kind": "dct"},
            "data": {"latents": "none", "num_classes": 10, "latent_channels": 4, "latent_size": 8},
            "train": {"total_samples": 1},
        }
    )


class Recorder(torch.nn.Module):
    """Stands in for the model: records its inputs and predicts zero."""

    def forward(self, contexts, states, times, labels):
        self.seen = (contexts, states, times, labels)
        return [torch.zeros_like(state) for state in states]


def make_model(config):
    """As if trained: zero gates would hide the inputs."""
    torch.manual_seed(0)
    model = kind_of(config).build_model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    if hasattr(model, "residual_scale"):  # it divides
        torch.nn.init.ones_(model.residual_scale.scale)
    return model


def objective(config, model, precision="fp32"):
    return kind_of(config).objective(model, partial(normalise, IDENTITY), config, precision)


def batch(positions):
    """Moments and labels that depend only on the position, like those of a data set."""
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


KINDS = [("ecar", 1), ("ecar", 2), ("ecar", 3), ("ecar", 4), ("pyramid", 3), ("dit", 1), ("mar", 1)]
KINDS += [("par", 1), ("par_cont", 1), ("hybrid", 1)]


@pytest.mark.parametrize(("kind", "num_stages"), KINDS)
def test_the_loss_is_the_weighted_mean_over_micro_batches(kind, num_stages):
    config = make_config(kind, num_stages=num_stages)
    compute = objective(config, make_model(config))
    with torch.no_grad():
        loss, per_stage, _ = compute(*batch(range(8)))
        halves = [compute(*batch(range(start, start + 4))) for start in (0, 4)]
    assert per_stage.shape == (8, num_stages)
    assert float(loss) == pytest.approx(float(halves[0][0] + halves[1][0]) / 2, abs=1e-6)
    assert torch.allclose(per_stage, torch.cat([half[1] for half in halves]), atol=1e-5)
    assert float(loss) == pytest.approx(float(per_stage.mean()), abs=1e-6)


def test_the_times_are_those_of_the_losses_stage_by_stage():
    config = make_config(num_stages=3)
    recorder, schedule = Recorder(), config.flow.schedule
    _, per_stage, times = objective(config, recorder)(*batch(range(16)))
    assert times.shape == per_stage.shape == (16, 3)
    for k, shown in enumerate(recorder.seen[2]):
        assert torch.equal(model_time(schedule, k, times[:, k]), shown)


@pytest.mark.parametrize("flow", [{}, {"objective": "mean_velocity", "instant_share": 1.0}])
def test_logit_normal_times_are_those_of_the_same_numbers(flow):
    found = {}
    for times in ("uniform", "logit_normal"):
        config = make_config(num_stages=3, times=times, **flow)
        found[times] = objective(config, make_model(config))(*batch(range(16)))[2]
    torch.testing.assert_close(found["logit_normal"], logit_normal_times(found["uniform"]))


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


@pytest.mark.parametrize(
    ("kind", "num_stages"), [("ecar", 2), ("pyramid", 2), ("mar", 1), ("par", 1), ("par_cont", 1), ("hybrid", 1)]
)
def test_bf16_touches_the_network_alone(kind, num_stages):
    config = make_config(kind, num_stages=num_stages)
    model = make_model(config)
    with torch.no_grad():
        full, *_ = objective(config, model)(*batch(range(8)))
        half, *_ = objective(config, model, "bf16")(*batch(range(8)))
    assert half.dtype == torch.float32
    assert 0 < abs(float(full - half)) < 0.02 * float(full)


def spy_on_draws(monkeypatch):
    """(seed, purpose, stream) of every draw from now on."""
    keys = []

    def spy(seed, positions, draws):
        assert not keys  # one call makes all of them
        keys.extend((seed, draw.purpose, draw.stream) for draw in draws)
        return draw_all(seed, positions, draws)

    monkeypatch.setattr(module, "draw_all", spy)
    return keys


def test_every_draw_has_its_own_stream(monkeypatch):
    """Stages, purposes: no two draws of a sample use the same numbers."""
    keys, config = spy_on_draws(monkeypatch), make_config(num_stages=3)
    config = config.model_copy(update={"run": config.run.model_copy(update={"seed": 5})})
    objective(config, Recorder())(*batch(range(4)))
    expected = [(Purpose.POSTERIOR, 0), (Purpose.LABEL_DROP, 0)]
    expected += [(purpose, k) for purpose in (Purpose.NOISE, Purpose.TIME) for k in range(3)]
    expected += [(Purpose.CONTEXT, k) for k in range(2)]
    assert sorted(keys) == sorted((5, purpose, stream) for purpose, stream in expected)


def test_stage_weights_weigh():
    loss, per_stage, _ = objective(make_config(num_stages=2, stage_weights=[0.0, 3.0]), Recorder())(*batch(range(8)))
    assert float(loss) == pytest.approx(3 * float(per_stage[:, 1].mean()), rel=1e-6)


def step(config, model):
    """Loss, gradients, and the weights after one step of AdamW."""
    loss, *_ = objective(config, model)(*batch(range(8)))
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    torch.optim.AdamW(model.parameters(), lr=1e-2).step()
    return loss.detach(), gradients, model.state_dict()


def test_dit_trains_as_the_pyramid_of_one_stage_and_as_ecar_of_one_stage_without_its_ar_transformer():
    """E16, to the last bit: loss, gradients and the weights after a step."""
    dit = make_model(make_config("dit", num_stages=1))
    pyramid, ecar = (make_model(make_config(kind, num_stages=1)) for kind in ("pyramid", "ecar"))
    pyramid.load_state_dict(dit.state_dict())
    without_ar(ecar, dit)
    (loss, gradients, weights), *others = (
        step(make_config(kind, num_stages=1), model)
        for kind, model in [("dit", dit), ("pyramid", pyramid), ("ecar", ecar)]
    )
    assert min(float(gradient.abs().max()) for gradient in gradients.values()) > 0
    for other_loss, other_gradients, other_weights in others:
        assert torch.equal(other_loss, loss)
        for name, gradient in gradients.items():
            assert torch.equal(other_gradients[name], gradient), name
            assert torch.equal(other_weights[name], weights[name]), name


def test_the_loss_of_dit_is_flow_matching_written_out():
    config = make_config("dit", num_stages=1)
    model, (moments, labels, positions) = make_model(config), batch(range(16))
    with torch.no_grad():
        loss, *_ = objective(config, model)(moments, labels, positions)
        z = normalise(IDENTITY, moments, normal(0, positions, Purpose.POSTERIOR, (4, 8, 8)))
        n, t = normal(0, positions, Purpose.NOISE, (4, 8, 8)), uniform(0, positions, Purpose.TIME)
        labels = torch.where(uniform(0, positions, Purpose.LABEL_DROP) < 0.1, 10, labels)
        v = model.flow((1 - t.view(-1, 1, 1, 1)) * n + t.view(-1, 1, 1, 1) * z, t, 0, None, labels)
        expected = (v - (z - n)).square().mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def test_the_pyramid_is_shown_what_ecar_is_shown_but_no_contexts():
    fed, alone = Recorder(), Recorder()
    objective(make_config(num_stages=3), fed)(*batch(range(8)))
    objective(make_config("pyramid", num_stages=3), alone)(*batch(range(8)))
    assert len(fed.seen[0]) == 2
    assert alone.seen[0] == []
    for ours, theirs in zip((*alone.seen[1], *alone.seen[2]), (*fed.seen[1], *fed.seen[2]), strict=True):
        assert torch.equal(ours, theirs)


class MaskedRecorder(torch.nn.Module):
    """Stands in for `mar`: records its inputs and predicts zero."""

    def forward(self, tokens, mask, states, times, labels):
        self.seen = (tokens, mask, states, times, labels)
        return torch.zeros_like(states)


def test_a_masked_sample_is_shown_the_same_whatever_batch_it_comes_in():
    config, whole, part = make_config("mar", num_stages=1), MaskedRecorder(), MaskedRecorder()
    _, losses, times = objective(config, whole)(*batch(range(8)))
    objective(config, part)(*batch([5, 2]))
    for ours, theirs in zip(part.seen, whole.seen, strict=True):
        assert torch.equal(ours, theirs[[5, 2]])
    assert losses.shape == times.shape == (8, 1)
    assert times.isnan().all()  # each is the mean over tokens at many times


def test_masked_tokens_flow_from_noise_to_themselves_several_times():
    """The loss of a model that predicts zero is the mean square of z - n, over masked tokens only."""
    config, recorder = make_config("mar", num_stages=1, token_draws=3), MaskedRecorder()
    moments, labels, positions = batch(range(16))
    loss, *_ = objective(config, recorder)(moments, labels, positions)
    tokens, mask, states, times, _ = recorder.seen
    z = normalise(IDENTITY, moments, normal(0, positions, Purpose.POSTERIOR, (4, 8, 8))).flatten(2).mT  # [B, T, c]
    noise = torch.stack([normal(0, positions, Purpose.NOISE, (4, 8, 8), stream=r).flatten(2).mT for r in range(3)], 1)
    torch.testing.assert_close(tokens, z)
    torch.testing.assert_close(states, (1 - times[..., None]) * noise + times[..., None] * z[:, None])
    assert times.shape == (16, 3, 64)
    assert times.unique().numel() > 0.99 * times.numel()
    share = mask.double().mean(1)
    assert 0.7 <= float(share.min()) < float(share.max()) <= 1.0
    expected = [(z[b, mask[b]] - noise[b][:, mask[b]]).square().mean() for b in range(16)]
    assert float(loss) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)


def test_every_draw_of_a_masked_sample_has_its_own_stream(monkeypatch):
    keys = spy_on_draws(monkeypatch)
    objective(make_config("mar", num_stages=1), MaskedRecorder())(*batch(range(4)))
    expected = [(purpose, 0) for purpose in (Purpose.POSTERIOR, Purpose.LABEL_DROP)]
    expected += [(purpose, 0) for purpose in (Purpose.MASK_RATIO, Purpose.MASK_ORDER)]
    expected += [(purpose, r) for purpose in (Purpose.NOISE, Purpose.TIME) for r in range(4)]
    assert sorted(keys) == sorted((0, purpose, stream) for purpose, stream in expected)


@pytest.mark.parametrize(("kind", "num_stages"), [("ecar", 3), ("pyramid", 2), ("dit", 1)])
def test_average_velocities_of_no_length_are_the_velocities(kind, num_stages):
    """All intervals have length 0, which the network does not see: the loss of flow matching, to the bit."""
    config = make_config(kind, num_stages=num_stages)
    plain = make_model(config)
    average_config = make_config(kind, num_stages=num_stages, objective="mean_velocity", instant_share=1.0)
    averages = kind_of(average_config).build_model(average_config)
    missing, unexpected = averages.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == []
    assert {name.split(".")[1] for name in missing} == {"length_embedding"}
    expected = objective(config, plain)(*batch(range(8)))
    for ours, theirs in zip(objective(average_config, averages)(*batch(range(8))), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["ecar", "pyramid"])
def test_the_loss_of_average_velocities_is_that_of_its_formula(kind):
    """Against U(x_a, a, h) and its two parts, computed here one stage at a time."""
    config = make_config(kind, num_stages=2, objective="mean_velocity", instant_share=0.4)
    model = make_model(config)
    values, labels, positions = batch(range(16))
    with torch.no_grad():
        _, per_stage, starts = objective(config, model)(values, labels, positions)

    # What was drawn, and the points on the paths.
    seed = config.run.seed
    dropped = uniform(seed, positions, Purpose.LABEL_DROP) < config.model.label_dropout
    labels = torch.where(dropped, config.data.num_classes, labels)
    posterior = normal(seed, positions, Purpose.POSTERIOR, (4, 8, 8))
    latents = normalise(IDENTITY, values, posterior)
    noise = [normal(seed, positions, Purpose.NOISE, (4, side, side), stream=k) for k, side in enumerate((4, 8))]
    tau = config.context_tau
    contexts = [] if tau is None else [normal(seed, positions, Purpose.CONTEXT, (4, 4, 4))]
    schedule = config.flow.schedule
    points = module.training_points(schedule, latents, noise, list(starts.unbind(1)), contexts, tau)

    # Stage by stage, as in sampling.
    cache = model.start_cache()
    for k in range(2):
        with torch.no_grad():
            context = points.contexts[k - 1] if k and points.contexts else None
            condition = model.begin_stage(k, context, labels, cache)

            def average(x, u, length, k=k, condition=condition):
                return model.velocity(x, model_time(schedule, k, u), k, condition, labels, length)

            u = uniform(seed, positions, Purpose.TIME, stream=k)
            drawn = module.Interval.draw(u, uniform(seed, positions, Purpose.INTERVAL, (4,), stream=k), 0.4)
            assert torch.equal(drawn.start, starts[:, k])
            first_length = drawn.split * drawn.length
            x = points.states[k]
            first = average(x, drawn.start, first_length)
            middle = x + first_length[:, None, None, None] * first
            second = average(middle, drawn.start + first_length, drawn.length - first_length)
            share = drawn.split[:, None, None, None]
            target = share * first + (1 - share) * second
            instant = drawn.length == 0
            assert 0 < instant.sum() < 16
            target[instant] = points.targets[k][instant]
            error = (average(x, drawn.start, drawn.length) - target).square().flatten(1).mean(1)
        torch.testing.assert_close(per_stage[:, k], error, rtol=1e-4, atol=1e-5)
