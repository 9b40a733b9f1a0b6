"""submit and tensorboard: what starts jobs on a Slurm cluster. Each imports what it needs when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ecar_dist.command_line import AddCommand, positive
from ecar_dist.commands.run_config import load_run_config
from ecar_dist.config.read import shown_config
from ecar_dist.errors import ConfigError
from ecar_dist.storage.redaction import redact_text

if TYPE_CHECKING:
    from ecar_dist.cluster.pipeline import Pipeline
    from ecar_dist.cluster.resources import Resources
    from ecar_dist.cluster.submission import Submission
    from ecar_dist.config.run import RunConfig

START_SECONDS = 300  # to wait for TensorBoard's job


def add_commands(add: AddCommand) -> None:
    submitting = add("submit", submit, "check a config, plan memory, and submit its training to Slurm (no torch)")
    submitting.add_argument("config", help="YAML file of the run")
    submitting.add_argument(
        "overrides", nargs="*", default=[], metavar="a.b=c", help="overrides of single config values"
    )
    _add_resources(submitting)
    _add_going_on(submitting)
    _add_pipeline(submitting)
    showing = add("tensorboard", tensorboard, "TensorBoard of many runs, here or as a job, and the ssh line to it")
    showing.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="run directories, or folders of them")
    showing.add_argument("--port", type=positive, help="default: a free one")
    showing.add_argument("--login", metavar="HOST", help="the name by which you log in (default: this machine's)")
    showing.add_argument("--submit", action="store_true", help="as a job; waits until it runs")
    showing.add_argument("--in-job", action="store_true", help=argparse.SUPPRESS)  # as slurm/tensorboard.sbatch says
    for command in (submitting, showing):
        command.add_argument(
            "--sbatch", action="append", default=[], metavar="--ARG", help="e.g. --sbatch=--partition=gpu"
        )
        command.add_argument("--scripts", type=Path, metavar="DIR", help="job scripts (default: slurm/)")


def _add_resources(command: argparse.ArgumentParser) -> None:
    command.add_argument("--nodes", type=positive, required=True)
    command.add_argument("--min-nodes", type=positive, help="start on as few as this where no more are free")
    command.add_argument("--gpus-per-node", type=_count, default=8, help="default 8; 0: on CPU")
    command.add_argument("--ranks-per-node", type=positive, help="default: one a GPU")
    command.add_argument("--cpus-per-rank", type=positive)
    command.add_argument("--time", help="limit of one job, e.g. 12:00:00; training goes on in the next one")
    command.add_argument("--device", help="A100, H100 or H200: memory is checked, and time estimated")


def _add_going_on(command: argparse.ArgumentParser) -> None:
    command.add_argument("--launcher", choices=("srun", "torchrun"), help="a task a GPU, or torchrun on each node")
    command.add_argument("--after", metavar="JOB", type=_job, help="begin when this job has ended, however it did")
    command.add_argument("--chain", type=positive, metavar="L", help="L jobs in a row, where requeueing is not allowed")
    command.add_argument("--max-requeues", type=_count, help="default 50")
    command.add_argument(
        "--dry-run", action="store_true", help="print plan, job script and resolved config; do nothing"
    )


def _add_pipeline(command: argparse.ArgumentParser) -> None:
    pipeline = command.add_argument_group("from images to scores, as jobs that wait for each other")
    pipeline.add_argument("--pipeline", metavar="SOURCE", help="folder with a directory per class, or tars")
    pipeline.add_argument("--holdout", type=float, default=0.05, help="share of images to score against (default 0.05)")
    pipeline.add_argument("--label", help="tars: member that holds the label: cls, json:FIELD or none")
    pipeline.add_argument("--classes", type=Path, metavar="FILE", help="text file with a class name a line")
    pipeline.add_argument(
        "--shards", type=Path, metavar="DIR", help="image shards (default: where data.train_images is)"
    )
    pipeline.add_argument("--vae", help="autoencoder (default: the config's)")
    pipeline.add_argument(
        "--encode-tasks", type=positive, default=32, help="jobs that encode side by side (default 32)"
    )
    pipeline.add_argument(
        "--encode-option", action="append", default=[], metavar="--ARG", help="e.g. --encode-option=--flip=store"
    )


def _count(text: str) -> int:
    return 0 if text == "0" else positive(text)


def _job(text: str) -> str:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text} is no job id; give its number")
    return text


def submit(parsed: argparse.Namespace) -> int:
    from ecar_dist.cluster.resources import fitness_lines
    from ecar_dist.cluster.slurm import require_slurm
    from ecar_dist.cluster.submission import dry_run_text, submitted_lines

    config, resources = load_run_config(parsed), _resources(parsed)
    print("\n".join(fitness_lines(config, resources, parsed.device)))
    submission = _submission(parsed, config, resources)
    if parsed.dry_run:
        print(redact_text(dry_run_text(submission, shown_config(submission.config))))
        return 0
    require_slurm()
    jobs = submission.submit()
    print(redact_text("\n".join(submitted_lines(submission, jobs))))
    return 0


def _resources(parsed: argparse.Namespace) -> Resources:
    from ecar_dist.cluster.resources import Resources

    return Resources(
        nodes=parsed.nodes,
        min_nodes=parsed.min_nodes,
        gpus_per_node=parsed.gpus_per_node,
        ranks_per_node=parsed.ranks_per_node,
        cpus_per_rank=parsed.cpus_per_rank,
        time=parsed.time,
        chain=parsed.chain,
        sbatch=tuple(parsed.sbatch),
    )


def _submission(parsed: argparse.Namespace, config: RunConfig, resources: Resources) -> Submission:
    """The training alone, or between the steps of the pipeline. Raises DataError where its data are not there."""
    from ecar_dist.cluster.job_script import find_scripts
    from ecar_dist.cluster.pipeline import evaluation_step, with_images
    from ecar_dist.cluster.submission import Submission, new_job_folder, training_step
    from ecar_dist.data.fit import check_fits, local_sets

    folder, scripts = new_job_folder(config), find_scripts(parsed.scripts)
    steps = [training_step(folder, resources, launcher=parsed.launcher, max_requeues=parsed.max_requeues)]
    data_stand = True
    if pipeline := _pipeline(parsed, config):
        config = with_images(config, pipeline)
        data_steps = pipeline.data_steps(resources)
        data_stand = data_steps[-1].stands
        steps = [*data_steps, *steps, evaluation_step(folder.parents[1], resources)]
    elif parsed.after:
        print(f"data: not looked at, since job {parsed.after} may make them")
        data_stand = False
    if data_stand:
        check_fits(config, local_sets(config))
    return Submission(config, steps, scripts, folder, parsed.after)


def _pipeline(parsed: argparse.Namespace, config: RunConfig) -> Pipeline | None:
    from ecar_dist.cluster.pipeline import plan_pipeline

    if parsed.pipeline is None:
        given = [name for name in ("label", "classes", "shards", "vae", "encode_option") if getattr(parsed, name)]
        if given:
            raise ConfigError(f"--{given[0].replace('_', '-')} is for --pipeline SOURCE; give both, or neither")
        return None
    return plan_pipeline(
        config,
        parsed.pipeline,
        holdout=parsed.holdout,
        encode_tasks=parsed.encode_tasks,
        vae=parsed.vae,
        shards=parsed.shards,
        label=parsed.label,
        classes=parsed.classes,
        encode_options=parsed.encode_option,
    )


def tensorboard(parsed: argparse.Namespace) -> int:
    from ecar_dist.cluster.job_script import find_scripts
    from ecar_dist.cluster.slurm import require_slurm
    from ecar_dist.cluster.tensorboard import await_start, serve, submit_tensorboard

    if not parsed.submit:
        serve(parsed.runs, port=parsed.port, login=parsed.login, in_job=parsed.in_job)
    require_slurm()
    job, log = submit_tensorboard(
        find_scripts(parsed.scripts), parsed.runs, sbatch=parsed.sbatch, port=parsed.port, login=parsed.login
    )
    print(f"job {job}, log {log}", flush=True)
    print("\n".join([*await_start(job, log, START_SECONDS), f"to end it: scancel {job}"]))
    return 0
