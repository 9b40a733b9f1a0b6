"""Score samples against held-out real images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ecar_dist.command_line import counted
from ecar_dist.errors import DataError
from ecar_dist.evaluate.bands import band_variances
from ecar_dist.evaluate.classifier import (
    CLASSIFIER_NAME,
    features_and_predictions,
    inputs_of,
    train_classifier,
)
from ecar_dist.evaluate.frechet import Gaussian, bootstrap_std, frechet_distance
from ecar_dist.evaluate.neighbours import heldout_ratio, neighbour_ratio

MIN_IMAGES = 2  # for a covariance


@dataclass(frozen=True)
class LabelledImages:
    """uint8 [N, H, W, 3] and int64 [N]."""

    pixels: np.ndarray
    labels: np.ndarray


class Scorer:
    """Scores sample sets against the same real images, in the features of one classifier trained on `train` alone.

    `reconstructions` are the training images after the autoencoder, the best that the generator can reach. Every
    distance is to the held-out images. It is named after the data set (FD-digits), because it is not FID and cannot be
    compared with it. Everything but the Frechet distance itself is computed on `device`. Raises DataError if a set is
    too small.
    """

    def __init__(
        self,
        reconstructions: LabelledImages,
        train: LabelledImages,
        heldout: LabelledImages,
        source: str,
        device: torch.device,
    ) -> None:
        for name, images in {"reconstructions": reconstructions, "train": train, "heldout": heldout}.items():
            _check_count(name, images)

        # The feature space, and the real images in it.
        self._device = device
        self._classifier = train_classifier(train.pixels, train.labels, _num_classes(train, heldout), device)
        self._heldout, accuracy_of_heldout = self._features_and_accuracy(heldout)
        self._train_seen = inputs_of(train.pixels, device)
        self._heldout_seen = inputs_of(heldout.pixels, device)
        self._heldout_bands = band_variances(heldout.pixels, device)

        # Scores of the real images. They are printed next to every score of samples.
        self.name = f"FD-{source}"
        features_of_train, _ = self._features_and_accuracy(train)
        rebuilt, accuracy_of_rebuilt = self._features_and_accuracy(reconstructions)
        self._floor = frechet_distance(features_of_train, self._heldout)
        self._of_real = {
            f"{self.name} real-vs-real floor": self._floor,
            f"{self.name} reconstructions": frechet_distance(rebuilt, self._heldout),
            "class accuracy real heldout": accuracy_of_heldout,
            "class accuracy reconstructions": accuracy_of_rebuilt,
            "neighbour ratio real heldout": heldout_ratio(self._train_seen, self._heldout_seen),
            "train": len(train.labels),
            "heldout": len(heldout.labels),
            "classifier": CLASSIFIER_NAME,
        }

    def score(self, samples: LabelledImages) -> dict[str, Any]:
        """Scores of one sample set."""
        _check_count("samples", samples)
        count = len(samples.labels)
        features, accuracy = self._features_and_accuracy(samples)
        distance = frechet_distance(features, self._heldout)
        bands = band_variances(samples.pixels, self._device)
        seen = inputs_of(samples.pixels, self._device)
        return {
            self.name: distance,
            f"{self.name} bootstrap std": bootstrap_std(features, Gaussian.of(self._heldout)),
            # A Frechet distance depends on the number of images, so different numbers give no ratio.
            "ratio to floor": distance / self._floor if count == self._of_real["train"] else None,
            "class accuracy": accuracy,
            "band variance ratio": {band: value / self._heldout_bands[band] for band, value in bands.items()},
            "neighbour ratio": neighbour_ratio(seen, self._train_seen, self._heldout_seen),
            "samples": count,
            **self._of_real,
        }

    def _features_and_accuracy(self, images: LabelledImages) -> tuple[np.ndarray, float]:
        features, predictions = features_and_predictions(self._classifier, images.pixels)
        return features, float((predictions == images.labels).mean())


def seeds_scores(scorer: Scorer, samples: Iterable[LabelledImages]) -> dict[str, Any]:
    """Means over sample sets, one for each sampling seed, and the spread of the distance.

    "std over seeds" is the standard deviation of the distance from set to set, None for a single one; "bootstrap std"
    resamples the images of the first set. A set is scored before the next one is requested.
    """
    each = [scorer.score(images) for images in samples]
    distances = [one[scorer.name] for one in each]
    bootstrap = f"{scorer.name} bootstrap std"
    return _mean(each) | {
        bootstrap: each[0][bootstrap],
        f"{scorer.name} std over seeds": float(np.std(distances, ddof=1)) if len(each) > 1 else None,
    }


def _mean(trees: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of each floating-point number, at the same place in all trees; the rest is taken from the first."""
    found: dict[str, Any] = {}
    for key, value in trees[0].items():
        of_each = [tree[key] for tree in trees]
        if isinstance(value, dict):
            found[key] = _mean(of_each)
        else:
            found[key] = float(np.mean(of_each)) if isinstance(value, float) else value
    return found


def _num_classes(*sets: LabelledImages) -> int:
    return max(int(images.labels.max()) for images in sets) + 1


def _check_count(name: str, images: LabelledImages) -> None:
    if len(images.labels) < MIN_IMAGES:
        raise DataError(
            f"{name}: {counted(len(images.labels), 'image')}, a Frechet distance needs at least {MIN_IMAGES} "
            f"(and thousands to be meaningful); {'give a larger --count' if name == 'samples' else 'give more of them'}"
        )
