"""Per-channel statistics of stored moments: sums of each shard, added up over the set."""

from __future__ import annotations

from typing import Any

import numpy as np

from ecar_dist.vae.codec import EncoderIdentity


def measure(moments: np.ndarray, identity: EncoderIdentity) -> dict[str, Any]:
    """Sums over one shard's moments, fp16 [N, 2C or C, H, W], per channel in float64."""
    channels, values = identity.latent_channels, moments.astype(np.float64)
    mean = values[:, :channels]
    sigma = np.zeros_like(mean) if identity.deterministic else np.exp(0.5 * values[:, channels:])
    axes = (0, 2, 3)
    return {
        "values_per_channel": mean[:, 0].size,
        "mean_sum": mean.sum(axes).tolist(),
        "mean_square_sum": np.square(mean).sum(axes).tolist(),
        "sigma_sum": sigma.sum(axes).tolist(),
        "sigma_square_sum": np.square(sigma).sum(axes).tolist(),
    }


def combine(shards: list[dict[str, Any]], identity: EncoderIdentity) -> dict[str, Any]:
    """Statistics of the set. `posterior_sharpness` is mean(sigma) / std(mean): below 1e-3 the posterior is a point."""
    number = sum(shard["values_per_channel"] for shard in shards)
    average = {
        name: np.sum([shard[name] for shard in shards], axis=0) / number
        for name in ("mean_sum", "mean_square_sum", "sigma_sum", "sigma_square_sum")
    }
    mean = average["mean_sum"]
    variance = np.maximum(average["mean_square_sum"] - mean**2, 0.0)
    sampled = variance + average["sigma_square_sum"]  # of a draw from the posterior
    spread = float(np.sqrt(variance.mean()))
    return {
        "raw_mean": mean.tolist(),
        "raw_std": np.sqrt(variance).tolist(),
        "normalised_mean": ((mean - identity.shift_factor) * identity.scaling_factor).tolist(),
        "normalised_std": (np.sqrt(sampled) * identity.scaling_factor).tolist(),
        "posterior_sharpness": float(average["sigma_sum"].mean()) / spread if spread else 0.0,
    }
