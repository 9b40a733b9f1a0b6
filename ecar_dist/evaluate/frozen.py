"""Scores in the features of a frozen network: Frechet distance with its spread, precision and recall."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ecar_dist.errors import ConfigError
from ecar_dist.evaluate.frechet import Gaussian, bootstrap_std, frechet_distance
from ecar_dist.evaluate.networks import FeatureNetwork

NEIGHBOURS = 3  # k of precision and recall, as in their paper
ROWS = 1024  # rows of a distance matrix that are computed at once


def frozen_scores(
    network: FeatureNetwork,
    *,
    drawn: Sequence[np.ndarray],
    train: np.ndarray,
    heldout: np.ndarray,
    reconstructions: np.ndarray,
    reference: Gaussian | None = None,
) -> dict[str, Any]:
    """Scores of sample sets, one per sampling seed, against held-out images. All images are uint8 [N, H, W, 3].

    drawn: the network's features of each set, [N, d], so that no more than one set has to be kept.
    The distance is the mean over the seeds. "std over seeds" is None for a single seed; "bootstrap std" resamples the
    images of the first. The floor is the distance of the training images to the held-out ones; it is comparable if
    there are as many samples. `reference`: moments to use instead of the held-out images, only for the distance.
    """
    real, seen = network(heldout), network(train)
    target = Gaussian.of(real) if reference is None else reference
    distances = [frechet_distance(features, target) for features in drawn]
    precision, recall = precision_recall(real, drawn[0])
    name = network.metric
    return {
        name: float(np.mean(distances)),
        f"{name} std over seeds": float(np.std(distances, ddof=1)) if len(distances) > 1 else None,
        f"{name} bootstrap std": bootstrap_std(drawn[0], target),
        f"{name} real-vs-real floor": frechet_distance(seen, target),
        f"{name} reconstructions": frechet_distance(network(reconstructions), target),
        f"precision {network.name}": precision,
        f"recall {network.name}": recall,
    }


def precision_recall(real: np.ndarray, generated: np.ndarray) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991), k = 3, of features [N, d] and [M, d].

    Precision: the share of generated features inside the union of balls around the real ones, each as large as the
    distance to its k-th neighbour. Recall: the same with both sets exchanged.
    """
    a, b = (torch.from_numpy(each).float() for each in (real, generated))
    return _share_inside(b, a), _share_inside(a, b)


def _share_inside(points: torch.Tensor, centres: torch.Tensor) -> float:
    # The point itself is its nearest neighbour, at distance 0.
    k = min(NEIGHBOURS + 1, len(centres))
    radii = torch.cat([torch.cdist(part, centres).kthvalue(k, dim=1).values for part in centres.split(ROWS)])
    inside = [(torch.cdist(part, centres) <= radii).any(dim=1) for part in points.split(ROWS)]
    return float(torch.cat(inside).float().mean())


def read_reference(path: Path, network: FeatureNetwork) -> Gaussian:
    """Moments of a reference batch: `mu` and `sigma` of a .npz, as in ADM's (VIRTUAL_imagenet256_labeled.npz).

    Raises ConfigError if the file has none, or moments of a different width.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = file["mu"], file["sigma"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--reference {path} is not a .npz with mu and sigma ({error}); give such a file") from None
    if mean.shape != (network.width,) or covariance.shape != (network.width, network.width):
        raise ConfigError(
            f"--reference {path} has mu {list(mean.shape)} and sigma {list(covariance.shape)}, {network.name} has "
            f"{network.width} features; give the moments of the same network"
        )
    return Gaussian(mean.astype(np.float64), covariance.astype(np.float64))
