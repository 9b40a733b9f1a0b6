import pytest
import torch

from ecar_dist.plan.memory import checkpoint_bytes, model_state


@pytest.mark.parametrize(
    ("zero_stage", "gib_per_7500m"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)], ids=["none", "os", "os+g", "os+g+p"]
)
def test_zero_paper_table(zero_stage, gib_per_7500m):
    """Figure 1 of the ZeRO paper: 7.5 B parameters on 64 ranks, in units of 1e9 bytes, without an EMA."""
    state = model_state(7_500_000_000, 64, zero_stage, "bf16")
    assert (state.total - state.ema) / 1e9 == pytest.approx(gib_per_7500m, rel=0.02)


def test_ema_is_divided_like_the_optimizer():
    assert model_state(1000, 4, 0, "bf16").ema == 4000
    assert model_state(1000, 4, 1, "bf16").ema == 1000


def test_fp32_holds_no_second_master_copy_at_stage_0():
    assert model_state(1000, 1, 0, "fp32").total == 1000 * (4 + 4 + 8 + 4)
    assert model_state(1000, 2, 1, "fp32").optimizer == 500 * 12


def test_shares_round_up():
    assert model_state(10, 4, 3, "bf16").weights == 6


def test_checkpoint_holds_master_moments_and_ema():
    parameter = torch.nn.Parameter(torch.ones(100))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    moments = [optimizer.state[parameter][name] for name in ("exp_avg", "exp_avg_sq")]
    held = [parameter, *moments, parameter.detach().clone()]
    assert checkpoint_bytes(100) == sum(tensor.nbytes for tensor in held)
