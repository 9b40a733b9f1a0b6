from __future__ import annotations

import pytest
import torch

from ecar_dist.flow.guidance import guide, stage_guidance_scales


@pytest.fixture
def velocities() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 4, 8, 8, generator=generator)


def test_scale_one_is_the_conditional_velocity_exactly(velocities: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert torch.equal(guide(*velocities, 1.0), velocities[0])


def test_scale_zero_is_the_null_velocity_exactly(velocities: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert torch.equal(guide(*velocities, 0.0), velocities[1])


@pytest.mark.parametrize("scale", [-0.5, 0.5, 1.5, 4.0])
def test_every_channel_is_extrapolated(velocities: tuple[torch.Tensor, torch.Tensor], scale: float) -> None:
    conditional, null = velocities
    torch.testing.assert_close(guide(conditional, null, scale), scale * conditional + (1 - scale) * null)


def test_linear_ramp_starts_without_guidance() -> None:
    assert stage_guidance_scales(2.0, 3, "linear") == (1.0, 1.5, 2.0)
    assert stage_guidance_scales(4.0, 4, "linear") == (1.0, 2.0, 3.0, 4.0)


def test_constant_ramp() -> None:
    assert stage_guidance_scales(2.0, 3, "constant") == (2.0, 2.0, 2.0)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize("ramp", ["linear", "constant"])
def test_scale_zero_is_the_unconditional_model_in_every_stage(num_stages: int, ramp: str) -> None:
    assert stage_guidance_scales(0.0, num_stages, ramp) == (0.0,) * num_stages


@pytest.mark.parametrize("scale", [1e-6, 0.5, 1.0, 1.3, 7.0])
def test_other_scales_keep_their_ramp(scale: float) -> None:
    assert stage_guidance_scales(scale, 3, "linear") == (1.0, 1.0 + (scale - 1.0) / 2, 1.0 + (scale - 1.0))


@pytest.mark.parametrize("ramp", ["linear", "constant"])
def test_a_single_stage_gets_the_whole_scale(ramp: str) -> None:
    assert stage_guidance_scales(2.0, 1, ramp) == (2.0,)
