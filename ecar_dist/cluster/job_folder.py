"""RUN/jobs/001, 002, ...: the scripts and the config of each submission of a run, and the ids of its jobs."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from ecar_dist.cluster.job_script import SITE_FILE
from ecar_dist.config.run import RunConfig
from ecar_dist.errors import ConfigError
from ecar_dist.runtime.run.directory import RunDirectory
from ecar_dist.storage.untrusted import UntrustedError, read_plain_file

JOB_FILE = "job"  # the id of the training job
STEPS_FILE = "steps"  # a line for each job: name of the step, job id
MAX_STEPS_BYTES = 1 << 12
_JOB_ID = re.compile(r"[0-9]{1,20}")


def next_job_folder(run_directory: Path) -> Path:
    """The folder after the last one."""
    taken = [int(path.name) for path in (run_directory / "jobs").glob("*") if path.name.isdigit()]
    return run_directory / "jobs" / f"{max(taken, default=0) + 1:03d}"


def write_job_folder(folder: Path, scripts: Mapping[str, str], config: RunConfig, site_file: Path) -> None:
    """Create the folder with the job scripts by name, the resolved config, and a copy of the site file.

    Raises ConfigError if another submission has just created it.
    """
    # Slurm does not create the folder for its output.
    run_directory = folder.parents[1]
    (run_directory / "logs").mkdir(parents=True, exist_ok=True)

    # Only one submission can create the folder.
    folder.parent.mkdir(exist_ok=True)
    try:
        folder.mkdir()
    except FileExistsError:
        raise ConfigError(f"{folder} was just created by another submission; check that one first") from None

    for name, text in scripts.items():
        (folder / name).write_text(text, encoding="utf-8")
    shutil.copyfile(site_file, folder / SITE_FILE)
    RunDirectory(folder).write_config(config)


def remove_job_folder(folder: Path) -> None:
    """Remove what a failed submission has created: the folder, and each folder above it that is then empty."""
    shutil.rmtree(folder)
    run_directory = folder.parents[1]
    for path in (folder.parent, run_directory / "logs", run_directory):
        if not any(path.iterdir()):
            path.rmdir()


def record_jobs(folder: Path, jobs: Mapping[str, str]) -> None:
    """Record the ids of the submitted jobs, given by name of the step."""
    (folder / STEPS_FILE).write_text("".join(f"{step} {job}\n" for step, job in jobs.items()))
    (folder / JOB_FILE).write_text(f"{jobs['train']}\n")


def recorded_jobs(run_directory: Path) -> dict[str, str]:
    """All jobs that were submitted for this run: job id -> name of the step. Raises ConfigError for a damaged file."""
    found: dict[str, str] = {}
    for path in sorted((run_directory / "jobs").glob(f"*/{STEPS_FILE}")):
        try:
            text = read_plain_file(path, MAX_STEPS_BYTES).decode(errors="replace")
        except UntrustedError as error:
            raise ConfigError(f"{path} cannot be read: {error}; if no job of this run is live, remove it") from None
        for line in text.splitlines():
            step, _, job = line.partition(" ")
            if _JOB_ID.fullmatch(job):
                found[job] = step
    return found
