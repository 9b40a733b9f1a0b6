"""What each `model.kind` weighs and costs, from a run's configuration: one row a kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ecar_dist.config.run import RunConfig
from ecar_dist.flow.guidance import stage_guidance_scales
from ecar_dist.flow.solvers import SOLVERS
from ecar_dist.flow.unmasking import masked_counts, masked_guidance_scales
from ecar_dist.models.presets import masked_size_of, preset_of
from ecar_dist.plan import flops, parameters
from ecar_dist.plan.parameters import ParameterCount


@dataclass(frozen=True)
class Kind:
    """How one kind is counted. MACs are per image; those of training are of forward and backward."""

    parameters: Callable[[RunConfig], ParameterCount]
    training_macs: Callable[[RunConfig], int]
    sampling_macs: Callable[[RunConfig], int]  # with the solver and the guidance of config.sample
    parts: tuple[str, str]  # what ParameterCount.ar and .flow are called; "" is not there
    calls: Callable[[RunConfig], str]  # how the network is called to sample, in words


def token_channels(config: RunConfig) -> int:
    """Numbers in one patch: C p^2."""
    return config.data.latent_channels * config.model.patch_size**2


def calls_per_stage(config: RunConfig) -> int:
    """Velocities that the solver asks for in a stage; in `mar`, for a token."""
    return config.sample.steps_per_stage * SOLVERS[config.sample.solver].calls_per_step


def _feeds_state(config: RunConfig) -> bool:
    return config.flow.context.mode != "class_only"


def _stage_scales(config: RunConfig) -> tuple[float, ...]:
    return stage_guidance_scales(config.sample.guidance_scale, config.flow.num_stages, config.sample.guidance_ramp)


def _stage_calls(config: RunConfig) -> tuple[int, ...]:
    return (calls_per_stage(config),) * config.flow.num_stages


def _ecar_parameters(config: RunConfig) -> ParameterCount:
    return parameters.ecar_parameters(
        preset_of(config),
        config.stage_tokens,
        token_channels(config),
        config.data.num_classes,
        feeds_state=_feeds_state(config),
    )


def _ecar_training_macs(config: RunConfig) -> int:
    return flops.ecar_training_macs(
        preset_of(config), config.stage_tokens, token_channels(config), feeds_state=_feeds_state(config)
    )


def _ecar_sampling_macs(config: RunConfig) -> int:
    return flops.ecar_sampling_macs(
        preset_of(config),
        config.stage_tokens,
        token_channels(config),
        _stage_calls(config),
        guidance_scales=_stage_scales(config),
        feeds_state=_feeds_state(config),
    )


def _stage_words(config: RunConfig) -> str:
    stages = config.flow.num_stages
    where = f"in each of {stages} stages" if stages > 1 else "in one stage"
    return f"{calls_per_stage(config)} velocity calls {where}"


def _pyramid_parameters(config: RunConfig) -> ParameterCount:
    stages = config.flow.num_stages
    return ParameterCount(
        0, parameters.velocity_parameters(preset_of(config), stages, token_channels(config), config.data.num_classes)
    )


def _pyramid_training_macs(config: RunConfig) -> int:
    return flops.pyramid_training_macs(preset_of(config), config.stage_tokens, token_channels(config))


def _pyramid_sampling_macs(config: RunConfig) -> int:
    return flops.pyramid_sampling_macs(
        preset_of(config),
        config.stage_tokens,
        token_channels(config),
        _stage_calls(config),
        guidance_scales=_stage_scales(config),
    )


def _masked_counts(config: RunConfig) -> tuple[int, ...]:
    return masked_counts(config.stage_tokens[-1], config.sample.ar_steps)


def _mar_parameters(config: RunConfig) -> ParameterCount:
    return parameters.mar_parameters(
        masked_size_of(config), config.stage_tokens[-1], token_channels(config), config.data.num_classes
    )


def _mar_training_macs(config: RunConfig) -> int:
    return flops.mar_training_macs(
        masked_size_of(config), config.stage_tokens[-1], token_channels(config), config.flow.token_draws
    )


def _mar_sampling_macs(config: RunConfig) -> int:
    counts, sample = _masked_counts(config), config.sample
    return flops.mar_sampling_macs(
        masked_size_of(config),
        token_channels(config),
        counts,
        calls_per_stage(config),
        guidance_scales=masked_guidance_scales(sample.guidance_scale, counts, sample.guidance_ramp),
    )


def _masked_words(config: RunConfig) -> str:
    steps = len(_masked_counts(config)) - 1
    return f"{steps} passes of the trunk and {calls_per_stage(config)} calls of the head for each token"


_PYRAMID = Kind(
    _pyramid_parameters, _pyramid_training_macs, _pyramid_sampling_macs, ("", "velocity network"), _stage_words
)
KINDS: dict[str, Kind] = {
    "ecar": Kind(_ecar_parameters, _ecar_training_macs, _ecar_sampling_macs, ("AR", "velocity network"), _stage_words),
    "dit": _PYRAMID,
    "pyramid": _PYRAMID,
    "mar": Kind(_mar_parameters, _mar_training_macs, _mar_sampling_macs, ("trunk", "head"), _masked_words),
}


def parameter_count(config: RunConfig) -> ParameterCount:
    """Parameters of the run's model, equal to those of the built module."""
    return KINDS[config.model.kind].parameters(config)


def training_macs(config: RunConfig) -> int:
    """MACs of forward and backward for one image of this run."""
    return KINDS[config.model.kind].training_macs(config)


def sampling_macs(config: RunConfig) -> int:
    """MACs for one image with the solver and the guidance of `config.sample`."""
    return KINDS[config.model.kind].sampling_macs(config)
