"""`ecar-dist submit`: one job, or several that wait for each other, and the text that describes them."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ecar_dist.cluster.job_folder import (
    next_job_folder,
    record_jobs,
    recorded_jobs,
    remove_job_folder,
    write_job_folder,
)
from ecar_dist.cluster.job_script import SITE_FILE, Options, option_words, render
from ecar_dist.cluster.resources import Resources
from ecar_dist.cluster.slurm import SlurmError, cancel_jobs, live_jobs, submit_script
from ecar_dist.command_line import columns
from ecar_dist.config.run import RunConfig
from ecar_dist.errors import ConfigError
from ecar_dist.runtime.run.directory import BEFORE_THE_START


@dataclass(frozen=True)
class Step:
    """One job, or job array, of a submission."""

    name: str
    template: str  # name of its job script
    command: str  # what it runs, for people
    arguments: Sequence[str]
    options: Options = field(default_factory=dict)
    exports: Mapping[str, str] = field(default_factory=dict)
    log: str = ""  # output of its script, in logs/ of the run, with %j, %A and %a as in Slurm
    done: bool = False  # its result exists: it is not submitted
    next_waits: Literal["afterok", "afterany"] = "afterok"


@dataclass(frozen=True)
class Submission:
    """The steps of one submission: each waits for the one before it. Nothing is written before `submit`."""

    config: RunConfig
    steps: Sequence[Step]
    scripts: Path  # folder of the templates
    folder: Path  # RUN/jobs/NNN
    after: str | None = None  # id of a job that the first step waits for

    @property
    def run_directory(self) -> Path:
        return self.folder.parents[1]

    @property
    def wanted(self) -> list[Step]:
        return [step for step in self.steps if not step.done]

    def log(self, step: Step, job: str) -> Path:
        """The output of a step's script: a file, or a pattern for several files."""
        return self.run_directory / "logs" / step.log.replace("%A", job).replace("%a", "*").replace("%j", job)

    def options(self, step: Step) -> Options:
        """All options of a step, except that it waits for another job."""
        logs = str(self.run_directory / "logs").replace("%", "%%")  # Slurm replaces %j, but not %%j
        return {
            "job-name": f"{self.config.run.name}-{step.name}",
            "output": f"{logs}/{step.log}",
            "chdir": os.getcwd(),
            **step.options,
        }

    def script(self, step: Step) -> str:
        """The complete job script of a step. It can be submitted again by hand."""
        template = (self.scripts / step.template).read_text(encoding="utf-8")
        exports = {"VENV": sys.prefix, "ECAR_SLURM": str(self.folder), **step.exports}
        return render(template, self.options(step), exports, step.arguments)

    def submit(self) -> dict[str, str]:
        """Write the job folder and submit all steps that are not done; returns the job ids by name of the step.

        Raises ConfigError if a job of this run has not ended, and SlurmError if sbatch fails. If a step is not
        submitted, the jobs of the steps before it are cancelled, and the folder is removed.
        """
        self._refuse_live_jobs()
        scripts = {f"{step.name}.sbatch": self.script(step) for step in self.wanted}
        write_job_folder(self.folder, scripts, self.config, self.scripts / SITE_FILE)
        jobs: dict[str, str] = {}
        try:
            for step in self.wanted:
                options = option_words(self.options(step))
                if dependency := self.dependency(step, jobs):
                    options += [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"]
                jobs[step.name] = submit_script(self.folder / f"{step.name}.sbatch", options)
            record_jobs(self.folder, jobs)
        except BaseException as error:
            # Also on Ctrl-C: half a submission must not run.
            if jobs:
                cancel_jobs(list(jobs.values()))
            remove_job_folder(self.folder)
            if jobs and isinstance(error, SlurmError):
                cancelled = ", ".join(f"{job} ({name})" for name, job in jobs.items())
                raise SlurmError(f"{error}; the jobs before it were cancelled: {cancelled}") from None
            raise
        return jobs

    def dependency(self, step: Step, jobs: Mapping[str, str]) -> str:
        """What a step waits for, as sbatch expects it: `afterok:12`; empty for a first step that waits for nothing."""
        number = self.wanted.index(step)
        if number:
            before = self.wanted[number - 1]
            return f"{before.next_waits}:{jobs[before.name]}"
        return f"afterany:{self.after}" if self.after else ""

    def _refuse_live_jobs(self) -> None:
        """Raises ConfigError if a job of this run has not ended, unless this submission waits for the newest one."""
        recorded = recorded_jobs(self.run_directory)
        live = live_jobs(list(recorded))
        if not live:
            return
        newest = max(live, key=int)
        if newest != self.after:
            raise ConfigError(
                f"job {newest} ({recorded[newest]}) of {self.run_directory} is {live[newest]}; wait for its end with "
                f"--after {newest}, or cancel it: scancel {' '.join(live)}"
            )


def training_step(
    folder: Path, resources: Resources, *, launcher: str | None = None, max_requeues: int | None = None
) -> Step:
    """The job that trains with the config in `folder`."""
    exports = {}
    if launcher is not None:
        exports["LAUNCHER"] = launcher
    if resources.fewest < resources.nodes:
        exports["MIN_NODES"] = f"{resources.fewest}"
    if max_requeues is not None:
        exports["MAX_REQUEUES"] = f"{max_requeues}"

    # In a chain, the jobs after the end of training do nothing and end as cancelled: that is not a failure.
    next_waits: Literal["afterok", "afterany"] = "afterany" if resources.chain else "afterok"
    config = str(folder / "config.yaml")
    return Step(
        "train",
        "train.sbatch",
        f"ecar-dist train {config}",
        arguments=[config],
        options=resources.options(),
        exports=exports,
        log="job-%j.log",
        next_waits=next_waits,
    )


def new_job_folder(config: RunConfig) -> Path:
    """The job folder of the next submission. Raises ConfigError if the run directory contains something else."""
    run_directory = Path(os.path.abspath(config.run_directory))
    names = {path.name for path in run_directory.glob("[!.]*")}
    if names - set(BEFORE_THE_START) and "lineage.json" not in names:
        raise ConfigError(f"{run_directory} is not empty and contains no run; choose another run.name or run.dir")
    return next_job_folder(run_directory)


def dry_run_text(submission: Submission, config_yaml: str) -> str:
    """The steps, and the files that would be written: every job script and the resolved config."""
    jobs = {step.name: f"JOB-{number}" for number, step in enumerate(submission.wanted, 1)}
    files = {f"{step.name}.sbatch": submission.script(step) for step in submission.wanted}
    files["config.yaml"] = config_yaml
    contents = [f"---- {submission.folder / name}\n{text}" for name, text in files.items()]
    return "\n".join(["dry run: nothing is submitted", *_step_table(submission, jobs), *contents])


def submitted_lines(submission: Submission, jobs: Mapping[str, str]) -> list[str]:
    """What was submitted, how to follow it, and how to cancel it."""
    run = submission.run_directory
    train = next(step for step in submission.wanted if step.name == "train")
    is_chain = "array" in train.options
    is_pipeline = len(submission.steps) > 1
    lines = _step_table(submission, jobs) if is_pipeline else [f"submitted job {jobs['train']}"]
    lines += [
        f"run directory  {run}",
        f"log            {submission.log(train, '*' if is_chain else jobs['train'])}",
        f"status         ecar-dist status {shlex.quote(str(run))}",
        f"cancel         scancel {' '.join(jobs.values())}",
    ]
    if is_pipeline:
        lines.append("if a step fails, the steps after it are cancelled; fix the cause and run the same command again")
    return lines


def _step_table(submission: Submission, jobs: Mapping[str, str]) -> list[str]:
    rows = [("step", "job", "waits for", "command")]
    for step in submission.steps:
        if step.done:
            rows.append((step.name, "-", "", "not needed: its result exists"))
        else:
            rows.append((step.name, jobs[step.name], submission.dependency(step, jobs), step.command))
    return columns(rows, left=range(4))
