"""`par`: autoregression over codes, several at once (arXiv 2412.15119). `par_cont`, ours: over continuous tokens."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from ecar_dist.flow.discrete.region_order import check_group, group_sizes
from ecar_dist.flow.unmasking import masked_guidance_scales
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
from ecar_dist.kinds.parameters import ParameterCount, block_parameters, block_weights, linear, transformer_parameters

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ecar_dist.config.run import RunConfig
    from ecar_dist.sample.sampling_plan import SamplingPlan
    from ecar_dist.train.objective import Normalise, Objective

INDEX = 8  # bytes of an int64


class GroupedKind(Kind):
    """What `par` and `par_cont` share: the transformer over tokens in region order.

    Not compilable: each step has a different number of keys.
    """

    one_stage = True

    def check(self, config: RunConfig) -> None:
        super().check(config)
        check_group(config.data.latent_size // config.model.patch_size, config.par.group)

    def trunk_parameters(self, config: RunConfig) -> int:
        """Blocks, and a row for each class, marker and place."""
        size = trunk_size_of(config)
        rows = config.data.num_classes + 1 + config.par.group - 1 + config.stage_tokens[-1]
        return transformer_parameters(size.depth, size.width, "shared", size.width // size.heads) + rows * size.width

    def trunk_macs(self, config: RunConfig, *, passes: int) -> int:
        """All slots of one image, in one pass in training, or in one pass per group with a KV cache.

        Attention counts what the rule leaves visible: a group sees itself and everything before it.
        """
        size = trunk_size_of(config)
        sizes = _group_sizes(config)
        blocks = (
            block_macs(count, size.width, size.depth, keys=keys)
            for count, keys in zip(sizes, accumulate(sizes), strict=True)
        )
        return sum(blocks) + passes * adaln_macs(size.width, size.depth, "shared")

    def trunk_activations(self, config: RunConfig, precision: str) -> Activations:
        """The blocks on all slots, and the class."""
        size = trunk_size_of(config)
        tokens = config.stage_tokens[-1]
        blocks = transformer_activations(tokens, size.width, size.depth, size.heads, "shared", precision)
        return blocks + Activations(rest=size.width * number_bytes(precision))


class ParKind(GroupedKind):
    """Codes of a codebook stored next to the latents, drawn with the transformer's probabilities."""

    title = "parallelised autoregression over codes"
    parts = ("AR transformer", "")
    needs_codebook = True

    def check(self, config: RunConfig) -> None:
        super().check(config)
        window, group = config.sample.jacobi_window, config.par.group
        if window > 1 and group > 1:
            raise ValueError(
                f"sample.jacobi_window={window} guesses single tokens, but par.group={group} draws groups of them; set "
                "sample.jacobi_window=1, or use a run with par.group=1"
            )

    def parameters(self, config: RunConfig) -> ParameterCount:
        size = trunk_size_of(config)
        codes = config.model.codebook_size
        ends = codes * (config.token_channels + size.width) + linear(size.width, codes)
        block = block_parameters(size.width, "shared", size.width // size.heads)
        quantized = block_weights(size.width, size.depth)
        return ParameterCount(self.trunk_parameters(config) + ends, 0, block, quantized)

    def training_macs(self, config: RunConfig) -> int:
        """Forward and backward; the search for the nearest code has no backward pass."""
        return TRAINING_PASSES * (self.trunk_macs(config, passes=1) + _logits_macs(config)) + code_search_macs(config)

    def activations(self, config: RunConfig, precision: str) -> Activations:
        """The trunk, the codes, and the logits with their loss."""
        tokens = config.stage_tokens[-1]
        ends = tokens * trunk_size_of(config).width * number_bytes(precision)
        return self.trunk_activations(config, precision) + Activations(rest=ends + code_loss_bytes(config))

    def sampling_macs(self, config: RunConfig) -> int:
        """With guidance, the null model runs in every step."""
        steps = self.trunk_macs(config, passes=len(_group_sizes(config)))
        return guidance_passes(config.sample.guidance_scale) * (steps + _logits_macs(config))

    def serial_calls(self, config: RunConfig) -> int:
        """One pass per group; with `sample.jacobi_window`, this is the maximum."""
        return len(_group_sizes(config))

    def describe_calls(self, config: RunConfig) -> str:
        return f"{len(_group_sizes(config))} passes of the transformer{_in_groups(config)}"

    def from_codebook(self, codes: torch.Tensor, residual_std: torch.Tensor) -> Mapping[str, torch.Tensor]:
        from ecar_dist.models.tokens.codebook import CODEBOOK

        return {CODEBOOK: codes}

    def build_model(self, config: RunConfig) -> nn.Module:
        from ecar_dist.models.tokens.par import PAR

        codes = config.model.codebook_size
        return PAR(trunk_size_of(config), group=config.par.group, num_codes=codes, **token_network_arguments(config))

    def objective(self, model: nn.Module, normalise: Normalise, config: RunConfig, precision: str) -> Objective:
        from ecar_dist.train.tokens.objectives import CodeObjective

        return CodeObjective(model, normalise, config, precision)

    def draw(
        self, model: Any, plan: SamplingPlan, labels: torch.Tensor, indices: torch.Tensor, seed: int
    ) -> list[torch.Tensor]:
        from ecar_dist.sample.tokens.grouped import draw_grouped
        from ecar_dist.sample.tokens.jacobi import draw_jacobi

        if plan.jacobi_window > 1:
            return draw_jacobi(model, plan, labels, indices, seed)
        return draw_grouped(model, plan, labels, indices, seed)

    def velocities(
        self, model: Any, plan: SamplingPlan, labels: torch.Tensor, indices: torch.Tensor, seed: int
    ) -> list[torch.Tensor]:
        """The logits, [B, N, V]: this kind has no velocity."""
        from ecar_dist.sample.tokens.grouped import code_logits

        return code_logits(model, plan, labels, indices, seed)


class ParContinuousKind(GroupedKind):
    """Continuous tokens, each drawn by MAR's flow head from the transformer's output. Ours, not the paper's."""

    title = "parallelised autoregression with a flow head"
    parts = ("AR transformer", "head")

    def parameters(self, config: RunConfig) -> ParameterCount:
        size = trunk_size_of(config)
        trunk = self.trunk_parameters(config) + linear(config.token_channels, size.width)
        block = block_parameters(size.width, "shared", size.width // size.heads)
        return ParameterCount(trunk, head_parameters(size, config.token_channels), block, quantized_weights(size))

    def training_macs(self, config: RunConfig) -> int:
        """One pass of the transformer, and `flow.token_draws` velocities of every token, each at its own time."""
        size = trunk_size_of(config)
        tokens = config.stage_tokens[-1]
        velocity = head_macs(size, config.token_channels) + time_macs(size.width)
        trunk = self.trunk_macs(config, passes=1) + _ends_macs(size, tokens, config.token_channels)
        return TRAINING_PASSES * (trunk + config.flow.token_draws * tokens * velocity)

    def activations(self, config: RunConfig, precision: str) -> Activations:
        """The trunk with the token projection before it and W_c after it, and the head on every draw of every token."""
        size = trunk_size_of(config)
        channels = config.token_channels
        tokens = config.stage_tokens[-1]
        ends = tokens * (channels + size.width) * number_bytes(precision)
        head = config.flow.token_draws * tokens * head_bytes(size, channels, precision)
        return self.trunk_activations(config, precision) + Activations(rest=ends + head)

    def sampling_macs(self, config: RunConfig) -> int:
        """A pass of the transformer for each group, and the velocity calls of its tokens."""
        size = trunk_size_of(config)
        channels = config.token_channels
        sample = config.sample
        sizes = _group_sizes(config)
        ends = [0, *accumulate(sizes)]
        left = tuple(ends[-1] - end for end in ends)
        scales = masked_guidance_scales(sample.guidance_scale, left, sample.guidance_ramp)
        (calls,) = velocity_calls(config)

        # Each token goes into the network once, except those of the last group.
        fed = ends[-1] - sizes[-1]
        trunk = self.trunk_macs(config, passes=len(sizes)) + fed * channels * size.width + ends[-1] * size.width**2
        flow = sum(
            velocity_evaluations(config, 0, scale) * (after - before) * head_macs(size, channels)
            + calls * time_macs(size.width)
            for (before, after), scale in zip(pairwise(ends), scales, strict=True)
        )
        return guidance_passes(sample.guidance_scale) * trunk + flow

    def serial_calls(self, config: RunConfig) -> int:
        """For each group one pass of the transformer, and then the head's calls, for its tokens together."""
        (calls,) = velocity_calls(config)
        return len(_group_sizes(config)) * (1 + calls)

    def describe_calls(self, config: RunConfig) -> str:
        (calls,) = velocity_calls(config)
        steps = f"{len(_group_sizes(config))} passes of the transformer{_in_groups(config)}"
        return f"{steps} and {calls} calls of the head for each token"

    def build_model(self, config: RunConfig) -> nn.Module:
        from ecar_dist.models.tokens.par import ContinuousPAR

        return ContinuousPAR(trunk_size_of(config), group=config.par.group, **token_network_arguments(config))

    def objective(self, model: nn.Module, normalise: Normalise, config: RunConfig, precision: str) -> Objective:
        from ecar_dist.train.tokens.objectives import GroupedFlowObjective

        return GroupedFlowObjective(model, normalise, config, precision)

    def draw(
        self, model: Any, plan: SamplingPlan, labels: torch.Tensor, indices: torch.Tensor, seed: int
    ) -> list[torch.Tensor]:
        from ecar_dist.sample.tokens.grouped import draw_grouped_tokens

        return draw_grouped_tokens(model, plan, labels, indices, seed)

    def velocities(
        self, model: Any, plan: SamplingPlan, labels: torch.Tensor, indices: torch.Tensor, seed: int
    ) -> list[torch.Tensor]:
        from ecar_dist.sample.tokens.grouped import token_velocities

        return token_velocities(model, plan, labels, indices, seed)


def _group_sizes(config: RunConfig) -> tuple[int, ...]:
    """How many tokens each step draws."""
    return group_sizes(config.stage_tokens[-1], config.par.group)


def _in_groups(config: RunConfig) -> str:
    group = config.par.group
    return "" if group == 1 else f" ({group} of single tokens, then {group} tokens each)"


def _ends_macs(size: TrunkSize, tokens: int, token_channels: int) -> int:
    """The projection of the tokens into the transformer, and W_c after it."""
    return tokens * (token_channels + size.width) * size.width


def _logits_macs(config: RunConfig) -> int:
    return config.stage_tokens[-1] * trunk_size_of(config).width * config.model.codebook_size


# Shared by the kinds with a codebook.


def code_search_macs(config: RunConfig) -> int:
    """The products of every token with every code."""
    return config.stage_tokens[-1] * config.token_channels * config.model.codebook_size


def code_loss_bytes(config: RunConfig) -> int:
    """Kept for the backward pass: log-probabilities of all codes in fp32, and the codes, as inputs and as targets."""
    return config.stage_tokens[-1] * (config.model.codebook_size * FP32 + 2 * INDEX)
