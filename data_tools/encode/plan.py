"""The plan of an encoding, `plan.json`: everything that determines the bytes of its shards.

It is written before the first image is read. Any worker can then make any shard, with the same bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import ConfigDict, Field, ValidationError

from data_tools.failures import MAX_BAD
from ecar_dist.data.order.chunks import ChunkOrder
from ecar_dist.data.order.lanes import sample_indices
from ecar_dist.data.prepared import PLAN_NAME
from ecar_dist.data.shards.entries import KNOWN_FIELDS
from ecar_dist.data.shards.manifest_rules import Classes, MomentsShape, Samples, Side, Tree, Visible
from ecar_dist.errors import DataError
from ecar_dist.storage.atomic import claim_name, temporary_beside, write_json
from ecar_dist.storage.untrusted import (
    MAX_JSON_BYTES,
    UntrustedError,
    adapter_of,
    first_violation,
    parse_object,
    read_plain_file,
)
from ecar_dist.vae.codec import EncoderIdentity, hash_config

_HINTS = {"decoder": " (set by --decoder and --device)", "order": " (set by --chunk)"}

MAX_SHARDS = 1_000_000
CHUNKED_FROM = 10_000_000  # images in tars; with fewer, a task can keep all tables in memory


@dataclass(frozen=True)
class EncodePlan:
    """The samples of the source in a random order given by `seed`, cut into shards of `samples_per_shard` rows."""

    __pydantic_config__: ClassVar[ConfigDict] = KNOWN_FIELDS

    source_folder: Visible  # for people; source_dataset_id is what identifies the source
    source_dataset_id: Visible
    count: Samples
    num_classes: Classes
    class_names: list[Visible]
    samples_per_shard: Samples
    seed: Annotated[int, Field(strict=True, ge=-(1 << 63), lt=1 << 63)]
    image_size: Side
    moments_shape: MomentsShape
    encoder: Tree
    decoder: Visible
    resize: Visible
    precision: Visible
    flip: Visible
    versions: dict[str, Visible]  # of the libraries that compute the moments
    background: Visible | None = None  # behind transparent pixels; None: old version that dropped transparency
    order: ChunkOrder | None = None  # None: one permutation of all images
    imported: Tree | None = None  # of `ecar-data import`: scale, shift and the other options; None: an encoding

    @functools.cached_property
    def plan_id(self) -> str:
        """sha256 of everything that determines the bytes of the shards. Folder names do not."""
        return hash_config(self.content())

    def content(self) -> dict[str, Any]:
        """What `plan_id` covers."""
        encoder = {key: value for key, value in self.encoder.items() if key != "name"}
        content = {**dataclasses.asdict(self), "source_folder": "", "encoder": encoder}
        if self.background is None:
            del content["background"]  # older plans have no such key, and their ids must not change
        if self.order is None:
            del content["order"]
        if self.imported is None:
            del content["imported"]
        else:
            content["imported"] = {name: self.imported[name] for name in ("scale", "shift")}
        return content

    @property
    def num_shards(self) -> int:
        return -(-self.count // self.samples_per_shard)

    @property
    def has_flip(self) -> bool:
        return self.flip == "store"

    def rows(self, shard_index: int) -> range:
        """Rows of a shard, counted over the whole set."""
        first = shard_index * self.samples_per_shard
        return range(first, min(first + self.samples_per_shard, self.count))

    def read_order(self, shard_index: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of a shard in the order in which to read them, and the source sample of each. Both are int64."""
        rows = self.rows(shard_index)
        if self.order is not None:
            return self.order.read_order(rows, shard_index, self.count, self.seed)
        ascending = np.array(rows, dtype=np.int64)
        return ascending, sample_indices(ascending, self.count, self.seed)

    def source_indices(self, shard_index: int) -> np.ndarray:
        """Source sample of each row of a shard, int64."""
        rows, indices = self.read_order(shard_index)
        return indices[np.argsort(rows)]

    def command(self, out: Path, task: int, tasks: int, max_bad: float = MAX_BAD) -> str:
        """The shell command that makes the shards task, task + tasks, ..."""
        if self.imported is not None:
            return self._import_command(out)

        # Every option that affects the bytes is written out, so that the command does not depend on defaults.
        settings = {
            "vae": self.encoder["name"],
            "image-size": self.image_size,
            "samples-per-shard": self.samples_per_shard,
            "seed": self.seed,
            "decoder": "dali" if self.decoder == "dali-mixed" else self.decoder,
            "resize": self.resize,
            "precision": self.precision,
            "flip": self.flip,
        }
        if self.background not in (None, "white"):
            settings["background"] = self.background
        if self.order is not None or self.count >= CHUNKED_FROM:
            settings["chunk"] = 1 if self.order is None else self.order.chunk
        settings |= {"task": task, "tasks": tasks}
        if max_bad != MAX_BAD:
            settings["max-bad"] = max_bad
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        return shlex.join(["ecar-data", "encode", self.source_folder, str(out), *words])

    def _import_command(self, out: Path) -> str:
        given = {"vae": self.encoder["name"], **(self.imported or {})}
        given |= {"samples-per-shard": self.samples_per_shard, "seed": self.seed}
        words = [word for name, value in given.items() if value != "" for word in (f"--{name}", str(value))]
        return shlex.join(["ecar-data", "import", self.source_folder, str(out), *words])


def settle_plan(out: Path, plan: EncodePlan, *, keep_order: bool = False) -> EncodePlan:
    """Write the plan if OUT is new, and return the plan that OUT has.

    Raises DataError if OUT contains a different plan or anything else. In a folder that an old version has started,
    transparency is still dropped, unless a background other than white is requested. `keep_order`: whether a folder
    that was started with a different order, such as one of an old version, keeps that order.
    """
    if plan.num_shards > MAX_SHARDS:
        raise DataError(
            f"{plan.count:,} images in shards of {plan.samples_per_shard:,} are {plan.num_shards:,} shards, the limit "
            f"is {MAX_SHARDS:,}; give a larger --samples-per-shard"
        )

    # Several tasks may get here at once: the first one writes the plan, all of them read it.
    out.mkdir(parents=True, exist_ok=True)
    path = out / PLAN_NAME
    if not path.exists() and any(not name.startswith(".") for name in os.listdir(out)):
        raise DataError(f"{out} is not empty and has no {PLAN_NAME}; remove it or give another folder")
    _create(path, {**dataclasses.asdict(plan), "plan_id": plan.plan_id})
    settled = read_plan(out)

    if settled.background is None and plan.background == "white":
        plan = dataclasses.replace(plan, background=None)
    if keep_order:
        plan = dataclasses.replace(plan, order=settled.order)
    if settled.plan_id != plan.plan_id:
        # Name the first field that differs: it is what the user has to change.
        ours = plan.content()
        theirs = settled.content()
        name = next(key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key))
        hint = _HINTS.get(name, "")
        raise DataError(
            f"{out} contains a different plan: its {name} is {theirs.get(name)}, this command has {ours.get(name)}; "
            f"repeat the first command{hint}, or give another folder"
        )
    return settled


def read_plan(out: Path) -> EncodePlan:
    """Raises DataError if the plan is missing, damaged or was edited."""
    path = out / PLAN_NAME
    try:
        tree = parse_object(read_plain_file(path, MAX_JSON_BYTES))
        stated = tree.pop("plan_id", None)
        plan = adapter_of(EncodePlan).validate_python(tree)
        EncoderIdentity.from_dict(plan.encoder)
        if plan.num_shards > MAX_SHARDS or stated not in (None, plan.plan_id):
            raise UntrustedError("its content is not what was written")
        return plan
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist; make the shards with `ecar-data encode SHARDS {out} --vae ...`"
        ) from None
    except (UntrustedError, ValidationError) as error:
        reason = first_violation(error) if isinstance(error, ValidationError) else error
        raise DataError(f"{path} is damaged ({reason}); remove {out} and encode again") from None


def _create(path: Path, tree: dict[str, Any]) -> None:
    """Write a JSON file unless it exists. If several tasks do so at once, one wins, and the file is never mixed."""
    temporary = temporary_beside(path)
    write_json(temporary, tree)
    try:
        claim_name(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
