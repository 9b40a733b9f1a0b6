"""What an encoding will produce, decided before the first image: any worker then makes any shard, byte for byte."""

from __future__ import annotations

import dataclasses
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from data_tools.encode.failures import MAX_BAD
from ecar_dist.data.order.lanes import sample_indices
from ecar_dist.data.shards.manifest import STRICT
from ecar_dist.data.shards.manifest_rules import Classes, MomentsShape, Samples, Side, Tree, Visible
from ecar_dist.errors import DataError
from ecar_dist.storage.atomic import claim_name, temporary_beside, write_json
from ecar_dist.storage.untrusted import (
    MAX_JSON_BYTES,
    UntrustedError,
    first_violation,
    parse_object,
    read_plain_file,
)
from ecar_dist.vae.codec import EncoderIdentity, hash_config

PLAN_NAME = "plan.json"
MAX_SHARDS = 1_000_000


@dataclass(frozen=True)
class EncodePlan:
    """Output shard i holds rows i x samples_per_shard ... of the source, permuted once by `seed`."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    source_folder: Visible  # a hint for people; the identity is the data set's id
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
    versions: dict[str, Visible]  # of the libraries that decide on the numbers
    background: Visible | None = None  # behind transparency; None in plans of versions that dropped transparency

    @property
    def plan_id(self) -> str:
        """sha256 of all that decides on the bytes: the names of places do not."""
        return hash_config(self.content())

    def content(self) -> dict[str, Any]:
        encoder = {key: value for key, value in self.encoder.items() if key != "name"}
        content = {**dataclasses.asdict(self), "source_folder": "", "encoder": encoder}
        if self.background is None:
            del content["background"]  # so that the ids of earlier plans, which have no such key, stay
        return content

    @property
    def num_shards(self) -> int:
        return -(-self.count // self.samples_per_shard)

    @property
    def has_flip(self) -> bool:
        return self.flip == "store"

    def rows(self, shard_index: int) -> range:
        """Global rows of a shard."""
        first = shard_index * self.samples_per_shard
        return range(first, min(first + self.samples_per_shard, self.count))

    def source_indices(self, shard_index: int) -> np.ndarray:
        """Source sample of each row of a shard, int64."""
        return sample_indices(np.array(self.rows(shard_index), dtype=np.int64), self.count, self.seed)

    def command(self, out: Path, task: int, tasks: int, max_bad: float = MAX_BAD) -> str:
        """The command that makes shards task, task + tasks, ..."""
        settings = {
            "vae": self.encoder["name"],
            "image-size": self.image_size,
            "samples-per-shard": self.samples_per_shard,
            "seed": self.seed,
            "decoder": "dali" if self.decoder == "dali-mixed" else self.decoder,
            "resize": self.resize,
            "precision": self.precision,
            "flip": self.flip,
            **({} if self.background in (None, "white") else {"background": self.background}),
            "task": task,
            "tasks": tasks,
            **({} if max_bad == MAX_BAD else {"max-bad": max_bad}),
        }
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        return shlex.join(["ecar-data", "encode", self.source_folder, str(out), *words])


def settle_plan(out: Path, plan: EncodePlan) -> EncodePlan:
    """Write the plan if OUT is new; else return the one there. Raises DataError where OUT belongs to something else.

    A folder begun by a version that dropped transparency goes on so, unless a background other than white is asked for.
    """
    if plan.num_shards > MAX_SHARDS:
        raise DataError(
            f"{plan.count:,} images in shards of {plan.samples_per_shard:,} are {plan.num_shards:,} shards, at most "
            f"{MAX_SHARDS:,} are made; give a larger --samples-per-shard"
        )
    out.mkdir(parents=True, exist_ok=True)
    path = out / PLAN_NAME
    if not path.exists() and any(not name.startswith(".") for name in os.listdir(out)):
        raise DataError(f"{out} is not empty and has no {PLAN_NAME}; remove it or give another folder")
    _create(path, {**dataclasses.asdict(plan), "plan_id": plan.plan_id})
    settled = read_plan(out)
    if settled.background is None and plan.background == "white":
        plan = dataclasses.replace(plan, background=None)
    if settled.plan_id != plan.plan_id:
        ours, theirs = plan.content(), settled.content()
        name = next(key for key in ours if ours[key] != theirs.get(key))
        same = "the first command" + " (its --decoder and --device decide on this)" * (name == "decoder")
        raise DataError(
            f"{out} is occupied by another plan: its {name} is {theirs.get(name)}, this command's {ours[name]}; "
            f"repeat {same}, or give another folder"
        )
    return settled


def read_plan(out: Path) -> EncodePlan:
    """Raises DataError where there is no plan, or one that breaks a rule or was changed."""
    path = out / PLAN_NAME
    try:
        tree = parse_object(read_plain_file(path, MAX_JSON_BYTES))
        stated = tree.pop("plan_id", None)
        plan = TypeAdapter(EncodePlan).validate_python(tree)
        EncoderIdentity.from_dict(plan.encoder)
        if plan.num_shards > MAX_SHARDS or stated not in (None, plan.plan_id):
            raise UntrustedError("it is not what was written")
        return plan
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist; make the shards with `ecar-data encode SHARDS {out} --vae ...`"
        ) from None
    except (UntrustedError, ValidationError) as error:
        reason = first_violation(error) if isinstance(error, ValidationError) else error
        raise DataError(f"{path} is damaged ({reason}); remove {out} and encode again") from None


def _create(path: Path, tree: dict[str, Any]) -> None:
    """Write unless it is there: the first of several tasks wins whole."""
    temporary = temporary_beside(path)
    write_json(temporary, tree)
    try:
        claim_name(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
