"""What `ecar-dist submit` prints."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from ecar_dist.cluster.submission import Submission
from ecar_dist.command_line import columns


def dry_run_text(submission: Submission, config_yaml: str) -> str:
    """The steps, every job script and the resolved config, as they would be written."""
    jobs = {step.name: f"JOB-{number}" for number, step in enumerate(submission.wanted, 1)}
    parts = ["\n".join(_table(submission, jobs))]
    parts += [_titled(f"{step.name}.sbatch", submission, submission.script(step)) for step in submission.wanted]
    parts.append(_titled("config.yaml", submission, config_yaml))
    return "\n".join(["nothing is submitted (--dry-run)", *parts])


def _titled(name: str, submission: Submission, text: str) -> str:
    return f"---- {submission.folder / name}\n{text}"


def submitted_lines(submission: Submission, jobs: Mapping[str, str]) -> list[str]:
    """What was submitted, where it can be followed, and how it is ended."""
    run = submission.run_directory
    train = next(step for step in submission.wanted if step.name == "train")
    chain = "array" in train.options
    lines = _table(submission, jobs) if len(submission.steps) > 1 else [f"submitted job {jobs['train']}"]
    lines += [
        f"run directory  {run}",
        f"log            {submission.log(train, '*' if chain else jobs['train'])}",
        f"look           ecar-dist status {shlex.quote(str(run))}",
        f"stop           scancel {' '.join(jobs.values())}",
    ]
    if len(submission.steps) > 1:
        lines.append("a failure cancels what waits for it; fix the cause and give the same command: it goes on there")
    return lines


def _table(submission: Submission, jobs: Mapping[str, str]) -> list[str]:
    rows = [("step", "job", "waits for", "command")]
    for step in submission.steps:
        if step.stands:
            rows.append((step.name, "-", "", "its result stands already"))
        else:
            rows.append((step.name, jobs[step.name], submission.waits_for(step, jobs), step.says))
    return columns(rows, left=range(4))
