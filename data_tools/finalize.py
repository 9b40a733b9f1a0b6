"""`ecar-data finalize`: check that every row of the plan is a sample or a failure, then write the manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_tools.encode.commit import Marker, committed_marker
from data_tools.encode.plan import EncodePlan, read_plan
from data_tools.failures import ERRORS_NAME, MAX_BAD, TASK_ERRORS, Failure, FailureTally, error_line
from data_tools.moments_statistics import add_up, combine
from ecar_dist.data.images.decode import RESIZES
from ecar_dist.data.shards.entries import TABLE_NAME, LatentEntry, ShardTable, write_table
from ecar_dist.data.shards.manifest import (
    MANIFEST_NAME,
    TABLE_SHARDS,
    Manifest,
    load_manifest,
    schema_of,
    write_manifest,
)
from ecar_dist.errors import DataError
from ecar_dist.storage.atomic import TEMPORARY_SUFFIX, atomic_write
from ecar_dist.vae.codec import EncoderIdentity

_MOST_SUMS = 10_000  # statistics of shards that are kept before they are added up
_MOST_LISTED = 10  # missing shards in an error


def finalize(out: Path, *, max_bad: float = MAX_BAD) -> None:
    """Write OUT/manifest.json. A set with more shards than TABLE_SHARDS also gets a table, unless it already has a
    manifest without one.

    The markers are read once, one after the other, so the memory does not grow with the number of shards. Raises
    DataError if shards are missing, if they do not cover the plan, or if more than max_bad x count images are bad.
    """
    plan = read_plan(out)
    tally = FailureTally(out, plan.count, max_bad)
    survey = Survey(out, plan, max_bad)
    as_table = plan.num_shards > TABLE_SHARDS and not _has_list(out)
    shards: Sequence[LatentEntry]
    with atomic_write(out / ERRORS_NAME) as errors:
        entries = survey.entries(errors)
        if as_table:
            name_bytes = len(f"{plan.num_shards:06d}.tar")
            shards = ShardTable(out / TABLE_NAME, write_table(out, entries, plan.num_shards, name_bytes))
        else:
            shards = list(entries)

    # Check the number of bad images.
    if survey.last_failure is None:
        (out / ERRORS_NAME).unlink()
    else:
        tally.check_number(survey.failed, survey.last_failure)

    manifest = _with_codebooks(out, _manifest(plan, shards, survey))
    write_manifest(out, manifest)
    # Remove temporary files of killed workers, and the lists that errors.jsonl now contains.
    for pattern in (f".*{TEMPORARY_SUFFIX}", TASK_ERRORS):
        for leftover in out.glob(pattern):
            leftover.unlink(missing_ok=True)
    bad = f", failed images: {survey.failed} ({out / ERRORS_NAME})" if survey.failed else ""
    print(f"{out}: {manifest.count} samples in {plan.num_shards} shards{bad}, dataset_id {manifest.dataset_id}")


class Survey:
    """One pass over the shards of a folder, and their totals."""

    def __init__(self, out: Path, plan: EncodePlan, max_bad: float) -> None:
        self.failed = 0
        self.last_failure: Failure | None = None
        self.sums: list[dict[str, Any]] = []  # of the shards, or of many of them together
        self._out = out
        self._plan = plan
        self._max_bad = max_bad

    def entries(self, errors: BinaryIO) -> Iterator[LatentEntry]:
        """The entries of all shards; the failures go to `errors`, in the order of their rows.

        `first_index` counts samples: rows of failures are skipped. Raises DataError at once for a shard that does
        not cover its rows of the plan, and at the end if shards are missing.
        """
        missing = 0
        listed: list[str] = []
        first_index = 0
        for index in range(self._plan.num_shards):
            marker = committed_marker(self._out, index, self._plan)
            if marker is None:
                missing += 1
                listed += [f"{index:06d}"] * (missing <= _MOST_LISTED)
                continue
            prove_coverage(self._out, self._plan, index, marker)

            errors.writelines(error_line(dataclasses.asdict(failure)) for failure in marker.failures)
            self.failed += len(marker.failures)
            self.last_failure = marker.failures[-1] if marker.failures else self.last_failure
            self._add(marker.statistics)
            yield dataclasses.replace(marker.entry, first_index=first_index)
            first_index += marker.entry.count

        # The error names the command that makes the missing shards.
        if missing:
            command = self._plan.command(self._out, 0, 1, self._max_bad)
            names = ", ".join(listed) + (", ..." if missing > _MOST_LISTED else "")
            raise DataError(
                f"{self._out} lacks {missing} of {self._plan.num_shards} shards ({names}); make them with: {command}"
            )

    def _add(self, statistics: dict[str, Any]) -> None:
        self.sums.append(statistics)
        if len(self.sums) > _MOST_SUMS:
            self.sums = [add_up(self.sums)]


def prove_coverage(out: Path, plan: EncodePlan, index: int, marker: Marker) -> None:
    """Raises DataError unless every row of a shard is exactly one sample or one failure.

    The rows of the shards are the plan without gap or overlap, so together the shards cover the plan.
    """
    # The samples are the rows from the first one on, without the missing ones, so comparing the counts is enough.
    entry = marker.entry
    rows = plan.rows(index)
    failed = [failure.row for failure in marker.failures]
    number = (entry.first_row, entry.count + len(entry.missing)) == (rows.start, len(rows))
    inside = all(row in rows for row in failed)
    if number and inside and sorted(entry.missing) == sorted(failed) == sorted(set(failed)):
        return

    # Only for the message: which rows are wrong.
    found, times = np.unique(np.concatenate([entry.rows, np.array(failed, dtype=np.int64)]), return_counts=True)
    wrong = np.union1d(np.setxor1d(found, np.arange(rows.start, rows.stop)), found[times > 1])
    raise DataError(
        f"{out}: samples and failures of shard {index:06d} do not match the plan: rows missing, repeated or outside "
        f"{rows.start}..{rows.stop - 1}: {len(wrong)}, the first is {wrong[0]}; delete {index:06d}.* and run: "
        f"{plan.command(out, index, plan.num_shards)}"
    )


def _has_list(out: Path) -> bool:
    """Whether the folder has a manifest that lists its shards itself. The dataset_id depends on this form."""
    return (out / MANIFEST_NAME).exists() and schema_of(out) == Manifest.SCHEMA


def _manifest(plan: EncodePlan, shards: Sequence[LatentEntry], survey: Survey) -> Manifest:
    return Manifest(
        count=plan.count - survey.failed,
        num_classes=plan.num_classes,
        class_names=plan.class_names,
        moments_shape=plan.moments_shape,
        has_flip=plan.has_flip,
        encoder=plan.encoder,
        preprocessing=_preprocessing(plan),
        statistics=combine(survey.sums, EncoderIdentity.from_dict(plan.encoder)),
        shards=shards,
        failures={"count": survey.failed, "file": ERRORS_NAME if survey.failed else None},
    )


def _with_codebooks(out: Path, manifest: Manifest) -> Manifest:
    """The manifest with the codebooks of an earlier manifest of the same samples."""
    try:
        earlier = load_manifest(out)
    except DataError:
        return manifest
    same = earlier.dataset_id == manifest.dataset_id
    return dataclasses.replace(manifest, codebooks=earlier.codebooks if same else [])


def _preprocessing(plan: EncodePlan) -> dict[str, object]:
    background = {} if plan.background is None else {"background": plan.background}
    order = {} if plan.order is None else {"order": dataclasses.asdict(plan.order)}
    pixels = {"resize": f"{plan.resize}: {RESIZES[plan.resize]}", "crop": "centre"}
    if plan.imported is not None:  # how its pixels were prepared is not known
        pixels = {"scale": plan.imported["scale"], "shift": plan.imported["shift"]}
    return {
        "image_size": plan.image_size,
        **pixels,
        "decoder": plan.decoder,
        "precision": plan.precision,
        "flip": plan.flip,
        **background,
        "versions": plan.versions,
        "source_dataset_id": plan.source_dataset_id,
        "order_seed": plan.seed,
        **order,
        "plan_id": plan.plan_id,
    }
