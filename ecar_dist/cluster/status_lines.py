"""The status of runs in words: a block for one, a table for several."""

from __future__ import annotations

from collections.abc import Sequence

from ecar_dist.cluster.run_state import DONE
from ecar_dist.cluster.status import Checkpoints, Progress, RunStatus
from ecar_dist.command_line import columns, counted, duration
from ecar_dist.storage.untrusted import printable

_LABEL = 12  # columns
_HEAD = ("run", "state", "step", "%", "samples/s", "left", "loss", "checkpoint", "last problem")
_TO_THE_LEFT = (0, 1, 8)


def block(status: RunStatus) -> list[str]:
    """One run, a line for each thing."""
    problem = status.problem
    rows = {
        "state": f"{status.state}{': ' * bool(status.sentence)}{status.sentence}",
        "progress": _progress(status.progress, status.state),
        "loss": _loss(status.progress),
        "checkpoint": _checkpoint(status.checkpoints),
        "attempts": _attempts(status),
        "problem": f"{duration(problem.age)} ago: {problem.text}" if problem else "none on record",
        "log": status.log or "",
        "curves": f"{status.tensorboard}; `ecar-dist tensorboard {status.run}`",
    }
    lines = [f"  {label.ljust(_LABEL)}{printable(text, 500)}" for label, text in rows.items() if text]
    unread = [f"  {'not read'.ljust(_LABEL)}{printable(what, 500)}" for what in status.unread]
    return [printable(status.run), *lines, *unread]


def table(found: Sequence[RunStatus | str]) -> list[str]:
    """Several runs, a line each; a text stands for a folder of which there is nothing else to say."""
    rows = [_HEAD, *(_row(status) for status in found if isinstance(status, RunStatus))]
    return columns(rows, left=_TO_THE_LEFT) + [status for status in found if isinstance(status, str)]


def _progress(progress: Progress, state: str) -> str:
    end = f"/{progress.last_step:,}" if progress.last_step is not None else ""
    said = [f"step {progress.step:,}{end}"]
    if progress.total_samples:
        said.append(f"{progress.samples_seen:,} of {progress.total_samples:,} samples ({_percent(progress)}%)")
    if progress.samples_per_second:
        said.append(f"{_rate(progress.samples_per_second)} samples/s")
    if progress.seconds_left and state != DONE:
        said.append(f"{duration(progress.seconds_left)} left")
    return ", ".join(said)


def _loss(progress: Progress) -> str:
    if progress.loss is None and not progress.step:
        return ""
    said = [f"{progress.loss:.4f}" if progress.loss is not None else "not finite"]
    if progress.loss_trend is not None:
        said[0] += f", {progress.loss_trend:+.1%} over the last {progress.loss_steps:,} steps"
    if progress.data_wait is not None:
        said.append(f"data wait {progress.data_wait:.0%}")
    return "; ".join([*said, *([progress.verdict] if progress.verdict else [])])


def _checkpoint(found: Checkpoints) -> str:
    if not found.asked:
        step = f"step {found.step:,} when the last attempt began" if found.step is not None else "none on record"
        return f"{step}; in {found.place}, which was not asked: `ecar-dist checkpoint list`"
    if found.step is None:
        return f"none yet in {found.place}"
    age = f", {duration(found.age)} ago" if found.age is not None else ""
    since = f"; {counted(found.steps_since, 'step')} since" if found.steps_since else ""
    return f"step {found.step:,}{age}{since}; {found.kept} kept in {found.place}"


def _attempts(status: RunStatus) -> str:
    ends = ", ".join(f"{count} {state}" for state, count in status.attempts.items())
    return f"{sum(status.attempts.values())}: {ends}; {duration(status.training_seconds)} of training" if ends else ""


def _row(status: RunStatus) -> tuple[str, ...]:
    progress, found, problem = status.progress, status.checkpoints, status.problem
    rate, left = progress.samples_per_second, progress.seconds_left
    return (
        printable(status.run),
        status.state,
        f"{progress.step:,}",
        _percent(progress) if progress.total_samples else "",
        _rate(rate) if rate else "",
        duration(left) if left and status.state != DONE else "",
        f"{progress.loss:.4f}" if progress.loss is not None else "",
        f"{found.step:,}" if found.step is not None else "",
        f"{duration(problem.age)} ago: {printable(problem.text, 60)}" if problem else "",
    )


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _percent(progress: Progress) -> str:
    """Rounded down: 100 is the end alone."""
    return f"{int(1000 * progress.samples_seen / (progress.total_samples or 1)) / 10:.1f}"
