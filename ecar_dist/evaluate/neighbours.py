"""Memorisation: are samples nearer to the training images than unseen images are?"""

from __future__ import annotations

import torch


def neighbour_ratio(images: torch.Tensor, train: torch.Tensor, heldout: torch.Tensor) -> float | None:
    """Mean L2 distance of images to their nearest training image, divided by that to their nearest held-out image.

    All images are [N, C, H, W]. The larger set is nearer by its size alone, so compare the ratio with that of real
    images, `heldout_ratio`: samples with a ratio far below it are copies. None if every image equals a held-out one.
    """
    return _ratio(_nearest(images, train), _nearest(images, heldout))


def heldout_ratio(train: torch.Tensor, heldout: torch.Tensor) -> float | None:
    """`neighbour_ratio` of the held-out images themselves, each compared with the others."""
    return _ratio(_nearest(heldout, train), _nearest(heldout, heldout, exclude_self=True))


def _ratio(to_train: torch.Tensor, to_heldout: torch.Tensor) -> float | None:
    return float(to_train.mean() / to_heldout.mean()) if to_heldout.any() else None


def _nearest(images: torch.Tensor, references: torch.Tensor, *, exclude_self: bool = False) -> torch.Tensor:
    """Distance of each image to its nearest reference, [N]."""
    images = images.flatten(1)
    references = references.flatten(1)
    nearest = []
    for rows in torch.arange(len(images)).split(1024):
        distances = torch.cdist(images[rows], references)
        if exclude_self:
            distances[torch.arange(len(rows)), rows] = torch.inf
        # cdist uses dot products, which find the nearest but are too imprecise for its distance.
        nearest.append((images[rows] - references[distances.argmin(1)]).norm(dim=1))
    return torch.cat(nearest)
