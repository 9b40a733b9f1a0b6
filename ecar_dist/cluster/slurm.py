"""The commands of Slurm, called without a shell. If one fails, its last line is the error message."""

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
    """Slurm is not installed here, or a command of it failed."""


def require_slurm() -> None:
    """Raises SlurmError if jobs cannot be submitted from this machine."""
    if shutil.which("sbatch") is None:
        raise SlurmError("sbatch is not on the PATH; run this on a login node of the cluster, or use --dry-run")


def submit_script(
    script: Path, options: Sequence[str], arguments: Sequence[str] = (), variables: Mapping[str, str] | None = None
) -> str:
    """Submit a job script; returns the job id. `variables` are added to the environment of the job.

    Raises SlurmError if sbatch fails, or does not print a job id.
    """
    output = _call("sbatch", "--parsable", *options, str(script), *arguments, variables=variables)
    job = output.strip().partition(";")[0]  # ID;CLUSTER on a site with several clusters
    if not _JOB_ID.fullmatch(job):
        raise SlurmError(f"sbatch printed {printable(output)!r}, not a job id; check with squeue whether the job runs")
    return job


def cancel_jobs(jobs: Sequence[str]) -> None:
    """Cancel jobs. Those that have ended are ignored. Raises SlurmError if Slurm does not answer."""
    _call("scancel", *jobs)


def live_jobs(jobs: Sequence[str]) -> dict[str, str]:
    """Those of the jobs that have not ended, and their state: PENDING, RUNNING, ...

    A job array is live under its own id as long as one of its tasks is. Raises SlurmError if Slurm does not answer.
    """
    if not jobs:
        return {}
    states: dict[str, str] = {}
    for line in _squeue(jobs, "%F %T"):
        job, _, state = line.strip().partition(" ")
        if states.get(job) != "RUNNING":
            states[job] = state
    return states


def job_state(job: str) -> tuple[str, str]:
    """State of a job and the reason why it waits, as squeue prints them; ("", "") if it has ended."""
    lines = _squeue([job], "%T %r")
    state, _, reason = lines[0].strip().partition(" ") if lines else ("", "", "")
    return state, reason


def _squeue(jobs: Sequence[str], columns: str) -> list[str]:
    """A line for each of the jobs, and each task of an array, that has not ended."""
    try:
        return _call("squeue", "--noheader", f"--jobs={','.join(jobs)}", f"--format={columns}").splitlines()
    except SlurmError as error:
        if "Invalid job id" in str(error):  # printed if a single job is given and Slurm has forgotten it
            return []
        raise


def _call(*command: str, variables: Mapping[str, str] | None = None) -> str:
    """Run a command; returns what it printed. Raises SlurmError."""
    # A command must not wait for the keyboard, and output that is not UTF-8 must not raise.
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, **(variables or {})},
        )
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} is not on the PATH; run this on a login node of the cluster") from None

    # Slurm prints warnings before the error.
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise SlurmError(printable(lines[-1]) if lines else f"{command[0]} ended with status {done.returncode}")
    return done.stdout
