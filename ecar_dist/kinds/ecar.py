"""`ecar`: an AR transformer makes a token map for each stage; a velocity network draws each stage conditioned on it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from ecar_dist.kinds.activations import (
    Activations,
    number_bytes,
    transformer_activations,
    velocity_activations,
)
from ecar_dist.kinds.flops import TRAINING_PASSES, adaln_macs, block_macs, stages_macs, velocity_training_macs
from ecar_dist.kinds.kind import StagedKind
from ecar_dist.kinds.parameters import (
    ParameterCount,
    block_parameters,
    block_weights,
    linear,
    transformer_parameters,
    velocity_parameters,
)
from ecar_dist.kinds.presets import Preset, preset_of

if TYPE_CHECKING:
    from torch import nn

    from ecar_dist.config.run import RunConfig


class EcarKind(StagedKind):
    """Sections 5-9 of docs/ecar.md."""

    title = "ECAR"
    parts = ("AR", "velocity network")
    feeds_states = True
    averages = True
    merges = True
    widens = True

    def check(self, config: RunConfig) -> None:
        super().check(config)
        config.flow.check_context()

    def parameters(self, config: RunConfig) -> ParameterCount:
        preset = preset_of(config)
        channels = config.token_channels
        stage_tokens = config.stage_tokens
        num_classes = config.data.num_classes
        num_stages = len(stage_tokens)

        # AR transformer: blocks, one row per class and stage, start and output positions, input projection
        width = preset.ar_width
        fed = _feeds_state(config)
        start_positions = stage_tokens[0] if fed else sum(stage_tokens)
        ar = transformer_parameters(preset.ar_depth, width, "shared", width // preset.ar_heads)
        ar += (num_classes + 1 + num_stages + start_positions + sum(stage_tokens)) * width
        ar += linear(channels, width) if fed and num_stages > 1 else 0

        # velocity network: the one that all kinds share, and W_m, which projects the token maps
        flow = velocity_parameters(config, preset) + linear(width, preset.flow_width)
        block = max(
            block_parameters(width, "shared", width // preset.ar_heads),
            block_parameters(preset.flow_width, preset.flow_adaln, preset.flow_width // preset.flow_heads),
        )
        quantized = block_weights(width, preset.ar_depth) + block_weights(preset.flow_width, preset.flow_depth)
        return ParameterCount(ar, flow, block, quantized + width * preset.flow_width)

    def training_macs(self, config: RunConfig) -> int:
        """One AR pass and one velocity call in each stage, forward and backward, and the cost of the targets."""
        preset = preset_of(config)
        stage_tokens = config.stage_tokens
        ar = ar_macs(preset, stage_tokens, config.token_channels, feeds_state=_feeds_state(config))
        conditions = condition_macs(preset, sum(stage_tokens))
        return TRAINING_PASSES * (ar + conditions) + velocity_training_macs(config, preset)

    def activations(self, config: RunConfig, precision: str) -> Activations:
        """The AR transformer on all stages at once, its token maps, and the velocity network on all stages at once."""
        preset = preset_of(config)
        channels = config.token_channels
        stage_tokens = config.stage_tokens
        tokens = sum(stage_tokens)
        width = preset.ar_width
        number = number_bytes(precision)

        # AR transformer: its conditioning is the class; W_in keeps the contexts, W_m the token maps.
        ar = transformer_activations(tokens, width, preset.ar_depth, preset.ar_heads, "shared", precision, joined=True)
        contexts = sum(stage_tokens[1:]) * channels * number if _feeds_state(config) else 0
        ends = Activations(rest=width * number + contexts + tokens * width * number)
        return ar + ends + velocity_activations(config, preset, precision)

    def sampling_macs(self, config: RunConfig) -> int:
        """Eq. (19): the token map of every stage, then the velocity calls under it.

        A stage with a guidance scale that is neither 0 nor 1 needs the conditional and the null velocity. If any does,
        the AR transformer runs twice in every stage, because later null blocks attend to the earlier ones.
        """
        preset = preset_of(config)
        channels = config.token_channels
        stage_tokens = config.stage_tokens
        passes = self.stage_passes(config)

        # AR transformer: with a KV cache, each stage's tokens are queries only once
        ar = ar_macs(preset, stage_tokens, channels, passes=len(stage_tokens), feeds_state=_feeds_state(config))
        # velocity network: W_m M_k once per stage, then the solver's calls
        flow = sum(
            evaluations * call + branches * condition_macs(preset, tokens)
            for tokens, branches, evaluations, call in zip(
                stage_tokens, passes, self.stage_evaluations(config), stages_macs(config, preset), strict=True
            )
        )
        return max(passes) * ar + flow

    def build_model(self, config: RunConfig) -> nn.Module:
        from ecar_dist.models.ecar import ECAR

        return ECAR(
            preset_of(config),
            stage_sizes=config.stage_sizes,
            latent_channels=config.data.latent_channels,
            patch_size=config.model.patch_size,
            num_classes=config.data.num_classes,
            context_scales=config.flow.schedule.context_scales(config.flow.context.tau),
            feeds_state=_feeds_state(config),
            mean_velocity=config.flow.learns_mean_velocity,
            recompute=config.train.activation_checkpointing,
        )


def _feeds_state(config: RunConfig) -> bool:
    """`class_only` draws the contexts, so that its noise is that of the other modes, but ignores them."""
    return config.flow.context.mode != "class_only"


def ar_macs(
    preset: Preset,
    stage_tokens: Sequence[int],
    token_channels: int,
    *,
    passes: int = 1,
    feeds_state: bool = True,
    linears_only: bool = False,
) -> int:
    """All token maps of one image, eq. (18), in `passes` passes: 1 in training, one per stage with a KV cache.

    Attention counts the blocks that the mask leaves visible: stage k sees the tokens of stages 0 .. k.
    """
    width, depth = preset.ar_width, preset.ar_depth
    # keys: the tokens of the stage and of all earlier ones
    blocks = (
        block_macs(tokens, width, depth, keys=keys, linears_only=linears_only)
        for tokens, keys in zip(stage_tokens, accumulate(stage_tokens), strict=True)
    )
    # adaLN runs once per pass; W_in of eq. (16), in every stage but the first
    inputs = sum(stage_tokens[1:]) * token_channels * width if feeds_state else 0
    return sum(blocks) + passes * adaln_macs(width, depth, "shared") + inputs


def condition_macs(preset: Preset, tokens: int) -> int:
    """W_m M_k, once per stage."""
    return tokens * preset.ar_width * preset.flow_width
