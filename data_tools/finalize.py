"""`ecar-data finalize`: check that every row of the plan is a sample or a failure, then write the manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_tools.encode.commit import CommittedFailures, Marker, is_committed, read_marker
from data_tools.encode.plan import EncodePlan, read_plan
from data_tools.failures import ERRORS_NAME, MAX_BAD, FailureTally
from data_tools.moments_statistics import combine
from ecar_dist.data.images.decode import RESIZES
from ecar_dist.data.shards.manifest import LatentEntry, Manifest, write_manifest
from ecar_dist.errors import DataError
from ecar_dist.storage.atomic import TEMPORARY_SUFFIX
from ecar_dist.vae.codec import EncoderIdentity


def finalize(out: Path, *, max_bad: float = MAX_BAD) -> None:
    """Write OUT/manifest.json.

    Raises DataError if shards are missing, if they do not cover the plan, and if more than max_bad x count images are
    bad.
    """
    # Every shard must be committed. The error has the command that makes the others.
    plan = read_plan(out)
    missing = [index for index in range(plan.num_shards) if not is_committed(out, index, plan)]
    if missing:
        listed = ", ".join(f"{index:06d}" for index in missing[:10]) + (", ..." if len(missing) > 10 else "")
        command = plan.command(out, 0, 1, max_bad)
        raise DataError(f"{out} lacks {len(missing)} of {plan.num_shards} shards ({listed}); make them with: {command}")

    # Together they must be the plan, with few enough bad images.
    markers = [marker for index in range(plan.num_shards) if (marker := read_marker(out, index)) is not None]
    prove_coverage(out, plan, markers)
    tally = FailureTally(out, plan.count, max_bad, CommittedFailures(out))
    failures = tally.write()
    tally.check()

    manifest = _manifest(plan, markers, failures)
    write_manifest(out, manifest)
    for leftover in out.glob(f".*{TEMPORARY_SUFFIX}"):  # temporary files of workers that were killed
        leftover.unlink(missing_ok=True)
    bad = f", failed images: {failures} ({out / ERRORS_NAME})" if failures else ""
    print(f"{out}: {manifest.count} samples in {plan.num_shards} shards{bad}, dataset_id {manifest.dataset_id}")


def prove_coverage(out: Path, plan: EncodePlan, markers: Sequence[Marker]) -> None:
    """Raises DataError unless every row of the plan is exactly one sample or one failure."""
    sampled = [marker.entry.rows for marker in markers]
    failed = [np.array([failure.row for failure in marker.failures], dtype=np.int64) for marker in markers]
    found, times = np.unique(np.concatenate([*sampled, *failed]), return_counts=True)
    wanted = np.arange(plan.count, dtype=np.int64)
    if np.array_equal(found, wanted) and (times == 1).all():
        return

    # The first row that is wrong, and the shard to make again.
    wrong = np.union1d(np.setxor1d(found, wanted), found[times > 1])
    index = int(np.clip(wrong[0] // plan.samples_per_shard, 0, plan.num_shards - 1))
    raise DataError(
        f"{out}: shards and failures do not match the plan: rows missing, repeated or outside "
        f"0..{plan.count - 1}: {len(wrong)}, the first is {wrong[0]}; delete {index:06d}.* and run: "
        f"{plan.command(out, index, plan.num_shards)}"
    )


def _manifest(plan: EncodePlan, markers: Sequence[Marker], failures: int) -> Manifest:
    return Manifest(
        count=plan.count - failures,
        num_classes=plan.num_classes,
        class_names=plan.class_names,
        moments_shape=plan.moments_shape,
        has_flip=plan.has_flip,
        encoder=plan.encoder,
        preprocessing=_preprocessing(plan),
        statistics=combine([marker.statistics for marker in markers], EncoderIdentity.from_dict(plan.encoder)),
        shards=_dense([marker.entry for marker in markers]),
        failures={"count": failures, "file": ERRORS_NAME if failures else None},
    )


def _dense(entries: Sequence[LatentEntry]) -> list[LatentEntry]:
    """The entries with `first_index` counted over samples: rows of failures are skipped."""
    ends = np.cumsum([entry.count for entry in entries]).tolist()
    return [dataclasses.replace(entry, first_index=end - entry.count) for entry, end in zip(entries, ends, strict=True)]


def _preprocessing(plan: EncodePlan) -> dict[str, object]:
    background = {} if plan.background is None else {"background": plan.background}
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
        "plan_id": plan.plan_id,
    }
