"""Frechet distance between two sets of features (Heusel et al., arXiv 1706.08500, eq. 6)."""

from __future__ import annotations

import numpy as np


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2) of features [N, d] and [M, d].

    Biased upwards for small N and M: compare only values of the same counts. On the host, in float64: with d = 64 the
    matrices are too small for a GPU.
    """
    first, second = first.astype(np.float64), second.astype(np.float64)
    # C1^1/2 C2 C1^1/2 is symmetric, so the trace of its root is the sum of the roots of its eigenvalues.
    root = _symmetric_sqrt(np.cov(first, rowvar=False))
    covariance = np.cov(second, rowvar=False)
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ covariance @ root), 0.0, None)).sum()

    mean_gap = np.square(first.mean(0) - second.mean(0)).sum()
    return float(mean_gap + np.trace(root @ root) + np.trace(covariance) - 2.0 * cross)


def _symmetric_sqrt(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
