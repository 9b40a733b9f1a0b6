"""`ecar-data status`: progress of an encoding, from its plan and the modification times of its markers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.encode.commit import read_marker
from data_tools.encode.plan import EncodePlan, read_plan
from data_tools.failures import ERRORS_NAME, TASK_ERRORS
from ecar_dist.command_line import duration
from ecar_dist.data.prepared import PLAN_NAME
from ecar_dist.data.shards.manifest import MANIFEST_NAME, load_manifest
from ecar_dist.errors import ConfigError

_RECENT_SECONDS = 600.0


@dataclass(frozen=True)
class _Done:
    shard_index: int
    images: int  # samples and failures
    failures: int
    at: float  # seconds since 1970


def status(out: Path, *, tasks: int | None = None, now: float | None = None) -> None:
    """Print finished shards and images, failures, rates and time left; with `tasks`, also the progress of each task.

    Reads only the markers; `finalize` checks the shards. Raises DataError if there is no plan.
    """
    if tasks is not None and tasks < 1:
        raise ConfigError(f"--tasks {tasks} must be at least 1; give the --tasks of the workers")
    plan = read_plan(out)
    now = time.time() if now is None else now
    begun = (out / PLAN_NAME).stat().st_mtime
    done = [found for index in range(plan.num_shards) if (found := _look(out, index, plan)) is not None]
    images = sum(shard.images for shard in done)
    failures = sum(shard.failures for shard in done)

    print(f"shards    {len(done)} of {plan.num_shards}")
    print(f"images    {images} of {plan.count}, {100 * images / plan.count:.1f} %")
    listed = ERRORS_NAME if (out / ERRORS_NAME).exists() else TASK_ERRORS
    print(f"failures  {failures}" + (f", listed in {out / listed}" if failures else ""))

    # The recent rate determines the time left; the overall rate includes pauses.
    recent = _recent_rate(done, begun, now)
    overall = _rate(done, begun)
    print(f"rate      {recent:.1f} images/s over the last {_RECENT_SECONDS / 60:.0f} min, {overall:.1f} overall")
    print(f"left      {_time_left(plan.count - images, recent)}")
    if done:
        newest = max(done, key=lambda shard: shard.at)
        print(f"newest    {newest.shard_index:06d}, {duration(now - newest.at)} ago")

    for task in range(tasks or 0):
        shards = range(task, plan.num_shards, tasks or 1)
        _print_task(task, len(shards), [shard for shard in done if shard.shard_index in shards], now)
    if (out / MANIFEST_NAME).exists():
        print(f"finalized {load_manifest(out).dataset_id}")


def _look(out: Path, shard_index: int, plan: EncodePlan) -> _Done | None:
    """None if the shard has no marker of this plan."""
    marker = read_marker(out, shard_index)
    if marker is None or marker.plan_id != plan.plan_id:
        return None
    at = (out / f"{shard_index:06d}.json").stat().st_mtime
    return _Done(shard_index, len(plan.rows(shard_index)), len(marker.failures), at)


def _print_task(task: int, num_shards: int, done: Sequence[_Done], now: float) -> None:
    line = f"task {task:<4} {len(done)} of {num_shards} shards"
    if done:
        line += f", the newest {duration(now - max(shard.at for shard in done))} ago"
    if len(done) > 1:
        line += f", {_own_rate(done):.1f} images/s between its last shards"
    print(line)


def _own_rate(done: Sequence[_Done]) -> float:
    """Images per second of one task while it ran, however long ago.

    The time of a shard is from the previous marker to its own. The first shard is left out, because the start of the
    task is not recorded.
    """
    shards = sorted(done, key=lambda shard: shard.at)
    recent = [shard for shard in shards if shards[-1].at - shard.at < _RECENT_SECONDS]
    chosen = recent if len(recent) > 1 else shards[-2:]
    return sum(shard.images for shard in chosen[1:]) / max(1.0, chosen[-1].at - chosen[0].at)


def _rate(done: Sequence[_Done], begun: float) -> float:
    """Images per second from the plan to the newest marker, pauses included."""
    if not done:
        return 0.0
    return sum(shard.images for shard in done) / max(1.0, max(shard.at for shard in done) - begun)


def _recent_rate(done: Sequence[_Done], begun: float, now: float) -> float:
    recent = sum(shard.images for shard in done if now - shard.at < _RECENT_SECONDS)
    return recent / max(1.0, min(_RECENT_SECONDS, now - begun))


def _time_left(images: int, rate: float) -> str:
    if not images:
        return "nothing"
    return f"{duration(images / rate)} at the recent rate" if rate else "unknown, no shard was finished recently"
