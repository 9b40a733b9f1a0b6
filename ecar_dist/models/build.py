"""From a run's configuration to its model, and the split of its parameters for weight decay."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ecar_dist.config import RunConfig
from ecar_dist.models.ecar import ECAR
from ecar_dist.models.presets import PRESETS


def build_model(config: RunConfig, context_scales: tuple[float, ...]) -> ECAR:
    """The model of `config.model.kind`, on torch's default device, its weights drawn from torch's global seed."""
    return MODELS[config.model.kind](config, context_scales)


def _build_ecar(config: RunConfig, context_scales: tuple[float, ...]) -> ECAR:
    return ECAR(
        PRESETS[config.model.preset],
        stage_sizes=config.stage_sizes,
        latent_channels=config.data.latent_channels,
        patch_size=config.model.patch_size,
        num_classes=config.data.num_classes,
        context_scales=context_scales,
        feeds_state=config.flow.context.mode != "class_only",
        recompute=config.train.activation_checkpointing,
    )


MODELS: dict[str, Callable[[RunConfig, tuple[float, ...]], ECAR]] = {"ecar": _build_ecar}


def weight_decay_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(decay, no_decay): the matrices of linear maps, and all else (embeddings, biases, norms, offsets)."""
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    decay = [parameter for parameter in model.parameters() if id(parameter) in matrices]
    no_decay = [parameter for parameter in model.parameters() if id(parameter) not in matrices]
    return decay, no_decay
