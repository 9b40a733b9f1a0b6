from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch

from ecar_dist.errors import ConfigError
from ecar_dist.flow.pyramid import block_noise, upsample
from ecar_dist.flow.schedule import StageSchedule, end_before, start_after, uniform_ends

# (factor, gamma): the extreme gamma of every factor, and some that renoise more.
BLOCKS = [(2, -1 / 3), (2, -0.2), (2, -0.05), (3, -1 / 8), (3, -0.05), (4, -1 / 15), (4, -0.05)]

WINDOWS: dict[int, list[tuple[Fraction | int, Fraction | int]]] = {
    1: [(0, 1)],
    2: [(0, Fraction(1, 2)), (Fraction(1, 3), 1)],
    3: [(0, Fraction(1, 3)), (Fraction(1, 5), Fraction(2, 3)), (Fraction(1, 2), 1)],
    4: [
        (0, Fraction(1, 4)),
        (Fraction(1, 7), Fraction(1, 2)),
        (Fraction(1, 3), Fraction(3, 4)),
        (Fraction(3, 5), 1),
    ],
}


@pytest.mark.parametrize("num_stages", WINDOWS)
def test_windows_of_uniform_ends(num_stages: int) -> None:
    schedule = StageSchedule(uniform_ends(num_stages))
    starts, ends = zip(*WINDOWS[num_stages], strict=True)
    assert schedule.num_stages == num_stages
    assert schedule.starts == pytest.approx([float(s) for s in starts], abs=1e-12)
    assert schedule.ends == pytest.approx([float(e) for e in ends], abs=1e-12)


@pytest.mark.parametrize("num_stages", WINDOWS)
def test_jump_at_the_extreme_gamma(num_stages: int) -> None:
    """Eq. (10): a = (1 + s) / 2 and alpha = sqrt(3) / 2 (1 - s)."""
    schedule = StageSchedule(uniform_ends(num_stages))
    for stage in range(1, num_stages):
        start = float(WINDOWS[num_stages][stage][0])
        expected = ((1 + start) / 2, math.sqrt(3) / 2 * (1 - start))
        assert schedule.jump(stage) == pytest.approx(expected, abs=1e-12)


def test_more_renoising_starts_the_stage_earlier() -> None:
    assert start_after(2 / 3, -1 / 3) == pytest.approx(1 / 2, abs=1e-12)
    assert start_after(2 / 3, -0.2) == pytest.approx(0.449489742783178, abs=1e-12)  # 1 / (1 + sqrt(1.2 / .2) / 2)


@pytest.mark.parametrize(("factor", "gamma"), BLOCKS)
@pytest.mark.parametrize("end", [0.1, 1 / 3, 0.5, 2 / 3, 0.9])
def test_end_and_start_are_inverse(factor: int, gamma: float, end: float) -> None:
    assert end_before(start_after(end, gamma), gamma) == pytest.approx(end, abs=1e-12)


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("end", [0.1, 1 / 3, 2 / 3])
def test_start_at_the_extreme_gamma_of_any_factor(factor: int, end: float) -> None:
    """Eq. (11)."""
    schedule = StageSchedule((end, 1.0), gamma=-1 / (factor**2 - 1), factor=factor)
    start = end / (factor * (1 - end) + end)
    alpha = (1 - start) * math.sqrt((factor**2 - 1) / factor**2)
    assert schedule.starts[1] == pytest.approx(start, abs=1e-12)
    assert schedule.jump(1) == pytest.approx((start / end, alpha), abs=1e-12)


@pytest.mark.parametrize(("factor", "gamma"), BLOCKS)
@pytest.mark.parametrize("end", [0.1, 1 / 3, 2 / 3])
def test_jump_restores_white_noise(factor: int, gamma: float, end: float) -> None:
    """a^2 (1-e)^2 U U^T + alpha^2 S' = (1-s)^2 I: the covariance match behind eq. (7)-(8), and a e = s for the mean."""
    schedule = StageSchedule((end, 1.0), gamma=gamma, factor=factor)
    scale, alpha = schedule.jump(1)
    start, coarse, fine = schedule.starts[1], 2, 2 * factor
    up = upsample(torch.eye(coarse**2, dtype=torch.float64).view(-1, 1, coarse, coarse), factor).flatten(1)
    corrective = block_noise(torch.eye(fine**2, dtype=torch.float64).view(-1, 1, fine, fine), gamma, factor).flatten(1)
    inherited = (scale * (1 - end)) ** 2 * up.T @ up
    total = inherited + alpha**2 * corrective.T @ corrective
    assert (total - (1 - start) ** 2 * torch.eye(fine**2, dtype=torch.float64)).abs().max() < 1e-12
    assert scale * end == pytest.approx(start, abs=1e-12)


def test_model_windows_divide_time_by_length() -> None:
    expected = [(0, 0.2 / 0.78), (0.2 / 0.78, 0.48 / 0.78), (0.48 / 0.78, 1)]  # .2564 and .6154
    windows = StageSchedule(uniform_ends(3)).model_windows
    for got, wanted in zip(windows, expected, strict=True):
        assert got == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("num_stages", [1, 2, 4, 6])
def test_model_windows_are_a_partition(num_stages: int) -> None:
    windows = StageSchedule(uniform_ends(num_stages)).model_windows
    assert windows[0][0] == 0.0
    assert windows[-1][1] == 1.0
    assert all(low < high for low, high in windows)
    assert all(left[1] == right[0] for left, right in itertools.pairwise(windows))


@pytest.mark.parametrize(
    "ends",
    [(), (0.5,), (0.0, 1.0), (-0.1, 1.0), (0.5, 0.5, 1.0), (0.7, 0.3, 1.0), (0.5, 0.9), (0.5, 1.1), (math.nan, 1.0)],
)
def test_bad_ends_are_refused(ends: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"flow\.ends=\[.*\]") as caught:
        StageSchedule(ends)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("gamma", "factor"), [(0.0, 2), (1 / 3, 2), (-0.34, 2), (-1.0, 2), (math.nan, 2), (-0.2, 3), (-0.07, 4)]
)
def test_bad_gamma_is_refused(gamma: float, factor: int) -> None:
    with pytest.raises(ConfigError, match=rf"flow\.gamma={gamma} .*{factor**2} pixels") as caught:
        StageSchedule((0.5, 1.0), gamma=gamma, factor=factor)
    assert "\n" not in str(caught.value)
