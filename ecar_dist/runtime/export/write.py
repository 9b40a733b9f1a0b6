"""Write an export: one EMA of a run as sharded safetensors, with config, facts and model card.

Each parameter is read from the ranks' files, converted and written before the next one is read.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ecar_dist import __version__
from ecar_dist.config.read import config_from_dict, config_to_yaml
from ecar_dist.config.run import RunConfig
from ecar_dist.errors import CheckpointError, ConfigError, reason_of
from ecar_dist.runtime.checkpoint.files import read_manifest
from ecar_dist.runtime.checkpoint.manifest import flat_identity
from ecar_dist.runtime.checkpoint.tensor_file import TensorEntry, write_tensor_file
from ecar_dist.runtime.export.card import model_card
from ecar_dist.runtime.export.ema import EmaWeights, WantedEma, open_ema_weights
from ecar_dist.runtime.export.files import CARD, CONFIG, FACTS, INDEX, PIPELINE, PIPELINE_INDEX, SCHEMA, WEIGHTS
from ecar_dist.runtime.export.names import CLASS_NAMES, class_names
from ecar_dist.runtime.run.directory import RunDirectory
from ecar_dist.storage.atomic import sync_to_disk, temporary_beside, write_json
from ecar_dist.storage.redaction import redact_tree
from ecar_dist.storage.untrusted import UntrustedError, parse_object, read_plain_file

Precision = Literal["fp32", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
GIB = 2**30
MAX_SCORES_BYTES = 1 << 20
PIPELINE_TEXT = '''\
"""For diffusers: DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True). Needs ecar_dist to be installed."""

from ecar_dist.diffusers_pipeline import EcarPipeline

__all__ = ["EcarPipeline"]
'''


@dataclass(frozen=True)
class Exported:
    """A finished export: its folder, a summary in one line, and the run and weights that it was made from."""

    path: Path
    summary: str
    run: Path
    weights: EmaWeights


def export_run(
    run: Path,
    out: Path,
    *,
    wanted: WantedEma | None = None,
    checkpoint: Path | None = None,
    dtype: Precision = "fp32",
    max_shard_gib: float = 5.0,
) -> Exported:
    """Write the `wanted` EMA of a checkpoint to folder `out`. Needs memory for two of its largest parameters.

    checkpoint: a verified checkpoint of the run (default: the newest one that is not damaged).

    Raises CheckpointError if `out` exists or cannot be written, if the run has no checkpoint, or if the EMA was neither
    kept nor can be rebuilt.
    """
    # Cheap checks first.
    if out.exists():
        raise CheckpointError(f"{out} exists already; choose another folder, or remove it")
    if not max_shard_gib > 0:
        raise ConfigError(f"--max-shard-gib {max_shard_gib} must be above 0; 5 is the default")
    directory = RunDirectory(run)
    config = without_credentials(directory.load_config())
    weights = open_ema_weights(run, wanted or WantedEma(), checkpoint)

    # The folder gets its name once it is complete.
    temporary = temporary_beside(out)
    try:
        temporary.mkdir(parents=True)
        entries = [
            TensorEntry(name, DTYPES[dtype], shape, _producer(weights, name, DTYPES[dtype]))
            for name, shape in weights.shapes.items()
        ]
        files = write_weights(temporary, entries, int(max_shard_gib * GIB))
        facts = export_facts(directory, config, weights, dtype, files)
        write_texts(temporary, config, facts, _scores(directory))
        temporary.rename(out)
        sync_to_disk(out.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"cannot write {out}: {reason_of(error)}; free space there, or choose another folder"
        ) from None
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Exported(out, _summary(facts), run, weights)


def without_credentials(config: RunConfig) -> RunConfig:
    """The config without users, passwords and query strings in its URLs, because exports are shared."""
    return config_from_dict(redact_tree(config.model_dump(mode="json"), variables=False))


def write_weights(folder: Path, entries: Sequence[TensorEntry], max_bytes: int) -> list[dict[str, Any]]:
    """Write the shards, and an index if there are several. Returns name, bytes and hash of every file."""
    by_name = {entry.name: entry for entry in entries}
    sizes = {entry.name: entry.bytes for entry in entries}
    shards = list(_in_shards(sizes, max_bytes))
    names = (
        [WEIGHTS] if len(shards) == 1 else [_shard_name(number, len(shards)) for number in range(1, len(shards) + 1)]
    )
    files = []
    for name, shard in zip(names, shards, strict=True):
        files.append(asdict(write_tensor_file(folder / name, [by_name[tensor] for tensor in shard], {"format": "pt"})))
    if len(shards) > 1:
        shard_of = {parameter: name for name, shard in zip(names, shards, strict=True) for parameter in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": shard_of})
    return files


def _producer(weights: EmaWeights, parameter: str, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    return lambda: weights[parameter].to(dtype)


def _in_shards(sizes: dict[str, int], max_bytes: int) -> Iterator[list[str]]:
    """Names in order, in shards of at most `max_bytes`. A larger parameter has a shard of its own."""
    shard: list[str] = []
    total = 0
    for name, size in sizes.items():
        if shard and total + size > max_bytes:
            yield shard
            shard = []
            total = 0
        shard.append(name)
        total += size
    yield shard


def _shard_name(number: int, count: int) -> str:
    stem, _, suffix = WEIGHTS.rpartition(".")
    return f"{stem}-{number:05d}-of-{count:05d}.{suffix}"


def export_facts(
    directory: RunDirectory, config: RunConfig, weights: EmaWeights, dtype: Precision, files: list[dict[str, Any]]
) -> dict[str, Any]:
    """config.json: facts for a loader, and the origin of the weights."""
    # Library versions and precision are those of the last attempt at the run.
    manifest = read_manifest(weights.checkpoint)
    attempts = directory.attempts()
    last = attempts[-1] if attempts else {}
    return {
        "schema": SCHEMA,
        "library_name": "ecar_dist",
        "model_type": config.model.kind,
        "dtype": dtype,
        "model": {
            "preset": config.model.preset,
            "stage_sizes": list(config.stage_sizes),
            "stage_ends": list(config.flow.resolved_ends),
            "parameters": sum(torch.Size(shape).numel() for shape in weights.shapes.values()),
        },
        "average": weights.facts,
        "config": config.model_dump(mode="json"),
        "progress": asdict(manifest.progress),
        "identity": manifest.identity,
        "source": {
            "checkpoint": weights.checkpoint.name,
            "world_size": manifest.world_size,
            "zero_stage": manifest.zero_stage,
            "precision": last.get("precision", config.deepspeed.precision),
            "dataset_ids": flat_identity(manifest.identity).get("dataset_ids") or [],
            "attempts": len(attempts),
        },
        CLASS_NAMES: class_names(config, manifest.client_state.get(CLASS_NAMES)),
        "versions": {"ecar_dist": __version__, "torch": last.get("torch", torch.__version__)},
        "files": files,
    }


def _scores(directory: RunDirectory) -> dict[str, Any] | None:
    path = directory.path / "scores.json"
    try:
        return parse_object(read_plain_file(path, MAX_SCORES_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, UntrustedError) as error:
        raise CheckpointError(
            f"cannot read {path} ({reason_of(error)}); remove it, or evaluate the run again"
        ) from None


def write_texts(folder: Path, config: RunConfig, facts: dict[str, Any], scores: dict[str, Any] | None) -> None:
    """Write everything but the weights. The facts come last: they make a folder an export."""
    (folder / CONFIG).write_text(config_to_yaml(config))
    (folder / CARD).write_text(model_card(facts, scores))
    (folder / PIPELINE).write_text(PIPELINE_TEXT)
    for name in (CONFIG, CARD, PIPELINE):
        sync_to_disk(folder / name)
    write_json(folder / PIPELINE_INDEX, {"_class_name": ["pipeline", "EcarPipeline"], "_diffusers_version": "0.42.1"})
    write_json(folder / FACTS, facts)


def _summary(facts: dict[str, Any]) -> str:
    about = ", ".join(
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in facts["average"].items()
        if name not in ("kind", "rampup")
    )
    size = sum(entry["bytes"] for entry in facts["files"]) / 2**20
    return (
        f"export of {facts['source']['checkpoint']}: {facts['average']['kind']}{f' ({about})' if about else ''}, "
        f"{facts['model']['parameters']:,} parameters in {facts['dtype']}, {len(facts['files'])} files, {size:.1f} MiB"
    )
