"""Slurm's commands, called one at a time without a shell. What they refuse is one line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from ecar_dist.errors import EcarError
from ecar_dist.storage.untrusted import printable

_JOB_ID = re.compile(r"[0-9]{1,20}")


class SlurmError(EcarError):
    """Slurm is not here, or did not do what it was asked for."""


def require_slurm() -> None:
    """Raises SlurmError where jobs cannot be submitted from."""
    if shutil.which("sbatch") is None:
        raise SlurmError("sbatch is not on the PATH; run this on a login node of the cluster, or look with --dry-run")


def submit_script(
    script: Path, options: Sequence[str], arguments: Sequence[str] = (), variables: Mapping[str, str] | None = None
) -> str:
    """Submit a job script; returns the job's id. `variables` are added to the environment that the job inherits.

    Raises SlurmError with sbatch's last line, or where it does not name a job.
    """
    said = _call("sbatch", "--parsable", *options, str(script), *arguments, variables=variables)
    job = said.strip().partition(";")[0]  # ID;CLUSTER where there are several clusters
    if not _JOB_ID.fullmatch(job):
        raise SlurmError(f"sbatch gave no job id but {printable(said)!r}; look with squeue whether it runs")
    return job


def cancel_jobs(jobs: Sequence[str]) -> None:
    """Raises SlurmError where Slurm cannot be asked; a job that has ended is none."""
    _call("scancel", *jobs)


def live_jobs(jobs: Sequence[str]) -> dict[str, str]:
    """Of these jobs those that have not ended, with their state: PENDING, RUNNING, ...

    A job array is there under its own id as long as one of its tasks is. Raises SlurmError where Slurm cannot be asked.
    """
    if not jobs:
        return {}
    try:
        lines = _call("squeue", "--noheader", f"--jobs={','.join(jobs)}", "--format=%F %T").splitlines()
    except SlurmError as error:
        if "Invalid job id" in str(error):  # said of one job alone that Slurm has forgotten
            return {}
        raise
    states: dict[str, str] = {}
    for line in lines:
        job, _, state = line.strip().partition(" ")
        if states.get(job) != "RUNNING":
            states[job] = state
    return states


def job_state(job: str) -> tuple[str, str]:
    """State of a job and why it waits, as squeue calls them; ("", "") for one that has ended."""
    try:
        said = _call("squeue", "--noheader", f"--jobs={job}", "--format=%T %r").split("\n")[0].strip()
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return "", ""
        raise
    state, _, reason = said.partition(" ")
    return state, reason


def _call(*command: str, variables: Mapping[str, str] | None = None) -> str:
    """What the command printed."""
    environment = {**os.environ, **(variables or {})}
    nothing = subprocess.DEVNULL
    try:
        done = subprocess.run(command, stdin=nothing, capture_output=True, text=True, errors="replace", env=environment)
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} is not on the PATH; run this on a login node of the cluster") from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise SlurmError(printable(lines[-1]) if lines else f"{command[0]} ended with status {done.returncode}")
    return done.stdout
