"""`ecar-data import`: convert latents of another program into latent shards. Run again to resume."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_tools.encode.commit import commit, is_committed, recover
from data_tools.encode.plan import EncodePlan, settle_plan
from data_tools.finalize import finalize
from data_tools.foreign.sources import ForeignSet, find_foreign
from data_tools.images.index import read_class_names
from data_tools.moments_statistics import FP16_MAX, measure
from data_tools.progress import progress
from ecar_dist.data.images.names import readable
from ecar_dist.data.shards.manifest import load_manifest
from ecar_dist.data.shards.write import ShardContent
from ecar_dist.errors import ConfigError, DataError
from ecar_dist.vae.build import open_codec_by_spec
from ecar_dist.vae.codec import LOGVAR_RANGE, EncoderIdentity

IMPORTED = "import"  # stands for the decoder in the plan
_EXPECTED_STD = (0.5, 2.0)  # of normalised latents; outside, the normalisation is probably wrong


def import_latents(
    source: Path,
    out: Path,
    *,
    vae: str,
    scale: float = 1.0,
    shift: float = 0.0,
    labels: str | None = None,
    classes: Path | None = None,
    samples_per_shard: int = 4096,
    seed: int = 0,
) -> None:
    """Write OUT and its manifest. The source contains (raw - shift) x scale; raw moments are stored.

    Raises DataError that names the files which are damaged, not finite or of a different shape, or if OUT contains
    anything else; ConfigError for settings that do not fit.
    """
    # The settings, and the content of the source.
    if not (math.isfinite(scale) and scale > 0 and math.isfinite(shift)):
        raise ConfigError(f"--scale {scale} --shift {shift}: give a finite scale above 0 and a finite shift")
    identity = open_codec_by_spec(vae).identity
    names = read_class_names(classes)
    found = find_foreign(source, labels, names)
    _check_channels(source, found, identity)
    if found.left_out:
        kinds = ", ".join(f"{count} {readable(kind) or 'without extension'}" for kind, count in found.left_out.items())
        print(f"{source}: left out: {kinds}")

    # The plan: the one in OUT, if it is of the same command.
    about: dict[str, Any] = {"scale": scale, "shift": shift, "labels": labels or "", "classes": str(classes or "")}
    drafted = _draft(source, found, identity, about, samples_per_shard, seed)
    plan = settle_plan(out, drafted)

    # The shards that do not exist yet.
    todo = [index for index in range(plan.num_shards) if not is_committed(out, index, plan)]
    with progress(sum(len(plan.rows(index)) for index in todo), "sample", "import") as bar:
        for index in todo:
            if not recover(out, index, plan):
                content = _content(found, plan, identity, index, scale, shift)
                statistics = measure(content.moments, identity)
                commit(out, index, plan, content, {"statistics": statistics, "failures": []})
            bar.update(len(plan.rows(index)))

    # The manifest, as for any encoding.
    finalize(out)
    _warn_of_scale(out)
    print(f"next: ecar-dist init {shlex.quote(str(out))} > mine.yaml")


def _check_channels(source: Path, found: ForeignSet, identity: EncoderIdentity) -> None:
    wanted = {identity.moments_channels, identity.latent_channels}
    if found.shape[0] not in wanted:
        raise DataError(
            f"{source} has latents of {found.shape[0]} channels, {identity.name} makes "
            f"{' or '.join(map(str, sorted(wanted)))}; give the --vae that made them"
        )


def _draft(
    source: Path,
    found: ForeignSet,
    identity: EncoderIdentity,
    about: dict[str, Any],
    samples_per_shard: int,
    seed: int,
) -> EncodePlan:
    """The plan of an import: like that of an encoding, without decoder and resize."""
    height, width = found.shape[1:]
    return EncodePlan(
        source_folder=str(source),
        source_dataset_id=found.identity,
        count=found.count,
        num_classes=len(found.class_names),
        class_names=found.class_names,
        samples_per_shard=samples_per_shard,
        seed=seed,
        image_size=height * identity.downsample,
        moments_shape=(identity.moments_channels, height, width),
        encoder=identity.to_dict(),
        decoder=IMPORTED,
        resize="cubic",
        precision="fp32",
        flip="store" if found.has_flip else "none",
        versions={"torch": torch.__version__},
        imported=about,
    )


def _content(
    found: ForeignSet, plan: EncodePlan, identity: EncoderIdentity, shard_index: int, scale: float, shift: float
) -> ShardContent:
    indices = plan.source_indices(shard_index)
    stored = found.read(indices)
    straight, flipped = (None if array is None else _raw(array, identity, scale, shift) for array in stored)
    assert straight is not None
    return ShardContent(plan.rows(shard_index).start, straight, found.labels[indices], flipped)


def _raw(stored: np.ndarray, identity: EncoderIdentity, scale: float, shift: float) -> np.ndarray:
    """Raw moments, fp16 [n, 2C or C, H, W]. A stored sample of the posterior gets the smallest variance."""
    channels = identity.latent_channels
    mean = stored[:, :channels] / scale + shift
    logvar = stored[:, channels:] - 2.0 * math.log(scale)
    if not identity.deterministic and not logvar.shape[1]:
        logvar = np.full_like(mean, LOGVAR_RANGE[0])
    if (worst := float(np.abs(mean).max())) > FP16_MAX:
        raise DataError(f"raw latents of up to {worst:g} do not fit fp16 (limit {FP16_MAX:.0f}); check --scale")
    return np.concatenate([mean, logvar.clip(*LOGVAR_RANGE)], axis=1).astype(np.float16)


def _warn_of_scale(out: Path) -> None:
    """Warn of a wrong scale. Training on such latents raises no error, but gives poor results."""
    stated = load_manifest(out).statistics["normalised_std"]
    std = float(np.sqrt(np.square(stated).mean()))
    if not _EXPECTED_STD[0] < std < _EXPECTED_STD[1]:
        print(
            f"{out}: normalised latents have a standard deviation of {std:.3f}, about 1 is expected; if the source was "
            "stored with a scale or shift, import it into a new folder with --scale and --shift"
        )
