"""The mathematics of EMA: decay rules, and post-hoc EMA.

After every step an EMA becomes beta * EMA + (1 - beta) * weights. So it is a weighted sum of the weights of all steps
so far; the coefficients are its `profile`. The profile of a linear combination of stored EMAs is the same combination
of their profiles. Post-hoc EMA approximates an EMA that was not stored, using the combination with the nearest profile
(Karras et al., "Analyzing and improving the training dynamics of diffusion models", arXiv 2312.02696, section 3 and
appendix C).

Two things differ from the paper. Profiles are those of the discrete updates, not of their continuous limit. The
coefficients sum to one, so that a weight that never changed is reproduced exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Decay = Callable[[npt.ArrayLike, float], Array]  # (samples_seen, batch) -> beta, the weight of the old EMA
Snapshot = tuple[int, str]  # (step, name of the EMA)

CHUNK_STEPS = 1 << 12  # steps of the profiles that are in memory at the same time
# Along directions in which the snapshots differ by a smaller share, the fit would amplify noise of their fp32 storage.
SMALLEST_DIRECTION = 1e-3


def half_life_decay(half_life_samples: float, rampup: float, samples_seen: npt.ArrayLike, batch: float) -> Array:
    """beta of a step of `batch` samples that ended at `samples_seen` (a number or an array).

    beta = 0.5^(batch / h), with a half-life h of at most `rampup` x samples_seen, so that the EMA forgets the random
    initialisation (EDM, Karras et al., arXiv 2206.00364, app. F.2). During the ramp-up it is the EMA of `power_decay`
    with gamma + 1 = ln 2 / rampup.
    """
    half_life = np.minimum(float(half_life_samples), rampup * np.asarray(samples_seen, dtype=np.float64))
    return 0.5 ** (batch / half_life)


def power_decay(gamma: float, samples_seen: npt.ArrayLike, batch: float) -> Array:
    """beta of EDM2's power function, with a profile that grows like samples_seen^gamma (section 3.1).

    beta = (1 - batch / samples_seen)^(gamma + 1). It is zero at the first step, so the random initialisation has no
    share at all.
    """
    return (1.0 - batch / np.asarray(samples_seen, dtype=np.float64)) ** (gamma + 1.0)


def gamma_to_sigma_rel(gamma: float) -> float:
    """Standard deviation of a profile t^gamma on [0, 1]: sqrt((g + 1) / ((g + 2)^2 (g + 3)))."""
    return float(np.sqrt((gamma + 1.0) / ((gamma + 2.0) ** 2 * (gamma + 3.0))))


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """The gamma > 0 of a relative width in (0, 0.2887): the largest root of g^3 + 7 g^2 + (16 - s) g + 12 - s.

    s = sigma_rel^-2; the cubic is `gamma_to_sigma_rel` multiplied out.
    """
    s = float(sigma_rel) ** -2
    return float(np.roots([1.0, 7.0, 16.0 - s, 12.0 - s]).real.max())


def profile(decay: Decay, steps: int, batch: float) -> Array:
    """Coefficient of every step's weights in an EMA after `steps` steps of `batch` samples: float64 [steps + 1].

    Entry 0 belongs to the initial weights. The entries sum to one.
    """
    return _History(decay, steps, batch).profile(steps, 0, steps + 1)


class _History:
    """One EMA over a run: entry i of the profile after step n is (1 - beta_i) x beta_(i+1) x .. x beta_n."""

    def __init__(self, decay: Decay, steps: int, batch: float) -> None:
        # Products are differences of cumulative sums of logarithms.
        beta = decay(batch * np.arange(1.0, steps + 1.0), batch)
        self._added = np.concatenate(([1.0], 1.0 - beta))
        kept = np.maximum(beta, np.finfo(np.float64).tiny)  # log 0 would make differences NaN
        self._log_kept = np.concatenate(([0.0], np.cumsum(np.log(kept))))

    def profile(self, step: int, start: int, stop: int) -> Array:
        """Entries [start, stop) of the profile after `step`; zero for later steps."""
        # Steps after `step` have no share yet.
        weights = np.zeros(stop - start)
        seen = slice(start, min(stop, step + 1))
        if seen.start < seen.stop:
            weights[: seen.stop - start] = self._added[seen] * np.exp(self._log_kept[step] - self._log_kept[seen])
        return weights


@dataclass(frozen=True)
class PosthocFit:
    """The combination of snapshots that approximates an EMA.

    coefficients: one for each snapshot; they sum to one.
    residual: L2 distance of the two profiles, divided by the L2 norm of the target's.
    """

    coefficients: dict[Snapshot, float]
    residual: float


def fit(
    snapshots: Sequence[Snapshot], decays: Mapping[str, Decay], target: Decay, step: int, batch: float
) -> PosthocFit:
    """The combination of `snapshots` with the profile nearest to that of an EMA by `target` after `step`.

    Arguments:
        snapshots: the stored ones, each once; at least one.
        decays: decay rules of the EMAs that the snapshots are from, by name.
        target: decay of the EMA that was not stored.
        batch: samples per step.

    Time grows with steps x snapshots^2 (a second or two for 1e6 x 40), memory with steps alone.
    """
    # Every profile as a vector over steps; those of one EMA share their history.
    last = max(step, *(at for at, _ in snapshots))
    histories = {name: _History(decays[name], last, batch) for name in {name for _, name in snapshots}}
    target_history = _History(target, last, batch)

    # Least squares by QR, a chunk of steps at a time: the triangular factor of all rows so far has the same inner
    # products as the rows.
    triangle = np.empty((0, len(snapshots) + 1))
    for start in range(0, last + 1, CHUNK_STEPS):
        stop = min(start + CHUNK_STEPS, last + 1)
        columns = [histories[name].profile(at, start, stop) for at, name in snapshots]
        rows = np.stack([*columns, target_history.profile(step, start, stop)], axis=1)  # [steps, snapshots + 1]
        triangle = np.asarray(np.linalg.qr(np.concatenate((triangle, rows)), mode="r"))

    # The last column is the target. The residual is the part of it that the other columns cannot reach.
    coefficients = _sum_to_one_least_squares(triangle[:, :-1], triangle[:, -1])
    distance = np.linalg.norm(triangle[:, :-1] @ coefficients - triangle[:, -1])
    named = dict(zip(snapshots, coefficients.tolist(), strict=True))
    return PosthocFit(named, float(distance / np.linalg.norm(triangle[:, -1])))


def _sum_to_one_least_squares(columns: Array, target: Array) -> Array:
    """Least squares under the constraint that the coefficients sum to one."""
    # Substitution: the nearest column has the coefficient 1 - sum of the others. The others are free, and multiply the
    # differences from the nearest column.
    nearest = int(np.argmin(np.linalg.norm(columns - target[:, None], axis=0)))
    differences = np.delete(columns, nearest, axis=1) - columns[:, [nearest]]

    # Unit columns, so that SMALLEST_DIRECTION is a share.
    lengths = np.maximum(np.linalg.norm(differences, axis=0), np.finfo(np.float64).tiny)
    free, *_ = np.linalg.lstsq(differences / lengths, target - columns[:, nearest], rcond=SMALLEST_DIRECTION)
    free = free / lengths
    return np.insert(free, nearest, 1.0 - free.sum())
