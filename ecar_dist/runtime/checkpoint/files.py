"""The files of a checkpoint: where they lie, what they are called, and whether one is whole.

    checkpoints/step-00001000/state-00000-of-00002.safetensors   one per rank: its fragments
                              checkpoint.json                    progress, notes, identity, hash of every file
                              COMMITTED                          hash of checkpoint.json, written last

A rank's file holds fp32 tensors keyed `kind:parameter:start`, for every fragment it owns one of each kind: the master
weight, AdamW's two moments, the averages. Only safetensors and JSON are read: nothing in a checkpoint is ever executed.
"""

from __future__ import annotations

import errno
import re
import stat
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from safetensors import SafetensorError, safe_open

from ecar_dist.errors import CheckpointError
from ecar_dist.runtime.checkpoint.manifest import (
    MAX_MANIFEST_BYTES,
    Manifest,
    OtherSchemaError,
    RankFile,
    WeightsFile,
    parse_manifest,
)
from ecar_dist.storage.untrusted import UntrustedError, parse_json, path_inside, plain_name, printable, read_plain_file

MANIFEST, MARKER = "checkpoint.json", "COMMITTED"
MARKER_BYTES = 32  # a hash in hexadecimal
_STEP = re.compile(r"step-(\d{8,18})", re.ASCII)
_STEP_AND_ATTEMPT = re.compile(r"step-(\d{8,18})-[0-9a-f]{8}_\d{4,9}", re.ASCII)
_UNFINISHED = re.compile(r"tmp-step-\d{8,18}-\w+(-old)?", re.ASCII)

Needed = Callable[[RankFile], bool]  # whether a reader wants a file


class DamagedError(CheckpointError):
    """One checkpoint is not whole; `problem` says why in a phrase. The one before it may be whole."""

    def __init__(self, where: object, problem: str) -> None:
        super().__init__(f"{where}: {problem}; use an older checkpoint, or a backup")
        self.problem = problem


class UnreadableError(DamagedError):
    """A checkpoint that cannot be read now, or not by this version, and may be another time: it is never removed."""


_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


def refused_file(path: Path, name: str, error: OSError) -> DamagedError:
    """What follows for the checkpoint where the system does not give one of its files.

    A file that is gone is damage. Anything else (EIO, ESTALE, EACCES of a network drive) may pass.
    """
    kind = DamagedError if error.errno in _GONE else UnreadableError
    return kind(path, f"{name}: {error.strerror}")


@dataclass(frozen=True)
class Progress:
    """How far the run is. Everything else that moves is a function of `samples_seen`."""

    samples_seen: int = 0
    step: int = 0


def readable(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def is_checkpoint_name(name: str, *, attempt: bool = False) -> bool:
    """Whether a folder may be one of ours: `step-00001000`, in a bucket (`attempt`) `step-00001000-0123abcd_0001`."""
    match = (_STEP_AND_ATTEMPT if attempt else _STEP).fullmatch(name)
    return match is not None and f"{int(match[1]):08d}" == match[1]


def is_unfinished_name(name: str) -> bool:
    """Whether a folder is one in which we put a checkpoint together."""
    return _UNFINISHED.fullmatch(name) is not None


def step_of(name: str) -> int:
    """The step in a checkpoint's name."""
    return int(name.split("-")[1])


def committed(folder: Path) -> list[Path]:
    """Committed checkpoints, newest first. A directory without its marker does not exist, nor one of another name."""
    found = [path for path in folder.glob("step-*") if is_checkpoint_name(path.name) and has_marker(path)]
    return sorted(found, key=lambda path: step_of(path.name), reverse=True)


def has_marker(path: Path) -> bool:
    """Whether anything is in the marker's place; whether it is the marker shows when it is read."""
    try:
        (path / MARKER).lstat()
    except OSError as error:
        return error.errno not in _GONE  # else nobody knows, and nothing is removed that may be whole
    return True


class PassedOver(NamedTuple):
    """A checkpoint that is not used, and why; `unreadable` where it may be whole all the same."""

    path: str
    problem: str
    unreadable: bool


def warn_of_damage(passed_over: Iterable[PassedOver], taken: object) -> None:
    """A line on stderr for each checkpoint that is newer than the one that was taken."""
    for path, problem, unreadable in passed_over:
        fault = "cannot be read now, or not by this version" if unreadable else "is damaged"
        line = f"warning: checkpoint {path} {fault} ({problem}); {taken} is used instead"
        print(line + ("; stop now if its progress is to be kept" if unreadable else ""), file=sys.stderr)


def none_whole(where: object, passed_over: list[PassedOver]) -> CheckpointError:
    if not passed_over:
        return CheckpointError(f"{where} holds no checkpoint; train first, or wait for the first save")
    return CheckpointError(
        f"none of the {len(passed_over)} checkpoints in {where} is whole ({passed_over[0].path}: "
        f"{passed_over[0].problem}); restore one from a backup, or remove the folder to train from the start"
    )


def read_manifest(path: Path, name: str | None = None) -> Manifest:
    """What a checkpoint says of itself. `name`: what it is called, where that is not the folder's name.

    Raises DamagedError where it is missing, not ours, or of another step than the name says, and UnreadableError where
    it is of another version.
    """
    return _parsed(path, _content(path, MANIFEST, MAX_MANIFEST_BYTES), name or path.name)


def manifest_as_it_is(path: Path) -> Any:
    """The JSON value of a manifest, with what this version does not know. Raises DamagedError where it is not JSON."""
    try:
        return parse_json(_content(path, MANIFEST, MAX_MANIFEST_BYTES))
    except UntrustedError as error:
        raise DamagedError(path, f"{MANIFEST}: {error}") from None


def proven_manifest(path: Path, name: str | None = None) -> Manifest:
    """The manifest, equal to what was committed. Raises as `read_manifest`, and DamagedError where it is not."""
    text = _content(path, MANIFEST, MAX_MANIFEST_BYTES)
    if marker_of(text) != _content(path, MARKER, MARKER_BYTES):
        raise DamagedError(path, f"{MANIFEST} does not match {MARKER}")
    return _parsed(path, text, name or path.name)


def check_committable(manifest: bytes, name: str) -> Manifest:
    """What is about to be committed as `name`. Raises CheckpointError where no reader would take it."""
    try:
        if len(manifest) > MAX_MANIFEST_BYTES:
            raise UntrustedError(
                f"it has {len(manifest):,} bytes, and readers take {MAX_MANIFEST_BYTES:,}: every rank holds a piece of "
                f"every parameter; use fewer ranks, or deepspeed.zero_stage 1 or 2"
            )
        record = parse_manifest(manifest)
    except UntrustedError as error:
        raise CheckpointError(f"{MANIFEST} could not be read back: {error}") from None
    if record.progress.step != step_of(name):
        raise CheckpointError(f"{MANIFEST} of {name} could not be read back: it is of step {record.progress.step}")
    return record


def marker_of(manifest: bytes) -> bytes:
    """What COMMITTED holds."""
    return xxhash.xxh3_128_hexdigest(manifest).encode()


def verify(path: Path, rank: int = 0, size: int = 1) -> None:
    """Prove a checkpoint: its manifest, and of its files every `size`-th, from number `rank` on, by its hash.

    Raises DamagedError naming the first bad one, and UnreadableError.
    """
    manifest = proven_manifest(path)
    kinds: set[str] = set()
    for file in manifest.files[rank::size]:
        # its header first: to be hashed all of it is read, whatever its size
        _, kinds = open_fragments(path, manifest, file, "np", kinds)
        try:
            digest = hash_file(sized_file(path, file))
        except OSError as error:
            raise refused_file(path, file.name, error) from None
        if digest != file.xxh3_128:
            raise DamagedError(path, f"{file.name} does not have its recorded hash")


def sized_file(path: Path, file: WeightsFile) -> Path:
    """A regular file in the folder, of the recorded size. Raises DamagedError."""
    try:
        found = path_inside(path, plain_name(file.name))
        status = found.stat()
    except UntrustedError as error:
        raise DamagedError(path, str(error)) from None
    except OSError as error:
        raise refused_file(path, file.name, error) from None
    if not stat.S_ISREG(status.st_mode):
        raise DamagedError(path, f"{file.name} is not a regular file")
    if status.st_size != file.bytes:
        raise DamagedError(path, f"{file.name} has {status.st_size} bytes, expected {file.bytes}")
    return found


def open_fragments(
    path: Path, manifest: Manifest, file: RankFile, framework: str, expected: Collection[str] = ()
) -> tuple[Any, set[str]]:
    """A rank's file, opened, and its kinds of state: it holds one fp32 tensor for each kind and fragment, no others.

    `framework`: what its tensors will be, `pt` or `np`. `expected`: the kinds that other files hold, where that is
    known. Raises DamagedError.
    """
    try:
        handle = open_tensors(sized_file(path, file), framework, file.header_limit(manifest.most_kinds))
    except UntrustedError as error:
        raise DamagedError(path, f"{file.name} {error}") from None
    keys = set(handle.keys())
    kinds = {key.partition(":")[0] for key in keys}
    if expected and kinds != expected:
        said = printable(f"{sorted(kinds)}, others hold {sorted(expected)}")
        raise DamagedError(path, f"{file.name} holds {said}")
    for piece in file.pieces():
        for kind in kinds:
            key = f"{kind}:{piece.name}:{piece.start}"
            if key not in keys:
                raise DamagedError(path, f"{file.name} lacks {printable(key)}")
            found = handle.get_slice(key)
            if (found.get_dtype(), found.get_shape()) != ("F32", [piece.numel]):
                said = f"{found.get_dtype()} {found.get_shape()}, expected F32 [{piece.numel}]"
                raise DamagedError(path, f"{printable(key)} of {file.name} is {said}")
    if len(keys) != len(kinds) * len(file.fragments):
        raise DamagedError(path, f"{file.name} holds tensors that {MANIFEST} does not name")
    return handle, kinds


def open_tensors(file: Path, framework: str, header_limit: int) -> Any:
    """A safetensors file whose header is not above the limit. Raises UntrustedError, a phrase to go after its name."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
        if length > header_limit:
            raise UntrustedError(f"is not a safetensors file (a header of {length:,} bytes, above {header_limit:,})")
        return safe_open(file, framework=framework)
    except SafetensorError as error:
        raise UntrustedError(f"is not a safetensors file ({printable(str(error))})") from None
    except OSError as error:
        raise UntrustedError(f"cannot be read: {error.strerror}") from None


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """The keys in which two identities differ."""
    return [key for key in [*expected, *(found.keys() - expected.keys())] if found.get(key) != expected.get(key)]


def check_identity(where: object, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another model or stage schedule. Raises CheckpointError."""
    for key in differences(found, expected):
        raise CheckpointError(
            f"{where} was made with {printable(f'{key}={found.get(key)}')}, this run has "
            f"{printable(f'{key}={expected.get(key)}')}; set it back, or choose another run.name to train anew"
        )


def hash_file(path: Path) -> str:
    """xxh3_128 of a file, in hexadecimal."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def _content(path: Path, name: str, limit: int) -> bytes:
    """Of COMMITTED or checkpoint.json; its size is looked at before it is read."""
    try:
        file = path_inside(path, name)
        status = file.lstat()
        if name == MANIFEST and stat.S_ISREG(status.st_mode) and status.st_size > limit:
            raise UnreadableError(path, f"{name} has {status.st_size:,} bytes, this version reads {limit:,}")
        return read_plain_file(file, limit)
    except UntrustedError as error:
        raise DamagedError(path, f"{name}: {error}") from None
    except OSError as error:
        raise refused_file(path, name, error) from None


def _parsed(path: Path, text: bytes, name: str) -> Manifest:
    try:
        manifest = parse_manifest(text)
    except OtherSchemaError as error:
        raise UnreadableError(path, str(error)) from None
    except UntrustedError as error:
        raise DamagedError(path, f"{MANIFEST}: {error}") from None
    ours = is_checkpoint_name(name) or is_checkpoint_name(name, attempt=True)
    if ours and manifest.progress.step != step_of(name):
        raise DamagedError(path, f"its name is of step {step_of(name)}, {MANIFEST} of step {manifest.progress.step}")
    return manifest
