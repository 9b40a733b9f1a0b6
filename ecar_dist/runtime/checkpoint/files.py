"""The files of a checkpoint: their names, and the proof that a checkpoint is complete.

    checkpoints/step-00001000/state-00000-of-00002.safetensors   one per rank: its fragments
                              checkpoint.json                    the manifest: progress, client state, identity, hashes
                              COMMITTED                          hash of checkpoint.json, written last

A rank's file contains fp32 tensors with keys `kind:parameter:start`: one for each fragment and kind of state. The kinds
are the master weights, the two AdamW moments, and the EMAs. Only safetensors and JSON are read, so nothing in a
checkpoint is ever executed.
"""

from __future__ import annotations

import errno
import re
import stat
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError, safe_open

from ecar_dist.errors import CheckpointError, reason_of
from ecar_dist.runtime.checkpoint.manifest import (
    MAX_MANIFEST_BYTES,
    PARTS,
    Manifest,
    OtherSchemaError,
    RankFile,
    WeightsFile,
    header_limit,
    parse_manifest,
)
from ecar_dist.storage.hashing import hash_file
from ecar_dist.storage.untrusted import UntrustedError, parse_json, path_inside, plain_name, printable, read_plain_file

MANIFEST, MARKER = "checkpoint.json", "COMMITTED"
MARKER_BYTES = 32  # a hash in hexadecimal

# Names: the folder of a step, a prefix in a bucket (with the attempt that wrote it), and a folder not yet committed.
_STEP = re.compile(r"step-(\d{8,18})", re.ASCII)
_STEP_AND_ATTEMPT = re.compile(r"step-(\d{8,18})-[0-9a-f]{8}_\d{4,9}", re.ASCII)
_UNFINISHED = re.compile(r"tmp-step-\d{8,18}-\w+(-old)?", re.ASCII)

# Errors that mean that a file does not exist.
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)

Needed = Callable[[Manifest], Sequence[RankFile]]  # the files that a reader needs


def all_files(manifest: Manifest) -> Sequence[RankFile]:
    """The `Needed` function of a reader that needs all files."""
    return manifest.files


class DamagedError(CheckpointError):
    """One checkpoint is damaged; an older one may be intact. `problem` is a phrase."""

    def __init__(self, where: object, problem: str) -> None:
        super().__init__(f"{where}: {problem}; use an older checkpoint, or a backup")
        self.problem = problem


class UnreadableError(DamagedError):
    """A checkpoint that may be complete, but cannot be read now, or not by this version. It is never removed."""


def refused_file(path: Path, name: str, error: OSError) -> DamagedError:
    """The error for a checkpoint file that the system cannot open.

    A missing file is damage. Any other error may be temporary (EIO, ESTALE, EACCES of a network drive).
    """
    kind = DamagedError if error.errno in _GONE else UnreadableError
    return kind(path, f"{name}: {reason_of(error)}")


def readable(size: int) -> str:
    """A number of bytes as text."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


# Names of checkpoints


def is_checkpoint_name(name: str, *, attempt: bool = False) -> bool:
    """Whether a name is one of our checkpoint names: `step-00001000`; in a bucket, `step-00001000-0123abcd_0001`."""
    # Eight digits with leading zeros, or more digits without: each step has exactly one name.
    match = (_STEP_AND_ATTEMPT if attempt else _STEP).fullmatch(name)
    return match is not None and f"{int(match[1]):08d}" == match[1]


def is_unfinished_name(name: str) -> bool:
    """Whether a name is one of our names for a checkpoint that is not committed yet."""
    return _UNFINISHED.fullmatch(name) is not None


def step_of(name: str) -> int:
    """The step in a checkpoint's name."""
    return int(name.split("-")[1])


def committed(folder: Path) -> list[Path]:
    """The committed checkpoints in a folder, newest first: those with our name and a marker."""
    # By number, because names with more than eight digits do not sort as text.
    found = [path for path in folder.glob("step-*") if is_checkpoint_name(path.name) and has_marker(path)]
    return sorted(found, key=lambda path: step_of(path.name), reverse=True)


def has_marker(path: Path) -> bool:
    """Whether anything exists under the marker's name. Its content is checked when it is read."""
    try:
        (path / MARKER).lstat()
    except OSError as error:
        # If the marker cannot be checked now, assume that it exists: nothing that may be complete is removed.
        return error.errno not in _GONE
    return True


# Manifest and marker


def read_manifest(path: Path, name: str | None = None) -> Manifest:
    """The manifest of a checkpoint. name: the checkpoint's name, if the folder's name differs.

    Raises DamagedError if it is missing, invalid, or for a different step than the name says, and UnreadableError if a
    different version wrote it.
    """
    return _parse(path, _read(path, MANIFEST, MAX_MANIFEST_BYTES), name or path.name)


def proven_manifest(path: Path, name: str | None = None) -> Manifest:
    """The manifest, verified by the marker. Raises like `read_manifest`, and DamagedError if they do not match."""
    # The marker contains the hash of the manifest, which contains the hashes of all files.
    content = _read(path, MANIFEST, MAX_MANIFEST_BYTES)
    if marker_of(content) != _read(path, MARKER, MARKER_BYTES):
        raise DamagedError(path, f"{MANIFEST} does not match {MARKER}")
    return _parse(path, content, name or path.name)


def manifest_as_it_is(path: Path) -> Any:
    """The manifest's JSON value, including keys unknown to this version. Raises DamagedError if it is not JSON."""
    try:
        return parse_json(_read(path, MANIFEST, MAX_MANIFEST_BYTES))
    except UntrustedError as error:
        raise DamagedError(path, f"{MANIFEST}: {error}") from None


def check_committable(manifest: bytes, name: str) -> Manifest:
    """Parse a manifest before it is committed as `name`. Raises CheckpointError if no reader would accept it."""
    # Make the same checks as a reader.
    try:
        if len(manifest) > MAX_MANIFEST_BYTES:
            raise UntrustedError(
                f"it has {len(manifest):,} bytes, readers accept {MAX_MANIFEST_BYTES:,}; use fewer ranks, or another "
                f"deepspeed.zero_stage"
            )
        record = parse_manifest(manifest)
    except UntrustedError as error:
        raise CheckpointError(f"{MANIFEST} could not be read back: {error}") from None
    if record.progress.step != step_of(name):
        raise CheckpointError(f"{MANIFEST} of {name} could not be read back: it has step {record.progress.step}")
    return record


def marker_of(manifest: bytes) -> bytes:
    """The content of COMMITTED."""
    return xxhash.xxh3_128_hexdigest(manifest).encode()


def _read(path: Path, name: str, limit: int) -> bytes:
    """The content of COMMITTED or checkpoint.json. Larger files are not read."""
    try:
        file = path_inside(path, name)
        status = file.lstat()

        # A newer version may write larger manifests.
        if name == MANIFEST and stat.S_ISREG(status.st_mode) and status.st_size > limit:
            raise UnreadableError(path, f"{name} has {status.st_size:,} bytes, this version reads at most {limit:,}")
        return read_plain_file(file, limit)
    except UntrustedError as error:
        raise DamagedError(path, f"{name}: {error}") from None
    except OSError as error:
        raise refused_file(path, name, error) from None


def _parse(path: Path, content: bytes, name: str) -> Manifest:
    try:
        manifest = parse_manifest(content)
    except OtherSchemaError as error:
        raise UnreadableError(path, str(error)) from None
    except UntrustedError as error:
        raise DamagedError(path, f"{MANIFEST}: {error}") from None

    # A copy under the name of a different step would count as the newest, or would hide the real checkpoint.
    ours = is_checkpoint_name(name) or is_checkpoint_name(name, attempt=True)
    if ours and manifest.progress.step != step_of(name):
        raise DamagedError(path, f"its name says step {step_of(name)}, {MANIFEST} says step {manifest.progress.step}")
    return manifest


# Files of tensors


def verify(path: Path, rank: int = 0, size: int = 1) -> None:
    """Verify a checkpoint: its manifest, and the hash of every `size`-th file, starting at number `rank`.

    Raises DamagedError with the name of the first bad file, and UnreadableError.
    """
    manifest = proven_manifest(path)
    kinds: set[str] = set()
    for file in manifest.files[rank::size]:
        # Check the header first: it is small, and the hash needs the complete file.
        _, kinds = open_fragments(path, manifest, file, "np", kinds)
        try:
            found = hash_file(sized_file(path, file))
        except OSError as error:
            raise refused_file(path, file.name, error) from None
        if found != file.xxh3_128:
            raise DamagedError(path, f"{file.name} has xxh3_128 {found}, the manifest says {file.xxh3_128}")


def sized_file(path: Path, file: WeightsFile) -> Path:
    """The path of a file of the checkpoint. Raises DamagedError if it is not a regular file of the recorded size."""
    # The name comes from the manifest: it must not lead out of the folder, not even through a link.
    try:
        found = path_inside(path, plain_name(file.name))
        status = found.stat()
    except UntrustedError as error:
        raise DamagedError(path, str(error)) from None
    except OSError as error:
        raise refused_file(path, file.name, error) from None

    # A pipe would block the reader, and a file of a different size cannot have the recorded hash.
    if not stat.S_ISREG(status.st_mode):
        raise DamagedError(path, f"{file.name} is not a regular file")
    if status.st_size != file.bytes:
        raise DamagedError(path, f"{file.name} has {status.st_size} bytes, expected {file.bytes}")
    return found


def open_fragments(
    path: Path, manifest: Manifest, file: RankFile, framework: str, expected: Collection[str] = ()
) -> tuple[Any, set[str]]:
    """Open a rank's file. It must have one fp32 tensor for each kind of state and fragment, and no others.

    framework: the library of the tensors, `pt` or `np`. expected: the kinds in other files of the checkpoint, if known.

    Returns the safetensors handle and the kinds in the file. Raises DamagedError.
    """
    pieces = list(file.pieces(manifest.shapes))
    try:
        limit = header_limit(pieces, manifest.most_kinds)
        handle = open_tensors(sized_file(path, file), framework, limit)
    except UntrustedError as error:
        raise DamagedError(path, f"{file.name} {error}") from None

    # All files of a checkpoint have the same kinds of state. A rank has no fragments if there are more ranks than
    # tensors (ZeRO 0) or values.
    keys = set(handle.keys())
    if file.parts is not None:
        keys.discard(PARTS)  # the hashes of the parts
    kinds = {key.partition(":")[0] for key in keys}
    if not pieces and not keys:
        return handle, set(expected)
    if expected and kinds != expected:
        text = printable(f"{sorted(kinds)}, others have {sorted(expected)}")
        raise DamagedError(path, f"{file.name} has {text}")

    # Every fragment of the manifest must be in the file, in every kind.
    for piece in pieces:
        for kind in kinds:
            key = f"{kind}:{piece.name}:{piece.start}"
            if key not in keys:
                raise DamagedError(path, f"{file.name} lacks {printable(key)}")
            found = handle.get_slice(key)
            if (found.get_dtype(), found.get_shape()) != ("F32", [piece.numel]):
                text = f"{found.get_dtype()} {found.get_shape()}, expected F32 [{piece.numel}]"
                raise DamagedError(path, f"{printable(key)} of {file.name} is {text}")
    if len(keys) != len(kinds) * len(pieces):
        raise DamagedError(path, f"{file.name} has tensors that are not in {MANIFEST}")
    return handle, kinds


def open_tensors(file: Path, framework: str, header_limit: int) -> Any:
    """Open a safetensors file with a header of limited size. Raises UntrustedError with a phrase to follow its name."""
    try:
        # The library reads the complete header, whatever its size.
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
        if length > header_limit:
            raise UntrustedError(
                f"is not a safetensors file (a header of {length:,} bytes, expected at most {header_limit:,})"
            )
        return safe_open(file, framework=framework)
    except SafetensorError as error:
        raise UntrustedError(f"is not a safetensors file ({printable(str(error))})") from None
    except OSError as error:
        raise UntrustedError(f"cannot be read: {reason_of(error)}") from None
