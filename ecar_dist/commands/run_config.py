"""The config argument of the commands that plan, submit or train a run."""

from __future__ import annotations

import argparse
import os
import sys

from ecar_dist.config.read import load_config
from ecar_dist.config.run import RunConfig
from ecar_dist.errors import ConfigError

KEPT_SHARE = 0.95
UNIT_VARIANCE = 1.0  # of the latents along one direction at the coarsest stage; the noise has the same variance


def add_config(command: argparse.ArgumentParser) -> None:
    """The arguments of every command that takes a config: see `load_run_config`."""
    command.add_argument("config", help="YAML file of the run")
    command.add_argument(
        "overrides", nargs="*", default=[], metavar="a.b=c", help="overrides of single keys of the config"
    )


def load_run_config(parsed: argparse.Namespace) -> RunConfig:
    """The config given on the command line. Raises ConfigError, for example if `flow.context.tau` is too small.

    If the run has already started, a small tau is only a warning. The config of an export or of a run directory is read
    with `load_config`, which does not check tau.
    """
    config = load_config(parsed.config, parsed.overrides)
    if (problem := small_tau(config)) is None:
        return config
    if not (config.run_directory / "lineage.json").exists():
        raise ConfigError(f"{problem}; set flow.context.tau=0.3, or allow it with flow.context.allow_small_tau=true")
    if is_first():
        print(f"warning: {problem}; the run was started with it, and continues", file=sys.stderr, flush=True)
    return config


def small_tau(config: RunConfig) -> str | None:
    """Why tau is too small: the sampler would lose variance. None if it is large enough, or allowed."""
    # Without a noisy context there is no tau.
    flow = config.flow
    tau = config.context_tau
    if tau is None or flow.num_stages == 1 or flow.context.mode != "noisy_state":
        return None
    # With a gamma that is not extreme, the jump noise adds variance at the start of a stage.
    if flow.gamma_is_relaxed or flow.context.allow_small_tau or flow.context.allow_unsafe:
        return None

    from ecar_dist.flow.context_noise import MOST_STEPS, SMALLEST_TAU, kept_variance, steps_to_keep

    if tau >= SMALLEST_TAU:
        return None

    # How much variance the configured number of steps keeps, and how many steps would keep enough.
    schedule = flow.schedule
    each = [min(steps, MOST_STEPS) for steps in config.stage_steps]
    shift = config.sample.time_shift
    kept = kept_variance(schedule, tau, each, variance=UNIT_VARIANCE, time_shift=shift)
    needed = steps_to_keep(schedule, tau, KEPT_SHARE, variance=UNIT_VARIANCE, time_shift=shift)
    steps = ", ".join(map(str, config.sample.steps_per_stage))
    enough = f"more than {MOST_STEPS:,}" if needed is None else f"{needed:,}"
    return (
        f"flow.context.tau={tau:g} is below {SMALLEST_TAU:g}: {steps} midpoint steps per stage keep {kept:.0%} of the "
        f"variance of the lowest frequencies, and {KEPT_SHARE:.0%} would need {enough} steps"
    )


def is_first() -> bool:
    """Whether this is rank 0, under any launcher. Does not need torch."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
