"""Which checkpoint a run goes on from: all ranks take the same one, the newest that none of them finds damaged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecar_dist.errors import CheckpointError
from ecar_dist.runtime.checkpoint_files import (
    DamagedError,
    Progress,
    check_identity,
    none_whole,
    read_manifest,
    warn_of_damage,
)
from ecar_dist.runtime.checkpoint_load import begun, check_data, check_run, conversion, needed_by, read_share, sources
from ecar_dist.runtime.checkpoint_place import CheckpointPlace
from ecar_dist.runtime.ema import ShardedEma
from ecar_dist.runtime.engine import Engine
from ecar_dist.runtime.world import World


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
    """Load the newest whole checkpoint, if there is any; also the names of those found damaged. Collective.

    Raises CheckpointError where all are damaged, or the checkpoint is not one that this run can go on from.
    """
    names: list[str] = world.broadcast(world.on_first_rank(lambda: _list(place)))
    damaged: list[tuple[str, str]] = []
    for name in names:
        folder, problem = _fetch(place, name, world, engine)
        if folder is None:
            damaged.append((f"{place.where}/{name}", problem))
            _release(place, name, world)
            continue
        if world.is_first:
            warn_of_damage(damaged, f"{place.where}/{name}")
        restored = _load(f"{place.where}/{name}", folder, world, engine, ema, expected)
        _release(place, name, world)
        return restored, {path.rpartition("/")[2] for path, _ in damaged}
    if damaged:
        world.agree(none_whole(place.where, damaged) if world.is_first else None)
    return None, set()


def _list(place: CheckpointPlace) -> list[str]:
    place.prepare()
    return place.committed()


def _fetch(place: CheckpointPlace, name: str, world: World, engine: Engine) -> tuple[Path | None, str]:
    """This rank's files of a checkpoint, proven; on all ranks None, and why, where any rank finds it damaged."""

    def fetch() -> tuple[Path | None, str | None]:
        try:
            return place.fetch(name, (world.rank, world.size), needed_by(engine.fragments)), None
        except DamagedError as damage:
            return None, str(damage)

    folder, problem = world.together(fetch)
    problems = [text for text in world.gather(problem) if text]
    return (None, problems[0]) if problems else (folder, "")


def _release(place: CheckpointPlace, name: str, world: World) -> None:
    """Once no rank reads it any more: what was fetched is given back, by one process of each node."""
    if world.local_rank == 0:
        place.release(name)


def _load(where: str, folder: Path, world: World, engine: Engine, ema: ShardedEma, expected: Expected) -> Restored:
    """Returns when all ranks have read what they need."""

    def load() -> Restored:
        manifest = read_manifest(folder)
        adopted = check_run(where, manifest["run"], expected.run_id, expected.adopt)
        found = manifest["identity"]
        check_identity(where, found["model"], expected.identity["model"])
        data = check_data(where, found["data"], expected.identity["data"], expected.allow_new_data)
        origins = sources(expected.averages, manifest["averages"])
        try:
            read_share(folder, engine, ema, origins)
        except OSError as error:
            raise CheckpointError(f"cannot read {where} ({error.strerror}); check the disk, then run again") from None
        changes = [adopted, conversion(manifest, expected.layout, expected.averages, origins)]
        line = "; ".join(change for change in changes if change) or None
        since = begun(manifest, expected.averages, origins)
        return Restored(Progress(**manifest["progress"]), manifest["notes"], where, line, data, since)

    restored = world.together(load)
    engine.set_optimizer_step(restored.progress.step)
    engine.publish_master_weights()
    return restored
