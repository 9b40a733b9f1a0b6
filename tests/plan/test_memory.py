"""Memory in closed form. tests/train/test_zero_matrix.py compares the state with what DeepSpeed allocates."""

import pytest
import torch

from ecar_dist.kinds.parameters import ParameterCount
from ecar_dist.plan.memory import (
    RESERVE,
    capacity,
    checkpoint_bytes,
    device_memory,
    host_bytes,
    model_state,
)
from ecar_dist.runtime.devices import DEVICES


def memory_of(config, world_size=64, zero_stage=2, *, compiled=False, recompute=False):
    return device_memory(config, world_size, zero_stage=zero_stage, compiled=compiled, recompute=recompute)


@pytest.mark.parametrize(
    ("precision", "zero_stage", "per_parameter"),
    [
        ("bf16", 0, 2 + 2 + 12),
        ("bf16", 1, 2 + 6 + 12 / 64),
        ("bf16", 2, 2 + 4 / 64 + 12 / 64),
        ("bf16", 3, (2 + 4 + 12) / 64),
        ("fp32", 0, 4 + 4 + 8),
        ("fp32", 1, 4 + 4 + 12 / 64),
        ("fp32", 2, 4 + 4 / 64 + 12 / 64),
        ("fp32", 3, (4 + 4 + 12) / 64),
    ],
)
def test_bytes_per_parameter_on_64_ranks(precision, zero_stage, per_parameter):
    state = model_state(6_400_000, 64, zero_stage, precision)
    assert state.total - state.ema == pytest.approx(6_400_000 * per_parameter)


def test_emas_are_divided_like_the_optimizer():
    assert model_state(1000, 4, 0, "bf16").ema == 4000
    assert model_state(1000, 4, 1, "bf16", emas=3).ema == 3000


def test_shares_round_up():
    assert model_state(10, 4, 3, "bf16").weights == 6


@pytest.mark.parametrize("emas", [1, 3])
def test_checkpoint_holds_master_moments_and_emas(emas):
    parameter = torch.nn.Parameter(torch.ones(100))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    moments = [optimizer.state[parameter][name] for name in ("exp_avg", "exp_avg_sq")]
    held = [parameter, *moments, *[parameter.detach().clone()] * emas]
    assert checkpoint_bytes(100, emas) == sum(tensor.nbytes for tensor in held)
    saved = -(-checkpoint_bytes(100, emas) // 8)
    assert host_bytes(ParameterCount(40, 60, block=10), 8, 2, emas) == (400, saved)
    assert host_bytes(ParameterCount(40, 60, block=10), 8, 3, emas) == (40, saved)  # split as it is built


def test_the_backward_pass_adds_buckets_and_the_gradients_of_one_block(make_config):
    """A weight has one gradient, which goes to its bucket at once; those of a compiled block come together."""
    block = 2 * (18 * 1152**2 + 15 * 1152 + 2 * 72)  # attention, MLP and adaLN with biases, and two gains
    bucket = 50_000_000 * 2
    config = make_config("XL")
    assert memory_of(config).backward == block + 3 * bucket  # two to fill, one that is sent
    waiting = make_config("XL", deepspeed={"raw": {"zero_optimization": {"overlap_comm": False}}})
    assert memory_of(waiting).backward == block + 2 * bucket
    large = make_config("XL", deepspeed={"raw": {"zero_optimization": {"reduce_bucket_size": 5e8}}})
    assert memory_of(large).backward == block + 30 * bucket
    one_stage = make_config("XL", model={"kind": "dit", "preset": "XL"}, flow={"num_stages": 1})
    assert memory_of(one_stage).backward == memory_of(config).backward

    # ZeRO-3 has one bucket, and gathers all weights of a model of less than 1.05e9.
    weights = 2 * 911_557_168
    assert memory_of(config, zero_stage=3).backward == block + 2 * bucket + weights

    # ZeRO-1 has fp32 buckets, but none in bf16, as without ZeRO.
    fp32 = make_config("XL", deepspeed={"precision": "fp32"})
    assert memory_of(fp32, zero_stage=1).backward == 2 * (block + 3 * bucket)
    assert memory_of(config, zero_stage=1).backward == memory_of(config, zero_stage=0).backward == block


def test_the_optimizer_step_needs_no_copy_where_gradients_were_in_buckets(make_config):
    config = make_config("XL")
    assert [memory_of(config, zero_stage=stage).after for stage in (2, 3)] == [0, 0]
    sent = 500_000_000  # that DeepSpeed reduces at a time after the backward pass, of 911,557,168
    assert memory_of(config, zero_stage=1).after == (2 + 4) * sent
    assert memory_of(config, zero_stage=0).after == 2 * sent + 4 * 911_557_168


def test_the_larger_of_backward_pass_and_what_follows_counts(make_config):
    memory = memory_of(make_config("XL"), zero_stage=1, recompute=True)
    assert memory.after > memory.backward + memory.image
    assert memory.total(1) == memory.state.total + memory.after
    assert memory.total(32) == memory.state.total + memory.backward + 32 * memory.image


def test_a_preview_needs_no_memory_of_its_own(make_config):
    """It is drawn by the trained model."""
    assert memory_of(make_config("XL", sample={"every_samples": 1000})) == memory_of(make_config("XL"))


def test_offload_moves_optimizer_state_and_divided_gradients_to_the_host(make_config):
    config = make_config("XL", deepspeed={"zero_stage": 3, "offload_optimizer": True, "offload_params": True})
    assert memory_of(config, zero_stage=3).state.total == 0
    assert memory_of(make_config("XL", deepspeed={"offload_optimizer": True})).state.total == 2 * 911_557_168


def test_the_largest_micro_batch_fits_and_one_more_does_not(make_config):
    usable = capacity(DEVICES["H100"])
    assert usable == 80_000_000_000 - RESERVE
    memory = memory_of(make_config("7B"))
    largest = memory.largest_micro_batch(usable)
    assert largest == 15
    assert memory.total(largest) <= usable < memory.total(largest + 1)
    assert memory_of(make_config("7B"), zero_stage=0).largest_micro_batch(usable) == 0


@pytest.mark.parametrize(
    ("preset", "ranks", "zero_stage", "eager", "compiled"),
    [("XL", 64, 2, 73, 107), ("XL", 1, 2, 56, 81), ("3B", 64, 2, 27, 39), ("7B", 64, 3, 18, 26)],
)
def test_modes_differ_by_what_they_keep(make_config, preset, ranks, zero_stage, eager, compiled):
    usable = capacity(DEVICES["H100"])
    config = make_config(preset)
    found = [
        memory_of(config, ranks, zero_stage, compiled=mode == "compiled", recompute=mode == "recomputed")
        for mode in ("eager", "compiled", "recomputed")
    ]
    assert [memory.largest_micro_batch(usable) for memory in found[:2]] == [eager, compiled]
    assert found[2].largest_micro_batch(usable) > 6 * eager
