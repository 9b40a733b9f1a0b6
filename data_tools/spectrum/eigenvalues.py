"""Variances of a set of latents along their principal directions, overall and by level of a Haar pyramid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SHARE = 0.95  # of the variance, in the directions that count


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of a covariance, descending, float64."""

    values: np.ndarray

    @staticmethod
    def of(samples: np.ndarray, freedom: int) -> Spectrum:
        """The spectrum of centred samples [N, D]. `freedom`: N minus the number of means that were subtracted."""
        # The two products have the same eigenvalues, except for zeros. Take the smaller one.
        flat = samples.reshape(len(samples), -1)
        product = flat.T @ flat if flat.shape[1] <= len(flat) else flat @ flat.T
        found = np.linalg.eigvalsh(product.astype(np.float64) / max(1, freedom))
        return Spectrum(np.maximum(found[::-1], 0.0))

    @property
    def dimensions(self) -> int:
        """How many directions contain SHARE of the variance."""
        return int(np.searchsorted(np.cumsum(self.values), SHARE * self.values.sum()) + 1)

    @property
    def main(self) -> np.ndarray:
        """The eigenvalues of these directions."""
        return self.values[: self.dimensions]


def centred(latents: np.ndarray, labels: np.ndarray | None = None) -> tuple[np.ndarray, int]:
    """Latents [N, ...] minus their mean, or minus that of their class; and the remaining degrees of freedom."""
    if labels is None:
        return latents - latents.mean(axis=0), len(latents) - 1
    classes = np.unique(labels)
    result = np.empty_like(latents)
    for label in classes:
        members = labels == label
        result[members] = latents[members] - latents[members].mean(axis=0)
    return result, len(latents) - len(classes)


def halve(fields: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One step of the orthonormal Haar transform: [N, C, H, W] -> [N, C, H/2, W/2] and the details [N, 3, C, H/2, W/2].

    The first part is twice the block means.
    """
    a, b, c, d = (fields[..., row::2, column::2] for row in (0, 1) for column in (0, 1))
    details = np.stack([a - b + c - d, a + b - c - d, a - b - c + d], axis=1)
    return (a + b + c + d) / 2, details / 2


def level_variances(fields: np.ndarray, freedom: int, stages: int, pooled: int, least: float) -> list[np.ndarray]:
    """Eigenvalues of at least `least` of each level, coarse to fine, for `stages` stages.

    `fields`: centred, and already halved `pooled` times. They lack the finest `pooled` levels, so these are empty.
    """
    levels: list[np.ndarray] = [np.empty(0)] * min(pooled, stages - 1)
    for _ in range(stages - 1 - pooled):
        fields, details = halve(fields)
        levels.insert(0, Spectrum.of(details, freedom).values)
    levels.insert(0, Spectrum.of(fields, freedom).values)
    return [values[values >= least] for values in levels]
