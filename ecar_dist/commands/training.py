"""check, plan and train: what takes a config. Each imports what it needs when it runs."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import sys

from ecar_dist.command_line import EX_TEMPFAIL, AddCommand, positive, say
from ecar_dist.config_file import config_to_yaml, load_config
from ecar_dist.errors import ConfigError
from ecar_dist.failpoint import faults_on_purpose


def add_commands(add: AddCommand) -> None:
    checking = add("check", check, "validate a config and print its arithmetic (no torch)")
    planning = add("plan", plan, "parameters, FLOPs, memory per rank, time and checkpoint size (no torch)")
    training = add("train", train, "train, or go on training: alone, or under torchrun, deepspeed or srun")
    for command in (checking, planning, training):
        command.add_argument("config", help="YAML file of the run")
        command.add_argument("overrides", nargs="*", metavar="a.b=c", help="overrides of single config values")
    planning.add_argument("--world-size", type=positive, help="ranks (default: 8, or as many as the batch allows)")
    planning.add_argument("--device", help="A100, H100 or H200: adds a time estimate")
    training.add_argument(
        "--new-data-order", action="store_true", help="go on although the data, or their order, have changed"
    )
    training.add_argument("--adopt", action="store_true", help="go on from checkpoints that another run saved")


def check(parsed: argparse.Namespace) -> int:
    from ecar_dist.flow.schedule import StageSchedule

    config = load_config(parsed.config, parsed.overrides)
    schedule = StageSchedule(config.flow.resolved_ends, config.flow.gamma)
    print(config_to_yaml(config))
    for k, (size, tokens) in enumerate(zip(config.stage_sizes, config.stage_tokens, strict=True)):
        window = f"[{schedule.starts[k]:.4f}, {schedule.ends[k]:.4f}]"
        print(f"# stage {k}: {size}x{size} latent, {tokens} tokens, data coefficient {window}")
    batch = config.batch
    print(f"# {config.total_steps:,} steps of {batch.global_batch_size} samples; micro-batches on R ranks:")
    for world_size in (2**power for power in range(11)):
        if batch.global_batch_size % (batch.micro_batch_size * world_size) == 0:
            print(
                f"#   R = {world_size}: {batch.global_batch_size} = {batch.micro_batch_size} x "
                f"{config.grad_accum_steps(world_size)} x {world_size}"
            )
    return 0


def plan(parsed: argparse.Namespace) -> int:
    from ecar_dist.plan.report import plan_lines

    config = load_config(parsed.config, parsed.overrides)
    shares = config.batch.global_batch_size // config.batch.micro_batch_size
    ranks = parsed.world_size or max(ranks for ranks in (1, 2, 4, 8) if shares % ranks == 0)
    print("\n".join(plan_lines(config, ranks, parsed.device)))
    return 0


def train(parsed: argparse.Namespace) -> int:
    try:
        config = load_config(parsed.config, parsed.overrides)
    except ConfigError:
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":  # all ranks read this file; one says so
            raise
        return 1
    from ecar_dist.plan.flops import FLOPS_PER_MAC
    from ecar_dist.plan.report import training_macs
    from ecar_dist.runtime.parent_death import die_with_parent
    from ecar_dist.runtime.peers import RemoteError, lost_peer
    from ecar_dist.runtime.stop import StoppedEarlyError
    from ecar_dist.runtime.watchdog import longest_wait
    from ecar_dist.runtime.world import COLLECTIVE_TIMEOUT, start_world, stop_world
    from ecar_dist.sample.preview import make_preview
    from ecar_dist.train.loop import train as run_training
    from ecar_dist.train.start import start_training

    if _is_launched():
        die_with_parent()
    faulthandler.enable()  # a crash leaves the stacks of its threads on stderr
    world = start_world(collective_timeout=longest_wait(config.train.hang_seconds, COLLECTIVE_TIMEOUT))
    if (line := faults_on_purpose()) and world.is_first:
        print(line, file=sys.stderr, flush=True)
    try:
        with contextlib.ExitStack() as ends:
            run, progress = start_training(
                config,
                world,
                ends,
                training_flops_per_sample=FLOPS_PER_MAC * training_macs(config),
                preview_factory=make_preview,
                allow_new_data=parsed.new_data_order,
                adopt=parsed.adopt,
            )
            end = run_training(run, progress)
        finished = end.samples_seen >= config.train.total_samples
        if world.is_first:
            say(f"{'done' if finished else 'stopped on a signal'} at step {end.step:,}: {config.run_directory}")
    except RemoteError:
        return 1
    except StoppedEarlyError as stopped:
        print(f"ecar-dist: {stopped}; run the same command again", file=sys.stderr)
        return EX_TEMPFAIL
    except RuntimeError as error:
        if (said := lost_peer(error)) is None:
            raise
        print(f"ecar-dist: rank {world.rank} lost another rank ({said}); run the same command again", file=sys.stderr)
        return 1
    stop_world()
    return 0 if finished else EX_TEMPFAIL


def _is_launched() -> bool:
    """Whether torchrun, deepspeed or srun started this process as one of several."""
    return "RANK" in os.environ or "SLURM_PROCID" in os.environ
