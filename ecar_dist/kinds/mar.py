"""`mar`: masked autoregression over the tokens of one stage, each sampled by a small flow head."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ecar_dist.flow.unmasking import masked_counts, masked_guidance_scales
from ecar_dist.kinds.activations import (
    Activations,
    number_bytes,
    transformer_activations,
)
from ecar_dist.kinds.flops import (
    TRAINING_PASSES,
    adaln_macs,
    block_macs,
    guidance_passes,
    time_macs,
    velocity_calls,
    velocity_evaluations,
)
from ecar_dist.kinds.flow_head import (
    TrunkSize,
    head_bytes,
    head_macs,
    head_parameters,
    quantized_weights,
    token_network_arguments,
    trunk_size_of,
)
from ecar_dist.kinds.kind import Kind
from ecar_dist.kinds.parameters import (
    ParameterCount,
    block_parameters,
    linear,
    transformer_parameters,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ecar_dist.config.run import RunConfig
    from ecar_dist.sample.sampling_plan import SamplingPlan
    from ecar_dist.train.objective import Normalise, Objective


class MarKind(Kind):
    """Not compilable: each step draws a different number of tokens."""

    title = "masked autoregression with a flow head"
    parts = ("trunk", "head")
    one_stage = True

    def parameters(self, config: RunConfig) -> ParameterCount:
        size = trunk_size_of(config)
        channels = config.token_channels
        tokens = config.stage_tokens[-1]
        width = size.width

        # trunk: blocks, input projection, the mask vector, one row per class, input and output positions
        trunk = transformer_parameters(size.depth, width, "shared", width // size.heads)
        trunk += linear(channels, width) + (1 + config.data.num_classes + 1 + 2 * tokens) * width

        block = block_parameters(width, "shared", width // size.heads)
        return ParameterCount(trunk, head_parameters(size, channels), block, quantized_weights(size))

    def training_macs(self, config: RunConfig) -> int:
        """One trunk pass, and `flow.token_draws` velocities of every token, each at its own time.

        The head's outputs at unmasked tokens are dropped, as in MAR, so that shapes do not depend on the data.
        """
        size = trunk_size_of(config)
        channels = config.token_channels
        tokens = config.stage_tokens[-1]
        velocity = head_macs(size, channels) + time_macs(size.width)
        forward = mar_trunk_macs(size, tokens, channels) + config.flow.token_draws * tokens * velocity
        return TRAINING_PASSES * forward

    def activations(self, config: RunConfig, precision: str) -> Activations:
        """The trunk on all tokens, and the head on every draw of every token."""
        size = trunk_size_of(config)
        channels = config.token_channels
        tokens = config.stage_tokens[-1]
        width = size.width
        number = number_bytes(precision)

        # Trunk: its operands are the tokens, the mask, the class, and for W_c the output.
        trunk = transformer_activations(tokens, width, size.depth, size.heads, "shared", precision)
        ends = tokens * ((channels + width) * number + 1) + width * number
        head = config.flow.token_draws * tokens * head_bytes(size, channels, precision)
        return trunk + Activations(rest=ends + head)

    def sampling_macs(self, config: RunConfig) -> int:
        """A trunk pass in each step, and the velocity calls of the tokens that the step draws.

        The time is embedded once per call for all tokens.
        """
        size = trunk_size_of(config)
        channels = config.token_channels
        sample = config.sample
        counts = _counts(config)
        (calls,) = velocity_calls(config)
        scales = masked_guidance_scales(sample.guidance_scale, counts, sample.guidance_ramp)

        trunk = mar_trunk_macs(size, counts[0], channels)
        head = head_macs(size, channels)
        return sum(
            guidance_passes(scale) * trunk
            + velocity_evaluations(config, 0, scale) * (before - after) * head
            + calls * time_macs(size.width)
            for (before, after), scale in zip(pairwise(counts), scales, strict=True)
        )

    def serial_calls(self, config: RunConfig) -> int:
        """In each step one pass of the trunk, and then the head's calls, for all tokens of the step together."""
        (calls,) = velocity_calls(config)
        return (len(_counts(config)) - 1) * (1 + calls)

    def describe_calls(self, config: RunConfig) -> str:
        steps = len(_counts(config)) - 1
        (calls,) = velocity_calls(config)
        return f"{steps} passes of the trunk and {calls} calls of the head for each token"

    def build_model(self, config: RunConfig) -> nn.Module:
        from ecar_dist.models.mar import MAR

        return MAR(trunk_size_of(config), **token_network_arguments(config))

    def objective(self, model: nn.Module, normalise: Normalise, config: RunConfig, precision: str) -> Objective:
        from ecar_dist.train.objective import MaskedObjective

        return MaskedObjective(model, normalise, config, precision)

    def draw(
        self, model: Any, plan: SamplingPlan, labels: torch.Tensor, indices: torch.Tensor, seed: int
    ) -> list[torch.Tensor]:
        from ecar_dist.sample.masked import draw_masked

        return draw_masked(model, plan, labels, indices, seed)

    def velocities(
        self, model: Any, plan: SamplingPlan, labels: torch.Tensor, indices: torch.Tensor, seed: int
    ) -> list[torch.Tensor]:
        from ecar_dist.sample.masked import token_velocities

        return token_velocities(model, plan, labels, indices, seed)


def _counts(config: RunConfig) -> tuple[int, ...]:
    """Masked tokens before the first step and after each step, from T to 0."""
    return masked_counts(config.stage_tokens[-1], config.sample.ar_steps)


def mar_trunk_macs(size: TrunkSize, tokens: int, token_channels: int, *, linears_only: bool = False) -> int:
    """One pass of the trunk over all tokens, and the head's condition for each."""
    ends = tokens * (token_channels + size.width) * size.width
    blocks = block_macs(tokens, size.width, size.depth, linears_only=linears_only)
    return blocks + adaln_macs(size.width, 1, "shared") + ends
