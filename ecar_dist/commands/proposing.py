"""init: write a first config from the manifest of latents (no torch)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ecar_dist.command_line import AddCommand
from ecar_dist.errors import ConfigError
from ecar_dist.kinds.presets import PRESETS
from ecar_dist.package_files import CONFIGS, SLURM, copy_package_folder


def add_commands(add: AddCommand) -> None:
    command = add("init", init, "print a commented first config for a set of latents: init OUT > mine.yaml (no torch)")
    command.add_argument(
        "folder",
        nargs="?",
        help="output folder of `ecar-data prepare`, or folder or URL of latents (default: no config)",
    )
    command.add_argument("--name", help="run.name (default: the name of the folder)")
    command.add_argument("--preset", choices=tuple(PRESETS), help="size of the model (default: by data and device)")
    command.add_argument(
        "--device",
        choices=("auto", "cpu", "A100", "H100", "H200"),
        default="auto",
        help="target hardware: auto (the GPU that nvidia-smi lists, else the CPU), cpu or a GPU model (default: auto)",
    )
    command.add_argument(
        "--slurm",
        type=Path,
        metavar="DIR",
        help="copy the job scripts to DIR; adapt its env.sh to the site (default: no)",
    )
    command.add_argument("--examples", type=Path, metavar="DIR", help="copy the example configs to DIR (default: no)")


def init(parsed: argparse.Namespace) -> int:
    from ecar_dist.data.prepared import find_latents
    from ecar_dist.plan.proposal import Hardware, propose_config, run_name

    # Files for the user to edit. Only the config is printed to stdout.
    copies = {SLURM: parsed.slurm, CONFIGS: parsed.examples}
    if parsed.folder is None and not any(copies.values()):
        raise ConfigError("init needs the folder of latents, or --slurm DIR, or --examples DIR; give one of them")
    for name, out in copies.items():
        if out is not None:
            copied = copy_package_folder(name, out)
            print(f"{out}: {', '.join(path.name for path in copied)}", file=sys.stderr)
    if parsed.folder is None:
        return 0

    # The config.
    found = find_latents(parsed.folder)
    name = parsed.name or run_name(parsed.folder)
    print(propose_config(found, Hardware.named(parsed.device), name=name, preset=parsed.preset), end="")
    return 0
