"""Start a new run from the weights of another one: compare the models, then fill this rank's master weights.

No rank holds more than one parameter of the other run at a time, and none builds the complete model. Parameters without
a counterpart keep the initial weights of this run, which depend only on its seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ecar_dist.command_line import columns, counted
from ecar_dist.config.run import RunConfig
from ecar_dist.errors import CheckpointError
from ecar_dist.kinds.presets import preset_of
from ecar_dist.kinds.table import KINDS, kind_of
from ecar_dist.runtime.checkpoint.compare import differences
from ecar_dist.runtime.checkpoint.storage import has_checkpoint
from ecar_dist.runtime.ema import ShardedEma
from ecar_dist.runtime.engine import Engine
from ecar_dist.runtime.initial.rows import Converted, RowPlan, pair_stages, plan_rows
from ecar_dist.runtime.initial.source import InitialWeights, open_initial_weights
from ecar_dist.runtime.replicas import check_replicas
from ecar_dist.runtime.start.agreement import agree_on
from ecar_dist.runtime.world import World
from ecar_dist.storage.untrusted import printable
from ecar_dist.vae.codec import hash_state_dict

SHOWN_PARAMETERS = 3  # in an error message


@dataclass(frozen=True)
class Transfer:
    """How one parameter of this model is filled. Without `from_source` it keeps its initial values."""

    name: str
    shape: tuple[int, ...]
    from_source: bool
    rows: RowPlan | None = None

    def convert(self, value: torch.Tensor) -> Converted:
        """`value` is the other model's parameter. Without `rows` it is used unchanged, and all rows are known."""
        if self.rows is None:
            return Converted(value.float(), torch.ones(self.shape[:1], dtype=torch.bool))
        return self.rows.convert(value)


@dataclass(frozen=True)
class Beginning:
    """Where the weights of this attempt come from.

    lines: for the log. facts: for lineage.json.
    source, transfers: weights that were compared with this run's model; None and empty if they are not needed.
    given: parameters by name that come from the run's data. The weights of another run are loaded after them.
    """

    lines: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    source: InitialWeights | None = None
    transfers: list[Transfer] = field(default_factory=list)
    given: Mapping[str, torch.Tensor] = field(default_factory=dict)


def plan_beginning(
    config: RunConfig,
    world: World,
    class_names: Sequence[str] | None,
    encoder: str | None,
    given: Mapping[str, torch.Tensor] | None = None,
) -> Beginning:
    """Open the weights that `train.init_from` names for a run without a checkpoint, before anything is allocated.

    class_names: of this run's data. encoder: the hash of the autoencoder of its latents. given: parameters from the
    data. Collective. Raises EcarError, on all ranks, if the weights do not fit.
    """
    given = given or {}
    if config.train.init_from is None and not given:
        return Beginning()

    # The run's own checkpoint takes precedence. In that case the source may be gone.
    if world.broadcast(world.on_first_rank(lambda: has_checkpoint(config))):
        unused = f"train.init_from={config.train.init_from} is not used: the run has a checkpoint of its own"
        return Beginning([unused] if config.train.init_from else [])

    # Parameters from the data must be the same on all ranks.
    if given:
        agree_on(world, "codebook", {"sha256": hash_state_dict(given)}, "give every node the same data")
    if config.train.init_from is None:
        return Beginning(given=given)

    # Every rank reads the weights itself, so check that all have found the same ones.
    path = Path(config.train.init_from)
    source = world.together(lambda: open_initial_weights(path))
    agree_on(world, "initial weights", {"train.init_from": source.digest}, "give every node the same weights")
    transfers = world.together(lambda: plan_transfers(config, source, class_names))
    lines = transfer_lines(config, source, transfers)
    if encoder is not None and source.identity.get("encoder.weights_sha256", encoder) != encoder:
        lines.append("  warning: these weights were trained on latents of another autoencoder")
    return Beginning(lines, {"initial_weights": source.facts}, source, transfers, given)


def begin(beginning: Beginning, world: World, engine: Engine, ema: ShardedEma) -> None:
    """Fill the model of a new run if its weights come from the data or another run. A resumed run has none of these.

    Collective.
    """
    source = beginning.source
    if source is None and not beginning.given:
        return
    given = [Transfer(name, tuple(value.shape), from_source=True) for name, value in beginning.given.items()]
    world.together(lambda: fill(engine, beginning.given, given))
    if source is not None:
        world.together(lambda: fill(engine, source.weights, beginning.transfers))

    # Update the weights of the forward pass and the EMAs from the master weights.
    engine.publish_master_weights()
    ema.restart()
    check_replicas(world, engine, ema, 0)


def plan_transfers(config: RunConfig, source: InitialWeights, class_names: Sequence[str] | None) -> list[Transfer]:
    """A transfer for each parameter of the config's model. Raises CheckpointError if the other model does not fit.

    class_names: of this run's data.
    """
    # Build both models without memory. A file is assumed to be of a model with this config.
    theirs = source.config or config
    if source.config is not None:
        check_architecture(config, source)
    with torch.device("meta"):
        model = kind_of(config).build_model(config)
        other = kind_of(theirs).build_model(theirs)
    modules = dict(other.named_modules())
    if source.config is None:
        check_file(source, model)

    # Go parameter by parameter. Tables are matched by the meaning of their rows.
    transfers = []
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        owner, _, _ = name.rpartition(".")
        if name not in source.shapes:
            transfers.append(Transfer(name, shape, from_source=False))
            continue
        rows = None
        if owner in modules:
            rows = plan_rows(modules[owner], model.get_submodule(owner), source.class_names, class_names)
        if rows is None and source.shapes[name] != shape:
            raise _refused(source, f"{name} {list(source.shapes[name])}", str(list(shape)), "")
        transfers.append(Transfer(name, shape, from_source=True, rows=rows))
    return transfers


def check_architecture(config: RunConfig, source: InitialWeights) -> None:
    """Raises CheckpointError, with the numbers, unless width, depth, kind and tokens are the same on both sides."""
    assert source.config is not None
    ours, theirs = _architecture(config), _architecture(source.config)
    if ours["kind"] != theirs["kind"]:  # all other differences follow from that
        ours, theirs = {"kind": ours["kind"]}, {"kind": theirs["kind"]}
    if changed := differences(theirs, ours):
        there, here = (", ".join(f"{key}={one[key]}" for key in changed) for one in (theirs, ours))
        raise _refused(source, there, here, f"set {_settings(source.config, changed)}, or ")

    # If the stages differ, at least one must be in both models.
    if not any(source_stage is not None for source_stage in pair_stages(source.config.stage_sizes, config.stage_sizes)):
        there, here = (f"stages of {list(one.stage_sizes)} latent pixels" for one in (source.config, config))
        raise _refused(source, there, here, "")


def _settings(config: RunConfig, keys: Sequence[str]) -> str:
    """The settings that give a model the same `keys` as the model of the config."""
    knobs = {"kind": "model.kind", "patch_size": "model.patch_size", "latent_channels": "data.latent_channels"}
    knobs |= {"ar_depth": "model.ar_depth", "flow_depth": "model.flow_depth", "codebook_size": "model.codebook_size"}
    values = dict(config.values())
    if any(key not in knobs for key in keys):  # widths and heads come from the preset
        return f"model.preset={config.model.preset} with its depths"
    facts = _architecture(config)
    return " ".join(f"{knobs[key]}={values.get(knobs[key]) or facts[key]}" for key in keys)


def _architecture(config: RunConfig) -> dict[str, Any]:
    """What fine-tuning cannot change."""
    # A kind without an AR transformer ignores the AR depth.
    preset = asdict(preset_of(config))
    has_ar = bool(KINDS[config.model.kind].parts[0])
    del preset["base_width"]  # muP changes how weights start and learn, not what they are
    sizes = {key: value for key, value in preset.items() if has_ar or not key.startswith("ar_")}
    if KINDS[config.model.kind].needs_codebook:
        sizes["codebook_size"] = config.model.codebook_size
    channels = config.data.latent_channels
    return {"kind": config.model.kind, **sizes, "patch_size": config.model.patch_size, "latent_channels": channels}


def check_file(source: InitialWeights, model: nn.Module) -> None:
    """Raises CheckpointError unless a file without a config has exactly this model's parameters."""
    ours = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if changed := differences(source.shapes, ours):
        name = printable(changed[0])
        there, here = (list(one[changed[0]]) if changed[0] in one else "missing" for one in (source.shapes, ours))
        fix = "a file has no config, so it needs all parameters in the same shapes; "
        more = f" and {len(changed) - 1} more differences" if len(changed) > 1 else ""
        raise _refused(source, f"{name} {there}{more}", f"{here}", fix)


def _refused(source: InitialWeights, there: str, here: str, fix: str) -> CheckpointError:
    return CheckpointError(
        f"train.init_from={source.path} has {there}, this run has {here}; {fix}give a run or export of this model"
    )


@torch.no_grad()
def fill(engine: Engine, weights: Mapping[str, torch.Tensor], transfers: Sequence[Transfer]) -> None:
    """Fill the master weights of this rank. Rows without a source stay as they are."""
    planned = {transfer.name: transfer for transfer in transfers if transfer.from_source}
    for fragment in engine.fragments:
        if (transfer := planned.get(fragment.name)) is None:
            continue
        converted = transfer.convert(weights[fragment.name])

        # The part of the flattened parameter that this rank holds.
        part = slice(fragment.start, fragment.start + fragment.numel)
        per_row = math.prod(transfer.shape[1:])
        known = converted.known.repeat_interleave(per_row)[part]
        held = fragment.of(engine.partitions)
        values = converted.values.reshape(-1)[part].to(held.device)
        held.copy_(torch.where(known.to(held.device), values, held))


def transfer_lines(config: RunConfig, source: InitialWeights, transfers: Sequence[Transfer]) -> list[str]:
    """The table of what was loaded, resized and new, for the log."""
    lines = [f"initial weights: {source.path}, {source.what}, xxh3_128 {source.digest}"]

    # One row for all unchanged parameters, then a row for each of the others.
    plain = [one for one in transfers if one.from_source and (one.rows is None or _keeps_all(one.rows))]
    values = sum(math.prod(one.shape) for one in plain)
    rows = [("  loaded", counted(len(plain), "parameter"), f"{values:,} values", "")]
    for one in transfers:
        if one in plain:
            continue
        what = "new" if one.rows is None else "resized" if one.rows.resizes else "rows"
        rows.append((f"  {what}", one.name, str(list(one.shape)), one.rows.note if one.rows else ""))
    unused = sorted(source.shapes.keys() - {one.name for one in transfers})
    rows += [("  not used", printable(name), str(list(source.shapes[name])), "") for name in unused]
    lines += columns(rows, left=(0, 1, 2, 3))

    # The meaning of the weights may have changed, which shapes do not show.
    return lines + _changed_meaning(config, source)


def _keeps_all(rows: RowPlan) -> bool:
    return not rows.resizes and all(segment.source == segment.start for segment in rows.segments)


def _changed_meaning(config: RunConfig, source: InitialWeights) -> list[str]:
    """A line for settings of the flow that differ; they change what the network has to predict."""
    if source.config is None:
        return []
    ours, theirs = config.model_identity, source.config.model_identity
    changed = [key for key in differences(theirs, ours) if key.startswith("flow.")]
    words = [f"{key} {theirs.get(key)} -> {ours.get(key)}" for key in changed]
    return [f"  changed: {printable(', '.join(words), 300)}"] if words else []
