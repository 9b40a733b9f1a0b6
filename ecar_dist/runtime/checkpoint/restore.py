"""The steps of a resume. All ranks restore the same checkpoint: the newest one that is intact on every rank.

    list       rank 0 lists the committed checkpoints, newest first
    say        in a bucket: rank 0 reports how much a node copies, if that is more than its share
    fetch      every rank gets the files that it needs, verified by their hashes
    compare    the manifest must fit this run (compare.py)
    load       every rank reads its fragments, whatever the layout of the writers was

If any rank finds damage, all ranks move on to the next older checkpoint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from ecar_dist.command_line import say
from ecar_dist.errors import CheckpointError, reason_of
from ecar_dist.failpoint import failpoint
from ecar_dist.runtime.checkpoint.compare import (
    check_data,
    check_identity,
    check_run,
    check_shapes,
    describe_conversion,
    describe_resharding,
    ema_start_steps,
    match_emas,
)
from ecar_dist.runtime.checkpoint.files import DamagedError, Needed, UnreadableError, read_manifest
from ecar_dist.runtime.checkpoint.manifest import VALUE_BYTES, Intervals, Manifest, Progress
from ecar_dist.runtime.checkpoint.reader import MASTER, FragmentReader
from ecar_dist.runtime.checkpoint.save import state_by_kind
from ecar_dist.runtime.checkpoint.storage import CheckpointStorage, PassedOver, none_whole, warn_of_damage
from ecar_dist.runtime.ema import ShardedEma
from ecar_dist.runtime.engine import Engine, Fragment
from ecar_dist.runtime.world import World

T = TypeVar("T")


@dataclass(frozen=True)
class Expected:
    """What a checkpoint is compared with: the facts of this run. See `CheckpointStore`."""

    run_id: str
    adopt: bool
    identity: Mapping[str, Mapping[str, Any]]
    ema_kinds: Mapping[str, str]
    layout: Mapping[str, Any]
    allow_new_data: bool


@dataclass(frozen=True)
class Restored:
    """The checkpoint that a run resumes from.

    `conversion` and `new_data_order` are lines for the log, None if nothing changed. `ema_since`: the step at which
    each EMA started.
    """

    progress: Progress
    client_state: dict[str, Any]
    path: str
    conversion: str | None
    new_data_order: str | None
    ema_since: dict[str, int]


def restore_newest(
    storage: CheckpointStorage, world: World, engine: Engine, ema: ShardedEma, expected: Expected
) -> tuple[Restored | None, set[str]]:
    """Load the newest checkpoint that is not damaged into engine and EMA. Collective.

    Returns the checkpoint (None if there is none yet), and the names of the checkpoints that were passed over. Raises
    CheckpointError if all are damaged, or if the checkpoint does not fit this run.
    """
    # All ranks use one list, because a storage may not show the same contents to all of them at the same time.
    names: list[str] = world.broadcast(world.on_first_rank(partial(_list_checkpoints, storage)))
    passed_over: list[PassedOver] = []
    for name in names:
        where = f"{storage.where}/{name}"
        restored = None

        if storage.copies:
            _say_resharding(storage, name, world, engine, expected.layout)

        # Every rank verifies its files before any rank loads.
        share = (world.rank, world.size)
        fetch = partial(storage.fetch, name, share, needed_by(engine.fragments), intervals_of(engine.fragments))
        folder, damage = _unless_damaged(where, world, fetch)
        if folder is not None:
            restored, damage = _unless_damaged(where, world, partial(_load, where, folder, engine, ema, expected))

        # No rank reads the files any more, so one process per node removes the local copy.
        if world.local_rank == 0:
            storage.release(name)

        # All ranks have loaded. Now update the engine's own copies.
        if restored is not None:
            if world.is_first:
                warn_of_damage(passed_over, where)
            engine.set_optimizer_step(restored.progress.step)
            engine.publish_master_weights()
            return restored, {over.path.rpartition("/")[2] for over in passed_over}

        # Damaged on some rank, for whatever reason: try the next older one.
        assert damage is not None
        passed_over.append(damage)

    # If all checkpoints are damaged, that is never a reason to train from the start.
    if passed_over:
        world.agree(none_whole(storage.where, passed_over) if world.is_first else None)
    return None, set()


def _list_checkpoints(storage: CheckpointStorage) -> list[str]:
    storage.check_writable()
    return storage.committed()


def _say_resharding(
    storage: CheckpointStorage, name: str, world: World, engine: Engine, layout: Mapping[str, Any]
) -> None:
    """Rank 0 reports how much its node copies for its state, if that is more than its share. Collective."""
    on_first_node = 0 in world.node_ranks

    # The ranks of the first node look up what they need. `fetch` finds and reports any damage.
    def look() -> tuple[Manifest | None, set[str]]:
        with contextlib.suppress(DamagedError):
            manifest = storage.manifest(name) if on_first_node else None
            return manifest, {file.name for file in needed_by(engine.fragments)(manifest)} if manifest else set()
        return None, set()

    manifest, mine = world.together(look)
    number = world.broadcast(len(manifest.files) if manifest else 0)
    if not number:
        return

    # One sum over ranks: which files any rank needs, and how many values they hold (without ZeRO, all hold the same).
    holds = world.is_first if engine.replicated else on_first_node
    values = sum(fragment.numel for fragment in engine.fragments) if holds else 0
    wanted = [file.name in mine for file in manifest.files] if manifest else [False] * number
    *readers, held = world.sum(world.tensor([*wanted, values])).tolist()

    # Rank 0 has the manifest.
    if world.is_first and manifest:
        own = int(held) * VALUE_BYTES * manifest.most_kinds
        read = manifest.copied([file for file, count in zip(manifest.files, readers, strict=True) if count], own)
        line = describe_resharding(manifest, layout, read, own)
        if line:
            say(f"restore of {storage.where}/{name}: {line}")


def _unless_damaged(where: str, world: World, action: Callable[[], T]) -> tuple[T | None, PassedOver | None]:
    """(result of `action`, None), or (None, damage) on all ranks if any rank found damage. Collective."""

    # Here damage is a result. Every other error ends all ranks.
    def attempt() -> tuple[T | None, PassedOver | None]:
        try:
            return action(), None
        except DamagedError as damage:
            return None, PassedOver(where, damage.problem, isinstance(damage, UnreadableError))

    # The first rank with damage gives the reason.
    result, damage = world.together(attempt)
    all_damage = [one for one in world.gather(damage) if one]
    return (None, all_damage[0]) if all_damage else (result, None)


def _load(where: str, folder: Path, engine: Engine, ema: ShardedEma, expected: Expected) -> Restored:
    """Compare the checkpoint with this run, then load this rank's fragments.

    Raises DamagedError, and CheckpointError if the checkpoint does not fit.
    """
    # First check what the user must know about, and may have to allow.
    manifest = read_manifest(folder)
    adopted = check_run(where, manifest.run, expected.run_id, expected.adopt)
    check_identity(where, manifest.identity["model"], expected.identity["model"])
    check_shapes(where, manifest.shapes, engine.shapes)
    new_data_order = check_data(where, manifest.identity["data"], expected.identity["data"], expected.allow_new_data)

    # The EMAs of the config may have changed since then.
    sources = match_emas(expected.ema_kinds, manifest.ema_kinds)
    try:
        load_fragments(folder, manifest, engine, ema, sources)
    except OSError as error:
        raise CheckpointError(f"cannot read {where} ({reason_of(error)}); check the disk, then run again") from None

    # What was converted, for the log.
    conversion = describe_conversion(manifest, expected.layout, expected.ema_kinds, sources)
    return Restored(
        progress=manifest.progress,
        client_state=manifest.client_state,
        path=where,
        conversion="; ".join(line for line in (adopted, conversion) if line) or None,
        new_data_order=new_data_order,
        ema_since=ema_start_steps(manifest, expected.ema_kinds, sources),
    )


@torch.no_grad()
def load_fragments(
    folder: Path, manifest: Manifest, engine: Engine, ema: ShardedEma, ema_sources: Mapping[str, str | None]
) -> None:
    """Read this rank's fragments of every kind of state into its tensors.

    Raises DamagedError; the tensors then contain whatever was read before the error.
    """
    failpoint("load.read")

    # In a large world a rank needs only a few files, and the headers alone are megabytes: open only those files.
    reader = FragmentReader(folder, needed_by(engine.fragments), manifest)
    state = state_by_kind(engine, ema)
    for fragment in engine.fragments:
        for kind, partitions in state.items():
            source = ema_sources.get(kind, kind) or MASTER  # a new EMA starts from the weights
            value = reader.read(source, fragment.name, fragment.start, fragment.numel)
            fragment.of(partitions).copy_(value)


def needed_by(fragments: Sequence[Fragment]) -> Needed:
    """The files of a checkpoint that contain any part of `fragments`."""
    intervals = intervals_of(fragments)
    return lambda manifest: manifest.files_with(intervals)


def intervals_of(fragments: Sequence[Fragment]) -> Intervals:
    """The elements of each parameter that are in `fragments`."""
    intervals: dict[str, list[tuple[int, int]]] = {}
    for fragment in fragments:
        intervals.setdefault(fragment.name, []).append((fragment.start, fragment.start + fragment.numel))
    return intervals
