"""What differs between the config a run was started with and the one it goes on with, and what each difference means.

Nothing is refused here: a checkpoint carries the identity of its model and of its data order, and is itself what
refuses. These lines tell a person, before training goes on, what they have changed.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ecar_dist.config.read import load_config
from ecar_dist.config.run import RunConfig
from ecar_dist.errors import ConfigError
from ecar_dist.storage.redaction import redact_tree


class Kind(enum.Enum):
    """What a difference does to a run that goes on. The value is said to the user."""

    SAFE = "safe"
    OPTIMISATION = "changes optimisation"
    DATA_ORDER = "changes data order: needs --new-data-order"
    MODEL = "another model: its checkpoints are refused"


@dataclass(frozen=True)
class Difference:
    """One leaf of the config, by dotted key, with both values as JSON has them."""

    key: str
    old: Any
    new: Any
    kind: Kind

    def __str__(self) -> str:
        return f"config on resume: {self.key} {_shown(self.old)} -> {_shown(self.new)} ({self.kind.value})"


# Every leaf of RunConfig stands here once: a field that is added must be thought about.
_LEAVES: dict[Kind, dict[str, str]] = {
    Kind.SAFE: {
        "run": "name dir",
        "flow.context": "allow_unsafe allow_small_tau",  # let a setting through; the setting itself is the model's
        "vae": "path",  # the same weights elsewhere: their hash is in the checkpoint's identity
        "data": "train_images heldout_images backend prefetch",
        "data.cache": "dir gib threads",
        "batch": "micro_batch_size",
        "ema": "snapshot_every_samples",
        "deepspeed": "zero_stage offload_optimizer offload_params",
        "train": "activation_checkpointing hang_seconds",
        "checkpoint": "every_samples keep keep_every_samples dir overlap max_failures",
        "sample": "solver steps_per_stage guidance_scale guidance_ramp ar_steps every_samples",
        "log": "every_steps time_bins tensorboard",
    },
    Kind.OPTIMISATION: {
        "model": "label_dropout",
        "flow": "stage_weights token_draws",
        "data": "on_bad max_bad",  # which samples stand in for damaged ones
        "batch": "global_batch_size",
        "optim": "learning_rate betas eps weight_decay clip_grad_norm schedule warmup_samples cooldown_samples "
        "final_learning_rate",
        "ema": "half_life_samples rampup sigma_rel",
        "deepspeed": "precision raw",
        "train": "total_samples",
        "train.bad_steps": "spike_factor window roll_back_after stop_after",
    },
    Kind.DATA_ORDER: {
        "run": "seed",
        "data": "latents mixture mixture_by images flip_images resize background lanes window_shards",
    },
    Kind.MODEL: {
        "model": "kind preset ar_depth flow_depth patch_size",
        "flow": "num_stages ends gamma",
        "flow.context": "mode tau",
        "vae": "kind downsample",
        "data": "num_classes latent_channels latent_size",
    },
}
KINDS = {
    f"{section}.{name}": kind
    for kind, sections in _LEAVES.items()
    for section, names in sections.items()
    for name in names.split()
}

# What each rank of a run may have of its own: the places of what is compared by its content instead (the ids of data
# sets, the hash of the autoencoder's weights), what training does not read, and how a node caches and reads ahead.
NODE_LOCAL = frozenset(
    {
        "vae.path",
        "data.latents",
        "data.images",
        "data.train_images",
        "data.heldout_images",
        "data.prefetch",
        "data.cache.dir",
        "data.cache.gib",
        "data.cache.threads",
    }
)


def shared_settings(config: RunConfig) -> dict[str, str]:
    """The leaves that all ranks of a run must have alike, as text for a message: all but NODE_LOCAL.

    Of a mixture it is the weights. No value holds a credential, so that they may be sent and shown.
    """
    values = {key: value for key, value in _leaves(config) if key not in NODE_LOCAL}
    values["data.mixture"] = [source.weight for source in config.data.latent_sources]
    return {key: _shown(value) for key, value in values.items()}


def drift(old: RunConfig, new: RunConfig, *, same_data: bool = False) -> list[Difference]:
    """Every leaf that differs between two resolved configs, in the config's order.

    same_data: the data sets have the same ids under both, so another path to them is no other order.
    """
    before, after = dict(_leaves(old)), dict(_leaves(new))
    return [
        Difference(key, before[key], after[key], _kind(key, old, new, same_data))
        for key in after
        if before[key] != after[key]
    ]


def resume_lines(old_config: Path, new: RunConfig, *, same_data: bool = False) -> list[str]:
    """What to say where a run goes on: a line for each difference from the config.yaml of before, if any.

    One that cannot be read, e.g. of a release with other fields, is a warning: the checkpoint has its own identity.
    """
    if not old_config.exists():
        return []
    try:
        old = load_config(old_config)
    except ConfigError as error:
        return [f"warning: the config of the last attempt cannot be compared with this one: {error}"]
    said = [str(difference) for difference in drift(old, new, same_data=same_data)]
    if new.data.images is not None and "background" not in old.data.model_fields_set:
        said.append(
            "warning: the version that began this run dropped the transparency of images; from here on they lie on "
            f"data.background={new.data.background}"
        )
    return said


def _leaves(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, JSON value) of every field that is no section itself; null defaults are told by what they mean."""
    values = section.model_dump(mode="json")
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            resolved = getattr(section, f"resolved_{name}", None) if value is None else None
            yield prefix + name, values[name] if resolved is None else json.loads(json.dumps(resolved))


def _kind(key: str, old: RunConfig, new: RunConfig, same_data: bool) -> Kind:
    """The table's kind, but for the keys whose meaning depends on others."""
    if same_data and key in ("data.latents", "data.images"):
        return Kind.SAFE
    if same_data and key == "data.mixture" and _weights(old) == _weights(new):
        return Kind.SAFE
    if key == "train.total_samples" and old.optim.schedule == new.optim.schedule == "constant":
        return Kind.SAFE
    if key == "batch.global_batch_size" and new.data.mixture and new.data.mixture_by == "step":
        return Kind.DATA_ORDER  # each set fills whole global batches
    return KINDS[key]


def _weights(config: RunConfig) -> list[float]:
    return [source.weight for source in config.data.mixture]


def _shown(value: Any) -> str:
    """On one line, and without the credentials that a URL may hold."""
    shown = redact_tree(value)
    return shown if isinstance(shown, str) and shown.isprintable() else json.dumps(shown, sort_keys=True)
