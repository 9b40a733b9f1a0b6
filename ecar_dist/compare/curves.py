"""The curves of a run by samples, training FLOPs and hours, and its scores, from its files alone. No torch."""

from __future__ import annotations

import itertools
import statistics
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ecar_dist.cluster.run_record import MetricsLine, read_run_record
from ecar_dist.config.run import RunConfig
from ecar_dist.errors import ConfigError, DataError, reason_of
from ecar_dist.kinds.flops import FLOPS_PER_MAC
from ecar_dist.kinds.table import kind_of
from ecar_dist.storage.untrusted import JsonLines, UntrustedError, parse_object, parse_record, read_plain_file

MAX_SCORES_BYTES = 1 << 20
SMOOTHED = 5  # logged train losses that are averaged for each value
AXES = ("samples", "flops", "hours")
CURVES = ("loss", "validation", "validation_ema")
_MEANING = (  # settings that determine the meaning of a loss
    "model.kind",
    "flow.num_stages",
    "flow.ends",
    "flow.gamma",
    "flow.stage_weights",
)


@dataclass(frozen=True)
class Point:
    """One logged step. flops: of the training so far; hours: of the steps so far, without start-up and queueing."""

    samples: float
    flops: float
    hours: float
    loss: float | None
    validation: float | None
    validation_ema: float | None


@dataclass(frozen=True)
class RunCurves:
    """The data by which runs are compared."""

    run: str
    config: RunConfig
    ranks: int | None
    dataset_ids: tuple[str, ...]
    heldout_id: str | None
    points: tuple[Point, ...]
    scores: dict[str, Any] = field(default_factory=dict)

    def end(self, axis: str) -> float:
        """How far the run is on an axis."""
        return getattr(self.points[-1], axis)

    def series(self, axis: str, curve: str) -> tuple[list[float], list[float]]:
        """The known values of a curve, and where they are on an axis. Train losses are smoothed backwards."""
        known = [(getattr(one, axis), getattr(one, curve)) for one in self.points if getattr(one, curve) is not None]
        xs, values = [x for x, _ in known], [value for _, value in known]
        if curve == "loss":
            values = [statistics.fmean(values[max(0, at - SMOOTHED + 1) : at + 1]) for at in range(len(values))]
        return xs, values

    def at(self, axis: str, curve: str, x: float) -> float | None:
        """The value at `x`, interpolated linearly between its neighbours; None outside the curve."""
        xs, values = self.series(axis, curve)
        if not xs or not xs[0] <= x <= xs[-1]:
            return None
        after = bisect_right(xs, x)
        if after == len(xs) or xs[after - 1] == x:
            return values[after - 1]
        share = (x - xs[after - 1]) / (xs[after] - xs[after - 1])
        return values[after - 1] + share * (values[after] - values[after - 1])


def read_curves(path: Path) -> RunCurves:
    """Raises ConfigError if `path` is not a run that has logged a step, DataError if files cannot be read."""
    record = read_run_record(path)
    if record.config is None:
        why = record.unread[0] if record.unread else "it has no config.yaml"
        raise ConfigError(f"{path} is not the directory of a run ({why}); give <run.dir>/<run.name>")

    # All lines. If a step was logged twice, the later line counts.
    by_step: dict[int, MetricsLine] = {}
    try:
        with JsonLines(record.directory.metrics, partial(parse_record, model=MetricsLine)) as lines:
            by_step.update((line.step, line) for line in lines)
    except FileNotFoundError:
        pass
    except (OSError, UntrustedError) as error:
        raise DataError(f"cannot read {record.directory.metrics}: {reason_of(error)}; move it away") from None
    if not by_step:
        raise ConfigError(f"{path} has not logged a step yet; wait for log.every_steps={record.config.log.every_steps}")

    # What the last attempt has recorded.
    last = next((one for one in reversed(record.attempts) if one.dataset_ids), record.last)
    return RunCurves(
        run=str(path),
        config=record.config,
        ranks=last.world_size if last else None,
        dataset_ids=tuple((last.dataset_ids if last else None) or ()),
        heldout_id=last.heldout_id if last else None,
        points=tuple(_points([by_step[step] for step in sorted(by_step)], record.config)),
        scores=_scores(path),
    )


def _points(lines: Sequence[MetricsLine], config: RunConfig) -> list[Point]:
    # The first line of an attempt has no step time, because it includes the start-up: the median replaces it.
    per_sample = FLOPS_PER_MAC * kind_of(config).training_macs(config)
    known = [line.step_seconds for line in lines if line.step_seconds is not None]
    usual = statistics.median(known) if known else 0.0

    # Steps since the previous line, times the seconds of a step.
    before = [0, *(line.step for line in lines)]
    seconds = [
        (line.step - earlier) * (usual if line.step_seconds is None else line.step_seconds)
        for line, earlier in zip(lines, before, strict=False)
    ]
    return [
        Point(
            samples=float(line.samples_seen),
            flops=float(line.samples_seen * per_sample),
            hours=total / 3600.0,
            loss=line.loss,
            validation=line.validation,
            validation_ema=line.validation_ema,
        )
        for line, total in zip(lines, itertools.accumulate(seconds), strict=True)
    ]


def _scores(path: Path) -> dict[str, Any]:
    """The numbers of scores.json; none if the run was not evaluated. Raises DataError if the file is damaged."""
    try:
        tree = parse_object(read_plain_file(path / "scores.json", MAX_SCORES_BYTES))
    except FileNotFoundError:
        return {}
    except (OSError, UntrustedError) as error:
        raise DataError(f"cannot read {path / 'scores.json'}: {reason_of(error)}; evaluate the run again") from None
    numbers = {name: value for name, value in tree.items() if isinstance(value, int | float)}
    return {name: value for name, value in numbers.items() if not isinstance(value, bool)}


def differences(runs: Sequence[RunCurves]) -> list[str]:
    """What makes the losses of the runs hard to compare: different data, stages or loss weights; one line for each."""
    # The training data, and the data of the validation.
    notes = []
    facts: dict[str, list[Any]] = {
        "data set": [tuple(one[:12] for one in run.dataset_ids) or None for run in runs],
        "held-out set": [run.heldout_id and run.heldout_id[:12] for run in runs],
        "train.validate_samples": [run.config.train.validate_samples if run.heldout_id else None for run in runs],
    }

    # What the loss means.
    for key in _MEANING:
        facts[key] = [dict(run.config.values())[key] for run in runs]
    for name, values in facts.items():
        if len({str(value) for value in values if value is not None}) > 1:
            each = ", ".join(f"{Path(run.run).name} {_shown(value)}" for run, value in zip(runs, values, strict=True))
            notes.append(f"different {name}: {each}")
    return notes


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
