"""The files of a checkpoint: what a reader of a committed one needs, and nothing about who writes it.

    checkpoints/step-00001000/state-00000-of-00002.safetensors   one per rank: its fragments
                              checkpoint.json                    progress, identity, hash of every file
                              COMMITTED                          hash of checkpoint.json, written last

A rank's file holds, for every fragment it owns, four fp32 tensors keyed `kind:parameter:start`: the master weight,
AdamW's two moments and the EMA. A fragment names its place in the flattened parameter, so the reader's layout need not
be the writer's. Only safetensors and JSON are read: nothing in a checkpoint is ever executed.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open

from ecar_dist.errors import CheckpointError

MANIFEST, MARKER = "checkpoint.json", "COMMITTED"
SCHEMA = "ecar-checkpoint-v1"


@dataclass(frozen=True)
class Progress:
    """How far the run is. Everything else that moves is a function of `samples_seen`."""

    samples_seen: int = 0
    step: int = 0


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


def committed(folder: Path) -> list[Path]:
    """Committed checkpoints, newest first. A directory without its marker does not exist."""
    return sorted((path for path in folder.glob("step-*") if (path / MARKER).is_file()), reverse=True)


def newest(folder: Path) -> Path:
    """The newest whole checkpoint of a run. Raises CheckpointError where there is none."""
    for path in committed(folder):
        problem = first_problem(path, 0, 1)
        if problem is None:
            return path
        print(f"warning: checkpoint {path} is damaged ({problem}); trying the one before", file=sys.stderr)
    raise CheckpointError(f"{folder} holds no whole checkpoint; train first, or wait for the first save")


def read_manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / MANIFEST).read_text())


def verify(path: Path) -> None:
    """Check every file of a checkpoint against its hash. Raises CheckpointError naming the first bad one."""
    problem = first_problem(path, 0, 1)
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


def hash_file(path: Path) -> str:
    """xxh3_128 of a file, in hexadecimal."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def first_problem(path: Path, rank: int, size: int) -> str | None:
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
