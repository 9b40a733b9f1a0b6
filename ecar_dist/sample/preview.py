"""The image strip that training writes to samples/ and TensorBoard: every stage, coarse to fine, a few classes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ecar_dist.config.run import RunConfig
from ecar_dist.sample.generate import generate
from ecar_dist.sample.load import load_weights
from ecar_dist.sample.pictures import decode_stages, enlarge, tile
from ecar_dist.sample.sampling_plan import SamplingPlan
from ecar_dist.vae.codec import LatentCodec

PREVIEW_SAMPLES = 10
SMALLEST_SIDE = 64  # pixels; smaller pictures are enlarged


def make_preview(
    config: RunConfig, codec: LatentCodec, device: torch.device
) -> Callable[[dict[str, torch.Tensor]], np.ndarray]:
    """A function from full weights to the strip: one row per stage, one column per sample, the same noise each time."""
    plan = SamplingPlan.from_config(config, device)
    indices = torch.arange(PREVIEW_SAMPLES, device=device)

    def preview(weights: dict[str, torch.Tensor]) -> np.ndarray:
        model = load_weights(config, weights, device)
        stages = generate(model, plan, indices % config.data.num_classes, indices, config.run.seed)
        return stage_strip(decode_stages(codec, [state.cpu() for state in stages]))

    return preview


def stage_strip(stages: list[np.ndarray]) -> np.ndarray:
    """Pictures of every stage, K of uint8 [B, H, W, 3], as one sheet with a row per stage."""
    scale = max(1, SMALLEST_SIDE // stages[-1].shape[1])
    return tile([[enlarge(picture, scale) for picture in stage] for stage in stages])
