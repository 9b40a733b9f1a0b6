"""init: write a first config from the manifest of latents (no torch)."""

from __future__ import annotations

import argparse

from ecar_dist.command_line import AddCommand
from ecar_dist.kinds.presets import PRESETS


def add_commands(add: AddCommand) -> None:
    command = add("init", init, "print a commented first config for a set of latents: init OUT > mine.yaml (no torch)")
    command.add_argument("folder", help="folder of `ecar-data prepare`, or folder or URL of latent shards")
    command.add_argument("--name", help="run.name (default: the name of the folder)")
    command.add_argument("--preset", choices=tuple(PRESETS), help="size of the model (default: by samples and device)")
    command.add_argument(
        "--device",
        choices=("auto", "cpu", "A100", "H100", "H200"),
        default="auto",
        help="hardware to fit: auto (the GPU that nvidia-smi lists, else the CPU), cpu or a GPU model (default: auto)",
    )


def init(parsed: argparse.Namespace) -> int:
    from ecar_dist.data.prepared import find_latents
    from ecar_dist.plan.proposal import Hardware, propose_config, run_name

    found = find_latents(parsed.folder)
    name = parsed.name or run_name(parsed.folder)
    print(propose_config(found, Hardware.named(parsed.device), name=name, preset=parsed.preset), end="")
    return 0
