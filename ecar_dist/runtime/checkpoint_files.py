"""The files of a checkpoint: what a reader of a committed one needs, and nothing about who writes it.

    checkpoints/step-00001000/state-00000-of-00002.safetensors   one per rank: its fragments
                              checkpoint.json                    progress, notes, identity, hash of every file
                              COMMITTED                          hash of checkpoint.json, written last

A rank's file holds fp32 tensors keyed `kind:parameter:start`, for every fragment it owns one of each kind: the master
weight, AdamW's two moments, the averages. A fragment names its place in the flattened parameter, so the reader's layout
need not be the writer's. Only safetensors and JSON are read: nothing in a checkpoint is ever executed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash
from safetensors import SafetensorError, safe_open

from ecar_dist.errors import CheckpointError
from ecar_dist.runtime.untrusted import file_inside, read_json

if TYPE_CHECKING:
    import torch  # its tensors are read below, the rest answers at once without it

MANIFEST, MARKER = "checkpoint.json", "COMMITTED"
SCHEMA = "ecar-checkpoint-v2"

Needed = Callable[[Mapping[str, Any]], bool]  # whether a reader wants a file, by its entry in the manifest


class DamagedError(Exception):
    """What is wrong with one checkpoint. The one before it may be whole."""


@dataclass(frozen=True)
class Progress:
    """How far the run is. Everything else that moves is a function of `samples_seen`."""

    samples_seen: int = 0
    step: int = 0


class FragmentReader:
    """Reads any slice of any parameter of a committed checkpoint, whatever layout wrote it.

    A file that is not `needed`, or was not fetched because nobody here needs it, is passed over; a gap shows when it is
    read.
    """

    def __init__(self, path: Path, needed: Needed = lambda entry: True) -> None:
        self._path = path
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        manifest = read_manifest(path)
        self.shapes = {name: tuple(shape) for name, shape in manifest["shapes"].items()}
        for entry in filter(needed, manifest["files"]):
            if (file := file_inside(path, entry["name"])).exists():
                self._add(_open_tensors(file))

    @property
    def kinds(self) -> set[str]:
        """Of what there are fragments: `master`, AdamW's moments, the averages."""
        return {kind for kind, _ in self._pieces}

    def read(self, kind: str, name: str, start: int, numel: int) -> torch.Tensor:
        """Elements [start, start + numel) of the flattened parameter, fp32 on CPU. Raises CheckpointError on a gap."""
        import torch

        value = torch.empty(numel)
        filled = 0
        for piece_start, piece_numel, handle, key in self._pieces.get((kind, name), []):
            low, high = max(start, piece_start), min(start + numel, piece_start + piece_numel)
            if low < high:
                value[low - start : high - start] = handle.get_slice(key)[low - piece_start : high - piece_start]
                filled += high - low
        if filled != numel:
            raise CheckpointError(
                f"{self._path} holds {filled} of {numel} values of {kind} {name}; it is of another model"
            )
        return value

    def full(self, kind: str, name: str) -> torch.Tensor:
        """A whole parameter in its own shape."""
        shape = self.shapes[name]
        return self.read(kind, name, 0, math.prod(shape)).view(shape)

    def _add(self, handle: Any) -> None:
        for key in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
            kind, name, start = key.split(":")
            numel = handle.get_slice(key).get_shape()[0]
            self._pieces.setdefault((kind, name), []).append((int(start), numel, handle, key))


def _open_tensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"{file} is no safetensors file ({error}); use an older checkpoint") from None


def readable(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def step_of(name: str) -> int:
    """The step in a checkpoint's name: `step-00001000`, in a bucket `step-00001000-<attempt>`."""
    return int(name.split("-")[1])


def committed(folder: Path) -> list[Path]:
    """Committed checkpoints, newest first. A directory without its marker does not exist."""
    return sorted((path for path in folder.glob("step-*") if (path / MARKER).is_file()), reverse=True)


def warn_of_damage(damaged: Iterable[tuple[str, str]], taken: object) -> None:
    for path, problem in damaged:
        print(f"warning: checkpoint {path} is damaged ({problem}); {taken} is used instead", file=sys.stderr)


def none_whole(where: object, damaged: list[tuple[str, str]]) -> CheckpointError:
    if not damaged:
        return CheckpointError(f"{where} holds no checkpoint; train first, or wait for the first save")
    return CheckpointError(
        f"none of the {len(damaged)} checkpoints in {where} is whole ({damaged[0][0]}: {damaged[0][1]}); restore one "
        f"from a backup, or remove the folder to train from the start"
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """What a committed checkpoint says of itself. Raises CheckpointError where that is missing, or of another form."""
    manifest = read_json(path / MANIFEST)
    if manifest.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{path} has schema {manifest.get('schema')!r}, this version of ecar_dist reads {SCHEMA!r}; "
            f"use the version that wrote it"
        )
    return manifest


def verify(path: Path) -> None:
    """Check every file of a checkpoint against its hash. Raises CheckpointError naming the first bad one."""
    problem = first_problem(path, 0, 1)
    if problem:
        raise CheckpointError(f"{path}: {problem}; use an older checkpoint")


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """The keys in which two identities differ."""
    return [key for key in [*expected, *(found.keys() - expected.keys())] if found.get(key) != expected.get(key)]


def check_identity(where: object, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another model or stage schedule. Raises CheckpointError."""
    for key in differences(found, expected):
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
    """What is wrong with this rank's share of a checkpoint's files, or None. Raises as `read_manifest`."""
    try:
        for entry in proven_manifest(path)["files"][rank::size]:
            if hash_file(sized_file(path, entry)) != entry["xxh3_128"]:
                return f"{entry['name']} does not have its recorded hash"
    except DamagedError as damage:
        return str(damage)
    except OSError as error:
        return f"{error.filename or path}: {error.strerror}"
    return None


def proven_manifest(path: Path) -> dict[str, Any]:
    """The manifest, equal to what was committed. Raises DamagedError where it is not, OSError where it is gone."""
    if marker_of((path / MANIFEST).read_bytes()) != (path / MARKER).read_bytes():
        raise DamagedError(f"{MANIFEST} does not match {MARKER}")
    return read_manifest(path)


def marker_of(manifest: bytes) -> bytes:
    """What COMMITTED holds."""
    return xxhash.xxh3_128_hexdigest(manifest).encode()


def sized_file(path: Path, entry: Mapping[str, Any]) -> Path:
    """A file of the manifest. Raises DamagedError where it was cut, OSError where it is missing."""
    file = file_inside(path, entry["name"])
    if file.stat().st_size != entry["bytes"]:
        raise DamagedError(f"{entry['name']} has {file.stat().st_size} bytes, expected {entry['bytes']}")
    return file
