"""Drills of rank faults: a rank is killed, stopped, slowed, asked to end, or computes a NaN."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from signal import SIGKILL, SIGSTOP, SIGTERM

from ecar_dist.command_line import counted
from ecar_dist.drills.evidence import (
    Finding,
    ended_well,
    ended_within,
    every_step_once,
    losses,
    no_orphans,
    one_line_with,
    rank_statuses,
    read_metrics,
    same_losses,
    whole_checkpoints,
)
from ecar_dist.drills.ground import STEPS, STRIKE_AT, CannotRunError, Ground, Trial
from ecar_dist.drills.processes import Ended
from ecar_dist.runtime.checkpoint.files import committed
from ecar_dist.storage.atomic import write_json
from ecar_dist.train.guard import roll_back_record

DEATH_SECONDS = 15.0  # a job must end within this time after a rank has died
GRACE_SECONDS = 25.0  # a job that is asked to end must end within this time; Slurm allows 30 by default
SHORTEST_HANG = 5.0
HANG_MARGIN = 15.0  # seconds for the reports of the watchdog, the kill, and the end of the launcher
# Alternating, in seconds: the rank runs for a third of the time.
STOPPED = 0.02
RUNNING = 0.01


def kill_rank(ground: Ground) -> Iterator[Finding]:
    trial, victim = Trial(ground, "kill-rank"), ground.ranks - 1
    with trial.start(failpoint=trial.slow_steps()) as job:
        trial.reach(job, STRIKE_AT)
        job.strike(SIGKILL, victim)
        ended = job.end()
    yield ended_within(ended, DEATH_SECONDS)
    yield names_rank(ended, victim)
    yield no_orphans(ended)
    yield from resumed_as_quiet(ground, trial)


def hang_rank(ground: Ground) -> Iterator[Finding]:
    trial, victim = Trial(ground, "hang-rank"), ground.ranks - 1
    patience = max(SHORTEST_HANG, ground.quiet.startup_seconds)
    with trial.start(f"train.hang_seconds={patience:.1f}", failpoint=trial.slow_steps()) as job:
        trial.reach(job, STRIKE_AT)
        job.strike(SIGSTOP, victim)
        ended = job.end()
    yield ended_within(ended, patience + HANG_MARGIN)
    yield names_rank(ended, victim)
    yield no_orphans(ended)
    yield from resumed_as_quiet(ground, trial)


def slow_rank(ground: Ground) -> Iterator[Finding]:
    if ground.ranks < 2:
        raise CannotRunError("a rank is slow only compared with others; use --ranks 2")
    trial, victim = Trial(ground, "slow-rank"), ground.ranks - 1
    with trial.start(failpoint=trial.slow_steps("burn")) as job:
        job.reach(1)
        job.hobble(victim, STOPPED, RUNNING)
        ended = job.end()
    yield ended_well(ended)
    found = re.findall(r"rank \d+ is [0-9.]+x slow.*", ended.text)
    named = {line.split()[1] for line in found} == {str(victim)}
    yield Finding(f"the log names rank {victim} as slow, and no other", found[-1] if found else "no such line", named)
    yield no_orphans(ended)
    yield from as_quiet(ground, trial)


def preempt(ground: Ground) -> Iterator[Finding]:
    trial = Trial(ground, "preempt")
    with trial.start(failpoint=trial.slow_steps()) as job:
        trial.reach(job, STRIKE_AT)
        job.strike(SIGTERM, *range(ground.ranks))
        ended = job.end()
    yield ended_within(ended, GRACE_SECONDS)
    yield rank_statuses(ended, 75)
    yield no_orphans(ended)
    last = max((entry["step"] for entry in trial.metrics()), default=0)
    saved = trial.newest_step()
    yield Finding(f"its last step, {last}, is committed", f"newest: step {saved}", saved == last)
    yield from resumed_as_quiet(ground, trial)


def resize(ground: Ground) -> Iterator[Finding]:
    """Started on all ranks, resumed on a different number of ranks in a different ZeRO stage, then as at the start."""
    trial = Trial(ground, "resize")
    was = ground.config.deepspeed.zero_stage
    stage = 3 if was != 3 else 1
    ranks = 2 if ground.ranks == 1 else 1
    changed = [f"deepspeed.zero_stage={stage}", "deepspeed.offload_params=false"]
    if ranks > 1:
        changed.append("batch.micro_batch_size=1")

    # Kill it with each number of ranks.
    for step, number, overrides in ((STRIKE_AT, ground.ranks, []), (2 * STEPS // 3 + 2, ranks, changed)):
        with trial.start(*overrides, ranks=number, failpoint=trial.slow_steps()) as job:
            trial.reach(job, step)
            job.strike(SIGKILL, number - 1)
            ended = job.end()
        yield no_orphans(ended)

    # Train to the end. Both resumed launches name the old and the new way of sharding.
    ways = [(ground.ranks, was, ranks, stage), (ranks, stage, ground.ranks, was)]
    saved = trial.newest_step()
    last = trial.train()
    for said, (old, old_stage, new, new_stage) in zip((ended, last), ways, strict=True):
        writer, reader = counted(old, "rank"), counted(new, "rank")
        words = f"written by {writer} with ZeRO-{old_stage}, read by {reader} with ZeRO-{new_stage}"
        found = [line for line in said.text.splitlines() if words in line]
        yield Finding(f"one line: {words}", found[0] if found else "no such line", len(found) == 1)
    yield ended_well(last)
    yield from_step(trial, saved)
    yield from as_quiet(ground, trial)


def nan(ground: Ground) -> Iterator[Finding]:
    trial, victim = Trial(ground, "nan"), ground.ranks - 1
    ended = trial.train(failpoint=f"train.loss:rank={victim}:step={STRIKE_AT}:nan")
    yield ended_well(ended)
    yield no_orphans(ended)
    metrics = trial.metrics()
    before = {step: loss for step, loss in ground.quiet.losses.items() if step < STRIKE_AT}
    yield same_losses(losses(metrics), before, ground.tolerance)
    yield from learnt_nothing(ground, losses(metrics), STRIKE_AT)
    yield every_step_once(metrics, STEPS)
    skipped = metrics[-1].get("train/skipped_steps") if metrics else None
    yield Finding("one step is skipped, by all ranks", f"train/skipped_steps is {skipped}", skipped == 1)
    steps = [entry.get("step") for entry in read_metrics(trial.path / "bad_steps.jsonl")]
    yield Finding(f"its samples are recorded for step {STRIKE_AT}", f"steps {steps}", steps == [STRIKE_AT])
    yield whole_checkpoints(trial.checkpoints, committed(trial.checkpoints))


def learnt_nothing(ground: Ground, found: dict[int, float], step: int) -> Iterator[Finding]:
    """Compare with a run that skips the step, as after a roll-back: it reads the samples and changes no weight."""
    trial = Trial(ground, "nan-passed-over")
    trial.path.mkdir(parents=True)
    write_json(trial.path / "lineage.json", [])  # a run directory without an attempt
    (trial.path / "bad_steps.jsonl").write_text(roll_back_record(step, (step, step)))
    whose = f"those of a run that skips step {step}"
    ended = trial.train()
    yield same_losses(found, losses(trial.metrics()) if ended.status == 0 else {}, ground.tolerance, whose)


def names_rank(ended: Ended, rank: int) -> Finding:
    return one_line_with(ended, f"one line names rank {rank}", f"rank {rank} ")


def resumed_as_quiet(ground: Ground, trial: Trial, prefix: Sequence[str] = ()) -> Iterator[Finding]:
    """The same command resumes from the newest checkpoint, and the complete run equals one without the fault."""
    saved = trial.newest_step()
    ended = trial.train(prefix=prefix)
    yield ended_well(ended)
    yield from_step(trial, saved)
    yield from as_quiet(ground, trial)


def from_step(trial: Trial, saved: int) -> Finding:
    found = trial.resumed_from()
    seen = "it did not get that far" if found is None else f"step {found}"
    return Finding(f"the same command continues from the newest checkpoint, step {saved}", seen, found == saved)


def as_quiet(ground: Ground, trial: Trial) -> Iterator[Finding]:
    metrics = trial.metrics()
    yield same_losses(losses(metrics), ground.quiet.losses, ground.tolerance)
    yield every_step_once(metrics, STEPS)
    yield whole_checkpoints(trial.checkpoints, committed(trial.checkpoints))
