"""Memorisation: are samples nearer to the training images than images that were never trained on are?"""

from __future__ import annotations

import torch


def neighbour_ratio(images: torch.Tensor, train: torch.Tensor, heldout: torch.Tensor) -> float | None:
    """Mean distance (L2) of images to their nearest training image, over that to their nearest held-out image.

    Images [N, C, H, W] each. The larger set is nearer by its size alone, so a ratio means something beside that of
    real images only (`heldout_ratio`): far below it, samples are copies. None where all lie upon held-out images.
    """
    return _ratio(_nearest(images, train), _nearest(images, heldout))


def heldout_ratio(train: torch.Tensor, heldout: torch.Tensor) -> float | None:
    """The same of the held-out images themselves, each compared with the others."""
    return _ratio(_nearest(heldout, train), _nearest(heldout, heldout, but_itself=True))


def _ratio(to_train: torch.Tensor, to_heldout: torch.Tensor) -> float | None:
    return float(to_train.mean() / to_heldout.mean()) if to_heldout.any() else None


def _nearest(images: torch.Tensor, references: torch.Tensor, *, but_itself: bool = False) -> torch.Tensor:
    """Distance of each image to the nearest reference. Dot products find it; they are too rough to say how far."""
    images, references = images.flatten(1), references.flatten(1)
    nearest = []
    for rows in torch.arange(len(images)).split(1024):
        distances = torch.cdist(images[rows], references)
        if but_itself:
            distances[torch.arange(len(rows)), rows] = torch.inf
        nearest.append((images[rows] - references[distances.argmin(1)]).norm(dim=1))
    return torch.cat(nearest)
