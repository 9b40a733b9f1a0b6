"""check, plan, preflight and train. Each imports what it needs when it runs."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ecar_dist.command_line import EX_TEMPFAIL, AddCommand, above_zero, positive, say, status_of
from ecar_dist.commands.run_config import add_config, is_first, load_run_config
from ecar_dist.config.batch import divides
from ecar_dist.config.read import shown_config
from ecar_dist.errors import ConfigError
from ecar_dist.failpoint import faults_on_purpose
from ecar_dist.storage.redaction import redact, redact_tree

if TYPE_CHECKING:
    from ecar_dist.config.run import RunConfig
    from ecar_dist.runtime.world import World


def add_commands(add: AddCommand) -> None:
    checking = add("check", check, "validate a config and print its arithmetic (no torch)")
    planning = add("plan", plan, "parameters, FLOPs, memory per rank, time and checkpoint size (no torch)")
    training = add("train", train, "train, or resume training: in one process, or under torchrun, deepspeed or srun")
    flying = add("preflight", preflight, "check all nodes before training; launch it as you launch `train`")
    for command in (checking, planning, training, flying):
        add_config(command)

    # Options of a single command.
    checking.add_argument(
        "--job",
        nargs=2,
        type=positive,
        metavar=("NODES", "RANKS_PER_NODE"),
        help="for job scripts: print the run directory and the number of nodes to use (default: check the config)",
    )
    planning.add_argument(
        "--world-size", type=positive, help="number of ranks (default: the largest of 1, 2, 4, 8 that fits the batch)"
    )
    planning.add_argument(
        "--device", help="GPU model (A100, H100, H200) for the memory check and the time forecast (default: neither)"
    )
    planning.add_argument("--gpus-per-node", type=positive, default=8, help="GPUs of each node (default: 8)")
    planning.add_argument(
        "--bandwidth",
        type=above_zero,
        default=50.0,
        metavar="GB/S",
        help="bandwidth between nodes in GB/s per GPU (default: 50, one 400 Gb/s adapter per GPU)",
    )
    planning.add_argument(
        "--ladder",
        action="store_true",
        help="print the runs of narrower models that find the learning rate of this one by muP, and their cost",
    )
    _add_machines(planning)
    training.add_argument(
        "--new-data-order", action="store_true", help="resume even if the data or its order has changed"
    )
    training.add_argument("--adopt", action="store_true", help="start from checkpoints that a different run saved")


def _add_machines(planning: argparse.ArgumentParser) -> None:
    """Options of `plan` about storage and failures, and the simulation."""
    planning.add_argument(
        "--storage",
        type=above_zero,
        default=2.0,
        metavar="GB/S",
        help="bandwidth between a node and the storage of data and checkpoints, in GB/s (default: 2)",
    )
    planning.add_argument(
        "--failure-hours",
        type=above_zero,
        default=50_000.0,
        metavar="H",
        help="GPU hours between two failures (default: 50000, as for Llama 3 on 16,384 GPUs)",
    )
    planning.add_argument(
        "--simulate",
        action="store_true",
        help="simulate one epoch of sample order, cache and saves, with failures; needs --device",
    )
    planning.add_argument(
        "--samples",
        type=positive,
        help="with --simulate: samples in the data set, in shards of 4,096 (default: as many as there are)",
    )
    planning.add_argument(
        "--cache-gib", type=above_zero, help="with --simulate: cache per node in GiB (default: data.cache.gib)"
    )


def check(parsed: argparse.Namespace) -> int:
    from ecar_dist.cluster.resources import usable_nodes
    from ecar_dist.data.fit import absent_sets, check_fits, local_sets
    from ecar_dist.plan.large import FEW_IMAGES

    config = load_run_config(parsed)

    # For a job script: two lines, and nothing else.
    if parsed.job:
        print(f"{config.run_directory.absolute()}\n{usable_nodes(config, *parsed.job)}")
        return 0

    # Compare the config with its data, then print it and its stages.
    check_fits(config, local_sets(config, absent_ok=True))
    schedule = config.flow.schedule
    print(shown_config(config))
    for k, (size, tokens) in enumerate(zip(config.stage_sizes, config.stage_tokens, strict=True)):
        window = f"[{schedule.starts[k]:.4f}, {schedule.ends[k]:.4f}]"
        print(f"# stage {k}: {size}x{size} latent, {tokens} tokens, data coefficient {window}")

    # What a reader of the config should know: the changed values, and data that could not be checked.
    given = redact_tree(config.model_dump(mode="json", exclude_defaults=True))
    print(f"# non-default values: {', '.join(_leaves(given))}")
    for folder in absent_sets(config):
        print(f"# {redact(folder)} has no manifest.json yet: the config was not compared with it")

    # The batch arithmetic.
    batch = config.batch
    print(f"# {config.total_steps:,} steps of {batch.global_batch_size} samples; micro-batches on R ranks:")
    for world_size in (2**power for power in range(11)):
        if divides(batch.global_batch_size, batch.micro_batch_size, world_size):
            product = f"{batch.micro_batch_size} x {config.grad_accum_steps(world_size)} x {world_size}"
            images = batch.global_batch_size // world_size
            few = f", {images} per rank: too few for a GPU" if images < FEW_IMAGES and world_size > 1 else ""
            print(f"#   R = {world_size}: {batch.global_batch_size} = {product}{few}")
    return 0


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Every value as `a.b=c`."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}={value}"


def plan(parsed: argparse.Namespace) -> int:
    from ecar_dist.plan.report import plan_lines

    config = load_run_config(parsed)
    shares = config.batch.global_batch_size // config.batch.micro_batch_size
    ranks = parsed.world_size or max(ranks for ranks in (1, 2, 4, 8) if shares % ranks == 0)
    lines = plan_lines(config, ranks, parsed.device, gpus_per_node=parsed.gpus_per_node, bandwidth=parsed.bandwidth)
    lines += _job_lines(parsed, config, ranks)
    if parsed.ladder:
        from ecar_dist.plan.ladder import ladder_lines

        lines = ladder_lines(config, parsed.config, parsed.overrides)
    print("\n".join(lines))
    return 0


def _job_lines(parsed: argparse.Namespace, config: RunConfig, ranks: int) -> list[str]:
    """The lines about storage and failures. Raises ConfigError if --simulate is given and the step time is unknown."""
    from ecar_dist.plan.large import Job, large_lines, simulation_lines
    from ecar_dist.plan.report import forecast_step

    step = forecast_step(config, ranks, parsed.device, gpus_per_node=parsed.gpus_per_node, bandwidth=parsed.bandwidth)
    if step is None:
        if parsed.simulate:
            raise ConfigError("--simulate needs the time per step; give --device, and a precision other than fp32")
        return []
    job = Job(
        config,
        ranks,
        parsed.device,
        step.total,
        gpus_per_node=parsed.gpus_per_node,
        storage=parsed.storage,
        failure_hours=parsed.failure_hours,
        samples=parsed.samples,
        cache_gib=parsed.cache_gib,
    )
    return [*large_lines(job), *(simulation_lines(job) if parsed.simulate else [])]


def train(parsed: argparse.Namespace) -> int:
    return on_record(lambda: _train(parsed))


def _train(parsed: argparse.Namespace) -> int:
    return _on_all_ranks(parsed, lambda config, world: _train_on(config, world, parsed.new_data_order, parsed.adopt))


def _train_on(config: RunConfig, world: World, new_data_order: bool, adopt: bool) -> int:
    from ecar_dist.kinds.flops import FLOPS_PER_MAC
    from ecar_dist.kinds.table import kind_of
    from ecar_dist.runtime.compiler import private_cache
    from ecar_dist.runtime.run.trackers import check_trackers
    from ecar_dist.sample.preview import StripPreview
    from ecar_dist.train.loop import train as run_training
    from ecar_dist.train.start import start_training

    world.on_first_rank(lambda: check_trackers(config.log))
    with contextlib.ExitStack() as ends:
        if config.compiles_on(world.device.type):
            ends.enter_context(private_cache())
        parts, progress = start_training(
            config,
            world,
            ends,
            training_flops_per_sample=FLOPS_PER_MAC * kind_of(config).training_macs(config),
            preview_factory=StripPreview,
            allow_new_data=new_data_order,
            adopt=adopt,
        )
        end = run_training(parts, progress)

    # Training ends early if a signal stops it.
    finished = end.samples_seen >= config.train.total_samples
    if world.is_first:
        say(f"{'done' if finished else 'stopped on a signal'} at step {end.step:,}: {config.run_directory}")
    return 0 if finished else EX_TEMPFAIL


def preflight(parsed: argparse.Namespace) -> int:
    def check(config: RunConfig, world: World) -> int:
        from ecar_dist.train.preflight import check_nodes

        check_nodes(config, world)
        return 0

    return _on_all_ranks(parsed, check)


def _on_all_ranks(parsed: argparse.Namespace, action: Callable[[RunConfig, World], int]) -> int:
    """Run an action on all ranks after they have agreed on the config; returns its exit status.

    An error that occurs on all ranks is reported by one of them.
    """
    # An error that rank 0 finds in the config ends it at once. One that only another rank finds is reported to all.
    config = None
    problem = ""
    try:
        config = load_run_config(parsed)
    except ConfigError as error:
        if is_first():
            raise
        problem = str(error)

    # Imported late, because they import torch: an invalid config is reported without it.
    from ecar_dist.runtime.peers import RemoteError, lost_peer
    from ecar_dist.runtime.signals import StoppedEarlyError, die_with_parent
    from ecar_dist.runtime.start.agreement import agree_on_settings
    from ecar_dist.runtime.start.rendezvous import COLLECTIVE_TIMEOUT, start_world, stop_world
    from ecar_dist.runtime.watchdog.watchdog import longest_wait

    # Prepare this process, connect to the other ranks, and run the action.
    if _is_launched():
        die_with_parent()
    faulthandler.enable()  # a crash prints the stacks of its threads to stderr
    try:
        hang_seconds = config.train.hang_seconds if config else 0.0
        world = start_world(collective_timeout=longest_wait(hang_seconds, COLLECTIVE_TIMEOUT))
        agree_on_settings(world, config, problem)
        assert config is not None  # otherwise agree_on_settings has raised
        if (line := faults_on_purpose()) and world.is_first:
            print(line, file=sys.stderr, flush=True)
        status = action(config, world)
    except RemoteError as remote:
        return EX_TEMPFAIL if remote.again else 1
    except StoppedEarlyError as stopped:
        print(f"ecar-dist: {stopped}; run the same command again", file=sys.stderr)
        return EX_TEMPFAIL
    except RuntimeError as error:
        if (reason := lost_peer(error)) is None:
            raise
        rank = os.environ["RANK"]
        print(f"ecar-dist: rank {rank} lost another rank ({reason}); run the same command again", file=sys.stderr)
        return EX_TEMPFAIL
    stop_world()
    return status


def on_record(action: Callable[[], int]) -> int:
    """Run an action; returns its exit status. In a job, rank 0 also writes it to $ECAR_JOB_LOGS/exit-status.

    Launchers do not report it: torchrun replaces every status by 1, and srun reports the signal that ended a slower
    rank. The file is empty while the action runs, and stays empty if this process is killed.
    """
    from ecar_dist.runtime.placement import job_logs

    if (folder := job_logs()) is None or not is_first():
        return action()

    # If writing the status fails on a full disk, the file stays empty, so the job is retried.
    file = folder / "exit-status"
    status = 1
    file.write_text("")
    try:
        status = action()
    except BaseException as error:
        status = status_of(error)
        raise
    finally:
        with contextlib.suppress(OSError):
            file.write_text(f"{status}\n")
    return status


def _is_launched() -> bool:
    """Whether torchrun, deepspeed or srun started this process as one of several."""
    return "RANK" in os.environ or "SLURM_PROCID" in os.environ
