"""Checkpoints that are either whole or do not exist, and that any number of ranks can read.

    checkpoints/step-00001000/state-00000-of-00002.safetensors   one per rank: its fragments
                              checkpoint.json                    progress, identity, hash of every file
                              COMMITTED                          hash of checkpoint.json, written last

A rank's file holds, for every fragment it owns, four fp32 tensors keyed `kind:parameter:start`: the master weight,
AdamW's two moments and the EMA. A fragment names its place in the flattened parameter, so the reader's layout need not
be the writer's. Only safetensors and JSON are read: nothing in a checkpoint is ever executed.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ecar_dist.errors import CheckpointError
from ecar_dist.runtime.ema import ShardedEma
from ecar_dist.runtime.engine import ADAM_MOMENTS, Engine
from ecar_dist.runtime.world import World
from ecar_dist.storage.atomic import sync_to_disk

MANIFEST, MARKER = "checkpoint.json", "COMMITTED"
SCHEMA = "ecar-checkpoint-v1"
T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """How far the run is. Everything else that moves is a function of `samples_seen`."""

    samples_seen: int = 0
    step: int = 0


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
            problems = self._world.gather(_first_problem(path, self._world.rank, self._world.size))
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


class FragmentReader:
    """Reads any slice of any parameter of a committed checkpoint, whatever layout wrote it."""

    def __init__(self, path: Path) -> None:
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        manifest = read_manifest(path)
        self.shapes = {name: tuple(shape) for name, shape in manifest["shapes"].items()}
        for entry in manifest["files"]:
            handle = safe_open(path / entry["name"], framework="pt")
            for key in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                kind, name, start = key.split(":")
                numel = handle.get_slice(key).get_shape()[0]
                self._pieces.setdefault((kind, name), []).append((int(start), numel, handle, key))

    def read(self, kind: str, name: str, start: int, numel: int) -> torch.Tensor:
        """Elements [start, start + numel) of the flattened parameter, fp32 on CPU. Raises CheckpointError on a gap."""
        value = torch.empty(numel)
        filled = 0
        for piece_start, piece_numel, handle, key in self._pieces.get((kind, name), []):
            low, high = max(start, piece_start), min(start + numel, piece_start + piece_numel)
            if low < high:
                value[low - start : high - start] = handle.get_slice(key)[low - piece_start : high - piece_start]
                filled += high - low
        if filled != numel:
            raise CheckpointError(
                f"checkpoint holds {filled} of {numel} values of {kind} {name}; it is of another model"
            )
        return value

    def full(self, kind: str, name: str) -> torch.Tensor:
        """A whole parameter in its own shape."""
        shape = torch.Size(self.shapes[name])
        return self.read(kind, name, 0, shape.numel()).view(shape)


def _by_kind(engine: Engine, ema: ShardedEma) -> dict[str, list[torch.Tensor]]:
    """What a checkpoint holds: lists of flat tensors of one layout."""
    moments = {name: engine.moments(name) for name in ADAM_MOMENTS}
    return {"master": engine.partitions, **moments, "ema": ema.partitions}


def committed(folder: Path) -> list[Path]:
    """Committed checkpoints, newest first. A directory without its marker does not exist."""
    return sorted((path for path in folder.glob("step-*") if (path / MARKER).is_file()), reverse=True)


def newest(folder: Path) -> Path:
    """The newest whole checkpoint of a run. Raises CheckpointError where there is none."""
    for path in committed(folder):
        problem = _first_problem(path, 0, 1)
        if problem is None:
            return path
        print(f"warning: checkpoint {path} is damaged ({problem}); trying the one before", file=sys.stderr)
    raise CheckpointError(f"{folder} holds no whole checkpoint; train first, or wait for the first save")


def read_manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / MANIFEST).read_text())


def verify(path: Path) -> None:
    """Check every file of a checkpoint against its hash. Raises CheckpointError naming the first bad one."""
    problem = _first_problem(path, 0, 1)
    if problem:
        raise CheckpointError(f"{path}: {problem}; use an older checkpoint")


def check_identity(where: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Refuse a checkpoint of another model, stage schedule or data order. Raises CheckpointError."""
    for key in [*expected, *(found.keys() - expected.keys())]:
        if found.get(key) != expected.get(key):
            raise CheckpointError(
                f"{where} was made with {key}={found.get(key)}, this run has {key}={expected.get(key)}; "
                f"set it back, or choose another run.name to train anew"
            )


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


def hash_file(path: Path) -> str:
    """xxh3_128 of a file, in hexadecimal."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def _first_problem(path: Path, rank: int, size: int) -> str | None:
    """What is wrong with this rank's share of a checkpoint's files, or None."""
    try:
        text = (path / MANIFEST).read_bytes()
        if xxhash.xxh3_128_hexdigest(text).encode() != (path / MARKER).read_bytes():
            return f"{MANIFEST} does not match {MARKER}"
        for entry in json.loads(text)["files"][rank::size]:
            file = path / entry["name"]
            if file.stat().st_size != entry["bytes"]:
                return f"{entry['name']} has {file.stat().st_size} bytes, expected {entry['bytes']}"
            if hash_file(file) != entry["xxh3_128"]:
                return f"{entry['name']} does not have its recorded hash"
    except OSError as error:
        return f"{error.filename or path}: {error.strerror}"
    return None
