"""Open a trained model for sampling: the EMA weights of a run's newest whole checkpoint, or an export."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ecar_dist.config import RunConfig
from ecar_dist.config_file import load_config
from ecar_dist.errors import CheckpointError
from ecar_dist.flow.schedule import StageSchedule
from ecar_dist.models.build import build_model
from ecar_dist.models.ecar import ECAR
from ecar_dist.runtime.checkpoint_files import FragmentReader, Progress, check_identity, newest, read_manifest
from ecar_dist.runtime.export import EXPORT_FACTS, EXPORT_WEIGHTS
from ecar_dist.runtime.run_directory import RunDirectory
from ecar_dist.vae.build import open_codec
from ecar_dist.vae.codec import LatentCodec


@dataclass(frozen=True)
class TrainedModel:
    """A model ready to sample, and the autoencoder whose latents it draws."""

    config: RunConfig
    model: ECAR
    codec: LatentCodec
    device: torch.device
    progress: Progress
    source: Path


def open_trained(path: Path, device: torch.device) -> TrainedModel:
    """`path` is a run directory or an export. Raises CheckpointError or ConfigError where it is not, or not whole."""
    if (path / EXPORT_FACTS).exists():
        source, facts = path, json.loads((path / EXPORT_FACTS).read_text())
        config, weights = load_config(path / "config.yaml"), _read_export(path / EXPORT_WEIGHTS)
    else:
        config = RunDirectory(path).load_config()
        source = newest(RunDirectory(path).checkpoints)
        facts, reader = read_manifest(source), FragmentReader(source)
        weights = {name: reader.full("ema", name) for name in reader.shapes}
    identity = facts["identity"]
    check_identity(source, {key: identity.get(key) for key in config.model_identity}, config.model_identity)
    codec = open_codec(config.vae, device)
    if codec.identity.weights_sha256 != identity["encoder.weights_sha256"]:
        raise CheckpointError(
            f"{source} was trained on latents of another autoencoder than {codec.identity.name}; point vae.path in "
            f"{path / 'config.yaml'} to the one that encoded them"
        )
    model = load_weights(config, weights, device)
    return TrainedModel(config, model, codec, device, Progress(**facts["progress"]), source)


def _read_export(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path} ({error}); export the run again") from None


def load_weights(config: RunConfig, weights: dict[str, torch.Tensor], device: torch.device) -> ECAR:
    """A model in eval mode that holds `weights`, fp32."""
    schedule = StageSchedule(config.flow.resolved_ends, config.flow.gamma)
    model = build_model(config, schedule.context_scales(config.flow.context.tau))
    model.load_state_dict(weights)
    return model.to(device).eval()
