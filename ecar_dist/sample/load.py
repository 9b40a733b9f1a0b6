"""Open a trained model for sampling: weights of a checkpoint, by default a run's newest intact one, or an export."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ecar_dist.config.read import load_config
from ecar_dist.config.run import RunConfig
from ecar_dist.errors import CheckpointError, ConfigError
from ecar_dist.kinds.table import kind_of
from ecar_dist.quantize.layers import quantizable, shaped_like
from ecar_dist.runtime.checkpoint.compare import check_identity
from ecar_dist.runtime.checkpoint.files import has_marker, read_manifest, verify
from ecar_dist.runtime.checkpoint.inspect import fetch_step
from ecar_dist.runtime.checkpoint.manifest import Manifest, Progress, flat_identity
from ecar_dist.runtime.checkpoint.storage import open_ema_storage, open_storage
from ecar_dist.runtime.export.ema import WantedEma, open_ema_weights
from ecar_dist.runtime.export.files import CONFIG, ExportFacts, ExportReader, Quantization, is_export
from ecar_dist.runtime.export.names import CLASS_NAMES, class_names
from ecar_dist.runtime.run.directory import RunDirectory
from ecar_dist.sample.fast import prepare
from ecar_dist.sample.generate import generate_in_batches
from ecar_dist.sample.labels import ClassNames
from ecar_dist.sample.options import with_settings
from ecar_dist.sample.preview import StripPreview
from ecar_dist.sample.sampling_plan import SamplingPlan
from ecar_dist.storage.untrusted import printable
from ecar_dist.vae.build import open_codec
from ecar_dist.vae.codec import LatentCodec


@dataclass(frozen=True)
class TrainedModel:
    """A model ready to sample, and the autoencoder that decodes its latents.

    source: the checkpoint or the export that the weights are from.
    home: the run directory or the export.
    weights: name of the weights, such as `ema`.
    dataset_ids: IDs of the sets of latents that it was trained on.
    """

    config: RunConfig
    model: nn.Module
    codec: LatentCodec
    device: torch.device
    progress: Progress
    source: Path
    home: Path
    weights: str
    classes: ClassNames
    dataset_ids: tuple[str, ...] = ()

    def with_settings(self, settings: Mapping[str, Any]) -> TrainedModel:
        """The same model with other values of `sample.*`. Raises ConfigError."""
        return dataclasses.replace(self, config=with_settings(self.config, settings))

    def draw(
        self, labels: Sequence[int], seed: int, batch_size: int, *, compiles: bool = False
    ) -> Iterator[list[torch.Tensor]]:
        """Every stage of sample 0, 1, 2, ... of a seed, batch by batch: K of [B, C, h_k, w_k].

        Errors are raised by this call, not by the first batch.
        """
        plan = SamplingPlan.from_config(self.config, self.device)
        model = prepare(self.model, plan, self.device, compiles=compiles)
        wanted = torch.tensor(labels, device=self.device)
        return generate_in_batches(model, plan, wanted, seed, batch_size, fill=compiles)


def open_trained(path: Path, device: torch.device, *, step: int | None = None, ema: str | None = None) -> TrainedModel:
    """Open a run directory, a checkpoint of a run, or an export.

    step: step of the checkpoint or EMA snapshot to use (default: the newest intact checkpoint).
    ema: which weights, see `WantedEma.parse` (default: the first EMA).

    Raises CheckpointError or ConfigError if `path` is none of these, is incomplete, or does not contain these weights.
    """
    # The config, the weights, and what their files say about them.
    weights: Mapping[str, torch.Tensor]
    facts: ExportFacts | Manifest
    quantization = None
    home = path
    if is_export(path):
        if step is not None or ema is not None:
            raise ConfigError(f"{path} is an export, which has one set of weights; leave --step and --ema out")
        config = load_config(path / CONFIG)
        source = path
        weights = reader = ExportReader(path)
        facts = reader.facts
        quantization = facts.quantization
        name = reader.facts.average.get("kind", "ema")
        named = reader.facts.class_names
    else:
        home, checkpoint = find_weights(path, step)
        config = RunDirectory(home).load_config()
        weights = found = open_ema_weights(home, WantedEma.parse(ema) if ema else WantedEma(), checkpoint)
        source = found.checkpoint
        facts = read_manifest(source)
        name = ema or found.facts["kind"]
        named = facts.client_state.get(CLASS_NAMES)

    # They must be weights of the config's model, trained on latents of the config's autoencoder.
    identity = flat_identity(facts.identity)
    check_identity(source, {key: identity.get(key) for key in config.model_identity}, config.model_identity)
    codec = open_codec(config.vae, device)
    if codec.identity.weights_sha256 != identity.get("encoder.weights_sha256"):
        raise CheckpointError(
            f"{source} was trained on latents of an autoencoder other than {codec.identity.name}; point vae.path in "
            f"{home / CONFIG} to the one that encoded them"
        )
    model = load_weights(config, weights, device, quantization)
    classes = ClassNames(config.data.num_classes, class_names(config, named))
    ids = tuple(map(str, identity.get("dataset_ids") or ()))
    return TrainedModel(config, model, codec, device, facts.progress, source, home, name, classes, ids)


def draw_preview(run: Path, step: int, device: torch.device) -> np.ndarray:
    """The strip that training draws after a step, uint8 [H, W, 3], from the checkpoint or EMA snapshot of that step.

    On the same kind of device it equals training's own strip bit for bit. Raises what `open_trained` raises.
    """
    trained = open_trained(run, device, step=step)
    config = trained.config

    # As in training: weights in the run's precision, and an autoencoder on the CPU unless it encodes on the device.
    bf16 = config.precision_on(device.type) == "bf16"
    model = trained.model.bfloat16() if bf16 else trained.model
    encodes = config.data.images is not None
    dtype = torch.bfloat16 if encodes and bf16 else torch.float32
    preview = StripPreview(config, open_codec(config.vae, device if encodes else "cpu", dtype), device)
    return preview.picture(preview.draw(model))


def find_weights(path: Path, step: int | None) -> tuple[Path, Path | None]:
    """The run directory, and the checkpoint that was requested by folder or by step; None stands for the newest.

    Raises ConfigError if `path` is neither a run directory nor a checkpoint in one. Raises CheckpointError if the
    checkpoint is damaged, or if there is none of this step.
    """
    # A checkpoint folder, inside the checkpoints folder of a run.
    if has_marker(path):
        run = path.absolute().parent.parent
        if step is not None:
            raise ConfigError(f"{path} is a single checkpoint; leave --step out, or give {run}")
        if not RunDirectory(run).config.exists():
            raise ConfigError(
                f"{path} is a checkpoint, but {run} contains no config.yaml; give the run directory, and the "
                "checkpoint with --step"
            )
        verify(path)
        return run, path

    # A run: a step may also be that of an EMA snapshot.
    config = RunDirectory(path).load_config()
    if step is None:
        return path, None
    return path, fetch_step(step, open_storage(config, path), open_ema_storage(config, path))


def load_weights(
    config: RunConfig,
    weights: Mapping[str, torch.Tensor],
    device: torch.device,
    quantization: Quantization | None = None,
) -> nn.Module:
    """The config's model with `weights`, in eval mode: fp32, but integers in the layers that `quantization` lists.

    Raises CheckpointError if they belong to a different model.
    """
    # First without memory, then with uninitialised memory: every number is copied from `weights`.
    with torch.device("meta"):
        model = kind_of(config).build_model(config)
        if quantization is not None:
            _prepare_quantized(model, quantization)
    model = model.to_empty(device=device)
    copy_weights(model, weights)
    return model.eval()


def _prepare_quantized(model: nn.Module, quantization: Quantization) -> None:
    layers = {name: (layer.weights, layer.rotated) for name, layer in quantization.layers.items()}
    if unknown := sorted(layers.keys() - quantizable(model).keys()):
        raise CheckpointError(
            f"layer {printable(unknown[0])} is quantised in the weights, but this version does not quantise it; the "
            "weights do not match the model of the config"
        )
    shaped_like(model, layers)


@torch.no_grad()
def copy_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy `weights` into the model one by one, so that memory holds one model and one parameter."""
    parameters = model.state_dict()

    # The same names on both sides.
    unmatched = sorted(parameters.keys() ^ weights.keys())
    if unmatched:
        where = "only in the model" if unmatched[0] in parameters else "only in the weights"
        raise CheckpointError(f"parameter {unmatched[0]} is {where}; the weights do not match the model of the config")

    # The same shapes.
    for name, parameter in parameters.items():
        value = weights[name]
        if value.shape != parameter.shape:
            raise CheckpointError(
                f"parameter {name} is {list(value.shape)} in the weights and {list(parameter.shape)} in the model; "
                "the weights do not match the model of the config"
            )
        parameter.copy_(value)
