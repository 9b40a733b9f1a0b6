"""The image strip that training writes to samples/ and TensorBoard: every stage, coarse to fine, a few classes."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ecar_dist.config.run import RunConfig
from ecar_dist.sample.generate import generate
from ecar_dist.sample.pictures import decode_stages, enlarge, tile
from ecar_dist.sample.sampling_plan import SamplingPlan
from ecar_dist.vae.codec import LatentCodec

PREVIEW_SAMPLES = 10
SMALLEST_SIDE = 64  # pixels; smaller pictures are enlarged


class StripPreview:
    """One row per stage, one column per sample, the same noise each time.

    codec: makes the pictures; None where none are made.
    """

    def __init__(self, config: RunConfig, codec: LatentCodec | None, device: torch.device) -> None:
        self._plan = SamplingPlan.from_config(config, device)
        self._indices = torch.arange(PREVIEW_SAMPLES, device=device)
        self._labels = self._indices % config.data.num_classes
        self._seed = config.run.seed
        self._codec = codec

    def draw(self, model: nn.Module) -> list[torch.Tensor]:
        """Every stage of the samples, K of [B, C, h_k, w_k]."""
        return generate(model, self._plan, self._labels, self._indices, self._seed)

    def picture(self, stages: list[torch.Tensor]) -> np.ndarray:
        """The strip, uint8 [H, W, 3]."""
        assert self._codec is not None
        return stage_strip(decode_stages(self._codec, [state.cpu() for state in stages]))


def stage_strip(stages: list[np.ndarray]) -> np.ndarray:
    """Pictures of every stage, K of uint8 [B, H, W, 3], as one sheet with a row per stage."""
    scale = max(1, SMALLEST_SIDE // stages[-1].shape[1])
    return tile([[enlarge(picture, scale) for picture in stage] for stage in stages])
