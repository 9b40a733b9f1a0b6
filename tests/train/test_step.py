"""One optimizer step, on a stand-in for the engine."""

import math

import pytest
import torch

from ecar_dist.config.knobs_training import BadStepsSection, OptimSection
from ecar_dist.data.order.substitution import Substitution
from ecar_dist.runtime.checkpoint.manifest import Progress
from ecar_dist.train.flags import Flags
from ecar_dist.train.guard import BadSteps, is_good
from ecar_dist.train.step import train_step
from ecar_dist.train.telemetry import Telemetry
from ecar_dist.train.time_budget import Goodput, Phases
from tests.train.pretend import ALONE, Pair, PretendEngine, make_batch, sized_config

BEGUN = Progress(8, 2)
NOTHING = Flags(0.0, 0.0, 0.0)


def run_step(engine, batches=None, config=None, world=ALONE, beats=None):
    config = config or sized_config()
    phases = Phases(lambda name, step: beats is None or beats.append((name, step)))
    telemetry = Telemetry(config, world, phases, Goodput(), 1.0)
    batches = batches or [make_batch(config.batch.micro_batch_size)]
    step = train_step(batches, BEGUN, lambda: NOTHING, config=config, world=world, engine=engine, telemetry=telemetry)
    result, flags = step.read(config)
    assert flags == NOTHING
    return result


def test_a_step_reports_the_global_loss():
    result = run_step(PretendEngine(0.5, 2.0))
    assert (result.loss, result.stage_losses, result.grad_norm, result.applied) == (0.5, (0.5, 0.5), 2.0, True)


def test_the_phases_of_a_step_are_entered_in_order():
    beats = []
    run_step(PretendEngine(0.5, 2.0), [make_batch(2)] * 2, sized_config(micro_batch_size=2), beats=beats)
    once = [("forward", 3), ("backward", 3), ("optimizer", 3)]
    assert beats[1:] == [("forward", 3), *once, *once]


def test_the_learning_rate_is_that_of_the_samples_at_the_end_of_the_step():
    config = sized_config(optim=OptimSection(learning_rate=0.5, warmup_samples=100))
    config = config.model_copy(update={"train": config.train.model_copy(update={"total_samples": 1000})})
    engine = PretendEngine(0.5, 2.0)
    assert run_step(engine, config=config).learning_rate == engine.rate == 0.5 * 12 / 100


@pytest.mark.parametrize(
    ("loss", "norm", "applied"), [(1.0, 2.0, True), (math.nan, 1.0, False), (1.0, math.nan, False)]
)
def test_the_engine_says_whether_weights_moved(loss, norm, applied):
    assert run_step(PretendEngine(loss, norm)).applied is applied


def test_the_limit_of_the_gradient_norm_is_that_of_the_good_steps():
    history = BadSteps(BadStepsSection(spike_factor=4.0, window=8), {"good_norms": [2.0] * 8})
    for norm in (8.0, 9.0):
        engine = PretendEngine(1.0, norm, is_good=lambda loss, norm: is_good(loss, norm, history.grad_norm_limit))
        assert run_step(engine).applied is (norm == 8.0)


@pytest.mark.parametrize(
    ("other", "applied"),
    [
        ([2.0, 2.0, 0.0], True),
        ([math.nan, 0.0, 0.0], False),
        ([0.0, math.inf, 0.0], False),
    ],
)
def test_the_loss_is_that_of_all_ranks_and_all_refuse_what_one_cannot_learn_from(other, applied):
    result = run_step(PretendEngine(0.5, 2.0), [make_batch(2)], sized_config(2), Pair(other=[*other, *NOTHING]))
    assert result.applied is applied
    if applied:
        assert result.loss == (2 * 0.5 + 2.0) / 4


def test_a_nan_of_one_stage_cannot_hide_behind_the_infinity_of_another():
    """What is judged is the sum over stages."""
    result = run_step(
        PretendEngine(0.5, 2.0), [make_batch(2)], sized_config(2), Pair(other=[math.inf, -math.inf, 0.0, *NOTHING])
    )
    assert not result.applied


def test_replaced_samples_are_those_of_all_micro_batches_and_ranks():
    made = [Substitution(position, 7, 70 + position, "shard x is damaged") for position in range(3)]
    batches = [make_batch(2, tuple(made[:1])), make_batch(2, tuple(made[1:]))]
    assert (
        run_step(PretendEngine(), batches, sized_config(2), Pair(other=[0.0, 0.0, 4.0, *NOTHING])).replaced_samples == 7
    )


def test_the_losses_by_time_are_those_of_every_micro_batch():
    config = sized_config(2)
    telemetry = Telemetry(config, ALONE, Phases(lambda name, step: None), Goodput(), 1.0)
    parts = {"config": config, "world": ALONE, "engine": PretendEngine(0.5), "telemetry": telemetry}
    train_step([make_batch(2)] * 2, BEGUN, lambda: NOTHING, **parts)
    sums, counts = telemetry.losses.take().view(2, -1)
    assert (sums.sum(), counts.sum()) == (0.5 * 8, 8)
    assert torch.equal(sums[counts > 0] / counts[counts > 0], torch.full((2,), 0.5, dtype=torch.float64))
