"""The image strip that training writes to samples/ and TensorBoard: every stage, coarse to fine, for a few classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from ecar_dist.config.run import RunConfig
from ecar_dist.sample.generate import generate
from ecar_dist.sample.pictures import decode_stages, labelled_grid
from ecar_dist.sample.sampling_plan import SamplingPlan
from ecar_dist.vae.codec import LatentCodec

PREVIEW_SAMPLES = 10
SMALLEST_SIDE = 64  # pixels; smaller pictures are enlarged


class StripPreview:
    """One row per stage, one column per sample, the same noise each time.

    codec: decodes the latents to pictures; None if no pictures are made.
    """

    def __init__(self, config: RunConfig, codec: LatentCodec | None, device: torch.device) -> None:
        # Under ZeRO-3 the weights of a compiled block are gathered only when the block as a whole is called.
        self._plan = dataclasses.replace(SamplingPlan.from_config(config, device), modulates_ahead=False)
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
        pictures = decode_stages(self._codec, [state.cpu() for state in stages])
        titles = [str(label) for label in self._labels.tolist()]
        return stage_strip(pictures, [state.shape[-1] for state in stages], titles)


def stage_strip(stages: list[np.ndarray], sides: Sequence[int], titles: Sequence[str] = ()) -> np.ndarray:
    """Pictures of every stage, K of uint8 [B, H, W, 3], as one sheet with a row per stage.

    sides: latent side of each stage, shown next to its row. titles: shown above the columns; none by default.
    """
    scale = max(1, SMALLEST_SIDE // stages[-1].shape[1])
    names = [f"stage {k}: {side}x{side}" for k, side in enumerate(sides)]
    return labelled_grid([list(stage) for stage in stages], titles, names, scale=scale)
