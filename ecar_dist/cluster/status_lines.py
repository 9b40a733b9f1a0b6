"""The status of runs as text: a block for one run, a table for several."""

from __future__ import annotations

from collections.abc import Sequence

from ecar_dist.cluster.run_state import DONE
from ecar_dist.cluster.status import CheckpointSummary, RunProgress, RunStatus
from ecar_dist.command_line import columns, counted, duration
from ecar_dist.storage.untrusted import printable

_LABEL = 12  # columns
_HEAD = ("run", "state", "step", "%", "samples/s", "left", "loss", "checkpoint", "last problem")
_LEFT_ALIGNED = (0, 1, 8)


def block(status: RunStatus) -> list[str]:
    """One run: a line for each fact."""
    problem = status.problem
    attempts = ", ".join(f"{count} {state}" for state, count in status.attempts.items())
    rows = [
        ("state", f"{status.state}: {status.sentence}"),
        ("progress", _progress(status.progress, status.state)),
        ("checkpoint", _checkpoint(status.checkpoints)),
        ("attempts", attempts),
        ("problem", f"{duration(problem.age)} ago: {problem.text}" if problem else "none on record"),
        ("log", status.log or ""),
        ("curves", f"{status.tensorboard}; `ecar-dist tensorboard {status.run}`"),
        *(("not read", what) for what in status.unread),
    ]
    return [printable(status.run), *(f"  {label:{_LABEL}}{printable(text, 500)}" for label, text in rows if text)]


def table(found: Sequence[RunStatus | str]) -> list[str]:
    """Several runs: a row for each. A string stands for a folder that is not a run."""
    rows = [_row(status) for status in found if isinstance(status, RunStatus)]
    return columns([_HEAD, *rows], left=_LEFT_ALIGNED) + [status for status in found if isinstance(status, str)]


def _progress(progress: RunProgress, state: str) -> str:
    end = f"/{progress.last_step:,}" if progress.last_step is not None else ""
    said = [f"step {progress.step:,}{end}"]
    if progress.total_samples:
        said.append(f"{progress.samples_seen:,} of {progress.total_samples:,} samples ({_percent(progress)}%)")
    if progress.samples_per_second:
        said.append(f"{_rate(progress.samples_per_second)} samples/s")
    if progress.data_wait is not None:
        said.append(f"data wait {progress.data_wait:.0%}")
    if progress.seconds_left and state != DONE:
        said.append(f"{duration(progress.seconds_left)} left")
    if progress.step:
        said.append(f"loss {progress.loss:.4f}" if progress.loss is not None else "loss not finite")
    return ", ".join(said)


def _checkpoint(found: CheckpointSummary) -> str:
    failed = f"; {counted(found.failed_saves, 'save')} failed in this attempt" if found.failed_saves else ""
    if not found.asked:
        step = f"step {found.step:,} when the last attempt began" if found.step is not None else "none on record"
        return f"{step}; in {found.place}, which was not asked: `ecar-dist checkpoint list`{failed}"
    if found.step is None:
        return f"none yet in {found.place}{failed}"
    age = f", {duration(found.age)} ago" if found.age is not None else ""
    since = f"; {counted(found.steps_since, 'step')} since" if found.steps_since else ""
    return f"step {found.step:,}{age}{since}; {found.kept} kept in {found.place}{failed}"


def _row(status: RunStatus) -> tuple[str, ...]:
    progress = status.progress
    problem = status.problem
    step = status.checkpoints.step
    return (
        printable(status.run),
        status.state,
        f"{progress.step:,}",
        _percent(progress) if progress.total_samples else "",
        _rate(progress.samples_per_second) if progress.samples_per_second else "",
        duration(progress.seconds_left) if progress.seconds_left and status.state != DONE else "",
        f"{progress.loss:.4f}" if progress.loss is not None else "",
        f"{step:,}" if step is not None else "",
        f"{duration(problem.age)} ago: {printable(problem.text, 60)}" if problem else "",
    )


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _percent(progress: RunProgress) -> str:
    """Rounded down: only the end is 100."""
    return f"{int(1000 * progress.samples_seen / (progress.total_samples or 1)) / 10:.1f}"
