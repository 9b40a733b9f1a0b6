"""Merge similar tokens for the duration of a layer, so that it computes on fewer tokens (ToMe: arXiv 2210.09461).

Importance decides which tokens may be merged (importance-based token merging: Wu et al., ICCV 2025, arXiv 2411.16720).
The importance of a token is the size of its guidance difference |v_cond - v_null|, which the solver's previous call has
computed anyway.

- The most important quarter of the tokens are destinations. They are never merged away.
- Of the rest, the tokens that are most similar to a destination are averaged into it.
- Afterwards each merged token gets a copy of its destination's result.

The paper draws its destinations at random from a larger pool of important tokens. Here the destinations are the full
pool, so that a sample stays a function of its seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

DESTINATIONS = 0.25  # share of the tokens
LARGEST_RATIO = 1.0 - DESTINATIONS


@dataclass(frozen=True)
class Merging:
    """Where the T tokens of each row go. All fields are int64 places, [B, n].

    kept: the T - r tokens that remain after merging, destinations last. merged: the r tokens that are merged away.
    into: the place of each one's destination among the kept tokens.
    """

    kept: torch.Tensor
    merged: torch.Tensor
    into: torch.Tensor

    def merge(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, T - r, D]; a destination becomes the mean of itself and the tokens merged into it."""
        into = _over(self.into, x)
        return _take(x, self.kept).scatter_reduce(1, into, _take(x, self.merged), reduce="mean", include_self=True)

    def unmerge(self, y: torch.Tensor) -> torch.Tensor:
        """[B, T - r, D] -> [B, T, D]: every token back in its place."""
        tokens = y.new_empty(y.shape[0], self.kept.shape[1] + self.merged.shape[1], y.shape[2])
        tokens = tokens.scatter(1, _over(self.kept, y), y)
        return tokens.scatter(1, _over(self.merged, y), _take(y, self.into))


def match_tokens(tokens: torch.Tensor, importance: torch.Tensor, ratio: float) -> Merging:
    """Merge the share `ratio` of the tokens [B, T, D], by importance [B, T] and cosine similarity."""
    count = tokens.shape[1]
    destinations = max(1, round(DESTINATIONS * count))
    removed = min(int(ratio * count), count - destinations)

    # The most important tokens are destinations; the others may be merged away.
    order = importance.argsort(dim=1, descending=True, stable=True)  # [B, T]
    important, others = order[:, :destinations], order[:, destinations:]

    # The nearest destination for each of the others, and the `removed` best pairs.
    unit = F.normalize(tokens.float(), dim=-1)
    similarity = _take(unit, others) @ _take(unit, important).transpose(1, 2)  # [B, T - d, d]
    best, nearest = similarity.max(dim=-1)
    pairs = best.argsort(dim=1, descending=True, stable=True)
    going, staying = pairs[:, :removed], pairs[:, removed:]

    kept = torch.cat((others.gather(1, staying), important), dim=1)
    return Merging(kept, others.gather(1, going), nearest.gather(1, going) + staying.shape[1])


def _over(places: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Places [B, n] as an index into values [B, T, D]: [B, n, D]."""
    return places[..., None].expand(-1, -1, values.shape[-1])


def _take(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return values.gather(1, _over(places, values))
