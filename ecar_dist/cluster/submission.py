"""`ecar-dist submit`: a job, or several that wait for each other, and what is printed of them."""

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
    template: str  # file among the job scripts
    says: str  # what it does, as a command
    arguments: Sequence[str]
    options: Options = field(default_factory=dict)
    exports: Mapping[str, str] = field(default_factory=dict)
    log: str = ""  # of its script, in logs/ of the run, with Slurm's marks
    stands: bool = False  # its result is there: not submitted
    next_waits: Literal["afterok", "afterany"] = "afterok"


@dataclass(frozen=True)
class Submission:
    """The steps of one submission, in the order they wait for each other. Nothing is written before `submit`."""

    config: RunConfig
    steps: Sequence[Step]
    scripts: Path  # folder of the templates
    folder: Path  # RUN/jobs/NNN
    after: str | None = None

    @property
    def run_directory(self) -> Path:
        return self.folder.parents[1]

    @property
    def wanted(self) -> list[Step]:
        return [step for step in self.steps if not step.stands]

    def log(self, step: Step, job: str) -> Path:
        """Where to look for what a step's script prints: a file, or a pattern for several."""
        return self.run_directory / "logs" / step.log.replace("%A", job).replace("%a", "*").replace("%j", job)

    def options(self, step: Step) -> Options:
        """All options of a step that are known before any job has an id."""
        folder = str(self.run_directory / "logs").replace("%", "%%")  # % begins Slurm's marks
        output = f"{folder}/{step.log}"
        places = {"job-name": f"{self.config.run.name}-{step.name}", "output": output, "chdir": os.getcwd()}
        return {**places, **step.options}

    def script(self, step: Step) -> str:
        """The job script of a step, complete: it may be submitted again by hand."""
        template = (self.scripts / step.template).read_text(encoding="utf-8")
        exports = {"VENV": sys.prefix, "ECAR_SLURM": str(self.folder), **step.exports}
        return render(template, self.options(step), exports, step.arguments)

    def submit(self) -> dict[str, str]:
        """Write the job folder and submit all steps that do not stand; returns the job ids by name of the step.

        Raises ConfigError where a job of this run has not ended, SlurmError for what sbatch refuses: then what was
        submitted before is cancelled, and the folder is gone.
        """
        self._refuse_live_jobs()
        scripts = {f"{step.name}.sbatch": self.script(step) for step in self.wanted}
        write_job_folder(self.folder, scripts, self.config, self.scripts / SITE_FILE)
        jobs: dict[str, str] = {}
        try:
            for step in self.wanted:
                options = [*option_words(self.options(step)), *self._dependency(step, jobs)]
                jobs[step.name] = submit_script(self.folder / f"{step.name}.sbatch", options)
            record_jobs(self.folder, jobs)
        except BaseException as error:
            self._take_back(jobs, error)
            raise
        return jobs

    def waits_for(self, step: Step, jobs: Mapping[str, str]) -> str:
        """`afterok:12`, or nothing for a first step."""
        number = self.wanted.index(step)
        if number:
            before = self.wanted[number - 1]
            return f"{before.next_waits}:{jobs[before.name]}"
        return f"afterany:{self.after}" if self.after else ""

    def _dependency(self, step: Step, jobs: Mapping[str, str]) -> list[str]:
        waits = self.waits_for(step, jobs)
        return [f"--dependency={waits}", "--kill-on-invalid-dep=yes"] if waits else []

    def _refuse_live_jobs(self) -> None:
        recorded = recorded_jobs(self.run_directory)
        live = live_jobs(list(recorded))
        if not live:
            return
        newest = max(live, key=int)
        if newest != self.after:
            raise ConfigError(
                f"job {newest} ({recorded[newest]}) of {self.run_directory} is {live[newest]}; wait for its end with "
                f"--after {newest}, or end it: scancel {' '.join(live)}"
            )

    def _take_back(self, jobs: Mapping[str, str], error: BaseException) -> None:
        if jobs:
            cancel_jobs(list(jobs.values()))
        remove_job_folder(self.folder)
        if jobs and isinstance(error, SlurmError):
            said = ", ".join(f"{job} ({step})" for step, job in jobs.items())
            raise SlurmError(f"{error}; the jobs before it were cancelled: {said}") from None


def training_step(
    folder: Path, resources: Resources, *, launcher: str | None = None, max_requeues: int | None = None
) -> Step:
    """The job that trains by the config in `folder`."""
    exports = {} if launcher is None else {"LAUNCHER": launcher}
    if resources.fewest < resources.nodes:
        exports["MIN_NODES"] = f"{resources.fewest}"
    if max_requeues is not None:
        exports["MAX_REQUEUES"] = f"{max_requeues}"
    return Step(
        "train",
        "train.sbatch",
        says=f"ecar-dist train {folder / 'config.yaml'}",
        arguments=[str(folder / "config.yaml")],
        options=resources.options(),
        exports=exports,
        log="job-%j.log",
        next_waits="afterany" if resources.chain else "afterok",  # the links that are not needed end cancelled
    )


def new_job_folder(config: RunConfig) -> Path:
    """Where the next submission of this run would lie. Raises ConfigError where its directory holds something else."""
    run_directory = Path(os.path.abspath(config.run_directory))
    names = {path.name for path in run_directory.glob("[!.]*")}
    if names - set(BEFORE_THE_START) and "lineage.json" not in names:
        raise ConfigError(f"{run_directory} is not empty and holds no run; choose another run.name or run.dir")
    return next_job_folder(run_directory)


def dry_run_text(submission: Submission, config_yaml: str) -> str:
    """The steps, every job script and the resolved config, as they would be written."""
    jobs = {step.name: f"JOB-{number}" for number, step in enumerate(submission.wanted, 1)}
    files = {f"{step.name}.sbatch": submission.script(step) for step in submission.wanted}
    files["config.yaml"] = config_yaml
    contents = [f"---- {submission.folder / name}\n{text}" for name, text in files.items()]
    return "\n".join(["nothing is submitted (--dry-run)", *_step_table(submission, jobs), *contents])


def submitted_lines(submission: Submission, jobs: Mapping[str, str]) -> list[str]:
    """What was submitted, how to follow it, and how to cancel it."""
    run = submission.run_directory
    train = next(step for step in submission.wanted if step.name == "train")
    chain = "array" in train.options
    pipeline = len(submission.steps) > 1
    lines = _step_table(submission, jobs) if pipeline else [f"submitted job {jobs['train']}"]
    lines += [
        f"run directory  {run}",
        f"log            {submission.log(train, '*' if chain else jobs['train'])}",
        f"look           ecar-dist status {shlex.quote(str(run))}",
        f"stop           scancel {' '.join(jobs.values())}",
    ]
    if pipeline:
        lines.append("if a step fails, the steps after it are cancelled; fix the cause and run the same command again")
    return lines


def _step_table(submission: Submission, jobs: Mapping[str, str]) -> list[str]:
    rows = [("step", "job", "waits for", "command")]
    for step in submission.steps:
        if step.stands:
            rows.append((step.name, "-", "", "not needed: its result exists"))
        else:
            rows.append((step.name, jobs[step.name], submission.waits_for(step, jobs), step.says))
    return columns(rows, left=range(4))
