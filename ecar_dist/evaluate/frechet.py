"""Frechet distance between two sets of features (Heusel et al., arXiv 1706.08500, eq. 6)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

BOOTSTRAPS = 10  # resamples of the images


@dataclass(frozen=True)
class Gaussian:
    """The moments that a Frechet distance compares: mean [d] and covariance [d, d], float64."""

    mean: np.ndarray
    covariance: np.ndarray

    @staticmethod
    def of(features: np.ndarray) -> Gaussian:
        """Of features [N, d]."""
        features = features.astype(np.float64)
        return Gaussian(features.mean(0), np.cov(features, rowvar=False))

    @cached_property
    def root(self) -> np.ndarray:
        """The symmetric square root of the covariance, [d, d]. Cached: one target is compared with many sets."""
        values, vectors = np.linalg.eigh(self.covariance)
        return (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T


def frechet_distance(first: np.ndarray | Gaussian, second: np.ndarray | Gaussian) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C2^1/2 C1 C2^1/2)^1/2) of features [N, d] and [M, d], or of their Gaussians.

    Biased upwards for small N and M: compare only values with the same counts. On the host, in float64.
    """
    a, b = (each if isinstance(each, Gaussian) else Gaussian.of(each) for each in (first, second))
    # C2^1/2 C1 C2^1/2 is symmetric, so the trace of its root is the sum of the roots of its eigenvalues.
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(b.root @ a.covariance @ b.root), 0.0, None)).sum()

    mean_gap = np.square(a.mean - b.mean).sum()
    return float(mean_gap + np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * cross)


def bootstrap_std(features: np.ndarray, target: Gaussian) -> float:
    """Standard deviation of the distance over resamples of the images, with replacement."""
    generator = np.random.default_rng(0)
    picks = (generator.integers(len(features), size=len(features)) for _ in range(BOOTSTRAPS))
    return float(np.std([frechet_distance(features[pick], target) for pick in picks], ddof=1))
