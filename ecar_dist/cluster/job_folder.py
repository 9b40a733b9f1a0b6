"""RUN/jobs/001, 002, ...: what was submitted for a run, and the ids of its jobs."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from ecar_dist.cluster.job_script import SITE_FILE
from ecar_dist.config.run import RunConfig
from ecar_dist.errors import ConfigError
from ecar_dist.runtime.run.directory import RunDirectory

JOB_FILE = "job"  # id of the training job
STEPS_FILE = "steps"  # of a pipeline, a line each: name of the step, job id
_JOB_ID = re.compile(r"[0-9]{1,20}")


def next_job_folder(run_directory: Path) -> Path:
    """The first number that is free."""
    taken = [int(path.name) for path in (run_directory / "jobs").glob("*") if path.name.isdigit()]
    return run_directory / "jobs" / f"{max(taken, default=0) + 1:03d}"


def write_job_folder(folder: Path, scripts: Mapping[str, str], config: RunConfig, site_file: Path) -> None:
    """Make the folder with its job scripts by name, the resolved config and a copy of the site's file.

    Also makes logs/ of the run, where Slurm is to write. Raises ConfigError where another submission took the number.
    """
    run_directory = folder.parents[1]
    (run_directory / "logs").mkdir(parents=True, exist_ok=True)
    folder.parent.mkdir(exist_ok=True)
    try:
        folder.mkdir()
    except FileExistsError:
        raise ConfigError(f"{folder} was just made by another submission; look at that one first") from None
    for name, text in scripts.items():
        (folder / name).write_text(text, encoding="utf-8")
    shutil.copyfile(site_file, folder / SITE_FILE)
    RunDirectory(folder).write_config(config)


def remove_job_folder(folder: Path) -> None:
    """Take back a submission that failed, with the folders above it as far as nothing else is in them."""
    shutil.rmtree(folder)
    run_directory = folder.parents[1]
    for path in (folder.parent, run_directory / "logs", run_directory):
        if not any(path.iterdir()):
            path.rmdir()


def record_jobs(folder: Path, jobs: Mapping[str, str]) -> None:
    """Note the ids of the submitted jobs, by name of the step."""
    (folder / STEPS_FILE).write_text("".join(f"{step} {job}\n" for step, job in jobs.items()))
    (folder / JOB_FILE).write_text(f"{jobs['train']}\n")


def recorded_jobs(run_directory: Path) -> dict[str, str]:
    """Name of the step of every job that was submitted for this run, by its id."""
    found: dict[str, str] = {}
    for path in sorted((run_directory / "jobs").glob(f"*/{STEPS_FILE}")):
        for line in path.read_text(errors="replace").splitlines():
            step, _, job = line.partition(" ")
            if _JOB_ID.fullmatch(job):
                found[job] = step
    return found
