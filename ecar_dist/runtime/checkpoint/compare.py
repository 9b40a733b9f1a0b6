"""Whether a run can resume from a checkpoint, and what changes if it does.

Each check compares one fact of the checkpoint with the same fact of the run. It raises CheckpointError, or returns a
line for the log if the user has allowed the change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ecar_dist.command_line import counted
from ecar_dist.errors import CheckpointError
from ecar_dist.runtime.checkpoint.files import readable
from ecar_dist.runtime.checkpoint.manifest import Manifest
from ecar_dist.storage.untrusted import printable

RESHARDING = 1.2  # bytes that a node copies / bytes of its state; a larger ratio is logged
Shapes = Mapping[str, tuple[int, ...]]  # of parameters, by name


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """The keys whose values differ, or that only one of the two has."""
    return [key for key in [*expected, *(found.keys() - expected.keys())] if found.get(key) != expected.get(key)]


def check_run(where: str, found: str, expected: str, adopt: bool) -> str | None:
    """Check the run that saved the checkpoint. A different run needs --adopt."""
    if found == expected:
        return None
    if adopt:
        return f"adopted from run {found}"
    raise CheckpointError(
        f"{where} was saved by another run ({found}, this run directory belongs to {expected}); choose another "
        f"run.name, or add --adopt to resume from it"
    )


def check_identity(where: object, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Check the meaning of the weights: model and stage schedule must be the same."""
    for key in differences(found, expected):
        raise CheckpointError(
            f"{where} was made with {printable(f'{key}={found.get(key)}')}, this run has "
            f"{printable(f'{key}={expected.get(key)}')}; set it back, or choose another run.name to train "
            f"from the start"
        )


def check_shapes(where: str, found: Shapes, expected: Shapes) -> None:
    """Check that the parameters of the model have the same names and shapes."""
    for name in differences(found, expected):
        there, here = (str(list(shapes[name])) if name in shapes else "missing" for shapes in (found, expected))
        raise CheckpointError(
            f"{where} has parameter {name} {there}, this model has {here}; use the version of ecar_dist that wrote it, "
            f"or choose another run.name to train from the start"
        )


def check_data(where: str, found: Mapping[str, Any], expected: Mapping[str, Any], allow: bool) -> str | None:
    """Check the order of the samples. A different order needs --new-data-order."""
    changed = differences(found, expected)
    if not changed:
        return None
    if allow:
        changes = (printable(f"{key}={found.get(key)} -> {expected.get(key)}") for key in changed)
        return "new data order from here on: " + ", ".join(changes)
    key = changed[0]
    raise CheckpointError(
        f"{where} was made with {printable(f'{key}={found.get(key)}')}, this run has "
        f"{printable(f'{key}={expected.get(key)}')}, which changes the order of the samples; set it back, or add "
        f"--new-data-order to resume with the new order"
    )


def match_emas(wanted: Mapping[str, str], found: Mapping[str, str]) -> dict[str, str | None]:
    """For each EMA of the run, the EMA of the checkpoint that it resumes from: kind -> kind, or None if it is new.

    wanted, found: descriptions by kind (see `ema_kinds`). Kinds are numbered by their position in the config, so an
    edit of the config can renumber them. Only its description identifies an EMA.
    """
    kind_of = {description: kind for kind, description in found.items()}
    same = {kind: kind_of[description] for kind, description in wanted.items() if description in kind_of}

    # A changed EMA resumes from the old EMA with the same number, unless another EMA of the run continues that one.
    free = found.keys() - set(same.values())
    return {kind: same.get(kind, kind if kind in free else None) for kind in wanted}


def ema_start_steps(manifest: Manifest, wanted: Mapping[str, str], sources: Mapping[str, str | None]) -> dict[str, int]:
    """For each EMA of the run, the step from which on all its updates match its description.

    A new or changed EMA starts at the checkpoint's step. Post-hoc EMA fits use only those that start at step 0.
    sources: as returned by `match_emas`.
    """
    steps = {}
    for kind, source in sources.items():
        unchanged = source is not None and manifest.ema_kinds[source] == wanted[kind]
        steps[kind] = manifest.ema_since[source] if source and unchanged else manifest.progress.step
    return steps


def describe_conversion(
    manifest: Manifest, layout: Mapping[str, Any], wanted: Mapping[str, str], sources: Mapping[str, str | None]
) -> str | None:
    """One line about what is converted for this run; None if nothing is.

    layout: world_size, zero_stage and precision of this run. wanted, sources: as for `ema_start_steps`.
    """
    parts = []

    # The layout of the ranks.
    there = {key: getattr(manifest, key) for key in ("world_size", "zero_stage", "precision")}
    if there != layout:
        parts.append(f"written by {_describe_layout(there, layout)}, read by {_describe_layout(layout, there)}")

    # The EMAs: new, changed and dropped ones.
    found = manifest.ema_kinds
    for kind, source in sources.items():
        if source is None:
            parts.append(f"the EMA with {wanted[kind]} is new and starts from the weights")
        elif found[source] != wanted[kind]:
            parts.append(f"the EMA with {wanted[kind]} resumes from the EMA with {found[source]}")
    dropped = [description for kind, description in found.items() if kind not in sources.values()]
    parts += [f"the EMA with {description} is dropped" for description in dropped]
    return "; ".join(parts) or None


def describe_resharding(manifest: Manifest, layout: Mapping[str, Any], read: int, own: int) -> str | None:
    """One line if a node copies more than RESHARDING times its own share of the checkpoint; None if it does not.

    layout: as for `describe_conversion`. read: bytes of the files that the node needs. own: bytes of its state.
    """
    if read <= RESHARDING * own:
        return None
    there = {key: getattr(manifest, key) for key in ("world_size", "zero_stage", "precision")}
    return (
        f"one re-sharding pass: written by {_describe_layout(there, layout)}, read by "
        f"{_describe_layout(layout, there)}, so the first node copies {readable(read)} for its {readable(own)} of "
        f"state, {read / own:.3g} times as much; the next checkpoint has the new layout"
    )


def _describe_layout(layout: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    ranks = f"{counted(layout['world_size'], 'rank')} with ZeRO-{layout['zero_stage']}"
    return ranks if layout["precision"] == other["precision"] else f"{ranks} in {layout['precision']}"
