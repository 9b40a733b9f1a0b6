"""The trained model in the production sampler."""

import contextlib
import dataclasses
from collections import Counter
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ecar_dist.sample.guided as guided
import ecar_dist.sample.staged as module
from ecar_dist.flow.path import model_time
from ecar_dist.flow.schedule import StageSchedule, uniform_ends
from ecar_dist.kinds.presets import PRESETS
from ecar_dist.models.ecar import ECAR
from ecar_dist.models.layers import AdaLN
from ecar_dist.rng import Purpose, draw_all, normal
from ecar_dist.sample.generate import generate, generate_in_batches
from ecar_dist.sample.sampling_plan import SamplingPlan
from tests.models.test_pyramid import without_ar
from tests.train.test_objective import make_config
from tests.train.test_objective import make_model as make_model_of

SEED = 3


def make_model(num_stages, feeds_state=True):
    torch.manual_seed(0)
    schedule = StageSchedule(uniform_ends(num_stages))
    model = ECAR(
        PRESETS["T"],
        stage_sizes=[8 >> (num_stages - 1 - k) for k in range(num_stages)],
        latent_channels=4,
        patch_size=1,
        num_classes=10,
        context_scales=schedule.context_scales(0.3),
        feeds_state=feeds_state,
    )
    for parameter in model.parameters():  # as if trained: no weight is zero
        torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def make_plan(num_stages, **changes):
    plan = SamplingPlan(
        kind="ecar",
        schedule=StageSchedule(uniform_ends(num_stages)),
        stage_sizes=tuple(8 >> (num_stages - 1 - k) for k in range(num_stages)),
        channels=4,
        null_label=10,
        tau=0.3,
        solver="midpoint",
        steps_per_stage=(2,) * num_stages,
        time_shift=1.0,
        guidance_scale=1.0,
        guidance_ramp="linear",
        ar_steps=8,
        bf16=False,
    )
    return dataclasses.replace(plan, **changes)


LABELS = torch.tensor([1, 7, 7, 0])
INDICES = torch.tensor([0, 1, 2, 30])


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_every_stage_comes_out_at_its_size(num_stages):
    stages = generate(make_model(num_stages), make_plan(num_stages), LABELS, INDICES, SEED)
    assert [tuple(stage.shape) for stage in stages] == [
        (4, 4, size, size) for size in make_plan(num_stages).stage_sizes
    ]
    assert all(torch.isfinite(stage).all() for stage in stages)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_a_sample_does_not_depend_on_the_batch_around_it(guidance_scale):
    model, plan = make_model(3), make_plan(3, guidance_scale=guidance_scale)
    together = generate(model, plan, LABELS, INDICES, SEED)[-1]
    alone = generate(model, plan, LABELS[3:], INDICES[3:], SEED)[-1]
    assert torch.allclose(together[3:], alone, atol=1e-4)
    batches = torch.cat([stages[-1] for stages in generate_in_batches(model, plan, LABELS, SEED, batch_size=3)])
    assert torch.allclose(batches[:3], generate(model, plan, LABELS[:3], torch.arange(3), SEED)[-1], atol=1e-4)
    assert batches.shape[0] == 4


def test_labels_indices_and_seed_all_matter():
    model, plan = make_model(3), make_plan(3)
    base = generate(model, plan, LABELS, INDICES, SEED)[-1]
    for labels, indices, seed in [(LABELS.flip(0), INDICES, SEED), (LABELS, INDICES + 1, SEED), (LABELS, INDICES, 4)]:
        assert not torch.allclose(generate(model, plan, labels, indices, seed)[-1], base, atol=1e-3)


@pytest.mark.parametrize("ramp", ["constant", "linear"])
def test_guidance_0_is_the_unconditional_model_and_1_the_conditional(ramp):
    model = make_model(3)
    plan = make_plan(3, guidance_ramp=ramp)
    null = generate(model, plan, torch.full_like(LABELS, 10), INDICES, SEED)[-1]
    zero = generate(model, dataclasses.replace(plan, guidance_scale=0.0), LABELS, INDICES, SEED)[-1]
    assert torch.allclose(zero, null, atol=1e-4)
    one = generate(model, dataclasses.replace(plan, guidance_scale=1.0), LABELS, INDICES, SEED)[-1]
    assert not torch.allclose(one, null, atol=1e-2)


def count_velocity_rows(model):
    """Rows that went through the velocity network, by stage."""
    rows = {}
    original = model.velocity

    def counting(x, time, stage, *rest, **more):
        rows[stage] = rows.get(stage, 0) + x.shape[0]
        return original(x, time, stage, *rest, **more)

    model.velocity = counting
    return rows


def test_the_null_pass_is_skipped_where_the_scale_is_1_with_the_same_result(monkeypatch):
    """E14: under the linear ramp stage 0 has scale 1; evaluating the null pass there changes nothing."""
    model, plan = make_model(3), make_plan(3, guidance_scale=3.0)
    rows = count_velocity_rows(model)
    skipped = generate(model, plan, LABELS, INDICES, SEED)[-1]
    assert rows == {0: 16, 1: 32, 2: 32}  # 4 samples x 2 steps x 2 calls, twice where guided
    barely = 1.0 + 1e-9  # not 1, so the null pass is made, but the same number in float32
    monkeypatch.setattr("ecar_dist.sample.staged.stage_guidance_scales", lambda scale, stages, ramp: (barely, 2.0, 3.0))
    rows.clear()
    in_full = generate(model, plan, LABELS, INDICES, SEED)[-1]
    assert rows[0] == 32
    assert torch.allclose(skipped, in_full, atol=1e-4)


def test_without_guidance_there_is_no_null_pass_at_all():
    model = make_model(3)
    rows = count_velocity_rows(model)
    generate(model, make_plan(3), LABELS, INDICES, SEED)
    assert rows == {0: 16, 1: 16, 2: 16}


def test_outside_of_the_guidance_interval_the_conditional_model_alone_is_evaluated():
    model = make_model(3)
    settings = {"guidance_ramp": "constant", "solver": "euler", "steps_per_stage": (4,) * 3}
    plan = make_plan(3, guidance_scale=3.0, **settings)
    rows = count_velocity_rows(model)

    # The first stage is before the interval, the last one after it, and half of the middle one's steps are in it.
    low, high = plan.schedule.model_windows[1]
    half = dataclasses.replace(plan, guidance_interval=(low + 0.01, low + 0.6 * (high - low)))
    limited = generate(model, half, LABELS, INDICES, SEED)
    assert rows == {0: 16, 1: 16 + 2 * 4, 2: 16}  # 4 samples x 4 steps; twice at u = 1/4 and 1/2

    # Up to the interval it equals the model without guidance; after it, the sample differs from both.
    plain = generate(model, dataclasses.replace(plan, guidance_scale=1.0), LABELS, INDICES, SEED)
    full = generate(model, plan, LABELS, INDICES, SEED)
    assert torch.allclose(limited[0], plain[0], atol=1e-5)
    assert not torch.allclose(limited[1], plain[1], atol=1e-2)
    assert not torch.allclose(limited[1], full[1], atol=1e-2)

    # The unconditional model is unconditional at all times.
    null = dataclasses.replace(plan, guidance_scale=0.0)
    never = dataclasses.replace(null, guidance_interval=(0.99, 1.0))
    assert torch.equal(
        generate(model, never, LABELS, INDICES, SEED)[-1], generate(model, null, LABELS, INDICES, SEED)[-1]
    )


def test_stages_may_have_different_numbers_of_steps():
    model = make_model(3)
    rows = count_velocity_rows(model)
    stages = generate(model, make_plan(3, steps_per_stage=(1, 3, 2)), LABELS, INDICES, SEED)
    assert rows == {0: 8, 1: 24, 2: 16}  # 4 samples x steps x 2 calls
    rows.clear()
    same = generate(model, make_plan(3, steps_per_stage=(1, 3, 4)), LABELS, INDICES, SEED)
    assert [torch.equal(a, b) for a, b in zip(stages, same, strict=True)] == [True, True, False]


@pytest.mark.parametrize("kind", ["ecar", "mar"])
def test_the_shift_moves_the_times_of_the_network(kind, monkeypatch):
    """Those of every stage, and those of the flow head."""
    home = module if kind == "ecar" else guided
    seen = []

    def watching(schedule, stage, u):
        seen.append((stage, float(u.flatten()[0])))
        return model_time(schedule, stage, u)

    monkeypatch.setattr(home, "model_time", watching)
    num_stages = 2 if kind == "ecar" else 1
    model = make_model_of(make_config(kind, num_stages=num_stages)).eval()
    changes = {"kind": kind, "solver": "euler", "ar_steps": 1, "steps_per_stage": (4,) * num_stages, "time_shift": 3.0}
    generate(model, make_plan(num_stages, **changes), LABELS, INDICES, SEED)
    # Before its calls, a stage of ecar computes the modulations of all times at once; the first time is 0.
    times = [*([0] if kind == "ecar" else []), 0, 1 / 10, 1 / 4, 1 / 2]
    assert [stage for stage, _ in seen] == [stage for stage in range(num_stages) for _ in times]
    assert [u for _, u in seen] == pytest.approx(times * num_stages)


@pytest.mark.parametrize("adaln", ["per_block", "shared"])
def test_adaln_runs_once_a_stage(adaln, monkeypatch):
    """Its matrices are read once for all calls of a stage, unless the batch is large; the samples are the same."""
    row = dataclasses.replace(PRESETS["T"], flow_adaln=adaln)
    monkeypatch.setitem(PRESETS, "T", row)
    model, plan = make_model(3), make_plan(3, guidance_scale=2.0, steps_per_stage=(2, 3, 1))
    runs = []
    for one in model.flow.modules():
        if isinstance(one, AdaLN):
            one.register_forward_hook(lambda *_: runs.append(1))
    matrices = 2 if adaln == "shared" else row.flow_depth + 1
    at_once = generate(model, plan, LABELS, INDICES, SEED)
    assert len(runs) == 3 * matrices

    # Each call makes its own if the table would be too large.
    runs.clear()
    monkeypatch.setattr(module, "MOST_MODULATIONS", 0)
    one_by_one = generate(model, plan, LABELS, INDICES, SEED)
    assert len(runs) == (2 + 3 + 1) * 2 * matrices
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(at_once, one_by_one, strict=True))


def test_one_stage_is_plain_flow_matching():
    """E16: with K = 1 a sample is the ODE of the velocity from N(0, I) on [0, 1], by the same solver, bit for bit.

    Each call makes its own adaLN vectors, because some CPUs round those of a larger batch differently.
    """
    model, plan = make_model(1), make_plan(1, solver="euler", steps_per_stage=(4,), modulates_ahead=False)
    (ours,) = generate(model, plan, LABELS, INDICES, SEED)
    with torch.no_grad():
        x = normal(SEED, INDICES, Purpose.GENERATE_START, (4, 8, 8))
        condition = model.condition(model.token_maps([], LABELS)[0])
        for step in range(4):
            time = model_time(plan.schedule, 0, torch.full((4,), step / 4))
            x = x + 0.25 * model.velocity(x, time, 0, condition, LABELS)
    assert torch.equal(ours, x)


def test_the_cached_sampler_sees_what_training_sees():
    """The token map of the last stage equals that of one full pass over the contexts that sampling made."""
    model, plan = make_model(3), make_plan(3)
    contexts, maps = [], []
    original = model.next_token_map

    def spy(stage, context, labels, cache):
        contexts.append(context)
        maps.append(original(stage, context, labels, cache))
        return maps[-1]

    model.next_token_map = spy
    stages = generate(model, plan, LABELS, INDICES, SEED)
    with torch.no_grad():
        in_one_pass = model.token_maps(contexts[1:], LABELS)
    for cached, full in zip(maps, in_one_pass, strict=True):
        assert torch.allclose(cached, full, atol=1e-5)
    for stage, context in zip(stages[:-1], contexts[1:], strict=True):  # C_k = X^e_k + tau xi, before upsampling
        assert float((context - stage).std()) == pytest.approx(0.3, rel=0.4)


def test_what_is_constant_in_a_stage_is_computed_once_a_stage():
    """The AR pass and the projection of its tokens; the velocity alone is in the solver's loop."""
    model, counts = make_model(3), Counter()
    for name, part in [("blocks", model.ar.transformer), ("map", model.flow.condition_projection), ("v", model.flow)]:
        part.register_forward_hook(lambda *_, name=name: counts.update([name]))
    generate(model, make_plan(3, guidance_scale=3.0), LABELS, INDICES, SEED)
    assert counts == {"blocks": 3, "map": 3, "v": 3 * 2 * 2}


class NoWaiting(TorchDispatchMode):
    """Fails if a value or a shape is read from the device, which makes the host wait for all queued work."""

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        name = operation.name()
        assert not name.startswith(("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")), name
        assert not name.startswith(("aten::equal", "aten::is_nonzero", "aten::unique", "aten::_unique")), name
        return operation(*arguments, **(keywords or {}))


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["ecar", "pyramid", "dit", "mar", "par", "hybrid"])
def test_the_host_never_waits_for_the_device(kind, guidance_scale):
    num_stages = 3 if kind in ("ecar", "pyramid") else 1
    model = make_model_of(make_config(kind, num_stages=num_stages)).eval()
    tau = 0.3 if kind == "ecar" else None
    plan = make_plan(num_stages, kind=kind, tau=tau, guidance_scale=guidance_scale)
    with NoWaiting():
        generate(model, plan, LABELS, INDICES, SEED)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            float(LABELS[0])  # such a read is detected


class StaysOn(NoWaiting):
    """Also fails if a tensor is made elsewhere: the host would wait to copy it to the device."""

    def __init__(self, device_type):
        super().__init__()
        self.device_type = device_type

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        results = super().__torch_dispatch__(operation, types, arguments, keywords)
        made = [result for result in tree_leaves(results) if isinstance(result, torch.Tensor)]
        assert {tensor.device.type for tensor in made} <= {self.device_type}, operation.name()
        return results


@pytest.mark.parametrize(
    ("kind", "solver"),
    [*product(("ecar", "pyramid", "dit", "mar"), ("midpoint", "heun")), ("par", "midpoint")],  # par calls no solver
)
def test_nothing_is_made_on_the_host_within_a_batch(kind, solver, monkeypatch):
    """On the meta device, which has no values that the host could read, and no autocast."""
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **more: contextlib.nullcontext())
    num_stages = 3 if kind in ("ecar", "pyramid") else 1
    config = make_config(kind, num_stages=num_stages)
    config = config.model_copy(update={"par": config.par.model_copy(update={"group": 16})})
    model = make_model_of(config).eval().to("meta")
    tau = 0.3 if kind == "ecar" else None
    plan = make_plan(num_stages, kind=kind, tau=tau, guidance_scale=2.0, solver=solver, time_shift=3.0)
    labels, indices = LABELS.to("meta"), INDICES.to("meta")
    if kind == "par":  # the order of the tokens is copied once
        generate(model, plan, labels, indices, SEED)
    with StaysOn("meta"):
        drawn = generate(model, plan, labels, indices, SEED)
        with pytest.raises(AssertionError, match="aten::"):
            torch.tensor([0.5]).to("meta")  # such a copy is detected
    assert [tuple(stage.shape) for stage in drawn] == [(4, 4, size, size) for size in plan.stage_sizes]


def test_a_last_batch_that_is_filled_up_draws_the_same_samples():
    model, plan, drawn = make_model(1), make_plan(1), []
    labels = torch.tensor([7, 3, 7, 1, 0])
    model.velocity = lambda x, *rest, original=model.velocity, **more: (
        drawn.append(len(x)) or original(x, *rest, **more)
    )
    filled = list(generate_in_batches(model, plan, labels, SEED, batch_size=2, fill=True))
    assert set(drawn) == {2}
    assert [len(stages[-1]) for stages in filled] == [2, 2, 1]
    plain = list(generate_in_batches(model, plan, labels, SEED, batch_size=2))
    assert drawn[-1] == 1
    for ours, theirs in zip(filled, plain, strict=True):
        torch.testing.assert_close(ours[-1], theirs[-1], atol=1e-4, rtol=0)
    drawn.clear()
    assert len(next(generate_in_batches(model, plan, labels, SEED, batch_size=64, fill=True))[-1]) == 5
    assert set(drawn) == {5}  # with one batch, nothing is drawn and then dropped


def test_class_only_ignores_the_states():
    model, plan = make_model(3, feeds_state=False), make_plan(3)
    assert torch.isfinite(generate(model, plan, LABELS, INDICES, SEED)[-1]).all()


def test_the_second_batch_goes_on_counting():
    model, plan = make_model(1), make_plan(1)
    labels = torch.tensor([7, 7, 7, 7])
    batches = torch.cat([stages[-1] for stages in generate_in_batches(model, plan, labels, SEED, batch_size=2)])
    assert torch.allclose(batches, generate(model, plan, labels, torch.arange(4), SEED)[-1], atol=1e-4)
    assert not torch.allclose(batches[2:], batches[:2], atol=1e-2)


def spy_on_draws(monkeypatch):
    """(purpose, stream) of every draw from now on, which are made in one call."""
    keys = []

    def spy(seed, positions, draws):
        assert not keys
        keys.extend((draw.purpose, draw.stream) for draw in draws)
        return draw_all(seed, positions, draws)

    monkeypatch.setattr(module, "draw_all", spy)
    return keys


def test_every_draw_of_a_sample_has_its_own_stream(monkeypatch):
    keys = spy_on_draws(monkeypatch)
    generate(make_model(3), make_plan(3), LABELS, INDICES, SEED)
    jumps = [(Purpose.GENERATE_JUMP, k) for k in (1, 2)]
    contexts = [(Purpose.GENERATE_CONTEXT, k) for k in (0, 1)]
    assert sorted(keys) == sorted([(Purpose.GENERATE_START, 0), *jumps, *contexts])


def test_the_plan_is_the_configs_unless_told_otherwise():
    config = make_config(num_stages=2)
    changed = config.sample.model_copy(
        update={"guidance_ramp": "constant", "guidance_scale": 4.0, "solver": "heun", "steps_per_stage": (3,)}
    )
    config = config.model_copy(update={"sample": changed})
    plan = SamplingPlan.from_config(config, torch.device("cpu"))
    assert (plan.kind, plan.null_label, plan.tau, plan.channels, plan.stage_sizes) == ("ecar", 10, 0.3, 4, (4, 8))
    assert (plan.guidance_ramp, plan.guidance_scale, plan.solver) == ("constant", 4.0, "heun")
    assert plan.steps_per_stage == (3, 3)
    assert plan.guidance_interval == (0.0, 1.0)
    fed_nothing = SamplingPlan.from_config(make_config("pyramid", num_stages=2), torch.device("cpu"))
    assert (fed_nothing.kind, fed_nothing.tau) == ("pyramid", None)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["pyramid", "dit", "mar", "par", "hybrid"])
def test_a_sample_of_any_kind_does_not_depend_on_the_batch_around_it(kind, guidance_scale):
    num_stages = 3 if kind == "pyramid" else 1
    model = make_model_of(make_config(kind, num_stages=num_stages)).eval()
    plan = make_plan(num_stages, kind=kind, tau=None, guidance_scale=guidance_scale)
    together = generate(model, plan, LABELS, INDICES, SEED)
    assert [tuple(stage.shape) for stage in together] == [(4, 4, size, size) for size in plan.stage_sizes]
    alone = generate(model, plan, LABELS[3:], INDICES[3:], SEED)
    for a, b in zip(together, alone, strict=True):
        assert torch.allclose(a[3:], b, atol=1e-4)
    for labels, indices, seed in [(LABELS.flip(0), INDICES, SEED), (LABELS, INDICES + 1, SEED), (LABELS, INDICES, 4)]:
        assert not torch.allclose(generate(model, plan, labels, indices, seed)[-1], together[-1], atol=1e-3)


def test_the_pyramid_is_fed_nothing_and_nothing_is_drawn_for_it(monkeypatch):
    keys = spy_on_draws(monkeypatch)
    model, fed = make_model_of(make_config("pyramid", num_stages=3)), []
    monkeypatch.setattr(model, "begin_stage", lambda stage, context, labels, cache: fed.append((stage, context)))
    generate(model, make_plan(3, kind="pyramid", tau=None), LABELS, INDICES, SEED)
    assert fed == [(0, None), (1, None), (2, None)]
    assert sorted(keys) == [(Purpose.GENERATE_START, 0), (Purpose.GENERATE_JUMP, 1), (Purpose.GENERATE_JUMP, 2)]


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_dit_draws_what_the_pyramid_of_one_stage_draws_and_ecar_of_one_stage_without_its_ar_transformer(guidance_scale):
    """E16, to the last bit."""
    models = {kind: make_model_of(make_config(kind, num_stages=1)).eval() for kind in ("dit", "pyramid", "ecar")}
    models["pyramid"].load_state_dict(models["dit"].state_dict())
    without_ar(models["ecar"], models["dit"])
    drawn = [
        generate(model, make_plan(1, kind=kind, guidance_scale=guidance_scale), LABELS, INDICES, SEED)[0]
        for kind, model in models.items()
    ]
    assert drawn[0].abs().max() > 0.1
    assert torch.equal(drawn[1], drawn[0])
    assert torch.equal(drawn[2], drawn[0])
