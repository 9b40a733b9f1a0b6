"""Memorisation: are samples nearer to the training images than unseen images are?"""

from __future__ import annotations

import torch

# Distances in memory at once: 268 MB.
ROWS = 1024
COLUMNS = 65_536


def neighbour_ratio(images: torch.Tensor, train: torch.Tensor, heldout: torch.Tensor) -> float | None:
    """Mean L2 distance of images to their nearest training image, divided by that to their nearest held-out image.

    All images are [N, C, H, W] on one device. The larger set is nearer simply because of its size, so compare the ratio
    with that of real images, `heldout_ratio`: samples with a ratio far below it are copies. None if every image equals
    a held-out one.
    """
    return _ratio(_nearest(images, train), _nearest(images, heldout))


def heldout_ratio(train: torch.Tensor, heldout: torch.Tensor) -> float | None:
    """`neighbour_ratio` of the held-out images themselves, each compared with the others."""
    return _ratio(_nearest(heldout, train), _nearest(heldout, heldout, exclude_self=True))


def nearest_images(images: torch.Tensor, references: torch.Tensor, number: int) -> torch.Tensor:
    """The references nearest to each image, the nearest first: int64 [N, number], fewer if there are fewer."""
    distances = torch.cdist(images.flatten(1), references.flatten(1))
    return distances.topk(min(number, len(references)), largest=False).indices


def _ratio(to_train: torch.Tensor, to_heldout: torch.Tensor) -> float | None:
    return float(to_train.mean() / to_heldout.mean()) if to_heldout.any() else None


def _nearest(images: torch.Tensor, references: torch.Tensor, *, exclude_self: bool = False) -> torch.Tensor:
    """Distance of each image to its nearest reference, [N]."""
    images = images.flatten(1)
    references = references.flatten(1)
    nearest = []
    for number, rows in enumerate(images.split(ROWS)):
        places = _nearest_places(rows, references, first=number * ROWS if exclude_self else None)
        # cdist uses dot products, which find the nearest but are too imprecise for its distance.
        nearest.append((rows - references[places]).norm(dim=1))
    return torch.cat(nearest)


def _nearest_places(rows: torch.Tensor, references: torch.Tensor, first: int | None) -> torch.Tensor:
    """The reference nearest to each row, int64 [N]. `first`: row i is itself reference first + i, and not compared."""
    nearest = torch.full((len(rows),), torch.inf, device=rows.device)
    places = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    for number, columns in enumerate(references.split(COLUMNS)):
        distances = torch.cdist(rows, columns)
        if first is not None:
            distances.diagonal(first - number * COLUMNS).fill_(torch.inf)

        # Of several equally near ones take the first, however the references are split.
        values, found = distances.min(dim=1)
        places = torch.where(values < nearest, found + number * COLUMNS, places)
        nearest = torch.minimum(nearest, values)
    return places
