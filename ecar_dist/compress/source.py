"""The model that is quantised: its weights, and what its files say about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from ecar_dist.compress.calibration import weights_digest
from ecar_dist.config.read import load_config
from ecar_dist.config.run import RunConfig
from ecar_dist.errors import CheckpointError, ConfigError
from ecar_dist.quantize.layers import quantizable
from ecar_dist.runtime.export.ema import WantedEma, open_ema_weights
from ecar_dist.runtime.export.files import CONFIG, FACTS, is_export, read_facts
from ecar_dist.runtime.export.write import export_facts, without_credentials
from ecar_dist.runtime.run.directory import RunDirectory
from ecar_dist.sample.load import TrainedModel, find_weights, open_trained
from ecar_dist.storage.untrusted import MAX_JSON_BYTES, parse_object, read_plain_file

Precision = Literal["fp32", "bf16"]


def open_source(path: Path, device: torch.device, *, step: int | None, ema: str | None) -> TrainedModel:
    """Like `open_trained`. Raises ConfigError for a model that is already quantised, or has nothing to quantise."""
    if is_export(path) and read_facts(path).quantization is not None:
        raise ConfigError(f"{path} is quantised already; give the run or the export that it was made from")
    trained = open_trained(path, device, step=step, ema=ema)
    if not quantizable(trained.model):
        raise ConfigError(f"model.kind={trained.config.model.kind} has no layers to quantise; leave it as it is")
    return trained


def belongs_to(trained: TrainedModel) -> dict[str, str]:
    """What a calibration and a sensitivity belong to: weights, data set, and settings of the sampler."""
    sample = trained.config.sample.model_dump(mode="json", exclude={"every_samples"})
    return {
        "data set": ", ".join(trained.dataset_ids) or "not recorded",
        "weights": weights_digest(trained.model.state_dict().items()),
        "sampler": ", ".join(f"{name}={value}" for name, value in sorted(sample.items())),
    }


def facts_of(
    path: Path, *, step: int | None, ema: str | None, dtype: Precision | None
) -> tuple[RunConfig, dict[str, Any]]:
    """Config and config.json of an export; for a run, those that its export would have, without weight files.

    dtype: of the layers that are not quantised; None: that of the export, or fp32 for a run.
    """
    if is_export(path):
        facts = parse_object(read_plain_file(path / FACTS, MAX_JSON_BYTES))
        return load_config(path / CONFIG), {**facts, "dtype": dtype or facts["dtype"]}
    run, checkpoint = find_weights(path, step)
    directory = RunDirectory(run)
    config = without_credentials(directory.load_config())
    weights = open_ema_weights(run, WantedEma.parse(ema) if ema else WantedEma(), checkpoint)
    return config, export_facts(directory, config, weights, dtype or "fp32", [])


def check_out(out: Path) -> None:
    """Raises CheckpointError if `out` already exists."""
    if out.exists():
        raise CheckpointError(f"{out} exists already; choose another folder, or remove it")
