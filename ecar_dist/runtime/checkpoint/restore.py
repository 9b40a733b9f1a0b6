"""Which checkpoint a run goes on from: all ranks take the same one, the newest that none of them finds damaged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ecar_dist.errors import CheckpointError
from ecar_dist.runtime.checkpoint.files import (
    DamagedError,
    PassedOver,
    Progress,
    UnreadableError,
    check_identity,
    none_whole,
    read_manifest,
    warn_of_damage,
)
from ecar_dist.runtime.checkpoint.folder import CheckpointPlace
from ecar_dist.runtime.checkpoint.load import (
    begun,
    check_data,
    check_run,
    check_shapes,
    conversion,
    needed_by,
    read_share,
    sources,
)
from ecar_dist.runtime.ema import ShardedEma
from ecar_dist.runtime.engine import Engine
from ecar_dist.runtime.world import World

T = TypeVar("T")


@dataclass(frozen=True)
class Restored:
    """What a run goes on from. `conversion` and `new_data_order` are lines for its log, where there is a reason.

    `since`: the step that each average goes back to; 0 where it is one of all steps.
    """

    progress: Progress
    notes: dict[str, Any]
    path: str
    conversion: str | None
    new_data_order: str | None
    since: dict[str, int]


@dataclass(frozen=True)
class Expected:
    """What a checkpoint is compared with: this run's id, identity, averages and layout."""

    run_id: str
    adopt: bool  # go on from a checkpoint of another run

    identity: Mapping[str, Mapping[str, Any]]
    averages: Mapping[str, str]
    layout: Mapping[str, Any]
    allow_new_data: bool


def restore_newest(
    place: CheckpointPlace, world: World, engine: Engine, ema: ShardedEma, expected: Expected
) -> tuple[Restored | None, set[str]]:
    """Load the newest whole checkpoint, if there is any; also the names of those passed over. Collective.

    One that any rank cannot read, or whose values training cannot go on from, is passed over with a warning. Raises
    CheckpointError where all are, or the checkpoint is not one that this run can go on from.
    """
    names: list[str] = world.broadcast(world.on_first_rank(lambda: _list(place)))
    passed_over: list[PassedOver] = []
    for name in names:
        where = f"{place.where}/{name}"
        folder, fault = _unless_damaged(where, world, partial(_fetch, place, name, world, engine))
        restored = None
        if folder is not None:
            load = partial(_load, where, folder, engine, ema, expected)
            restored, fault = _unless_damaged(where, world, load)
        _release(place, name, world)
        if restored is not None:
            if world.is_first:
                warn_of_damage(passed_over, where)
            engine.set_optimizer_step(restored.progress.step)
            engine.publish_master_weights()
            return restored, {over.path.rpartition("/")[2] for over in passed_over}
        assert fault is not None
        passed_over.append(fault)
    if passed_over:
        world.agree(none_whole(place.where, passed_over) if world.is_first else None)
    return None, set()


def _list(place: CheckpointPlace) -> list[str]:
    place.prepare()
    return place.committed()


def _fetch(place: CheckpointPlace, name: str, world: World, engine: Engine) -> Path:
    """This rank's files of a checkpoint, proven."""
    return place.fetch(name, (world.rank, world.size), needed_by(engine.fragments))


def _unless_damaged(where: str, world: World, action: Callable[[], T]) -> tuple[T | None, PassedOver | None]:
    """What `action` returns; on all ranks None, and why, where any rank finds the checkpoint damaged by it."""

    def tried() -> tuple[T | None, PassedOver | None]:
        try:
            return action(), None
        except DamagedError as damage:
            return None, PassedOver(where, damage.problem, isinstance(damage, UnreadableError))

    value, fault = world.together(tried)
    faults = [one for one in world.gather(fault) if one]
    return (None, faults[0]) if faults else (value, None)


def _release(place: CheckpointPlace, name: str, world: World) -> None:
    """Once no rank reads it any more: what was fetched is given back, by one process of each node."""
    if world.local_rank == 0:
        place.release(name)


def _load(where: str, folder: Path, engine: Engine, ema: ShardedEma, expected: Expected) -> Restored:
    """This rank's share into its tensors. Raises DamagedError, and CheckpointError where it is another run's."""
    manifest = read_manifest(folder)
    adopted = check_run(where, manifest.run, expected.run_id, expected.adopt)
    found = manifest.identity
    check_identity(where, found["model"], expected.identity["model"])
    check_shapes(where, manifest.shapes, engine.shapes)
    data = check_data(where, found["data"], expected.identity["data"], expected.allow_new_data)
    origins = sources(expected.averages, manifest.averages)
    try:
        read_share(folder, manifest, engine, ema, origins)
    except OSError as error:
        raise CheckpointError(f"cannot read {where} ({error.strerror}); check the disk, then run again") from None
    changes = [adopted, conversion(manifest, expected.layout, expected.averages, origins)]
    line = "; ".join(change for change in changes if change) or None
    since = begun(manifest, expected.averages, origins)
    progress = Progress(manifest.progress.samples_seen, manifest.progress.step)
    return Restored(progress, manifest.notes, where, line, data, since)
