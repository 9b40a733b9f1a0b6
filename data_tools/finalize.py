"""`ecar-data finalize`: prove that the shards are exactly the plan, then write the manifest."""

from __future__ import annotations

from pathlib import Path

from data_tools.encode import is_committed, read_marker
from data_tools.encode_plan import EncodePlan, read_plan
from data_tools.moments_statistics import combine
from ecar_dist.data.atomic import TEMPORARY_SUFFIX
from ecar_dist.data.manifest import LatentEntry, Manifest, write_manifest
from ecar_dist.errors import DataError
from ecar_dist.vae.codec import EncoderIdentity


def finalize(out: Path) -> None:
    """Raises DataError listing the shards that are missing, or naming one that is not what the plan says."""
    plan = read_plan(out)
    missing = [index for index in range(plan.num_shards) if not is_committed(out, index, plan)]
    if missing:
        listed = ", ".join(f"{index:06d}" for index in missing[:10]) + (", ..." if len(missing) > 10 else "")
        command = plan.command(out, 0, 1)
        raise DataError(f"{out} lacks {len(missing)} of {plan.num_shards} shards ({listed}); make them with: {command}")
    markers = [read_marker(out, index) or {} for index in range(plan.num_shards)]
    entries = [LatentEntry(**marker["entry"]) for marker in markers]
    for index, entry in enumerate(entries):
        _check_entry(out, entry, plan, index)
    identity = EncoderIdentity.from_dict(plan.encoder)
    manifest = Manifest(
        count=plan.count,
        num_classes=plan.num_classes,
        class_names=plan.class_names,
        moments_shape=plan.moments_shape,
        has_flip=plan.has_flip,
        encoder=plan.encoder,
        preprocessing=_preprocessing(plan),
        statistics=combine([marker["statistics"] for marker in markers], identity),
        shards=entries,
    )
    write_manifest(out, manifest)
    for leftover in out.glob(f".*{TEMPORARY_SUFFIX}"):  # of workers that were killed
        leftover.unlink(missing_ok=True)
    print(f"{out}: {plan.count} samples in {plan.num_shards} shards, dataset_id {manifest.dataset_id}")


def _check_entry(out: Path, entry: LatentEntry, plan: EncodePlan, index: int) -> None:
    rows = plan.rows(index)
    found, wanted = (entry.name, entry.first_index, entry.count), (f"{index:06d}.tar", rows.start, len(rows))
    if found != wanted:
        raise DataError(
            f"marker {out}/{index:06d}.json says (name, first row, count) = {found}, the plan says {wanted}; "
            f"delete {index:06d}.* and run: {plan.command(out, index, plan.num_shards)}"
        )


def _preprocessing(plan: EncodePlan) -> dict[str, object]:
    return {
        "image_size": plan.image_size,
        "resize": "shorter side, cubic, antialiased",
        "crop": "centre",
        "decoder": plan.decoder,
        "precision": plan.precision,
        "flip": plan.flip,
        "versions": plan.versions,
        "source_dataset_id": plan.source_dataset_id,
        "order_seed": plan.seed,
        "plan_id": plan.plan_id,
    }
