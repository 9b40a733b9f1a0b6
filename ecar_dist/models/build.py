"""From a run's configuration to its model, and the split of its parameters for weight decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ecar_dist.config.run import RunConfig
from ecar_dist.models.dit import DiT
from ecar_dist.models.ecar import ECAR
from ecar_dist.models.mar import MAR
from ecar_dist.models.presets import masked_size_of, preset_of
from ecar_dist.models.pyramid import Pyramid


def build_model(config: RunConfig, context_scales: tuple[float, ...]) -> nn.Module:
    """The model of `config.model.kind`, on torch's default device, its weights drawn from torch's global seed.

    context_scales bring the states that are fed back to unit variance; the kinds that are fed none leave them alone.
    """
    return MODELS[config.model.kind](config, context_scales)


def _common(config: RunConfig) -> dict[str, Any]:
    """What every kind is told."""
    return {
        "latent_channels": config.data.latent_channels,
        "patch_size": config.model.patch_size,
        "num_classes": config.data.num_classes,
        "recompute": config.train.activation_checkpointing,
    }


def _build_ecar(config: RunConfig, context_scales: tuple[float, ...]) -> nn.Module:
    return ECAR(
        preset_of(config),
        stage_sizes=config.stage_sizes,
        context_scales=context_scales,
        feeds_state=config.flow.context.mode != "class_only",
        **_common(config),
    )


def _build_pyramid(config: RunConfig, context_scales: tuple[float, ...]) -> nn.Module:
    return Pyramid(preset_of(config), stage_sizes=config.stage_sizes, **_common(config))


def _build_dit(config: RunConfig, context_scales: tuple[float, ...]) -> nn.Module:
    return DiT(preset_of(config), latent_size=config.data.latent_size, **_common(config))


def _build_mar(config: RunConfig, context_scales: tuple[float, ...]) -> nn.Module:
    return MAR(masked_size_of(config), latent_size=config.data.latent_size, **_common(config))


MODELS: dict[str, Callable[[RunConfig, tuple[float, ...]], nn.Module]] = {
    "ecar": _build_ecar,
    "dit": _build_dit,
    "pyramid": _build_pyramid,
    "mar": _build_mar,
}


def weight_decay_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(decay, no_decay): the matrices of linear maps, and all else (embeddings, biases, norms, offsets)."""
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    decay = [parameter for parameter in model.parameters() if id(parameter) in matrices]
    no_decay = [parameter for parameter in model.parameters() if id(parameter) not in matrices]
    return decay, no_decay
