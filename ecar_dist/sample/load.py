"""Open a trained model for sampling: the EMA weights of a run's newest intact checkpoint, or an export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ecar_dist.config.read import load_config
from ecar_dist.config.run import RunConfig
from ecar_dist.errors import CheckpointError
from ecar_dist.kinds.table import kind_of
from ecar_dist.runtime.checkpoint.compare import check_identity
from ecar_dist.runtime.checkpoint.files import read_manifest
from ecar_dist.runtime.checkpoint.manifest import Manifest, Progress, flat_identity
from ecar_dist.runtime.export.ema import open_ema_weights
from ecar_dist.runtime.export.files import CONFIG, ExportFacts, ExportReader, is_export
from ecar_dist.runtime.run.directory import RunDirectory
from ecar_dist.vae.build import open_codec
from ecar_dist.vae.codec import LatentCodec


@dataclass(frozen=True)
class TrainedModel:
    """A model ready to sample, and the autoencoder that decodes its latents."""

    config: RunConfig
    model: nn.Module
    codec: LatentCodec
    device: torch.device
    progress: Progress
    source: Path


def open_trained(path: Path, device: torch.device) -> TrainedModel:
    """Open a run directory or an export. Raises CheckpointError or ConfigError if it is neither, or incomplete."""
    # The config, the weights, and what their files say of them.
    weights: Mapping[str, torch.Tensor]
    facts: ExportFacts | Manifest
    if is_export(path):
        config = load_config(path / CONFIG)
        source = path
        weights = reader = ExportReader(path)
        facts = reader.facts
    else:
        config = RunDirectory(path).load_config()
        weights = ema = open_ema_weights(path)
        source = ema.checkpoint
        facts = read_manifest(source)

    # They must be weights of the config's model, trained on latents of the config's autoencoder.
    identity = flat_identity(facts.identity)
    check_identity(source, {key: identity.get(key) for key in config.model_identity}, config.model_identity)
    codec = open_codec(config.vae, device)
    if codec.identity.weights_sha256 != identity.get("encoder.weights_sha256"):
        raise CheckpointError(
            f"{source} was trained on latents of another autoencoder than {codec.identity.name}; point vae.path in "
            f"{path / CONFIG} to the one that encoded them"
        )
    return TrainedModel(config, load_weights(config, weights, device), codec, device, facts.progress, source)


def load_weights(config: RunConfig, weights: Mapping[str, torch.Tensor], device: torch.device) -> nn.Module:
    """The config's model with `weights`, fp32, in eval mode. Raises CheckpointError if they are of another model."""
    # Without memory, then with memory that is not initialised: every number is copied from `weights`.
    with torch.device("meta"):
        model = kind_of(config).build_model(config)
    model = model.to_empty(device=device)
    copy_weights(model, weights)
    return model.eval()


@torch.no_grad()
def copy_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy `weights` into the model one by one, so that memory holds one model and one parameter."""
    parameters = model.state_dict()

    # The same names on both sides.
    unmatched = sorted(parameters.keys() ^ weights.keys())
    if unmatched:
        where = "only in the model" if unmatched[0] in parameters else "only in the weights"
        raise CheckpointError(f"parameter {unmatched[0]} is {where}; the weights are of another model than the config")

    # The same shapes.
    for name, parameter in parameters.items():
        value = weights[name]
        if value.shape != parameter.shape:
            raise CheckpointError(
                f"parameter {name} is {list(value.shape)} in the weights and {list(parameter.shape)} in the model; "
                "the weights are of another model than the config"
            )
        parameter.copy_(value)
