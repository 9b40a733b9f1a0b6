"""The labelled images of one WebDataset tar, from `ecar-data shard` or another program, read once from start to end."""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import xxhash

from ecar_dist.data.images.formats import IMAGE_EXTENSIONS
from ecar_dist.data.images.table import MAX_IMAGE_BYTES, ImageRow
from ecar_dist.data.shards.tar_index import TarMember, split_name, tar_members
from ecar_dist.errors import ConfigError, DataError
from ecar_dist.storage import remote
from ecar_dist.storage.daemon_pool import DaemonPool
from ecar_dist.storage.redaction import redact
from ecar_dist.storage.retries import Transfer
from ecar_dist.storage.untrusted import parse_json

_CHUNK = 8 << 20
_AHEAD = 4  # chunks of a remote tar that are downloaded at once
_MAX_LABEL_BYTES = 1 << 20
_CAPTIONS = ("txt", "caption")  # extensions of captions, as img2dataset and others write them
MAX_CLASSES = 1_000_000


@dataclass(frozen=True)
class LabelRule:
    """Where the label of a sample is. It is a number, or a name if `class_names` is given."""

    kind: Literal["cls", "json", "none"]
    field: str = ""
    class_names: tuple[str, ...] | None = None

    @staticmethod
    def parse(text: str, class_names: tuple[str, ...] | None = None) -> LabelRule:
        """`cls`, `json:FIELD` or `none`. Raises ConfigError for anything else."""
        kind, _, name = text.partition(":")
        if kind == "json" and name:
            return LabelRule("json", name, class_names)
        if text == "cls":
            return LabelRule("cls", "", class_names)
        if text == "none":
            return LabelRule("none", "", class_names)
        if text in _CAPTIONS:
            raise ConfigError(
                f"--label {text}: captions are not supported, models learn class numbers; give none (all images are "
                "one class), cls or json:FIELD"
            )
        raise ConfigError(f"--label {text} is not known; give cls, json:FIELD or none")

    def read(self, payload: bytes | None) -> int:
        """The label of a payload. Raises ValueError if it is not a class."""
        if self.kind == "none":
            return 0
        value = self._value(payload or b"")
        if isinstance(value, str) and self.class_names and value in self.class_names:
            # A name wins over a number: a class may be called "7".
            return self.class_names.index(value)

        # JSON may have the label as a number or as text; other types, including true and false, are not labels.
        number = int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 10 else value
        limit = len(self.class_names) if self.class_names else MAX_CLASSES
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < limit:
            raise ValueError(f"label {value!r:.60} is not a number in 0..{limit - 1}")
        return number

    def _value(self, payload: bytes) -> object:
        if self.kind == "cls":
            return payload.decode("utf-8").strip()
        tree = parse_json(payload, foreign=True)
        if not isinstance(tree, dict) or self.field not in tree:
            raise ValueError(f"json has no field {self.field!r}")
        return tree[self.field]


@dataclass(frozen=True)
class IndexedTar:
    size: int
    xxh3_128: str
    sha256: str
    rows: list[ImageRow]
    members: list[TarMember]


def index_image_tar(
    location: str | Path, name: str, size: int, rule: LabelRule, *, foreign: bool, transfer: Transfer | None = None
) -> IndexedTar:
    """Read a tar of `size` bytes once. Raises DataError naming tar and member if it is damaged or ambiguous."""
    path = remote.join(location, name)
    transfer = transfer or Transfer()
    before = _version(path, transfer)
    stream = HashedStream(_chunks(path, size, transfer))
    members: list[TarMember] = []
    rows = list(_rows(stream, size, redact(path), rule, foreign, members))
    if stream.position != size or _version(path, transfer) != before:
        raise DataError(f"{redact(path)} changed while it was read; stop other writers and run the command again")
    return IndexedTar(size, stream.fast.hexdigest(), stream.strong.hexdigest(), rows, members)


class HashedStream:
    """A sequence of chunks as a file that can only be read forward. All bytes are hashed as they are read."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self.fast = xxhash.xxh3_128()
        self.strong = hashlib.sha256()
        self.position = 0
        self._chunks = iter(chunks)
        self._chunk = b""
        self._used = 0  # bytes of the current chunk

    def read(self, size: int, /) -> bytes:
        """Fewer than `size` bytes only at the end."""
        parts: list[bytes] = []
        while size > 0 and (part := self._take(size)):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def seek(self, offset: int, /) -> None:
        while self.position < offset and self._take(offset - self.position):
            pass

    def _take(self, size: int) -> bytes:
        """Up to `size` bytes of the current chunk, or of the next one; empty at the end."""
        if self._used == len(self._chunk):
            self._chunk = next(self._chunks, b"")
            self._used = 0
            self.fast.update(self._chunk)
            self.strong.update(self._chunk)
        part = self._chunk[self._used : self._used + size]
        self._used += len(part)
        self.position += len(part)
        return part


@dataclass
class _Sample:
    key: str
    image: tuple[TarMember, int] | None = None  # and its xxh3_64
    label: bytes | None = None
    extensions: list[str] = field(default_factory=list)


def _rows(
    stream: HashedStream, size: int, where: str, rule: LabelRule, foreign: bool, members: list[TarMember]
) -> Iterator[ImageRow]:
    """A row for each sample. Appends all members to `members`. Dotfiles and names without extension are skipped."""
    seen: set[str] = set()
    sample: _Sample | None = None
    reading = tar_members(stream, size, where, foreign=foreign)
    for member in reading:
        members.append(member)
        key, extension = split_name(member.name)
        if not key or key.endswith("/") or not extension:
            continue

        # The members of a sample are adjacent, so a different key ends the current sample.
        if sample is None or key != sample.key:
            if sample is not None:
                yield _row(sample, where, rule, itertools.chain([member], reading))
            if key in seen:
                raise DataError(
                    f"{where}: members of sample {key!r} are not adjacent, or the sample occurs twice; {_RENAME}"
                )
            seen.add(key)
            sample = _Sample(key)
        _add(sample, member, extension.lower(), stream, where, rule)
    if sample is not None:
        yield _row(sample, where, rule, ())


def _add(sample: _Sample, member: TarMember, extension: str, stream: HashedStream, where: str, rule: LabelRule) -> None:
    # One image and one label per sample, and no extension twice.
    is_label = extension == rule.kind
    if extension in sample.extensions or (extension in IMAGE_EXTENSIONS and sample.image is not None):
        raise DataError(f"{where}: sample {sample.key!r} has a second {extension} at {member.name!r}; {_RENAME}")
    sample.extensions.append(extension)
    if not is_label and extension not in IMAGE_EXTENSIONS:
        return

    # A member beyond the limit is refused before it is read.
    limit = _MAX_LABEL_BYTES if is_label else MAX_IMAGE_BYTES
    if member.size > limit:
        raise DataError(f"{where}: {member.name!r} has {member.size} bytes, the limit is {limit}; remove it")
    payload = stream.read(member.size)
    if is_label:
        sample.label = payload
    else:
        sample.image = member, xxhash.xxh3_64_intdigest(payload)


def _row(sample: _Sample, where: str, rule: LabelRule, rest: Iterable[TarMember]) -> ImageRow:
    """The row of a sample. `rest`: of the tar, searched only to explain why the sample is incomplete."""
    if sample.image is None or (sample.label is None and rule.kind != "none"):
        # The other members may come later in the tar, or the label may be a caption. Each has its own fix.
        needed = f"one image ({', '.join(IMAGE_EXTENSIONS)})" + ("" if rule.kind == "none" else f" and {rule.kind}")
        apart = next((member.name for member in rest if split_name(member.name)[0] == sample.key), None)
        if apart:
            raise DataError(
                f"{where}: the members of sample {sample.key!r} are not adjacent: {apart!r} comes after "
                "those of other samples; write the tar again, sorted by name"
            )
        captioned = sample.image is not None and any(part in _CAPTIONS for part in sample.extensions)
        fix = "captions are not supported: give --label none to make all images one class" if captioned else _CHOOSE
        raise DataError(
            f"{where}: sample {sample.key!r} has members {sorted(sample.extensions)}, needs {needed}; {fix}"
        )
    try:
        label = rule.read(sample.label)
    except ValueError as error:
        fix = (
            "repair it, give another --label, or list the class names in a file, one per line, and give --classes FILE"
        )
        raise DataError(f"{where}: sample {sample.key!r}: {error}; {fix}") from None
    member, digest = sample.image
    return ImageRow(sample.key, label, member.offset, member.size, digest)


def _chunks(path: str, size: int, transfer: Transfer) -> Iterator[bytes]:
    """The file from start to end. Chunks of a remote file are downloaded ahead."""
    if not remote.is_remote(path):
        try:
            with open(path, "rb", buffering=0) as file:
                while chunk := file.read(_CHUNK):
                    if transfer.stopping.is_set():
                        raise DataError(f"reading {path} was stopped; run the command again")
                    yield chunk
        except OSError as error:
            raise DataError(f"cannot read {path} ({error.strerror}); check the path") from None
        return

    # A queue of downloads in the order of the file, at most _AHEAD long.
    with DaemonPool(_AHEAD, "tar-chunk") as pool:
        waiting: deque[Future[bytes]] = deque()
        for start in range(0, size, _CHUNK):
            waiting.append(pool.submit(remote.read_range, path, start, min(start + _CHUNK, size), transfer))
            if len(waiting) == _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _version(path: str, transfer: Transfer) -> remote.ObjectVersion | None:
    """None for a local file, which stays open while it is read. A remote one could be replaced between two ranges."""
    return remote.stat(path, transfer) if remote.is_remote(path) else None


_CHOOSE = "repair it, or give another --label"
_RENAME = "give every sample a unique key and write the tar again"
