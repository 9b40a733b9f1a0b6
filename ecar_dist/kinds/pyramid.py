"""`pyramid`: the multistage flow of ECAR without its AR transformer; and `dit`, its case with one stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ecar_dist.kinds.activations import Activations, velocity_activations
from ecar_dist.kinds.flops import stages_macs, velocity_training_macs
from ecar_dist.kinds.kind import StagedKind
from ecar_dist.kinds.parameters import ParameterCount, block_parameters, block_weights, velocity_parameters
from ecar_dist.kinds.presets import preset_of

if TYPE_CHECKING:
    from torch import nn

    from ecar_dist.config.run import RunConfig


class PyramidKind(StagedKind):
    """The velocity network alone."""

    parts = ("", "velocity network")
    averages = True
    merges = True
    widens = True

    def __init__(self, title: str, *, one_stage: bool = False) -> None:
        self.title = title
        self.one_stage = one_stage

    def parameters(self, config: RunConfig) -> ParameterCount:
        preset = preset_of(config)
        flow = velocity_parameters(config, preset)
        width = preset.flow_width
        block = block_parameters(width, preset.flow_adaln, width // preset.flow_heads)
        return ParameterCount(0, flow, block, block_weights(width, preset.flow_depth))

    def training_macs(self, config: RunConfig) -> int:
        """One velocity call in each stage, forward and backward, and the cost of the targets."""
        return velocity_training_macs(config, preset_of(config))

    def activations(self, config: RunConfig, precision: str) -> Activations:
        """The velocity network on all stages at once."""
        return velocity_activations(config, preset_of(config), precision)

    def sampling_macs(self, config: RunConfig) -> int:
        """Eq. (19) without its AR terms."""
        calls = stages_macs(config, preset_of(config))
        return sum(evaluations * macs for evaluations, macs in zip(self.stage_evaluations(config), calls, strict=True))

    def build_model(self, config: RunConfig) -> nn.Module:
        from ecar_dist.models.pyramid import Pyramid

        return Pyramid(
            preset_of(config),
            stage_sizes=config.stage_sizes,
            latent_channels=config.data.latent_channels,
            patch_size=config.model.patch_size,
            num_classes=config.data.num_classes,
            mean_velocity=config.flow.learns_mean_velocity,
            recompute=config.train.activation_checkpointing,
        )
