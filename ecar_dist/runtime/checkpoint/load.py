"""From a checkpoint's files into engine and averages, whatever number of ranks and ZeRO stage wrote them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ecar_dist.command_line import counted
from ecar_dist.config.knobs_training import EmaSection
from ecar_dist.errors import CheckpointError
from ecar_dist.failpoint import failpoint
from ecar_dist.runtime.checkpoint.files import Needed, differences
from ecar_dist.runtime.checkpoint.manifest import Manifest, RankFile
from ecar_dist.runtime.checkpoint.reader import FragmentReader
from ecar_dist.runtime.ema import ShardedEma, tracked_decays
from ecar_dist.runtime.engine import ADAM_MOMENTS, Engine, Fragment
from ecar_dist.storage.untrusted import printable

MASTER = "master"


def state_by_kind(engine: Engine, ema: ShardedEma) -> dict[str, Sequence[torch.Tensor]]:
    """What a checkpoint holds: lists of flat tensors of one layout."""
    return {MASTER: engine.partitions, **{name: engine.moments(name) for name in ADAM_MOMENTS}, **ema.averages}


def meanings(section: EmaSection) -> dict[str, str]:
    """What each average is, by its name in checkpoints: names are numbered, and move when the config's lists change."""
    words = [f"half-life {half_life}, ramp-up {section.rampup}" for half_life in section.half_life_samples]
    words += [f"sigma_rel {sigma_rel}" for sigma_rel in section.sigma_rel]
    return dict(zip(tracked_decays(section), words, strict=True))


def sources(wanted: Mapping[str, str], found: Mapping[str, str]) -> dict[str, str | None]:
    """For each average of this run the kind in the checkpoint to go on from: its own; else, where that is not the own
    one of another, that of the same name; else None."""
    kind_of = {meaning: kind for kind, meaning in found.items()}
    own = {kind: kind_of[meaning] for kind, meaning in wanted.items() if meaning in kind_of}
    free = found.keys() - set(own.values())
    return {kind: own.get(kind, kind if kind in free else None) for kind in wanted}


def needed_by(fragments: Sequence[Fragment]) -> Needed:
    """Whether a file of a checkpoint holds anything of `fragments`."""
    spans: dict[str, list[tuple[int, int]]] = {}
    for fragment in fragments:
        spans.setdefault(fragment.name, []).append((fragment.start, fragment.start + fragment.numel))

    def needed(file: RankFile) -> bool:
        for piece in file.pieces():
            low, high = piece.start, piece.start + piece.numel
            if any(low < stop and begin < high for begin, stop in spans.get(piece.name, ())):
                return True
        return False

    return needed


@torch.no_grad()
def read_share(
    folder: Path, manifest: Manifest, engine: Engine, ema: ShardedEma, origins: Mapping[str, str | None]
) -> None:
    """This rank's slices, and no more, into its tensors. `origins`: the averages' kinds in the checkpoint.

    Raises DamagedError; what was read until then stays in the tensors.
    """
    failpoint("load.read")
    # of a large world's files a rank needs a few: their headers alone are megabytes
    reader = FragmentReader(folder, needed_by(engine.fragments), manifest)
    state = state_by_kind(engine, ema)
    for fragment in engine.fragments:
        for kind, partitions in state.items():
            source = origins.get(kind, kind) or MASTER
            value = reader.read(source, fragment.name, fragment.start, fragment.numel)
            fragment.of(partitions).copy_(value)


def begun(manifest: Manifest, wanted: Mapping[str, str], origins: Mapping[str, str | None]) -> dict[str, int]:
    """The step that each average goes back to: that of the checkpoint where it is new, or was another until then."""
    found, since, now = manifest.averages, manifest.averages_since, manifest.progress.step
    return {
        kind: since[source] if source is not None and found[source] == wanted[kind] else now
        for kind, source in origins.items()
    }


def check_run(where: str, found: str, expected: str, adopt: bool) -> str | None:
    """A line where another run saved this, and it may be used. Raises CheckpointError where it may not."""
    if found == expected:
        return None
    if adopt:
        return f"adopted from run {found}"
    raise CheckpointError(
        f"{where} was saved by another run ({found}) than that of this run directory ({expected}); choose another "
        f"run.name, or add --adopt to go on from it"
    )


def check_shapes(where: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a checkpoint of a model with other parameters than this one. Raises CheckpointError."""
    for name in differences(found, expected):
        shapes = [str(list(one[name])) if name in one else "not there" for one in (found, expected)]
        raise CheckpointError(
            f"{where} was made with parameter {name} {shapes[0]}, in this model it is {shapes[1]}; use the version of "
            f"ecar_dist that wrote it, or choose another run.name to train anew"
        )


def check_data(where: str, found: Mapping[str, Any], expected: Mapping[str, Any], allow: bool) -> str | None:
    """A line where the data, or their order, are others, and may be. Raises CheckpointError where they may not."""
    changed = differences(found, expected)
    if not changed:
        return None
    if allow:
        changes = (printable(f"{key}={found.get(key)} -> {expected.get(key)}") for key in changed)
        return "new data order from here on: " + ", ".join(changes)
    key = changed[0]
    theirs, ours = (printable(f"{key}={one.get(key)}") for one in (found, expected))
    raise CheckpointError(
        f"{where} was made with {theirs}, this run has {ours}: the order of the data would change; set it back, or add "
        f"--new-data-order to go on with the new one"
    )


def conversion(
    manifest: Manifest, here: Mapping[str, Any], wanted: Mapping[str, str], origins: Mapping[str, str | None]
) -> str | None:
    """One line on what was converted; None where reader and writer are alike."""
    found, parts = manifest.averages, []
    there = {key: getattr(manifest, key) for key in ("world_size", "zero_stage", "precision")}
    if there != here:
        parts.append(f"written by {_layout(there, here)}, read by {_layout(here, there)}")
    for kind, source in origins.items():
        if source is None:
            parts.append(f"the average of {wanted[kind]} is new and begins from the weights")
        elif found[source] != wanted[kind]:
            parts.append(f"the average of {wanted[kind]} goes on from that of {found[source]}")
    dropped = [found[kind] for kind in found if kind not in origins.values()]
    parts += [f"the average of {meaning} is no longer kept" for meaning in dropped]
    return "; ".join(parts) or None


def _layout(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    ranks = f"{counted(one['world_size'], 'rank')} with ZeRO-{one['zero_stage']}"
    return ranks if one["precision"] == other["precision"] else f"{ranks} in {one['precision']}"
