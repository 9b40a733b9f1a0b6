"""Export: the EMA weights alone, as safetensors, with the config and the identity they belong to."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import save_file

from ecar_dist.errors import CheckpointError
from ecar_dist.runtime.checkpoint_files import FragmentReader, newest, read_manifest
from ecar_dist.runtime.run_directory import RunDirectory
from ecar_dist.storage.atomic import sync_to_disk, temporary_beside, write_json

EXPORT_WEIGHTS, EXPORT_FACTS = "model.safetensors", "export.json"


def export_run(run: Path, out: Path) -> Path:
    """Write the newest whole checkpoint's EMA weights to folder `out`. Raises CheckpointError where `out` exists."""
    if out.exists():
        raise CheckpointError(f"{out} exists already; choose another folder, or remove it")
    directory = RunDirectory(run)
    directory.load_config()
    checkpoint = newest(directory.checkpoints)
    reader, manifest = FragmentReader(checkpoint), read_manifest(checkpoint)
    temporary = temporary_beside(out)
    temporary.mkdir(parents=True)
    try:
        save_file({name: reader.full("ema", name) for name in reader.shapes}, temporary / EXPORT_WEIGHTS)
        sync_to_disk(temporary / EXPORT_WEIGHTS)
        shutil.copy(directory.config, temporary / "config.yaml")
        write_json(temporary / EXPORT_FACTS, {key: manifest[key] for key in ("progress", "identity")})
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return out
