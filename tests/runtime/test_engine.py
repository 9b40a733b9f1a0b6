"""The parts of the engine that need no DeepSpeed; train/test_zero_matrix.py tests the engine itself, on ranks."""

import math

import pytest
import torch

from ecar_dist.config.read import config_from_dict
from ecar_dist.runtime.deepspeed_config import deepspeed_config
from ecar_dist.runtime.engine import LARGEST_NORM, Engine, Fragment
from ecar_dist.runtime.optimizer import GuardedAdamW, Judgement, StepStatus
from ecar_dist.runtime.world import Placement, World

ALONE = World(Placement(), torch.device("cpu"))
FOUR = World(Placement(0, 4), torch.device("cpu"))


@pytest.fixture
def parameter():
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    parameter.grad = torch.tensor([0.5, 0.5])
    return parameter


def test_the_optimizer_moves_nothing_before_the_engine_stands(parameter):
    optimizer = GuardedAdamW([{"params": [parameter]}], lr=0.1)
    optimizer.step()
    assert parameter.tolist() == [1.0, -2.0]
    assert not optimizer.state[parameter]


def test_a_refused_step_moves_neither_weights_nor_moments_and_is_counted(parameter):
    optimizer = GuardedAdamW([{"params": [parameter]}], lr=0.1)
    plain = parameter.detach().clone().requires_grad_()
    reference = torch.optim.AdamW([plain], lr=0.1, fused=True)
    for number, good in enumerate((True, False, True)):
        optimizer.judge = lambda good=good: Judgement(torch.tensor(good), None)
        parameter.grad = torch.tensor([0.5, 0.5 if good else math.nan])
        optimizer.step()
        assert optimizer.state[parameter]["step"] == number + 1
        if good:
            plain.grad = parameter.grad.clone()
            if number:
                reference.state[plain]["step"].fill_(number)
            reference.step()
        assert torch.equal(parameter, plain)
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state[parameter][name], reference.state[plain][name])


def test_gradients_are_divided_by_the_clip_factor(parameter):
    optimizer = GuardedAdamW([{"params": [parameter]}], lr=0.1)
    optimizer.judge = lambda: Judgement(torch.tensor(True), torch.tensor(4.0))
    optimizer.step()
    assert optimizer.state[parameter]["exp_avg"].tolist() == pytest.approx([0.1 * 0.5 / 4] * 2)


class OneStep:
    """Replaces DeepSpeed where it keeps no norm. Every micro-batch ends a step. `asks`: it calls the optimizer."""

    def __init__(self, optimizer, asks=True, boundary=True):
        self.optimizer, self.asks, self.boundary = optimizer, asks, boundary

    def is_gradient_accumulation_boundary(self):
        return self.boundary

    def step(self):
        if self.asks and self.boundary:
            self.optimizer.step()


class Second(World):
    """Rank 1 of two; rank 0's gradients have the given norm."""

    def __init__(self, norm):
        super().__init__(Placement(1, 2), torch.device("cpu"))
        self.norm = norm

    def sum(self, values):
        return values + self.norm


LOSSES = torch.tensor([0.25, 0.5], dtype=torch.float64)


def make_engine(parameter, world, limit):
    """An engine that refuses norms above `limit[0]`."""
    optimizer = GuardedAdamW([{"params": [parameter]}], lr=0.1)
    engine = object.__new__(Engine)
    engine.world, engine._adam, engine._optimizer = world, optimizer, optimizer
    engine._engine, engine._parameters, engine.partitions = OneStep(optimizer), {"weight": parameter}, [parameter]
    engine._is_good = lambda loss, norm: (loss.isfinite() & norm.isfinite()) & (norm <= limit[0])
    engine._max_norm = 0.0
    optimizer.judge = engine._judge
    return engine


def test_a_step_is_refused_for_its_loss_or_its_norm_or_by_deepspeed_and_is_counted_all_the_same(parameter):
    limit = [math.inf]
    engine = make_engine(parameter, ALONE, limit)
    said = [engine.step(LOSSES), engine.step(LOSSES * math.nan), engine.step(LOSSES)]
    limit[0] = 0.5  # the norm is the square root of 0.5
    said.append(engine.step(LOSSES))
    limit[0] = 0.75
    said.append(engine.step(LOSSES))
    engine._engine.asks = False
    said.append(engine.step(LOSSES))
    engine._engine.asks = True
    parameter.grad[0] = math.nan
    said.append(engine.step(LOSSES))
    said = [pending.read() for pending in said]
    assert [status.applied for status in said] == [True, False, True, False, True, False, False]
    assert said[0] == StepStatus((0.25, 0.5), pytest.approx(math.sqrt(0.5)), True)
    assert said[5].grad_norm == math.inf  # DeepSpeed found a gradient that is not finite
    assert engine._adam.state[parameter]["step"] == 7
    assert parameter.isfinite().all()


def test_a_norm_that_deepspeed_reports_as_invalid_is_infinite(parameter):
    """ZeRO 0 in bf16 reports -1 if a gradient is not finite."""
    status = make_engine(parameter, Second(-1.0), [math.inf]).step(LOSSES).read()
    assert (status.applied, status.grad_norm) == (False, math.inf)


def test_a_norm_above_the_largest_is_clipped(parameter):
    engine = make_engine(parameter, ALONE, [math.inf])
    engine._max_norm = math.sqrt(0.5) / 4
    assert engine.step(LOSSES).read().grad_norm == pytest.approx(math.sqrt(0.5))  # before clipping
    assert engine._adam.state[parameter]["exp_avg"].tolist() == pytest.approx([0.1 * 0.5 / 4] * 2, rel=1e-5)


def test_before_the_last_micro_batch_nothing_is_decided(parameter):
    engine = make_engine(parameter, ALONE, [math.inf])
    engine._engine.boundary = False
    assert engine.step(LOSSES * math.nan) is None
    assert parameter not in engine._adam.state


def test_all_ranks_judge_by_the_norm_that_rank_0_has(parameter):
    status = make_engine(parameter, Second(7.0), [6.9]).step(LOSSES).read()
    assert (status.applied, status.grad_norm) == (False, 7.0)


@pytest.mark.parametrize(("factor", "applied"), [(0.99, True), (1.01, False)])
def test_a_norm_whose_square_overflows_fp32_is_infinite(parameter, factor, applied):
    status = make_engine(parameter, Second(factor * LARGEST_NORM), [math.inf]).step(LOSSES).read()
    assert status.applied is applied
    assert math.isfinite(status.grad_norm) is applied


def test_every_loss_is_judged(parameter):
    engine = make_engine(parameter, ALONE, [math.inf])
    bad = [LOSSES.clone().index_fill_(0, torch.tensor([index]), math.nan) for index in range(len(LOSSES))]
    assert [engine.step(losses).read().applied for losses in (LOSSES, *bad)] == [True, False, False]


def test_a_step_is_judged_once_however_often_the_optimizer_asks(parameter):
    """ZeRO-3 asks for each of its sub-groups, and must move all of them or none."""
    engine, asked = make_engine(parameter, ALONE, [math.inf]), []
    engine._is_good = lambda loss, norm: asked.append(norm) or torch.tensor(len(asked) == 1)
    engine._engine.step = lambda: [engine._adam.step() for _ in range(3)]
    assert engine.step(LOSSES).read().applied
    assert len(asked) == 1
    assert engine._adam.state[parameter]["step"] == 3


def test_a_fragment_is_a_view():
    flat = [torch.zeros(4), torch.arange(6.0)]
    view = Fragment("weight", start=10, numel=2, partition=1, offset=3).of(flat)
    assert view.tolist() == [3.0, 4.0]
    view.zero_()
    assert flat[1].tolist() == [0.0, 1.0, 2.0, 0.0, 0.0, 5.0]


def make_config(**deepspeed):
    return config_from_dict(
        {
            "run": {"name": "test"},
            "vae": {"kind": "dct"},
            "data": {"latents": "nowhere", "num_classes": 10},
            "batch": {"global_batch_size": 64, "micro_batch_size": 8},
            "train": {"total_samples": 256},
            "deepspeed": deepspeed,
        }
    )


def test_batch_sizes_multiply_out():
    settings = deepspeed_config(make_config(), FOUR, "fp32")
    assert settings["train_batch_size"] == 64
    assert settings["train_micro_batch_size_per_gpu"] * settings["gradient_accumulation_steps"] * 4 == 64


@pytest.mark.parametrize(("zero_stage", "accumulates"), [(0, None), (1, "fp32"), (2, "fp32"), (3, "fp32")])
def test_bf16_gradients_accumulate_in_fp32_under_zero(zero_stage, accumulates):
    settings = deepspeed_config(make_config(zero_stage=zero_stage), FOUR, "bf16")
    assert settings["bf16"]["enabled"]
    assert settings.get("data_types", {}).get("grad_accum_dtype") == accumulates


def test_offload_goes_to_the_cpu_and_raw_settings_come_last():
    raw = {"zero_optimization": {"offload_param": {"pin_memory": True}, "reduce_bucket_size": 7}}
    zero = deepspeed_config(
        make_config(zero_stage=3, offload_optimizer=True, offload_params=True, raw=raw), FOUR, "bf16"
    )["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu"}
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert (zero["stage"], zero["reduce_bucket_size"]) == (3, 7)
