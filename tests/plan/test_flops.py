import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ecar_dist.models.build import build_model
from ecar_dist.models.presets import PRESETS
from ecar_dist.plan.flops import (
    FLOPS_PER_MAC,
    ar_macs,
    condition_macs,
    dit_macs,
    ecar_sampling_macs,
    ecar_training_macs,
    velocity_macs,
)

TOKENS, CALLS = (16, 64, 256), (16, 16, 16)
DIT_XL = dit_macs(256, 1152, 28)


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
    """E15: the "Gflops" that DiT prints are MACs."""
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
def test_ecar_table(preset, tmacs, ratio, training_gmacs):
    """E15: docs/ecar.md section 10, 16 calls in each of three stages, no guidance."""
    macs = ecar_sampling_macs(PRESETS[preset], TOKENS, 16, CALLS)
    assert macs / 1e12 == pytest.approx(tmacs, rel=0.01)
    assert 250 * DIT_XL / macs == pytest.approx(ratio, rel=0.01)
    assert ecar_training_macs(PRESETS[preset], TOKENS, 16) / 1e9 == pytest.approx(training_gmacs, rel=0.01)


@pytest.mark.parametrize(
    ("tokens", "calls", "ratio"), [((64, 256), 25, 7.9), ((16, 64, 256), 20, 9.3), ((4, 16, 64, 256), 12.5, 14.5)]
)
def test_number_of_stages_table(tokens, calls, ratio):
    macs = ecar_sampling_macs(PRESETS["XL"], tokens, 16, (calls,) * len(tokens))
    assert 250 * DIT_XL / macs == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize("preset", ["T", "3B"])
def test_forward_matches_torch_counter(make_config, preset):
    """torch counts FLOPs, two a MAC. It counts fused attention as nothing on CPU, so attention is spelled out here."""
    with torch.device("meta"):
        model = build_model(make_config(preset), (1.0, 1.0))
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


def test_guidance_doubles_what_it_must():
    preset = PRESETS["T"]
    plain = ecar_sampling_macs(preset, TOKENS, 16, CALLS)
    assert ecar_sampling_macs(preset, TOKENS, 16, CALLS, guidance_scales=(1.0, 1.0, 1.0)) == plain
    assert ecar_sampling_macs(preset, TOKENS, 16, CALLS, guidance_scales=(0.0, 0.0, 0.0)) == plain
    assert ecar_sampling_macs(preset, TOKENS, 16, CALLS, guidance_scales=(2.0, 2.0, 2.0)) == 2 * plain
    spared = 16 * velocity_macs(preset, 16, 16) + condition_macs(preset, 16)
    assert ecar_sampling_macs(preset, TOKENS, 16, CALLS, guidance_scales=(1.0, 1.5, 2.0)) == 2 * plain - spared
