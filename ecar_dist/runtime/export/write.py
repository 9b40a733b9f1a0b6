"""Export: one average of a run's weights as sharded safetensors, with all that a loader and a reader need.

Nothing is gathered: each parameter is read from the ranks' files, converted and written before the next one is read.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ecar_dist import __version__
from ecar_dist.config.read import config_from_dict, config_to_yaml
from ecar_dist.config.run import RunConfig
from ecar_dist.errors import CheckpointError, ConfigError
from ecar_dist.runtime.checkpoint.files import read_manifest
from ecar_dist.runtime.checkpoint.tensor_file import TensorEntry, write_tensor_file
from ecar_dist.runtime.export.averages import Average, Wanted, open_average
from ecar_dist.runtime.export.card import model_card
from ecar_dist.runtime.export.files import CARD, CONFIG, FACTS, INDEX, SCHEMA, WEIGHTS, flat_identity
from ecar_dist.runtime.run.directory import RunDirectory
from ecar_dist.storage.atomic import sync_to_disk, temporary_beside, write_json
from ecar_dist.storage.redaction import redact_tree
from ecar_dist.storage.untrusted import UntrustedError, parse_object, read_plain_file

Precision = Literal["fp32", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
GIB = 2**30
MAX_SCORES_BYTES = 1 << 20


@dataclass(frozen=True)
class Exported:
    """A finished export: its folder, one line that says what it is, and the run and weights it was made from."""

    path: Path
    summary: str
    run: Path
    average: Average


def export_run(
    run: Path, out: Path, *, wanted: Wanted | None = None, dtype: Precision = "fp32", max_shard_gib: float = 5.0
) -> Exported:
    """Write an average of the newest whole checkpoint to folder `out`; memory: about two of its largest parameter.

    Raises CheckpointError where `out` exists or cannot be written, where the run has no whole checkpoint, or where it
    did not keep enough to rebuild the average that is `wanted`.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists already; choose another folder, or remove it")
    if not max_shard_gib > 0:
        raise ConfigError(f"--max-shard-gib {max_shard_gib} must be above 0; 5 is the default")
    directory = RunDirectory(run)
    config = without_credentials(directory.load_config())
    average = open_average(run, wanted or Wanted())
    temporary = temporary_beside(out)
    try:
        temporary.mkdir(parents=True)
        files = _write_weights(temporary, average, DTYPES[dtype], int(max_shard_gib * GIB))
        facts = _facts(directory, config, average, dtype, files)
        _write_papers(temporary, config, facts, _scores(directory))
        temporary.rename(out)
        sync_to_disk(out.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"cannot write {out}: {error.strerror}; free space there, or choose another folder"
        ) from None
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Exported(out, _summary(facts), run, average)


def without_credentials(config: RunConfig) -> RunConfig:
    """The same config, its URLs without user, password and query string: an export is passed on."""
    return config_from_dict(redact_tree(config.model_dump(mode="json"), variables=False))


def _write_weights(folder: Path, average: Average, dtype: torch.dtype, max_bytes: int) -> list[dict[str, Any]]:
    """The shards, and their index where they are several. Returns name, bytes and hash of every file."""
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, shape in average.shapes.items()}
    shards = list(_in_shards(sizes, max_bytes))
    names = [WEIGHTS] if len(shards) == 1 else [_shard_name(place, len(shards)) for place in range(len(shards))]
    files = []
    for name, parameters in zip(names, shards, strict=True):
        entries = [
            TensorEntry(parameter, dtype, average.shapes[parameter], _producer(average, parameter, dtype))
            for parameter in parameters
        ]
        files.append(asdict(write_tensor_file(folder / name, entries, {"format": "pt"})))
    if len(shards) > 1:
        where = {parameter: name for name, shard in zip(names, shards, strict=True) for parameter in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where})
    return files


def _producer(average: Average, parameter: str, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    return lambda: average[parameter].to(dtype)


def _in_shards(sizes: dict[str, int], max_bytes: int) -> Iterator[list[str]]:
    """Names in order, cut where the next would pass `max_bytes`; one larger than that has a shard of its own."""
    shard: list[str] = []
    held = 0
    for name, size in sizes.items():
        if shard and held + size > max_bytes:
            yield shard
            shard, held = [], 0
        shard.append(name)
        held += size
    yield shard


def _shard_name(place: int, count: int) -> str:
    stem, _, suffix = WEIGHTS.rpartition(".")
    return f"{stem}-{place + 1:05d}-of-{count:05d}.{suffix}"


def _facts(
    directory: RunDirectory, config: RunConfig, average: Average, dtype: Precision, files: list[dict[str, Any]]
) -> dict[str, Any]:
    """config.json: what a loader needs, and where the weights come from."""
    manifest = read_manifest(average.checkpoint)
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
            "parameters": sum(torch.Size(shape).numel() for shape in average.shapes.values()),
        },
        "average": average.facts,
        "config": config.model_dump(mode="json"),
        "progress": manifest.progress.model_dump(),
        "identity": manifest.identity,
        "source": {
            "checkpoint": average.checkpoint.name,
            "world_size": manifest.world_size,
            "zero_stage": manifest.zero_stage,
            "precision": last.get("precision", config.deepspeed.precision),
            "dataset_ids": flat_identity(manifest.identity).get("dataset_ids") or [],
            "attempts": len(attempts),
        },
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
        problem = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"cannot read {path} ({problem}); remove it, or evaluate the run again") from None


def _write_papers(folder: Path, config: RunConfig, facts: dict[str, Any], scores: dict[str, Any] | None) -> None:
    """Everything but the weights; facts last, since their presence is what makes a folder an export."""
    (folder / CONFIG).write_text(config_to_yaml(config))
    (folder / CARD).write_text(model_card(facts, scores))
    for name in (CONFIG, CARD):
        sync_to_disk(folder / name)
    write_json(folder / FACTS, facts)


def _summary(facts: dict[str, Any]) -> str:
    average = {name: value for name, value in facts["average"].items() if name not in ("kind", "rampup")}
    of = ", ".join(
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}" for name, value in average.items()
    )
    size = sum(entry["bytes"] for entry in facts["files"]) / 2**20
    return (
        f"export of {facts['source']['checkpoint']}: {facts['average']['kind']} ({of}), "
        f"{facts['model']['parameters']:,} parameters in {facts['dtype']}, {len(facts['files'])} files, {size:.1f} MiB"
    )
