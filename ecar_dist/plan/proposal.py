"""`ecar-dist init`: a commented first config for a set of latents, from its manifest and the hardware of this machine.

What the manifest states is copied. The rest are rules of thumb from the runs of this project: they give a first result,
not the best one. Does not import torch.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ecar_dist.command_line import counted
from ecar_dist.config.read import config_from_dict
from ecar_dist.config.run import RunConfig
from ecar_dist.data.fit import check_fits
from ecar_dist.data.images.names import readable
from ecar_dist.data.prepared import PreparedLatents
from ecar_dist.errors import DataError
from ecar_dist.kinds.flops import FLOPS_PER_MAC
from ecar_dist.kinds.table import kind_of
from ecar_dist.plan.memory import RESERVE, device_memory
from ecar_dist.runtime.devices import DEVICES
from ecar_dist.storage.bounded_yaml import parse_yaml
from ecar_dist.vae.table import CODECS

# The largest preset for each number of samples on a GPU, and learning rates that were stable at these sizes.
PRESETS_BY_SAMPLES = ((0, "T"), (4_000, "S"), (100_000, "B"), (500_000, "L"), (1_000_000, "XL"))
LEARNING_RATES = {"T": 1.5e-3, "S": 4e-4, "B": 2e-4}
SMALLEST_LEARNING_RATE = 1e-4  # of all larger presets

GPU_EPOCHS = 100
GPU_SAMPLES = (200_000, 100_000_000)  # the shortest and the longest run on a GPU
CPU_FLOPS = 25e9  # FLOP/s that preset T reached on one or two cores
CPU_SECONDS = 300.0
CPU_SAMPLES = (6_400, 102_400)
SMALLEST_MICRO_BATCH = 8  # if not even this fits, a smaller preset is chosen
SHOWN_CLASSES = 20
_SMI = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]


@dataclass(frozen=True)
class Hardware:
    """What a first run is fitted to. `memory`: bytes of one GPU, 0 for a CPU."""

    name: str
    memory: int = 0

    @staticmethod
    def named(name: str) -> Hardware:
        """`cpu`, a known GPU such as `H100`, or `auto`: the first GPU that nvidia-smi lists, else the CPU."""
        if name in DEVICES:
            return Hardware(name, DEVICES[name].memory)
        return (name == "auto" and _first_gpu()) or Hardware("CPU")


def propose_config(found: PreparedLatents, hardware: Hardware, *, name: str, preset: str | None = None) -> str:
    """The text of a config that `check` accepts. Raises DataError for latents that no model here can learn."""
    if len(set(found.manifest.moments_shape[1:])) > 1:
        height, width = found.manifest.moments_shape[1:]
        raise DataError(f"{found.folder} has latents of {height} x {width}, the models need squares; encode squares")

    # Presets, from the largest that suits the number of samples downwards, until a micro-batch fits in memory.
    fitting = [row for least, row in PRESETS_BY_SAMPLES if found.manifest.count >= least] if hardware.memory else ["T"]
    for row in [preset] if preset else reversed(fitting):
        chosen = _choose(found, hardware, name, row)
        text = _text(found, hardware, chosen)
        config = config_from_dict(parse_yaml(text))
        fits = _largest_micro_batch(config, hardware) if hardware.memory else chosen["micro"]
        if fits >= min(SMALLEST_MICRO_BATCH, chosen["micro"]):
            break

    # A smaller micro-batch of the same global batch, if memory requires it.
    while chosen["micro"] > max(1, fits):
        chosen["micro"] //= 2
    text = _text(found, hardware, chosen)
    check_fits(config_from_dict(parse_yaml(text)), [(found.folder, found.manifest)])
    return text


def _choose(found: PreparedLatents, hardware: Hardware, name: str, preset: str) -> dict[str, Any]:
    """The values that are not copied from the manifest."""
    count = found.manifest.count
    side = found.manifest.moments_shape[-1]
    patch, stages = _stages(side, found.manifest.encoder["downsample"])
    chosen: dict[str, Any] = {"name": name, "preset": preset, "patch": patch, "stages": stages}
    chosen["learning_rate"] = LEARNING_RATES.get(preset, SMALLEST_LEARNING_RATE)
    chosen["guidance"] = 1.5 if found.manifest.num_classes > 1 else 1.0

    # The batch: at least eight steps an epoch.
    largest = 64 if not hardware.memory or count < 20_000 else 256
    batch = max([size for size in (8, 16, 32, 64, 128, 256) if size <= largest and size * 8 <= count], default=8)
    chosen |= {"batch": batch, "micro": batch // 2 if batch <= 64 else 32}

    # The length of the run, in whole steps; the intervals follow from it.
    if hardware.memory:
        wanted = _within(GPU_SAMPLES, GPU_EPOCHS * count)
    else:
        wanted = _within(CPU_SAMPLES, CPU_SECONDS * CPU_FLOPS / _flops_per_sample(found, chosen))
    total = max(1, round(wanted / (20 * batch))) * 20 * batch
    return chosen | {"total": total, "fifth": total // 5, "tenth": total // 10, "warmup": total // 20}


def _stages(side: int, downsample: int) -> tuple[int, int]:
    """Side of a token, and number of stages, for latents of `side`: three stages if `side` is divisible.

    Pixels get larger tokens than the latents of an autoencoder, which has already merged several pixels into one.
    """
    patch = 4 if downsample == 1 and side % 16 == 0 else 2 if side % 8 == 0 else 1
    stages = max(k for k in (1, 2, 3) if side % (patch << (k - 1)) == 0)
    return patch, stages


def _within(limits: tuple[int, int], value: float) -> float:
    return min(max(limits[0], value), limits[1])


def _flops_per_sample(found: PreparedLatents, chosen: Mapping[str, Any]) -> int:
    """FLOPs of the forward and backward pass."""
    trial = dict(chosen) | {"total": 20, "fifth": 4, "tenth": 2, "warmup": 1}
    config = config_from_dict(parse_yaml(_text(found, Hardware("CPU"), trial)))
    return FLOPS_PER_MAC * kind_of(config).training_macs(config)


def _largest_micro_batch(config: RunConfig, hardware: Hardware) -> int:
    memory = device_memory(config, 1, zero_stage=config.deepspeed.zero_stage, compiled=False, recompute=False)
    return memory.largest_micro_batch(hardware.memory - RESERVE)


def _text(found: PreparedLatents, hardware: Hardware, chosen: Mapping[str, Any]) -> str:
    manifest, encoder = found.manifest, found.manifest.encoder
    channels, (height, width) = encoder["latent_channels"], manifest.moments_shape[1:]
    path = f", path: {_scalar(found.vae)}" if CODECS[encoder["kind"]].needs_path else ""
    steps = chosen["total"] // chosen["batch"]
    epochs = chosen["total"] / manifest.count

    # The data to score against, if there is any.
    scored = [("train_images", found.train_images), ("heldout_images", found.heldout_images)]
    scored += [("heldout_latents", found.heldout_latents)]
    images = "".join(f"  {key}: {_scalar(folder)}\n" for key, folder in scored if folder)
    images = (
        images
        or "  # train_images, heldout_images: image shards for `ecar-dist evaluate`; heldout_latents: for validation\n"
    )
    return f"""\
# ECAR on {readable(found.folder)}: {counted(manifest.count, "sample")}, latents of {channels} x {height} x {width}
# Written by `ecar-dist init` for this hardware: {hardware.name}. docs/config.md explains every key.
# Command: ecar-dist train mine.yaml   (the same command resumes; see the arithmetic with ecar-dist check mine.yaml)
run: {{name: {_scalar(chosen["name"])}, dir: runs}} # a new name begins a new run
model:
  kind: ecar
  preset: {chosen["preset"]} # T and S for small data, B, L, XL for more
  patch_size: {chosen["patch"]} # side of a token, in latent pixels
flow:
  num_stages: {chosen["stages"]} # latents of {_sides(width, chosen["stages"])}

# Facts from the manifest: other values are refused.
vae: {{kind: {encoder["kind"]}{path}, downsample: {encoder["downsample"]}}}
data:
  latents: {_scalar(found.folder)}
  num_classes: {manifest.num_classes}{_class_comment(manifest.class_names)}
  latent_channels: {channels}
  latent_size: {width}
{images}
# Choices that fit {counted(manifest.count, "sample")}.
batch:
  global_batch_size: {chosen["batch"]} # samples of an optimizer step, over all ranks
  micro_batch_size: {chosen["micro"]} # samples that a rank computes at once: halve it if memory runs out
optim: {{learning_rate: {chosen["learning_rate"]:g}, schedule: cosine, warmup_samples: {chosen["warmup"]}}}
ema: {{half_life_samples: {chosen["tenth"]}}} # a tenth of the run
deepspeed: {{zero_stage: 2, precision: auto}} # auto: bf16 on a GPU, fp32 on a CPU
train:
  validate_every_samples: {chosen["fifth"]} # the loss on data.heldout_latents
  total_samples: {chosen["total"]} # {counted(steps, "step")}, {epochs:.1f} epochs; raise it and repeat the command
checkpoint: {{every_samples: {chosen["fifth"]}}}
sample:
  guidance_scale: {chosen["guidance"]}
  every_samples: {chosen["fifth"]} # previews, in samples/ of the run
log: {{every_steps: {max(1, steps // 50)}}}
"""


def _sides(side: int, stages: int) -> str:
    return ", ".join(f"{side >> k} x {side >> k}" for k in reversed(range(stages)))


def _scalar(text: str) -> str:
    """A string as YAML: plain if it is read back as the same string, quoted otherwise."""
    if re.fullmatch(r"[\w./~-]+", text) and parse_yaml(text) == text:
        return text
    return json.dumps(text, ensure_ascii=False)


def _class_comment(names: list[str]) -> str:
    """`# 0 cat, 1 dog`."""
    shown = [f"{label} {readable(name):.40}" for label, name in enumerate(names[:SHOWN_CLASSES])]
    return " # " + ", ".join(shown) + (", ..." if len(names) > SHOWN_CLASSES else "")


def run_name(folder: str) -> str:
    """A valid `run.name` from the name of a folder."""
    parts = [part for part in re.split(r"[/\\]", folder) if part not in ("", ".", "..", "latents")]
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", parts[-1]).lstrip("._-") if parts else ""
    return words[:60] or "first"


def _first_gpu() -> Hardware | None:
    """None without nvidia-smi, or if it lists no GPU."""
    try:
        listed = subprocess.run(_SMI, capture_output=True, text=True, timeout=20, check=True).stdout
        name, _, megabytes = listed.splitlines()[0].rpartition(",")
        return Hardware(name.strip(), int(megabytes) << 20)
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None
