"""`hybrid`: masked prediction of codes, then a flow for all residuals, after DC-AR (arXiv 2507.04947)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ecar_dist.flow.unmasking import arccosine, masked_counts
from ecar_dist.kinds.activations import FP32, Activations, number_bytes, transformer_activations
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
from ecar_dist.kinds.par import code_loss_bytes, code_search_macs
from ecar_dist.kinds.parameters import ParameterCount, block_parameters, linear, transformer_parameters

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ecar_dist.config.run import RunConfig
    from ecar_dist.sample.sampling_plan import SamplingPlan
    from ecar_dist.train.objective import Normalise, Objective


class HybridKind(Kind):
    """Not compilable: its steps read a mask."""

    title = "masked prediction of codes with a flow of residuals"
    parts = ("trunk", "head")
    one_stage = True
    needs_codebook = True

    def parameters(self, config: RunConfig) -> ParameterCount:
        size = trunk_size_of(config)
        width, channels = size.width, config.token_channels
        codes, tokens = config.model.codebook_size, config.stage_tokens[-1]

        # Trunk: blocks, the projection of the codes, the mask vector, rows of classes and places; the logits.
        trunk = transformer_parameters(size.depth, width, "shared", width // size.heads)
        trunk += linear(channels, width) + (1 + config.data.num_classes + 1 + 2 * tokens) * width
        trunk += codes * channels + linear(width, codes)

        # Head: with the code of the token, and the scale of the residuals.
        head = head_parameters(size, channels) + linear(channels, width) + 1
        block = block_parameters(width, "shared", width // size.heads)
        return ParameterCount(trunk, head, block, quantized_weights(size))

    def training_macs(self, config: RunConfig) -> int:
        """One pass of the trunk, and `flow.token_draws` velocities of every residual, each at its own time."""
        size = trunk_size_of(config)
        tokens, channels = config.stage_tokens[-1], config.token_channels
        velocity = head_macs(size, channels) + time_macs(size.width)
        forward = _trunk_macs(config) + _condition_macs(size, tokens, channels)
        forward += config.flow.token_draws * tokens * velocity
        return TRAINING_PASSES * forward + code_search_macs(config)

    def activations(self, config: RunConfig, precision: str) -> Activations:
        """The trunk on all tokens, the logits, and the head on every draw of every token."""
        size = trunk_size_of(config)
        tokens, channels, width = config.stage_tokens[-1], config.token_channels, size.width
        number = number_bytes(precision)

        # The codes' vectors, into the trunk and into the head; the trunk's output, into the logits and the condition.
        casts = 1 if number == FP32 else 2
        trunk = transformer_activations(tokens, width, size.depth, size.heads, "shared", precision)
        ends = tokens * (casts * (channels + width) * number + 1) + width * number
        head = config.flow.token_draws * tokens * head_bytes(size, channels, precision)
        return trunk + Activations(rest=ends + _masked_loss_bytes(config) + head)

    def sampling_macs(self, config: RunConfig) -> int:
        """A pass of the trunk in each step, and at the end the velocity calls of all residuals."""
        size = trunk_size_of(config)
        tokens, channels, sample = config.stage_tokens[-1], config.token_channels, config.sample
        trunk = (len(_counts(config)) - 1) * _trunk_macs(config)
        head = 0
        if sample.residuals:
            trunk += _condition_macs(size, tokens, channels)
            (calls,) = velocity_calls(config)
            evaluations = velocity_evaluations(config, 0, sample.guidance_scale)
            head = evaluations * tokens * head_macs(size, channels) + calls * time_macs(size.width)
        return guidance_passes(sample.guidance_scale) * trunk + head

    def serial_calls(self, config: RunConfig) -> int:
        """One pass of the trunk in each step, and at the end the head's calls, for all residuals together."""
        (calls,) = velocity_calls(config)
        return len(_counts(config)) - 1 + (calls if config.sample.residuals else 0)

    def describe_calls(self, config: RunConfig) -> str:
        steps = len(_counts(config)) - 1
        (calls,) = velocity_calls(config)
        residuals = f"{calls} calls of the head for all residuals" if config.sample.residuals else "no residuals"
        return f"{steps} passes of the trunk and {residuals}"

    def from_codebook(self, codes: torch.Tensor, residual_std: torch.Tensor) -> Mapping[str, torch.Tensor]:
        from ecar_dist.models.tokens.codebook import CODEBOOK, RESIDUAL_SCALE

        return {CODEBOOK: codes, RESIDUAL_SCALE: residual_std}

    def build_model(self, config: RunConfig) -> nn.Module:
        from ecar_dist.models.tokens.hybrid import Hybrid

        codes = config.model.codebook_size
        return Hybrid(trunk_size_of(config), num_codes=codes, **token_network_arguments(config))

    def objective(self, model: nn.Module, normalise: Normalise, config: RunConfig, precision: str) -> Objective:
        from ecar_dist.train.tokens.objectives import HybridObjective

        return HybridObjective(model, normalise, config, precision)

    def draw(
        self, model: Any, plan: SamplingPlan, labels: torch.Tensor, indices: torch.Tensor, seed: int
    ) -> list[torch.Tensor]:
        from ecar_dist.sample.tokens.hybrid import draw_hybrid

        return draw_hybrid(model, plan, labels, indices, seed)

    def velocities(
        self, model: Any, plan: SamplingPlan, labels: torch.Tensor, indices: torch.Tensor, seed: int
    ) -> list[torch.Tensor]:
        """The logits and the velocities side by side, [B, T, V + c]."""
        from ecar_dist.sample.tokens.hybrid import hybrid_outputs

        return hybrid_outputs(model, plan, labels, indices, seed)


def _counts(config: RunConfig) -> tuple[int, ...]:
    """Masked tokens before the first step and after each step, from T to 0."""
    return masked_counts(config.stage_tokens[-1], config.sample.code_steps, arccosine)


def _trunk_macs(config: RunConfig) -> int:
    """One pass over all tokens, with the logits of each."""
    size = trunk_size_of(config)
    tokens = config.stage_tokens[-1]
    ends = tokens * (config.token_channels + config.model.codebook_size) * size.width
    return block_macs(tokens, size.width, size.depth) + adaln_macs(size.width, 1, "shared") + ends


def _condition_macs(size: TrunkSize, tokens: int, token_channels: int) -> int:
    """The head's condition, from the trunk's output and the codes."""
    return tokens * (size.width + token_channels) * size.width


def _masked_loss_bytes(config: RunConfig) -> int:
    """`code_loss_bytes` without the codes as inputs, plus the mask as a factor of the errors."""
    tokens = config.stage_tokens[-1]
    return code_loss_bytes(config) - tokens * 8 + tokens
