"""The config argument of commands, and how a run that is about to be planned, submitted or trained reads it."""

from __future__ import annotations

import argparse
import os
import sys

from ecar_dist.config.read import load_config
from ecar_dist.config.run import RunConfig
from ecar_dist.errors import ConfigError

KEPT_SHARE = 0.95
UNIT_VARIANCE = 1.0  # of a direction of the latents at the coarsest stage; its noise has the same


def add_config(command: argparse.ArgumentParser) -> None:
    """The arguments of every command that takes a config: see `load_run_config`."""
    command.add_argument("config", help="YAML file of the run")
    command.add_argument(
        "overrides", nargs="*", default=[], metavar="a.b=c", help="other values for single keys of the config"
    )


def load_run_config(parsed: argparse.Namespace) -> RunConfig:
    """The config of the command line. Raises ConfigError, also for a small `flow.context.tau` that is not allowed.

    In a run that has already begun it is only a warning. Exports and run directories are read by `load_config` alone,
    which does not check it.
    """
    config = load_config(parsed.config, parsed.overrides)
    if (said := small_tau(config)) is None:
        return config
    if not (config.run_directory / "lineage.json").exists():
        raise ConfigError(f"{said}; set flow.context.tau=0.3, or allow it by flow.context.allow_small_tau=true")
    if is_first():
        print(f"warning: {said}; the run was started with it, and continues", file=sys.stderr, flush=True)
    return config


def small_tau(config: RunConfig) -> str | None:
    """What is wrong with a tau that is so small that the sampler loses variance; None where it is fine, or allowed."""
    flow, tau = config.flow, config.context_tau
    if tau is None or flow.num_stages == 1 or flow.context.mode != "noisy_state":
        return None
    # away from the extreme gamma the jump noise gives the start of a stage a spread of its own
    if flow.gamma_is_relaxed or flow.context.allow_small_tau or flow.context.allow_unsafe:
        return None

    from ecar_dist.flow.context_noise import MOST_STEPS, SMALLEST_TAU, kept_variance, steps_to_keep

    if tau >= SMALLEST_TAU:
        return None
    schedule = flow.schedule
    steps = config.sample.steps_per_stage
    kept = kept_variance(schedule, tau, min(steps, MOST_STEPS), variance=UNIT_VARIANCE)
    needed = steps_to_keep(schedule, tau, KEPT_SHARE, variance=UNIT_VARIANCE)
    enough = f"more than {MOST_STEPS:,}" if needed is None else f"{needed:,}"
    return (
        f"flow.context.tau={tau:g} is below {SMALLEST_TAU:g}: {steps} midpoint steps a stage keep {kept:.0%} of the "
        f"variance of the lowest frequencies, {KEPT_SHARE:.0%} take {enough} steps"
    )


def is_first() -> bool:
    """Whether this is rank 0, under any launcher. It needs no torch."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
