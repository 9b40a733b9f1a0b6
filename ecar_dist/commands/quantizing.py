"""quantize and sensitivity: integer weights for a trained model. Each imports what it needs when it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ecar_dist.command_line import EX_TEMPFAIL, AddCommand, positive
from ecar_dist.errors import ConfigError
from ecar_dist.sample.options import parse_step

if TYPE_CHECKING:
    from ecar_dist.compress.run import Wish
    from ecar_dist.runtime.world import World


def add_commands(add: AddCommand) -> None:
    quantizing = add("quantize", quantize, "round the weights of a trained model to integers, and compare the samples")
    _add_model(quantizing)
    quantizing.add_argument("out", type=Path, metavar="OUT", help="folder to create: an export for sample and evaluate")
    quantizing.add_argument("--weights", type=int, choices=(4, 8), default=8, help="bits of the weights")
    quantizing.add_argument("--activations", type=int, choices=(8,), default=8, help="bits of the activations")
    quantizing.add_argument(
        "--mean-bits",
        type=float,
        metavar="B",
        help="mean bits per weight, instead of --weights: layers get 4, 8 or 16 by their sensitivity (default: none)",
    )
    quantizing.add_argument(
        "--sensitivity",
        type=Path,
        metavar="DIR",
        help="with --mean-bits: folder of the sensitivities; missing ones are measured (default: OUT.sensitivity)",
    )
    _add_recipe(quantizing)
    quantizing.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="calibration file, read if it exists, otherwise written (default: none is kept)",
    )
    quantizing.add_argument(
        "--dtype",
        choices=("fp32", "bf16"),
        help="data type of the layers that are not quantised (default: that of the export; fp32 for a run)",
    )

    measuring = add(
        "sensitivity", sensitivity, "measure the effect of rounding each layer, for quantize --mean-bits; resumable"
    )
    _add_model(measuring)
    measuring.add_argument("folder", type=Path, metavar="DIR", help="folder of the sensitivities; tasks may share it")
    measuring.add_argument("--task", type=int, default=0, help="index of this task in the array, starting at 0")
    measuring.add_argument("--tasks", type=positive, default=1, help="number of tasks in the array")
    _add_recipe(measuring)


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "model", type=Path, metavar="MODEL", help="run directory, or folder of a checkpoint or an export"
    )
    command.add_argument("--step", help="optimizer step of the checkpoint or EMA snapshot (default: the newest)")
    command.add_argument("--ema", metavar="NAME", help="weights, as in `ecar-dist sample` (default: ema)")


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--alpha", type=float, default=0.3, help="share of the activations' range that balancing moves to the weights"
    )
    command.add_argument("--no-balance", action="store_true", help="do not balance the channels of the activations")
    command.add_argument("--no-rotation", action="store_true", help="do not rotate the activations and weights")
    command.add_argument("--images", type=positive, default=16, help="images drawn for calibration and comparison")
    command.add_argument("--batch-size", type=positive, default=16, help="number of images drawn at once")
    command.add_argument("--seed", type=int, default=0, help="seed of the noise and of the rotation's signs")


def quantize(parsed: argparse.Namespace) -> int:
    from ecar_dist.compress.run import quantize as run
    from ecar_dist.runtime.peers import RemoteError

    wish = _wish(parsed)
    try:
        _in_world(lambda world: run(wish, world))
    except RemoteError as remote:
        return EX_TEMPFAIL if remote.again else 1
    return 0


def sensitivity(parsed: argparse.Namespace) -> int:
    from ecar_dist.compress.run import measure_task

    if not 0 <= parsed.task < parsed.tasks:
        raise ConfigError(f"--task {parsed.task} is outside 0..{parsed.tasks - 1}; give --tasks, the size of the array")
    measure_task(_wish(parsed), parsed.folder, parsed.task, parsed.tasks, _alone())
    return 0


def _wish(parsed: argparse.Namespace) -> Wish:
    from ecar_dist.compress.model import Recipe
    from ecar_dist.compress.run import Wish

    if not 0.0 <= parsed.alpha <= 1.0:
        raise ConfigError(f"--alpha {parsed.alpha:g} is outside [0, 1]; 0.3 is the default")
    if not 0 <= parsed.seed < 2**31:
        raise ConfigError(f"--seed {parsed.seed} is outside 0..{2**31 - 1}; give a smaller number")
    of_quantize = ("out", "weights", "mean_bits", "sensitivity", "dtype", "calibration")
    return Wish(
        **{name: getattr(parsed, name) for name in of_quantize if hasattr(parsed, name)},
        model=parsed.model,
        step=None if parsed.step is None else parse_step(parsed.step),
        ema=parsed.ema,
        images=parsed.images,
        batch_size=parsed.batch_size,
        seed=parsed.seed,
        recipe=Recipe(None if parsed.no_balance else parsed.alpha, not parsed.no_rotation, parsed.seed),
    )


def _in_world(action: Callable[[World], None]) -> None:
    """Run an action on all ranks of the launcher, or in this process alone."""
    import os

    from ecar_dist.runtime.placement import placement_from_environment
    from ecar_dist.runtime.start.rendezvous import start_world, stop_world

    if placement_from_environment(os.environ).size == 1:
        action(_alone())
        return
    try:
        action(start_world())
    finally:
        stop_world()


def _alone() -> World:
    import torch

    from ecar_dist.runtime.placement import Placement
    from ecar_dist.runtime.world import World

    return World(Placement(), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
