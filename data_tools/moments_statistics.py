"""Per-channel statistics of stored moments. Each shard stores sums; `combine` adds them up over the set."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import Field

from ecar_dist.storage.untrusted import Record
from ecar_dist.vae.codec import LOGVAR_RANGE, EncoderIdentity

FP16_MAX = float(np.finfo(np.float16).max)
_CHANNEL_SUMS = ("mean_sum", "mean_square_sum", "sigma_sum", "sigma_square_sum")
POINT_SHARPNESS = 1e-3  # posterior_sharpness below which the posterior is practically a point


def measure(moments: np.ndarray, identity: EncoderIdentity) -> dict[str, Any]:
    """Sums over one shard's moments, fp16 [N, 2C or C, H, W], per channel in float64."""
    values = moments.astype(np.float64)
    mean = values[:, : identity.latent_channels]
    logvar = values[:, identity.latent_channels :]  # empty for a deterministic encoder
    sigma = np.zeros_like(mean) if identity.deterministic else np.exp(0.5 * logvar)
    axes = (0, 2, 3)
    return {
        "values_per_channel": mean[:, 0].size,
        "mean_sum": mean.sum(axes).tolist(),
        "mean_square_sum": np.square(mean).sum(axes).tolist(),
        "sigma_sum": sigma.sum(axes).tolist(),
        "sigma_square_sum": np.square(sigma).sum(axes).tolist(),
        "saturated_means": int((np.abs(mean) >= FP16_MAX).sum()),
        "clamped_logvars": int(((logvar <= LOGVAR_RANGE[0]) | (logvar >= LOGVAR_RANGE[1])).sum()),
    }


class Sums(Record):
    """What `measure` returns for one shard."""

    values_per_channel: Annotated[int, Field(ge=1, le=1 << 53)]
    mean_sum: list[float]
    mean_square_sum: list[float]
    sigma_sum: list[float]
    sigma_square_sum: list[float]
    saturated_means: Annotated[int, Field(ge=0, le=1 << 53)]
    clamped_logvars: Annotated[int, Field(ge=0, le=1 << 53)]


def check_sums(tree: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError for sums that `combine` cannot add up."""
    sums = Sums.model_validate(tree)
    if len({len(part) for part in (sums.mean_sum, sums.mean_square_sum, sums.sigma_sum, sums.sigma_square_sum)}) != 1:
        raise ValueError("its sums have different numbers of channels")
    return tree


def add_up(shards: list[dict[str, Any]]) -> dict[str, Any]:
    """The sums of several shards as those of one."""
    numbers = ("values_per_channel", "saturated_means", "clamped_logvars")
    return {
        **{name: np.sum([shard[name] for shard in shards], axis=0) for name in _CHANNEL_SUMS},
        **{name: sum(shard[name] for shard in shards) for name in numbers},
    }


def combine(shards: list[dict[str, Any]], identity: EncoderIdentity) -> dict[str, Any]:
    """Statistics of the set, per channel where they are lists.

    `posterior_sharpness` is mean(sigma) / std(mean). The shares are fractions of all means or logvars.
    """
    # Means over all values of each channel.
    sums = add_up(shards)
    number = sums["values_per_channel"]
    average = {name: sums[name] / number for name in _CHANNEL_SUMS}

    # Var[x] = E[x^2] - E[x]^2. A sample of the posterior adds the variance sigma^2.
    mean = average["mean_sum"]
    variance = np.maximum(average["mean_square_sum"] - mean**2, 0.0)
    sampled = variance + average["sigma_square_sum"]
    spread = float(np.sqrt(variance.mean()))
    return {
        "raw_mean": mean.tolist(),
        "raw_std": np.sqrt(variance).tolist(),
        "normalised_mean": ((mean - identity.shift_factor) * identity.scaling_factor).tolist(),
        "normalised_std": (np.sqrt(sampled) * identity.scaling_factor).tolist(),
        "saturated_mean_share": sums["saturated_means"] / (number * len(mean)),
        "clamped_logvar_share": sums["clamped_logvars"] / (number * len(mean)),
        "posterior_sharpness": float(average["sigma_sum"].mean()) / spread if spread else 0.0,
    }
