"""Verify an export: loaded like any other, it must compute what the run's own weights compute."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ecar_dist.command_line import counted
from ecar_dist.config.read import load_config
from ecar_dist.config.run import RunConfig
from ecar_dist.errors import CheckpointError
from ecar_dist.runtime.export.files import CONFIG, ExportReader
from ecar_dist.runtime.export.write import Exported
from ecar_dist.runtime.run.directory import RunDirectory
from ecar_dist.sample.generate import generate, velocities
from ecar_dist.sample.load import load_weights
from ecar_dist.sample.sampling_plan import SamplingPlan
from ecar_dist.storage.atomic import write_json

REPORT = "parity.json"
INPUTS = 4
SEED = 0

Outputs = dict[str, list[torch.Tensor]]  # "velocity" and "samples": K of [INPUTS, C, h_k, w_k]


def parity_report(exported: Exported, device: torch.device | None = None) -> str:
    """Compare an export with the weights it was made from. Writes parity.json into it and returns one line.

    It compares the weights, the velocities of a few inputs (the first classes and the null label) and one sample of
    each of the first classes. An fp32 export must be equal to the last bit; if not, it is removed and CheckpointError
    is raised. A bf16 export has rounded weights, and the report states the differences.

    device: where to compute; the CPU by default. One model is in memory at a time.
    """
    # The run's own weights, then those of the export.
    device = device or torch.device("cpu")
    reader = ExportReader(exported.path)
    config = RunDirectory(exported.run).load_config()
    ours = _outputs(config, exported.weights, device)
    theirs = _outputs(load_config(exported.path / CONFIG), reader, device)

    # The largest difference in weights, velocities and samples, stage by stage.
    differences = {"weights": [_weight_difference(exported.weights, reader)]} | {
        name: [_max_difference(a, b) for a, b in zip(values, theirs[name], strict=True)]
        for name, values in ours.items()
    }
    sizes = {name: [float(value.square().mean().sqrt()) for value in values] for name, values in ours.items()}
    worst = {name: _worst(values) for name, values in differences.items()}

    # An fp32 export that differs is removed.
    dtype = reader.facts.dtype
    if dtype == "fp32" and set(worst.values()) != {0.0}:
        shutil.rmtree(exported.path)
        raise CheckpointError(
            f"{exported.path} was removed: {_shown(worst)} from the run, but an fp32 export must be equal; "
            f"check the disk, then export again"
        )

    about = {"dtype": dtype, "inputs": INPUTS, "seed": SEED, "device": device.type, "torch": torch.__version__}
    write_json(exported.path / REPORT, {**about, "max_abs_difference": differences, "rms": sizes})
    if dtype == "fp32":
        stages = counted(len(ours["velocity"]), "stage")
        return f"parity: weights, velocities of {stages} and {INPUTS} samples equal the run's"
    return f"parity: {_shown(worst)} from the run; {sizes['samples'][-1]:.3g} is the rms of a sample"


def _outputs(config: RunConfig, weights: Mapping[str, torch.Tensor], device: torch.device) -> Outputs:
    """Velocities, the last of them with the null label, and one sample of each of the first classes; all in fp32."""
    model = load_weights(config, weights, device)
    plan = dataclasses.replace(SamplingPlan.from_config(config, device), bf16=False)
    indices = torch.arange(INPUTS, device=device)
    labels = indices % config.data.num_classes
    with_null = torch.cat((labels[:-1], labels.new_tensor([config.data.num_classes])))
    return {
        "velocity": velocities(model, plan, with_null, indices, SEED),
        "samples": generate(model, plan, labels, indices, SEED),
    }


def _weight_difference(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> float:
    return _worst(_max_difference(ours[name], theirs[name].float()) for name in ours)


def _max_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max())


def _worst(differences: Iterable[float]) -> float:
    """The largest; NaN if any is NaN, which Python's max would miss."""
    return float(torch.tensor(list(differences), dtype=torch.float64).max())


def _shown(worst: dict[str, Any]) -> str:
    return (
        f"weights differ by {worst['weights']:.3g}, velocities by {worst['velocity']:.3g}, "
        f"samples by {worst['samples']:.3g}"
    )
