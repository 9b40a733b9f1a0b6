"""The README.md of an export, its model card: every number comes from the run."""

from __future__ import annotations

import math
from typing import Any

from ecar_dist.command_line import counted
from ecar_dist.kinds.table import KINDS
from ecar_dist.storage.untrusted import printable

_FRONT_MATTER = """\
---
library_name: ecar_dist
tags:
- {kind}
- image-generation
- class-conditional
- flow-matching
# license: the owner of the weights must choose one before they are passed on
---
"""
_NOT_MEASURED = """\
Everything else, for example other guidance scales and solvers, memorisation of the training data, bias, and fitness for
a purpose."""
_SETTINGS = ("guidance_scale", "seed", "samples", "train", "heldout", "samples_seen")  # of a measurement, not scores


def model_card(facts: dict[str, Any], scores: dict[str, Any] | None) -> str:
    """Markdown with the hub's front matter. `facts` is the export's config.json, `scores` the run's scores.json."""
    config = facts["config"]
    sections = [
        f"# {config['run']['name']}",
        _what(facts),
        "## How it was trained\n\n" + _table(_training(facts)),
        *_quantization(facts),
        _sampling(config, "parity.json" if "quantization" not in facts else "quantization.json"),
        "## What was measured\n\n" + _measured(facts, scores),
        f"## What was not measured\n\n{_NOT_MEASURED}",
    ]
    return _FRONT_MATTER.format(kind=facts["model_type"]) + "\n" + "\n\n".join(sections) + "\n"


def _what(facts: dict[str, Any]) -> str:
    config = facts["config"]
    model = facts["model"]
    sides = " -> ".join(f"{side}x{side}" for side in model["stage_sizes"])
    pixels = config["data"]["latent_size"] * config["vae"]["downsample"]
    return (
        f"A class-conditional image generator ({KINDS[facts['model_type']].title}, preset {model['preset']}, "
        f"{model['parameters']:,} parameters) for {config['data']['num_classes']} classes. It samples latents of "
        f"{pixels}x{pixels} pixel images in {counted(len(model['stage_sizes']), 'stage')}, {sides}, and an autoencoder "
        f"decodes them ({_autoencoder(facts)}; it is not part of these files).\n\n"
        f"The weights are {facts['dtype']}: {_ema(facts['average'])}."
    )


def _autoencoder(facts: dict[str, Any]) -> str:
    vae = facts["config"]["vae"]
    return f"`{vae['path']}`, kind {vae['kind']}" if vae["path"] else f"kind {vae['kind']}, which has no weights"


def _ema(average: dict[str, Any]) -> str:
    if average["kind"] == "raw":
        return "those of the last step, without an EMA"

    # Which EMA: described only by the checkpoint, or by its settings.
    if "meaning" in average:
        form = f"an EMA of the weights ({average['meaning']})"
    elif "sigma_rel" in average:
        form = f"a power-function EMA with relative width {average['sigma_rel']}"
    else:
        form = f"an EMA with a half-life of {average['half_life_samples']:,} samples"
        form += f", capped at {average['rampup']:g} of the samples seen"

    # Only a rebuilt EMA has a residual.
    if "relative_residual" not in average:
        return f"{form}, kept during training"
    return (
        f"{form}, rebuilt after training from {average['snapshots']} EMA snapshots "
        f"(relative residual of its profile {average['relative_residual']:.2%})"
    )


def _training(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    config = facts["config"]
    source = facts["source"]
    progress = facts["progress"]
    return [
        ("samples seen", f"{progress['samples_seen']:,} of {config['train']['total_samples']:,} planned"),
        ("optimizer steps", f"{progress['step']:,}"),
        ("data set ids", ", ".join(f"`{name}`" for name in source["dataset_ids"]) or "not recorded"),
        ("global batch size", config["batch"]["global_batch_size"]),
        ("peak learning rate", f"{config['optim']['learning_rate']:g} ({config['optim']['schedule']})"),
        ("ranks", f"{source['world_size']}, ZeRO-{source['zero_stage']} (at the exported checkpoint)"),
        ("precision", source["precision"]),
        ("attempts", source["attempts"]),
        ("versions", ", ".join(f"{name} {value}" for name, value in facts["versions"].items())),
    ]


def _quantization(facts: dict[str, Any]) -> list[str]:
    """A section for quantised exports only."""
    about = facts.get("quantization")
    if about is None:
        return []
    bits = {name: layer["weights"] for name, layer in about["layers"].items()}
    rows: list[tuple[str, Any]] = [
        (f"layers with {each} bits", list(bits.values()).count(each)) for each in sorted(set(bits.values()))
    ]
    rows += [("bits of activations", about["activations"]), ("bits per weight", f"{about['mean_bits']:.3g}")]
    rows += [(printable(name), "equal" if value is None else f"{value:.4g}") for name, value in about["paired"].items()]
    what = (
        "After training, with `ecar-dist quantize`. The other layers are not quantised. The paired numbers compare "
        "samples from the same noise, before and after."
    )
    return [f"## How it was quantised\n\n{what}\n\n{_table(rows)}"]


def _sampling(config: dict[str, Any], report: str) -> str:
    sample = config["sample"]
    shift = f", time shift {sample['time_shift']:g}," if sample["time_shift"] != 1.0 else ""
    return (
        "## How to sample\n\n"
        "```sh\necar-dist sample PATH/TO/THIS/FOLDER --labels 0,1,2 --count 24 --out samples\n```\n\n"
        f"By default {_steps(sample['steps_per_stage'])} {sample['solver']} steps per stage{shift} and guidance scale "
        f"{sample['guidance_scale']:g} ({sample['guidance_ramp']}). `vae.path` in config.yaml says where the "
        f"autoencoder is; point it to your copy. `{report}` compares these files with the run."
    )


def _steps(steps_per_stage: list[int]) -> str:
    """`8`, or from coarse to fine `4, 8 and 16`."""
    *first, last = map(str, steps_per_stage)
    return f"{', '.join(first)} and {last}" if first else last


def _measured(facts: dict[str, Any], scores: dict[str, Any] | None) -> str:
    numbers = {name: value for name, value in (scores or {}).items() if _is_number(value) and name not in _SETTINGS}
    if not scores or not numbers:
        return "Nothing: the run has no scores.json (see `ecar-dist evaluate`)."

    # Scores belong to the exported weights only at the same progress, for the first EMA, in fp32.
    seen = scores.get("samples_seen")
    same = (
        seen == facts["progress"]["samples_seen"]
        and facts["average"]["kind"] == scores.get("weights", "ema")
        and facts["dtype"] == "fp32"
    )
    weights = "these weights" if same else "other weights of the run, not exactly these weights"
    settings = ", ".join(printable(f"{name}={scores[name]}") for name in _SETTINGS[:-1] if name in scores)
    about = f"Of {weights}, at {printable(str(seen))} samples seen, with {settings} (`ecar-dist evaluate`)"
    rows = [(printable(name), f"{value:.6g}") for name, value in numbers.items()]
    return f"{about}:\n\n{_table(rows)}"


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)


def _table(rows: list[tuple[str, Any]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
