"""Frechet distance between two sets of features (Heusel et al., arXiv 1706.08500, eq. 6)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Gaussian:
    """What a Frechet distance looks at: mean [d] and covariance [d, d], float64."""

    mean: np.ndarray
    covariance: np.ndarray

    @staticmethod
    def of(features: np.ndarray) -> Gaussian:
        """Of features [N, d]."""
        features = features.astype(np.float64)
        return Gaussian(features.mean(0), np.cov(features, rowvar=False))


def frechet_distance(first: np.ndarray | Gaussian, second: np.ndarray | Gaussian) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2) of features [N, d] and [M, d], or of their Gaussians.

    Biased upwards for small N and M: compare only values of the same counts. On the host, in float64.
    """
    a, b = (each if isinstance(each, Gaussian) else Gaussian.of(each) for each in (first, second))
    # C1^1/2 C2 C1^1/2 is symmetric, so the trace of its root is the sum of the roots of its eigenvalues.
    root = _symmetric_sqrt(a.covariance)
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ b.covariance @ root), 0.0, None)).sum()

    mean_gap = np.square(a.mean - b.mean).sum()
    return float(mean_gap + np.trace(root @ root) + np.trace(b.covariance) - 2.0 * cross)


def _symmetric_sqrt(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
