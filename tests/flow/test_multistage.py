"""The production sampler under closed-form velocities.

Gaussian setting: 4 x 4 field, covariance exp(-distance / 1.5), K = 3 with ends 1/3, 2/3, 1, gamma = -1/3 by default.
Its covariances are propagated exactly; only the mixture is Monte Carlo.
"""

from __future__ import annotations

import pytest
import torch

from ecar_dist.flow.multistage import sample_stages
from ecar_dist.flow.schedule import StageSchedule, uniform_ends
from ecar_dist.flow.solvers import SOLVERS, VelocityFn
from ecar_dist.rng import Purpose, normal
from tests.flow.linear_velocity import fit_linear_velocity
from tests.flow.oracle import (
    GaussianOracle,
    History,
    MixtureOracle,
    basis_draws,
    begin_stages,
    expected_losses,
    exponential_covariance,
    relative_error,
    sampled_covariance,
    stage_sides,
)

TRUTH = exponential_covariance(4)
TAU = 0.3
EXACT_LIMIT = 0.5  # the error of exact contexts at gamma = -1/3 must stay above this for any number of steps


def field(tau: float, gamma: float = -1 / 3) -> GaussianOracle:
    return GaussianOracle(StageSchedule(uniform_ends(3), gamma), TRUTH, torch.zeros(16, dtype=torch.float64), tau)


def covariance(oracle: GaussianOracle, history: History, solver: str, steps: int) -> torch.Tensor:
    stages = begin_stages(oracle, history)
    return sampled_covariance(oracle.schedule, stages, 4, tau=oracle.tau, solver=solver, steps=steps)


def mean_variance_ratio(sampled: torch.Tensor) -> float:
    """Variance of the field's mean, the lowest frequency, as a share of the truth."""
    return float(sampled.sum() / TRUTH.sum())


@pytest.mark.parametrize(("steps", "error"), [(16, 0.0799), (50, 0.0265), (200, 0.0067), (1000, 0.0013)])
def test_euler_without_context(steps: int, error: float) -> None:
    got = relative_error(covariance(field(TAU), "none", "euler", steps), TRUTH)
    assert got == pytest.approx(error, abs=6e-5)


@pytest.mark.parametrize(("steps", "error"), [(16, 0.1092), (50, 0.0364), (200, 0.0092), (1000, 0.0019)])
def test_euler_with_noisy_state_history(steps: int, error: float) -> None:
    got = relative_error(covariance(field(TAU), "all", "euler", steps), TRUTH)
    assert got == pytest.approx(error, abs=6e-5)


def test_midpoint_needs_few_steps() -> None:
    assert relative_error(covariance(field(TAU), "none", "midpoint", 8), TRUTH) < 2.5e-4
    assert relative_error(covariance(field(TAU), "all", "midpoint", 8), TRUTH) < 5e-4


@pytest.mark.parametrize(
    ("history", "solver", "steps", "ratio"),
    [
        ("none", "euler", 16, 0.897),
        ("none", "heun", 8, 0.996),
        ("none", "midpoint", 8, 0.9997),
        ("none", "euler", 8, 0.806),
        ("none", "heun", 4, 0.979),
        ("none", "midpoint", 4, 0.998),
        ("all", "euler", 16, 0.880),
        ("all", "heun", 8, 0.990),
        ("all", "midpoint", 8, 0.9996),
    ],
)
def test_share_of_the_variance_at_equal_calls(history: History, solver: str, steps: int, ratio: float) -> None:
    """16 or 8 calls per stage: Euler shrinks the samples, the second-order solvers hardly do."""
    sampled = covariance(field(TAU), history, solver, steps)
    assert float(sampled.trace() / TRUTH.trace()) == pytest.approx(ratio, abs=6e-4)


def test_exact_contexts_never_converge() -> None:
    """Negative control, the trap of docs/ecar.md. If this setting ever looks right, the tests detect nothing."""
    errors = [relative_error(covariance(field(0.0), "all", "euler", steps), TRUTH) for steps in (50, 1000)]
    assert min(errors) > EXACT_LIMIT
    assert errors == pytest.approx([0.794, 0.793], abs=6e-4)


def test_more_renoising_makes_exact_contexts_safe() -> None:
    """gamma = -0.2 gives the jump noise a block mean: the start is no longer a function of the contexts."""
    got = relative_error(covariance(field(0.0, gamma=-0.2), "all", "euler", 1000), TRUTH)
    assert got == pytest.approx(0.0018, abs=6e-5)


@pytest.mark.parametrize(
    ("history", "tau", "gamma", "share"),
    [("none", 0.3, -1 / 3, 0.999), ("all", 0.3, -1 / 3, 0.998), ("all", 0.0, -0.2, 0.998), ("all", 0.0, -1 / 3, 0.075)],
)
def test_low_frequency_variance_is_the_alarm(history: History, tau: float, gamma: float, share: float) -> None:
    sampled = covariance(field(tau, gamma), history, "euler", 1000)
    assert mean_variance_ratio(sampled) == pytest.approx(share, abs=6e-4)


def states_of_sampling(oracle: GaussianOracle, steps: int) -> tuple[list[torch.Tensor], ...]:
    """Contexts, starts and ends of all stages under optimal velocities; the rows are the sampler's random numbers."""
    contexts: list[torch.Tensor] = []
    starts: list[torch.Tensor] = []
    begin = begin_stages(oracle, "all")

    def begin_stage(stage: int, context: torch.Tensor | None) -> VelocityFn:
        velocity = begin(stage, context)
        if context is not None:
            contexts.append(context.flatten(1))

        def spying(x: torch.Tensor, u: float) -> torch.Tensor:
            if len(starts) == stage:
                starts.append(x.flatten(1))
            return velocity(x, u)

        return spying

    draw, each = basis_draws(oracle.schedule, 4), [steps] * 3
    ends = sample_stages(
        oracle.schedule, begin_stage, draw, tau=oracle.tau, solver=SOLVERS["midpoint"], steps_per_stage=each
    )
    return contexts, starts, [end.flatten(1) for end in ends]


def states_of_training(oracle: GaussianOracle) -> tuple[list[torch.Tensor], ...]:
    """The same for the training points; the rows are the scaled sources of the data."""
    at_start = oracle.points(oracle.source_root, 0.0)
    starts = [state.flatten(1) for state in at_start.states]
    ends = [start + target.flatten(1) for start, target in zip(starts, at_start.targets, strict=True)]
    return [context.flatten(1) for context in at_start.contexts], starts, ends


def joint_covariance(*parts: torch.Tensor) -> torch.Tensor:
    rows = torch.cat(parts, dim=1)
    return rows.T @ rows


def test_sampling_meets_the_pairs_of_training_and_not_the_joint_law() -> None:
    """Section 4.4 of docs/ecar.md: contexts with a stage's start, and contexts with its end; start and end differ."""
    oracle = field(TAU)
    ours, theirs = states_of_sampling(oracle, 400), states_of_training(oracle)
    apart = []
    for stage in range(3):
        (seen, start, end), (wanted_seen, wanted_start, wanted_end) = (
            (contexts[:stage], starts[stage], ends[stage]) for contexts, starts, ends in (ours, theirs)
        )
        for state, wanted in ((start, wanted_start), (end, wanted_end)):
            found = joint_covariance(*seen, state)
            assert relative_error(found, joint_covariance(*wanted_seen, wanted)) < 1e-6
        apart.append(relative_error(start.T @ end, wanted_start.T @ wanted_end))
    assert apart == pytest.approx([0.040, 0.489, 0.424], abs=6e-4)


@pytest.mark.parametrize("gamma", [-0.2, -0.05])
@pytest.mark.parametrize("history", ["none", "all"])
def test_any_gamma_samples_the_data(gamma: float, history: History) -> None:
    assert relative_error(covariance(field(TAU, gamma), history, "midpoint", 50), TRUTH) < 1e-4


def test_linear_velocity_learns_the_optimum() -> None:
    """Fitted to production training points: the loss approaches the closed form, and so do the samples."""
    oracle = field(TAU)
    fitted = fit_linear_velocity(oracle, num_samples=60_000, seed=0)
    best, got = (expected_losses(velocity, oracle, "none") for velocity in (oracle, fitted))
    excess = got / best - 1
    assert bool((excess > -1e-6).all())
    assert bool((excess < 0.02).all())
    stages = begin_stages(fitted, "none")
    sampled = sampled_covariance(oracle.schedule, stages, 4, tau=TAU, solver="euler", steps=50)
    assert relative_error(sampled, TRUTH) < 2 * 0.0265


def mixture(tau: float) -> MixtureOracle:
    """Weights .3 and .7; the components differ in the mean of the field, 2.0 apart with std .29 inside each."""
    schedule = StageSchedule(uniform_ends(3))
    means = (torch.full((16,), level, dtype=torch.float64) for level in (1.4, -0.6))
    return MixtureOracle((0.3, 0.7), tuple(GaussianOracle(schedule, 0.16 * TRUTH, mean, tau) for mean in means))


def sample_mixture(oracle: MixtureOracle, tau: float, history: History, count: int) -> torch.Tensor:
    """[count, 16], with the run's own random numbers and 100 Euler steps per stage."""
    schedule, positions = oracle.components[0].schedule, torch.arange(count)
    sides = stage_sides(4, schedule)

    def draw(purpose: Purpose, stage: int) -> torch.Tensor:
        return normal(0, positions, purpose, (1, sides[stage], sides[stage]), stream=stage).double()

    stages = begin_stages(oracle, history)
    ends = sample_stages(schedule, stages, draw, tau=tau, solver=SOLVERS["euler"], steps_per_stage=[100] * 3)
    return ends[-1].flatten(1)


def sliced_wasserstein(a: torch.Tensor, b: torch.Tensor) -> float:
    """W2 between two sets of N samples [N, D], root mean square over 128 random directions."""
    directions = torch.randn(a.shape[1], 128, dtype=a.dtype, generator=torch.Generator().manual_seed(2))
    directions /= directions.norm(dim=0)
    return float(((a @ directions).sort(0).values - (b @ directions).sort(0).values).square().mean().sqrt())


def first_weight(samples: torch.Tensor) -> float:
    """Share of fields [N, 16] on the first component's side of the gap between the two."""
    return float((samples.mean(1) > 0.4).double().mean())


@pytest.mark.parametrize("history", ["none", "all"])
def test_mixture_keeps_its_weights_and_shape(history: History) -> None:
    oracle = mixture(TAU)
    samples = sample_mixture(oracle, TAU, history, 20_000)
    truth = oracle.sample_data(20_000, torch.Generator().manual_seed(1))
    assert first_weight(samples) == pytest.approx(0.30, abs=0.015)
    assert sliced_wasserstein(samples, truth) < 0.10


def test_exact_contexts_break_the_mixture() -> None:
    """Negative control, as with the Gaussian field."""
    oracle = mixture(0.0)
    samples = sample_mixture(oracle, 0.0, "all", 20_000)
    truth = oracle.sample_data(20_000, torch.Generator().manual_seed(1))
    assert sliced_wasserstein(samples, truth) > 0.20
    assert first_weight(samples) == pytest.approx(0.18, abs=0.015)


def contract(x: torch.Tensor, u: float) -> torch.Tensor:
    return -x


def test_stages_run_in_order_and_return_their_ends() -> None:
    schedule, begun, steps = StageSchedule(uniform_ends(3)), [], []

    def begin_stage(stage: int, context: torch.Tensor | None) -> VelocityFn:
        begun.append((stage, None if context is None else context.shape[-1]))
        return contract

    def solver(velocity_fn: VelocityFn, x: torch.Tensor, num_steps: int, time_shift: float) -> torch.Tensor:
        steps.append((num_steps, time_shift))
        return SOLVERS["euler"](velocity_fn, x, num_steps)

    draw = basis_draws(schedule, 4)
    ends = sample_stages(schedule, begin_stage, draw, tau=TAU, solver=solver, steps_per_stage=(1, 2, 3), time_shift=2.0)
    assert steps == [(1, 2.0), (2, 2.0), (3, 2.0)]
    assert begun == [(0, None), (1, 1), (2, 2)]  # contexts have the size of the stage that made them
    assert [tuple(end.shape[1:]) for end in ends] == [(1, 1, 1), (1, 2, 2), (1, 4, 4)]
    assert torch.equal(ends[0], torch.zeros_like(ends[0]))  # one Euler step of dx/du = -x


def test_context_is_the_end_plus_fresh_noise() -> None:
    schedule, contexts = StageSchedule(uniform_ends(3)), []

    def begin_stage(stage: int, context: torch.Tensor | None) -> VelocityFn:
        contexts.append(context)
        return contract

    draw = basis_draws(schedule, 4)
    ends = sample_stages(schedule, begin_stage, draw, tau=TAU, solver=SOLVERS["heun"], steps_per_stage=(4, 4, 4))
    for stage in (0, 1):
        noise = TAU * draw(Purpose.GENERATE_CONTEXT, stage)
        torch.testing.assert_close(contexts[stage + 1], ends[stage] + noise)
        assert not bool((ends[2][noise.flatten(1).any(1)] != 0).any())  # the noise is on the context, not on the path


def test_stages_after_given_ends_continue_from_them() -> None:
    schedule, contexts = StageSchedule(uniform_ends(3)), []

    def begin_stage(stage: int, context: torch.Tensor | None) -> VelocityFn:
        contexts.append(context)
        return contract

    def run(given: list[torch.Tensor]) -> list[torch.Tensor]:
        return sample_stages(
            schedule, begin_stage, draw, tau=TAU, solver=SOLVERS["euler"], steps_per_stage=(4, 4, 4), given=given
        )

    draw = basis_draws(schedule, 4)
    own = run([])
    for count in (1, 2, 3):
        for repeated, end in zip(run(own[:count]), own, strict=True):
            assert torch.equal(repeated, end)
    contexts.clear()
    ends = run([torch.ones_like(own[0])])
    assert len(contexts) == 3  # the AR network also reads the given stage
    torch.testing.assert_close(contexts[1], 1 + TAU * draw(Purpose.GENERATE_CONTEXT, 0))
    assert not torch.equal(ends[1], own[1])


def test_every_random_number_is_drawn_once() -> None:
    schedule, drawn = StageSchedule(uniform_ends(3)), []
    fields = basis_draws(schedule, 4)

    def draw(purpose: Purpose, stage: int) -> torch.Tensor:
        drawn.append((purpose, stage))
        return fields(purpose, stage)

    def run(tau: float) -> set[tuple[Purpose, int]]:
        drawn.clear()
        sample_stages(
            schedule, lambda k, c: contract, draw, tau=tau, solver=SOLVERS["euler"], steps_per_stage=(1, 1, 1)
        )
        assert len(set(drawn)) == len(drawn)
        return set(drawn)

    path = {(Purpose.GENERATE_START, 0), (Purpose.GENERATE_JUMP, 1), (Purpose.GENERATE_JUMP, 2)}
    assert run(0.0) == path
    assert run(TAU) == path | {(Purpose.GENERATE_CONTEXT, 0), (Purpose.GENERATE_CONTEXT, 1)}


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_stage_is_the_plain_solver_bit_for_bit(solver: str) -> None:
    start = normal(0, torch.arange(4), Purpose.GENERATE_START, (2, 8, 8))

    def velocity(x: torch.Tensor, u: float, length: float = 0.0) -> torch.Tensor:
        return torch.sin(3 * x) + u

    ends = sample_stages(
        StageSchedule((1.0,)),
        lambda stage, context: velocity,
        lambda purpose, stage: start,
        tau=TAU,
        solver=SOLVERS[solver],
        steps_per_stage=(7,),
    )
    assert len(ends) == 1
    assert torch.equal(ends[0], SOLVERS[solver](velocity, start, 7))
