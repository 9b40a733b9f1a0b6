"""Shared by `sample` and `evaluate`: the options, opening the model, and drawing with a progress bar."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecar_dist.command_line import positive
from ecar_dist.config.knob import Knob, OneOf
from ecar_dist.errors import ConfigError
from ecar_dist.sample.options import SAMPLING_KNOBS, parse_step

if TYPE_CHECKING:
    from ecar_dist.sample.load import TrainedModel

Command = Callable[[argparse.Namespace], int]


def add_drawing(command: argparse.ArgumentParser) -> None:
    """Options that choose the weights and set the sampler."""
    command.add_argument(
        "model", type=Path, metavar="MODEL", help="run directory, or folder of a checkpoint or an export"
    )
    command.add_argument("--step", help="optimizer step of the checkpoint or EMA snapshot (default: the newest)")
    command.add_argument(
        "--ema",
        metavar="NAME",
        help="weights: ema, ema1, ... of the checkpoint; half-life=SAMPLES or sigma-rel=WIDTH, reconstructed if "
        "not stored; raw for the weights without an EMA (default: ema, the first one)",
    )
    for option, knob in SAMPLING_KNOBS.items():
        command.add_argument(f"--{option}", metavar="VALUE", help=_help_of(knob))
    command.add_argument("--seed", type=int, default=0, help="seed of the noise, a whole number")
    command.add_argument("--batch-size", type=positive, default=64, help="number of images drawn at once")
    command.add_argument(
        "--compile", action="store_true", help="compile the model first: takes minutes, then batches are faster"
    )


def _help_of(knob: Knob) -> str:
    """Meaning, unit, values and default of a knob of `sample`, as the help of its option."""
    names = next((rule.names for rule in knob.field.metadata if isinstance(rule, OneOf)), ())
    values = f": {', '.join(names)}" if names else ""
    unit = f"; unit: {knob.unit}" if knob.unit not in ("", "factor") else ""
    return f"{knob.meaning}{values}{unit} (default: sample.{knob.key} of the run)"


def with_private_cache(command: Command) -> Command:
    """Give a command its own compiler cache for `--compile`."""

    @functools.wraps(command)
    def run(parsed: argparse.Namespace) -> int:
        if not parsed.compile:
            return command(parsed)
        from ecar_dist.runtime.compiler import private_cache

        with private_cache():
            return command(parsed)

    return run


def open_model(parsed: argparse.Namespace, **other: str) -> TrainedModel:
    """The model of the command line, with its options; `other`: values that override single options."""
    import torch

    from ecar_dist.sample.load import open_trained

    step = other.get("step", parsed.step)
    return open_trained(
        parsed.model,
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        step=None if step is None else parse_step(step),
        ema=other.get("ema", parsed.ema),
    ).with_settings(settings(parsed))


def settings(parsed: argparse.Namespace) -> dict[str, str]:
    """The sampler settings given on the command line, by option."""
    given = {option: getattr(parsed, option.replace("-", "_")) for option in SAMPLING_KNOBS}
    return {option: value for option, value in given.items() if value is not None}


def draw(
    trained: TrainedModel, parsed: argparse.Namespace, labels: list[int], seed: int | None = None
) -> Iterator[Any]:
    """The stages of each batch, with a progress bar. Errors are raised by the call, not with the first batch.

    seed: of the noise; None: the value of --seed.
    """
    seed = parsed.seed if seed is None else seed
    if not -(2**63) <= seed < 2**63:
        raise ConfigError(f"--seed {seed} does not fit in 64 bits; give a smaller number")
    batches = trained.draw(labels, seed, parsed.batch_size, compiles=parsed.compile)
    return _with_progress(batches, len(labels))


def _with_progress(batches: Iterator[Any], total: int) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(total=total, unit="image", desc="sampling", mininterval=2) as bar:
        for stages in batches:
            yield stages
            bar.update(stages[-1].shape[0])
