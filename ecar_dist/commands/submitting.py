"""submit and tensorboard: start jobs on a Slurm cluster. Each imports what it needs when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ecar_dist.command_line import AddCommand, positive
from ecar_dist.commands.run_config import add_config, load_run_config
from ecar_dist.config.read import shown_config
from ecar_dist.errors import ConfigError
from ecar_dist.storage.redaction import redact_text

if TYPE_CHECKING:
    from ecar_dist.cluster.pipeline import Pipeline
    from ecar_dist.cluster.resources import Resources
    from ecar_dist.cluster.submission import Submission
    from ecar_dist.config.run import RunConfig

START_SECONDS = 300  # to wait for the start of TensorBoard's job


def add_commands(add: AddCommand) -> None:
    # submit
    submitting = add("submit", submit, "check a config, plan memory, and submit its training to Slurm (no torch)")
    add_config(submitting)
    _add_resources(submitting)
    _add_scheduling(submitting)
    _add_pipeline(submitting)

    # tensorboard
    showing = add(
        "tensorboard",
        tensorboard,
        "run TensorBoard for several runs, here or as a job, and print the ssh command to reach it",
    )
    showing.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="run directories, or folders of them")
    showing.add_argument("--port", type=positive, help="port to listen on (default: any free port)")
    showing.add_argument(
        "--login", metavar="HOST", help="host name to log in to from your own machine (default: this host)"
    )
    showing.add_argument(
        "--submit", action="store_true", help=f"run it as a job, and wait up to {START_SECONDS} s for its start"
    )
    showing.add_argument("--in-job", action="store_true", help=argparse.SUPPRESS)  # given by slurm/tensorboard.sbatch

    # Both start jobs.
    for command in (submitting, showing):
        command.add_argument(
            "--sbatch",
            action="append",
            default=[],
            metavar="--ARG",
            help="additional option for sbatch, e.g. --sbatch=--partition=gpu; may be repeated",
        )
        command.add_argument(
            "--scripts",
            type=Path,
            metavar="DIR",
            help="folder of the job scripts (default: slurm/ here, else those of the package)",
        )


def _add_resources(command: argparse.ArgumentParser) -> None:
    command.add_argument("--nodes", type=positive, required=True, help="number of nodes")
    command.add_argument(
        "--min-nodes", type=positive, help="start on this many nodes if --nodes nodes are not free (default: --nodes)"
    )
    command.add_argument("--gpus-per-node", type=_count, default=8, help="GPUs of each node; 0: train on CPU")
    command.add_argument("--ranks-per-node", type=positive, help="processes per node (default: one per GPU)")
    command.add_argument("--cpus-per-rank", type=positive, help="CPU cores per process (default: as in train.sbatch)")
    command.add_argument(
        "--time",
        help="time limit of one job as HH:MM:SS, e.g. 12:00:00; a requeued job continues (default: as in train.sbatch)",
    )
    command.add_argument(
        "--device", help="GPU model (A100, H100, H200) for the memory check and the time forecast (default: neither)"
    )


def _add_scheduling(command: argparse.ArgumentParser) -> None:
    # How a job starts, and when.
    command.add_argument(
        "--launcher",
        choices=("srun", "torchrun"),
        help="srun: one task per rank; torchrun: one per node (default: as in train.sbatch)",
    )
    command.add_argument(
        "--after",
        metavar="JOB",
        type=_job,
        help="id of a job to wait for, whether it succeeds or fails (default: start at once)",
    )

    # How training continues after the time limit of a job.
    command.add_argument(
        "--chain",
        type=positive,
        metavar="L",
        help="L jobs in a row, for sites that do not allow requeueing (default: one job that is requeued)",
    )
    command.add_argument(
        "--max-requeues", type=_count, help="maximum number of restarts of the job (default: 50, as in train.sbatch)"
    )

    command.add_argument(
        "--dry-run", action="store_true", help="print the plan, the job scripts and the resolved config; submit nothing"
    )


def _add_pipeline(command: argparse.ArgumentParser) -> None:
    pipeline = command.add_argument_group("from images to scores, in jobs that wait for each other")

    # The images, and how they become shards.
    pipeline.add_argument(
        "--pipeline", metavar="SOURCE", help="folder with a directory per class, or tars (default: train only)"
    )
    pipeline.add_argument(
        "--holdout", type=float, default=0.05, help="fraction of the images to hold out for scoring, in (0, 1)"
    )
    pipeline.add_argument(
        "--label", help="where to find the label of a sample in a tar: cls, json:FIELD or none (default: cls)"
    )
    pipeline.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="text file with one class name per line (default: the names of the directories)",
    )
    pipeline.add_argument(
        "--shards",
        type=Path,
        metavar="DIR",
        help="folder for the image shards (default: the parent of data.train_images)",
    )

    # How they are encoded.
    pipeline.add_argument("--vae", help="folder or hub name of the autoencoder (default: that of the config)")
    pipeline.add_argument("--encode-tasks", type=positive, default=32, help="number of jobs that encode in parallel")
    pipeline.add_argument(
        "--encode-option",
        action="append",
        default=[],
        metavar="--ARG",
        help="additional option for `ecar-data encode`, e.g. --encode-option=--flip=store; may be repeated",
    )


def _count(text: str) -> int:
    return 0 if text == "0" else positive(text)


def _job(text: str) -> str:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text} is not a job id; give its number")
    return text


def submit(parsed: argparse.Namespace) -> int:
    from ecar_dist.cluster.fitness import fitness_lines
    from ecar_dist.cluster.slurm import require_slurm
    from ecar_dist.cluster.submission import dry_run_text, submitted_lines

    # Errors are found before a job waits in the queue.
    config = load_run_config(parsed)
    resources = _resources(parsed)
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
    """The training alone, or with the other steps of the pipeline. Raises DataError if its data do not exist."""
    from ecar_dist.cluster.job_script import find_scripts
    from ecar_dist.cluster.pipeline import evaluation_step, with_images
    from ecar_dist.cluster.submission import Submission, new_job_folder, training_step
    from ecar_dist.data.fit import check_fits, local_sets

    folder = new_job_folder(config)
    scripts = find_scripts(parsed.scripts)
    steps = [training_step(folder, resources, launcher=parsed.launcher, max_requeues=parsed.max_requeues)]

    # Data that an earlier job creates cannot be checked yet.
    has_data = True
    if pipeline := _pipeline(parsed, config):
        config = with_images(config, pipeline)
        data_steps = pipeline.data_steps(resources)
        has_data = data_steps[-1].done
        steps = [*data_steps, *steps, evaluation_step(folder.parents[1], resources)]
    elif parsed.after:
        print(f"data: not checked, because job {parsed.after} may create it")
        has_data = False
    if has_data:
        check_fits(config, local_sets(config))
    return Submission(config, steps, scripts, folder, parsed.after)


def _pipeline(parsed: argparse.Namespace, config: RunConfig) -> Pipeline | None:
    from ecar_dist.cluster.pipeline import plan_pipeline

    # Options of the pipeline have no effect without it.
    if parsed.pipeline is None:
        given = [name for name in ("label", "classes", "shards", "vae", "encode_option") if getattr(parsed, name)]
        if given:
            raise ConfigError(f"--{given[0].replace('_', '-')} needs --pipeline SOURCE; give both, or neither")
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
    print("\n".join([*await_start(job, log, START_SECONDS), f"to cancel it: scancel {job}"]))
    return 0
