"""Lloyd's k-means on tokens in blocks, with exact sums: any split of the blocks gives the same codes.

Sums of tokens and of errors are int64 in fixed point, so their order does not matter. A block is assigned in
one piece, so its products are the same on any process.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ecar_dist.flow.discrete.nearest_code import nearest_codes
from ecar_dist.rng import Purpose, uniform

FIXED_POINT = 2.0**24  # 10^9 tokens of normalised latents stay far below the limit of int64
MAX_RESTARTS = 256  # codes that one pass can replace

Block = tuple[torch.Tensor, torch.Tensor]  # numbers of the tokens int64 [n], tokens float32 [n, c]


@dataclass
class Assignment:
    """The result of one pass over tokens. Results of several processes add up.

    sums int64 [V, c] and counts int64 [V] of the tokens of each code; error int64 [], the sum of all squared errors.
    keys float64 [r], numbers int64 [r] and tokens int64 [r, c] of candidates for dead codes, best first.
    """

    sums: torch.Tensor
    counts: torch.Tensor
    error: torch.Tensor
    keys: torch.Tensor
    numbers: torch.Tensor
    tokens: torch.Tensor

    @property
    def dead(self) -> int:
        """Codes without a token."""
        return int((self.counts == 0).sum())

    @property
    def mean_squared_error(self) -> float:
        """Per number of a token."""
        return float(self.error) / FIXED_POINT / float(self.counts.sum()) / self.sums.shape[1]

    @property
    def perplexity(self) -> float:
        """exp of the entropy of the code usage: the number of codes that, used equally, would have this entropy."""
        shares = self.counts.double() / self.counts.sum()
        return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))


def to_fixed(values: torch.Tensor) -> torch.Tensor:
    return (values.double() * FIXED_POINT).round().to(torch.int64)


def from_fixed(values: torch.Tensor) -> torch.Tensor:
    return (values.double() / FIXED_POINT).float()


def assign(blocks: Iterable[Block], codes: torch.Tensor, seed: int, iteration: int) -> Assignment:
    """One pass, which assigns each token to its nearest code [V, c].

    Candidates for dead codes are drawn with probability proportional to their squared error, as k-means++ draws its
    first codes (Arthur and Vassilvitskii, 2007): the largest log(u) / error, u ~ U(0, 1) keyed by the token's number
    (Efraimidis and Spirakis, 2006).
    """
    found = _nothing(codes)
    for numbers, tokens in blocks:
        nearest = nearest_codes(tokens, codes)
        errors = (tokens - codes[nearest]).square().sum(-1).double()  # [n]
        fixed = to_fixed(tokens)
        found.sums.index_add_(0, nearest, fixed)
        found.counts += torch.bincount(nearest, minlength=len(codes))
        found.error += to_fixed(errors).sum()

        # A token that equals its code would not help: its key is -inf.
        keys = torch.log(uniform(seed, numbers, Purpose.CODEBOOK, stream=iteration).double()) / errors
        found = best_candidates(found, keys, numbers, fixed)
    return found


def best_candidates(found: Assignment, keys: torch.Tensor, numbers: torch.Tensor, tokens: torch.Tensor) -> Assignment:
    """The assignment with the best of its own candidates and these."""
    keys = torch.cat((found.keys, keys))
    numbers = torch.cat((found.numbers, numbers))
    tokens = torch.cat((found.tokens, tokens))
    useful = keys.isfinite()
    keys, numbers, tokens = keys[useful], numbers[useful], tokens[useful]

    # Equal keys are ordered by the number of the token.
    by_number = numbers.argsort()
    best = by_number[keys[by_number].argsort(descending=True, stable=True)][:MAX_RESTARTS]
    return Assignment(found.sums, found.counts, found.error, keys[best], numbers[best], tokens[best])


def updated(found: Assignment, codes: torch.Tensor) -> torch.Tensor:
    """The mean of each code's tokens; dead codes are replaced with candidates, as far as there are any."""
    means = from_fixed(found.sums.double() / found.counts.clamp(min=1)[:, None])
    new = torch.where(found.counts[:, None] > 0, means, codes)
    dead = (found.counts == 0).nonzero()[:, 0][: len(found.tokens)]
    new[dead] = from_fixed(found.tokens[: len(dead)])
    return new


def _nothing(codes: torch.Tensor) -> Assignment:
    """An assignment of no tokens."""
    num_codes, channels = codes.shape

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=codes.device)

    return Assignment(
        sums=zeros(num_codes, channels),
        counts=zeros(num_codes),
        error=zeros(),
        keys=zeros(0).double(),
        numbers=zeros(0),
        tokens=zeros(0, channels),
    )
