"""Score samples against held-out real images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ecar_dist.command_line import counted
from ecar_dist.errors import DataError
from ecar_dist.evaluate.bands import band_variances
from ecar_dist.evaluate.classifier import CLASSIFIER_NAME, features_and_predictions, train_classifier
from ecar_dist.evaluate.frechet import frechet_distance
from ecar_dist.vae.pixels import from_pixels

LEAST_IMAGES = 2  # that have a covariance


@dataclass(frozen=True)
class LabelledImages:
    """uint8 [N, H, W, 3] and int64 [N]."""

    pixels: np.ndarray
    labels: np.ndarray


def score(
    samples: LabelledImages,
    reconstructions: LabelledImages,
    train: LabelledImages,
    heldout: LabelledImages,
    source: str,
) -> dict[str, Any]:
    """Every distance is to the held-out images, in the features of a classifier trained on `train` alone.

    `reconstructions` are the train images after the autoencoder: what the generator could reach at best. The name of
    the distance carries the data set (FD-digits): it is no FID and not comparable with one. Raises DataError where one
    of the sets is too small.
    """
    sets = {"samples": samples, "reconstructions": reconstructions, "train": train, "heldout": heldout}
    _check_counts(sets)
    num_classes = int(max(train.labels.max(), heldout.labels.max())) + 1
    classifier = train_classifier(train.pixels, train.labels, num_classes)
    features, accuracy = {}, {}
    for name, images in sets.items():
        features[name], predictions = features_and_predictions(classifier, images.pixels)
        accuracy[name] = float((predictions == images.labels).mean())
    distance = {name: frechet_distance(features[name], features["heldout"]) for name in list(sets)[:3]}
    bands = {name: band_variances(from_pixels(sets[name].pixels)) for name in ("samples", "heldout")}
    return {
        f"FD-{source}": distance["samples"],
        f"FD-{source} real-vs-real floor": distance["train"],
        f"FD-{source} reconstructions": distance["reconstructions"],
        # A Frechet distance depends on the number of samples: no ratio where they differ.
        "ratio to floor": distance["samples"] / distance["train"] if len(samples.labels) == len(train.labels) else None,
        "class accuracy": accuracy["samples"],
        "class accuracy real heldout": accuracy["heldout"],
        "class accuracy reconstructions": accuracy["reconstructions"],
        "band variance ratio": {band: value / bands["heldout"][band] for band, value in bands["samples"].items()},
        "samples": len(samples.labels),
        "train": len(train.labels),
        "heldout": len(heldout.labels),
        "classifier": CLASSIFIER_NAME,
    }


def _check_counts(sets: Mapping[str, LabelledImages]) -> None:
    for name, images in sets.items():
        if len(images.labels) < LEAST_IMAGES:
            raise DataError(
                f"{name}: {counted(len(images.labels), 'image')}, and a Frechet distance needs {LEAST_IMAGES} at least "
                f"(and thousands to mean much); {'give a larger --count' if name == 'samples' else 'give more of them'}"
            )
