"""Checkpoints that are either whole or do not exist, and that any number of ranks can read (see checkpoint_files)."""

from __future__ import annotations

import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import save_file

from ecar_dist.errors import CheckpointError
from ecar_dist.runtime.checkpoint_files import (
    MANIFEST,
    MARKER,
    SCHEMA,
    FragmentReader,
    Progress,
    check_identity,
    committed,
    first_problem,
    hash_file,
    read_manifest,
)
from ecar_dist.runtime.ema import ShardedEma
from ecar_dist.runtime.engine import ADAM_MOMENTS, Engine
from ecar_dist.runtime.world import World
from ecar_dist.storage.atomic import sync_to_disk

T = TypeVar("T")


class CheckpointStore:
    """The checkpoints of one run. Every method is called by all ranks together."""

    def __init__(self, folder: Path, world: World, keep: int, identity: dict[str, Any]) -> None:
        self.folder, self._world, self._keep, self._identity = folder, world, keep, identity

    def save(self, progress: Progress, engine: Engine, ema: ShardedEma) -> Path:
        """Write, hash, commit, then drop the oldest beyond `keep`. Raises on all ranks if any rank failed."""
        final = self.folder / f"step-{progress.step:08d}"
        attempt = self._world.broadcast(uuid.uuid4().hex[:8])
        temporary = self.folder / f"tmp-{final.name}-{attempt}"
        try:
            entry = self._world.together(lambda: _writing(temporary, lambda: self._write_share(temporary, engine, ema)))
            entries = self._world.gather(entry)
            self._world.on_first_rank(
                lambda: _writing(temporary, lambda: self._commit(temporary, final, progress, engine, entries))
            )
        except Exception:
            if self._world.is_first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        return final

    def restore(self, engine: Engine, ema: ShardedEma) -> Progress | None:
        """Load the newest whole checkpoint into engine and EMA; None where there is none yet.

        A damaged checkpoint is reported and the one before it is taken. Raises CheckpointError where all are damaged,
        or where the checkpoint is of another model, stage schedule or data set.
        """
        candidates = self._world.broadcast(committed(self.folder) if self._world.is_first else None)
        for path in candidates:
            problems = self._world.gather(first_problem(path, self._world.rank, self._world.size))
            problem = next((text for text in problems if text), None)
            if problem is None:
                return self._load(path, engine, ema)
            if self._world.is_first:
                print(f"warning: checkpoint {path} is damaged ({problem}); trying the one before", file=sys.stderr)
        if candidates:
            raise CheckpointError(
                f"none of the {len(candidates)} checkpoints in {self.folder} is whole; restore one from a backup, or "
                f"remove the folder to train from the start"
            )
        return None

    def _load(self, path: Path, engine: Engine, ema: ShardedEma) -> Progress:
        progress = self._world.together(lambda: self._read_share(path, engine, ema))
        engine.set_optimizer_step(progress.step)
        engine.publish_master_weights()
        return progress

    def _read_share(self, path: Path, engine: Engine, ema: ShardedEma) -> Progress:
        manifest = read_manifest(path)
        check_identity(path, manifest["identity"], self._identity)
        reader = FragmentReader(path)
        targets = _by_kind(engine, ema)
        with torch.no_grad():
            for fragment in engine.fragments:
                for kind, partitions in targets.items():
                    value = reader.read(kind, fragment.name, fragment.start, fragment.numel)
                    fragment.of(partitions).copy_(value)
        return Progress(**manifest["progress"])

    def _write_share(self, folder: Path, engine: Engine, ema: ShardedEma) -> dict[str, Any]:
        rank, size = self._world.rank, self._world.size
        partitions = _by_kind(engine, ema)
        owned = engine.fragments[rank::size] if engine.replicated else engine.fragments
        tensors = {
            f"{kind}:{fragment.name}:{fragment.start}": fragment.of(flat).detach().cpu().clone()
            for fragment in owned
            for kind, flat in partitions.items()
        }
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"state-{rank:05d}-of-{size:05d}.safetensors"
        save_file(tensors, path)
        sync_to_disk(path)
        return {"name": path.name, "bytes": path.stat().st_size, "xxh3_128": hash_file(path)}

    def _commit(
        self, temporary: Path, final: Path, progress: Progress, engine: Engine, files: list[dict[str, Any]]
    ) -> None:
        manifest = {
            "schema": SCHEMA,
            "progress": asdict(progress),
            "identity": self._identity,
            "world_size": self._world.size,
            "zero_stage": engine.zero_stage,
            "shapes": engine.shapes,
            "files": files,
        }
        text = json.dumps(manifest, indent=1)
        for name, content in ((MANIFEST, text), (MARKER, xxhash.xxh3_128_hexdigest(text.encode()))):
            (temporary / name).write_text(content)
            sync_to_disk(temporary / name)
        sync_to_disk(temporary)
        if final.exists():
            _remove(final)  # the same step, from an attempt that this one has gone back behind
        os.rename(temporary, final)
        sync_to_disk(self.folder)
        self._prune(final)

    def _prune(self, newest_whole: Path) -> None:
        """Keep the newest; what lies after them was damaged, or this attempt would have begun there."""
        found = committed(self.folder)
        at = found.index(newest_whole)
        keep = found[at : at + self._keep]
        for path in [*self.folder.glob("step-*"), *self.folder.glob("tmp-*")]:
            if path not in keep:
                _remove(path)


def _by_kind(engine: Engine, ema: ShardedEma) -> dict[str, list[torch.Tensor]]:
    """What a checkpoint holds: lists of flat tensors of one layout."""
    moments = {name: engine.moments(name) for name in ADAM_MOMENTS}
    return {"master": engine.partitions, **moments, "ema": ema.partitions}


def _writing(where: Path, write: Callable[[], T]) -> T:
    """Run `write`; what it cannot write is an error that the user can mend. safetensors has an error of its own."""
    try:
        return write()
    except (OSError, RuntimeError, SafetensorError) as failure:
        raise CheckpointError(
            f"cannot write {where}: {failure}; free space there, then run again: it goes on from the one before"
        ) from failure


def _remove(path: Path) -> None:
    """The marker goes first: from then on the checkpoint does not exist for a reader."""
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
