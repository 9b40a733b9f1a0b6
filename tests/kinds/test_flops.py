import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ecar_dist.kinds.ecar import ar_macs, condition_macs
from ecar_dist.kinds.flops import FLOPS_PER_MAC, dit_macs, time_macs, velocity_macs
from ecar_dist.kinds.flow_head import head_macs, trunk_size_of
from ecar_dist.kinds.mar import mar_trunk_macs
from ecar_dist.kinds.presets import PRESETS
from ecar_dist.kinds.table import kind_of
from ecar_dist.sample.generate import generate
from ecar_dist.sample.sampling_plan import SamplingPlan

TOKENS = (16, 64, 256)
DIT_XL = dit_macs(256, 1152, 28)
DATA = {"latents": "nowhere", "num_classes": 10, "latent_size": 16}
SERIAL = ("velocity", "next_logits", "next_conditions")  # passes that run one after another, of any kind
MORE_SERIAL = {"mar": ("conditions",), "hybrid": ("hidden",)}
UNGUIDED = {"guidance_scale": 1.0}  # with the default solver: 16 calls in each stage


def build_model(config):
    return kind_of(config).build_model(config)


def sampling_macs(config):
    return kind_of(config).sampling_macs(config)


def training_macs(config):
    return kind_of(config).training_macs(config)


@pytest.mark.parametrize(
    ("tokens", "width", "depth", "patch", "gmacs"),
    [
        (256, 384, 12, 2, 6.06),
        (256, 768, 12, 2, 23.01),
        (256, 1024, 24, 2, 80.70),
        (256, 1152, 28, 2, 118.62),
        (64, 1152, 28, 4, 29.05),
    ],
)
def test_dit_table(tokens, width, depth, patch, gmacs):
    """E15: the "Gflops" that DiT reports are MACs."""
    macs = dit_macs(tokens, width, depth, channels_in=4 * patch**2, channels_out=8 * patch**2)
    assert macs / 1e9 == pytest.approx(gmacs, rel=1e-3)


@pytest.mark.parametrize(
    ("preset", "tmacs", "ratio", "training_gmacs"),
    [
        ("S", 0.133, 223, 47.5),
        ("B", 0.510, 58, 181),
        ("L", 1.48, 20, 475),
        ("XL", 2.56, 11.6, 699),
        ("XXL", 4.61, 6.4, 1526),
        ("3B", 10.3, 2.87, 3102),
        ("7B", 22.0, 1.35, 7169),
    ],
)
def test_ecar_table(make_config, preset, tmacs, ratio, training_gmacs):
    """E15: docs/ecar.md section 10, 16 calls in each of three stages, no guidance."""
    config = make_config(preset, sample=UNGUIDED)
    macs = sampling_macs(config)
    assert macs / 1e12 == pytest.approx(tmacs, rel=0.01)
    assert 250 * DIT_XL / macs == pytest.approx(ratio, rel=0.01)
    assert training_macs(config) / 1e9 == pytest.approx(training_gmacs, rel=0.01)


@pytest.mark.parametrize(
    ("num_stages", "calls", "ratio"),
    [(2, (25,), 7.9), (3, (20,), 9.3), (4, (12, 13), 14.5)],  # 12.5 calls per stage
)
def test_number_of_stages_table(make_config, num_stages, calls, ratio):
    flow, sample = {"num_stages": num_stages}, UNGUIDED | {"solver": "euler"}
    each = [sampling_macs(make_config("XL", flow=flow, sample=sample | {"steps_per_stage": steps})) for steps in calls]
    assert 250 * DIT_XL / (sum(each) / len(each)) == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize("preset", ["T", "3B"])
def test_forward_matches_torch_counter(make_config, preset):
    """torch counts FLOPs, two per MAC. On a CPU it counts fused attention as zero, so attention is written out here."""
    with torch.device("meta"):
        model = build_model(make_config(preset))
        states = [torch.zeros(1, 4, side, side) for side in (8, 16, 32)]
        times, labels = [torch.zeros(1)] * 3, torch.zeros(1, dtype=torch.long)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(states[:-1], states, times, labels)
    counted = counter.get_flop_counts()["Global"]
    linears, total = (
        ar_macs(PRESETS[preset], TOKENS, 16, linears_only=only)
        + sum(velocity_macs(PRESETS[preset], count, 16, linears_only=only) for count in TOKENS)
        + sum(condition_macs(PRESETS[preset], count) for count in TOKENS)
        for only in (True, False)
    )
    assert counted[torch.ops.aten.addmm] == FLOPS_PER_MAC * linears
    assert sum(counted.values()) == FLOPS_PER_MAC * total


def test_only_visible_attention_is_counted():
    preset = PRESETS["XL"]
    attention = ar_macs(preset, TOKENS, 16) - ar_macs(preset, TOKENS, 16, linears_only=True)
    full = preset.ar_depth * 2 * 336**2 * preset.ar_width
    assert attention / full == pytest.approx(0.81, abs=0.005)


def test_guidance_doubles_what_it_must(make_config):
    """The linear ramp begins at scale 1, so stage 0 needs no null velocity; its null AR pass is still needed."""

    def macs(guidance_scale, ramp):
        sample = {"guidance_scale": guidance_scale, "guidance_ramp": ramp}
        return sampling_macs(make_config("T", sample=sample))

    plain, preset = macs(1.0, "constant"), PRESETS["T"]
    assert macs(1.0, "linear") == macs(0.0, "constant") == macs(0.0, "linear") == plain
    assert macs(2.0, "constant") == 2 * plain
    spared = 16 * velocity_macs(preset, 16, 16) + condition_macs(preset, 16)
    assert macs(2.0, "linear") == 2 * plain - spared


def counted_flops(run, *, linears_only=False):
    """torch's count of run(), with attention written out; on meta tensors, which have no values."""
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    counted = counter.get_flop_counts()["Global"]
    return counted.get(torch.ops.aten.addmm, 0) if linears_only else sum(counted.values())


@pytest.mark.parametrize("preset", ["T", "3B"])
@pytest.mark.parametrize(("kind", "num_stages"), [("dit", 1), ("pyramid", 3)])
def test_training_without_ar_matches_torch_counter(make_config, kind, num_stages, preset):
    config = make_config(model={"kind": kind, "preset": preset}, flow={"num_stages": num_stages})
    with torch.device("meta"):
        model = build_model(config)
        states = [torch.zeros(1, 4, side, side) for side in config.stage_sizes]
        times, labels = [torch.zeros(1)] * num_stages, torch.zeros(1, dtype=torch.long)
    forward = counted_flops(lambda: model([], states, times, labels))
    assert training_macs(config) * FLOPS_PER_MAC == 3 * forward


def test_average_velocities_cost_two_more_forward_passes(make_config):
    config = make_config(model={"kind": "pyramid"}, flow={"num_stages": 3, "objective": "mean_velocity"})
    with torch.device("meta"):
        model = build_model(config)
        states = [torch.zeros(1, 4, side, side) for side in config.stage_sizes]
        times, labels = [torch.zeros(1)] * 3, torch.zeros(1, dtype=torch.long)
    forward = counted_flops(lambda: model.all_velocities(states, times, None, labels, times))
    assert training_macs(config) * FLOPS_PER_MAC == 5 * forward


@pytest.mark.parametrize("preset", ["T", "L"])
def test_training_of_mar_matches_torch_counter(make_config, preset):
    config = make_config(model={"kind": "mar", "preset": preset}, flow={"num_stages": 1, "token_draws": 3})
    with torch.device("meta"):
        model = build_model(config)
        tokens, mask = torch.zeros(1, 256, 16), torch.zeros(1, 256, dtype=torch.bool)
        draws, times, labels = torch.zeros(1, 3, 256, 16), torch.zeros(1, 3, 256), torch.zeros(1, dtype=torch.long)
    size = trunk_size_of(config)
    assert training_macs(config) * FLOPS_PER_MAC == 3 * counted_flops(lambda: model(tokens, mask, draws, times, labels))
    linears = mar_trunk_macs(size, 256, 16, linears_only=True) + 3 * 256 * (head_macs(size, 16) + time_macs(size.width))
    counted = counted_flops(lambda: model(tokens, mask, draws, times, labels), linears_only=True)
    assert counted == FLOPS_PER_MAC * linears


def counting(function, calls):
    def called(*arguments, **more):
        calls.append(1)
        return function(*arguments, **more)

    return called


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        ("ecar", [2]),
        ("ecar", [3, 1]),
        ("dit", [2]),
        ("pyramid", [1, 3]),
        ("mar", [2]),
        ("par", [2]),
        ("par_cont", [2]),
        ("hybrid", [2]),
    ],
)
def test_sampling_matches_torch_counter(make_config, kind, steps, guidance_scale):
    """The production sampler itself, from labels to latents: exactly as many passes as `plan` says.

    A guided ECAR embeds the condition of its first stage for the null branch too, where the linear ramp needs no null
    velocity: one more projection than is counted.
    """
    config = make_config(
        model={"kind": kind, "preset": "T", "patch_size": 2},
        flow={"num_stages": 2 if kind in ("ecar", "pyramid") else 1},
        data={"latents": "nowhere", "num_classes": 10, "latent_size": 8},
        sample={"steps_per_stage": steps, "guidance_scale": guidance_scale, "ar_steps": 5, "code_steps": 5},
    )
    model = build_model(config).eval()
    plan, label = SamplingPlan.from_config(config, torch.device("cpu")), torch.zeros(1, dtype=torch.long)
    calls = []
    for name in (*SERIAL, *MORE_SERIAL.get(kind, ())):
        if hasattr(model, name):
            setattr(model, name, counting(getattr(model, name), calls))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        generate(model, plan, label, label, 0)
    assert len(calls) == kind_of(config).serial_calls(config)
    spared = condition_macs(PRESETS["T"], 4) if kind == "ecar" and guidance_scale != 1.0 else 0
    assert counter.get_total_flops() == (sampling_macs(config) + spared) * FLOPS_PER_MAC


def test_mar_runs_its_trunk_each_step_and_its_head_once_a_token(make_config):
    for steps in (1, 64, 256):
        plain, guided = (
            make_config(
                model={"kind": "mar", "preset": "B"},
                flow={"num_stages": 1},
                sample={"ar_steps": steps, "guidance_scale": scale, "guidance_ramp": "constant"},
            )
            for scale in (1.0, 2.0)
        )
        size = trunk_size_of(plain)
        trunk, head, time = mar_trunk_macs(size, 256, 16), head_macs(size, 16), time_macs(size.width)
        assert sampling_macs(plain) == steps * (trunk + 16 * time) + 256 * 16 * head
        assert sampling_macs(guided) == 2 * (steps * trunk + 256 * 16 * head) + steps * 16 * time


def test_dit_costs_what_the_published_dit_costs(make_config):
    """Minus its learned variance, which ours does not have."""
    one_call = UNGUIDED | {"solver": "euler", "steps_per_stage": 1}
    ours = sampling_macs(make_config(model={"kind": "dit", "preset": "XL"}, flow={"num_stages": 1}, sample=one_call))
    assert ours == DIT_XL - 256 * 1152 * 16
    assert ours / 1e9 == pytest.approx(118.64, rel=0.01)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["par", "par_cont"])
@pytest.mark.parametrize("group", [4, 16])
def test_sampling_in_groups_matches_torch_counter(make_config, kind, group, guidance_scale):
    config = make_config(
        model={"kind": kind, "ar_depth": 1, "flow_depth": 1, "patch_size": 1, "codebook_size": 32},
        par={"group": group},
        flow={"num_stages": 1},
        data={"latents": "nowhere", "num_classes": 10, "latent_size": 2 * math.isqrt(group)},
        sample={"steps_per_stage": 1, "guidance_scale": guidance_scale},
    )
    model = build_model(config).eval()
    plan, label = SamplingPlan.from_config(config, torch.device("cpu")), torch.zeros(1, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        generate(model, plan, label, label, 0)
    assert counter.get_total_flops() == sampling_macs(config) * FLOPS_PER_MAC


def test_training_of_par_matches_torch_counter_but_for_the_mask(make_config):
    """The kernel counts the products that its mask hides; the closed form does not."""
    model = {"kind": "par", "ar_depth": 2, "codebook_size": 64}
    config = make_config("T", model=model, par={"group": 4}, flow={"num_stages": 1}, data=DATA)
    network, size = build_model(config), trunk_size_of(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 64, 16), torch.zeros(1, dtype=torch.long))
    hidden = 2 * size.depth * size.width * (64**2 - (1 + 2 + 3 + 4 + 4 * sum(range(8, 65, 4))))
    search = 64 * 16 * 64
    forward = counter.get_total_flops() / FLOPS_PER_MAC - hidden - search
    assert training_macs(config) == 3 * forward + search


def test_training_of_hybrid_matches_torch_counter(make_config):
    model = {"kind": "hybrid", "ar_depth": 2, "codebook_size": 64}
    config = make_config("T", model=model, flow={"num_stages": 1, "token_draws": 3}, data=DATA)
    network, labels = build_model(config), torch.zeros(1, dtype=torch.long)
    tokens, mask, times = torch.zeros(1, 64, 16), torch.ones(1, 64, dtype=torch.bool), torch.zeros(1, 3, 64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(tokens, mask, torch.zeros(1, 3, 64, 16), times, times, labels)
    search = 64 * 16 * 64
    assert training_macs(config) == 3 * (counter.get_total_flops() / FLOPS_PER_MAC - search) + search
