"""checkpoint.json, the manifest of a checkpoint: validated as a whole before any of it is used.

Writers and readers use the same `parse_manifest`. A writer calls it before the commit, so readers accept what was
committed.
Unknown keys are ignored, because a later version may add some. The schema changes when the meaning of a key changes.

Under ZeRO 3 every rank has a part of every parameter: millions of fragments on thousands of ranks. They follow a rule,
so the manifest contains only the number of each file's share. Each file's own header still lists its fragments, and
readers check it against the rule.

In a bucket, readers copy only what they need, so each file has hashes of its parts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from ecar_dist.storage.parts import table_bytes
from ecar_dist.storage.untrusted import (
    MAX_JSON_BYTES,
    Record,
    UntrustedError,
    parse_object,
    plain_name,
    printable,
    validate_record,
)

SCHEMA = "ecar-checkpoint-v2"  # files list their fragments
EVEN_SCHEMA = "ecar-checkpoint-v3"  # files have equal shares of every parameter
PARTS_SCHEMA = "ecar-checkpoint-v4"  # files of either kind have hashes of their parts
PARTS = "parts"  # the tensor of a file that contains the hashes of its parts
MAX_MANIFEST_BYTES = MAX_JSON_BYTES
VALUE_BYTES = 4  # of an fp32 value
MOMENTS_AND_MASTER = 3  # kinds of state besides the EMAs
_MAX_COUNT = 2**63 - 1
_MAX_VALUES = 2**43  # in all parameters together
_HEADER_BYTES = 200  # upper bound for one tensor in a file's header, without its name
_TYPICAL_HEADER = 100
_FEW_PARTS = 8  # a file with at most this many parts is copied completely
_FRAGMENT = re.compile(r"([A-Za-z0-9_.\-]{1,512}):(\d{1,19}):(\d{1,19})", re.ASCII)


class OtherSchemaError(UntrustedError):
    """The manifest was written by a different version of ecar_dist, which may be able to read it."""


class Piece(NamedTuple):
    """Elements [start, start + numel) of the flattened parameter `name`."""

    name: str
    start: int
    numel: int


Shapes = Mapping[str, Sequence[int]]  # of parameters, by name
Intervals = Mapping[str, Sequence[tuple[int, int]]]  # elements [start, stop) of flattened parameters, by name


def overlaps(piece: Piece, wanted: Intervals) -> Iterator[tuple[int, int]]:
    """The wanted elements [start, stop) of the parameter that are in this piece."""
    for start, stop in wanted.get(piece.name, ()):
        low, high = max(start, piece.start), min(stop, piece.start + piece.numel)
        if low < high:
            yield low, high


def even_pieces(shapes: Shapes, share: int, shares: int) -> Iterator[Piece]:
    """Part number `share` of every parameter, cut into `shares` parts of equal length; the last ones may be shorter."""
    for name, shape in shapes.items():
        numel = math.prod(shape)
        length = -(-numel // shares)
        start = share * length
        if start < numel:
            yield Piece(name, start, min(length, numel - start))


def _weights_name(name: str) -> str:
    if not plain_name(name).endswith(".safetensors"):
        raise UntrustedError(f"{name} is not named *.safetensors")
    return name


def _word(text: str) -> str:
    if printable(text) != text:
        raise UntrustedError("it has more than 300 characters, or some that are not printable")
    return text


Count = Annotated[int, Field(ge=0, le=_MAX_COUNT)]
Word = Annotated[str, AfterValidator(_word)]
Hash = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
EmaKind = Annotated[str, Field(pattern="^ema[0-9]{0,6}$")]
ParameterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]{1,512}$")]
Shape = Annotated[tuple[Annotated[int, Field(ge=1, le=_MAX_VALUES)], ...], Field(max_length=16)]


class WeightsFile(Record):
    """A file of tensors: a plain name, its size in bytes and its hash. Raises ValidationError for anything else."""

    model_config = ConfigDict(extra="ignore")

    name: Annotated[str, AfterValidator(_weights_name)]
    bytes: Count
    xxh3_128: Hash


class Parts(Record):
    """The size of a file's parts, and one hash of the file's header and of the table of part hashes."""

    model_config = ConfigDict(extra="ignore")

    bytes: Annotated[int, Field(ge=256, le=2**30)]
    xxh3_128: Hash


class RankFile(WeightsFile):
    """A rank's file. It contains one tensor for each fragment and kind of state.

    It lists its fragments as `parameter:start:numel`, or has `share`: (k, n) for part k of n of every parameter.
    """

    fragments: tuple[str, ...] | None = None
    share: tuple[Count, Annotated[int, Field(ge=1, le=2**20)]] | None = None
    parts: Parts | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> RankFile:
        if (self.fragments is None) == (self.share is None):
            raise UntrustedError(f"{self.name} must have either fragments or a share")
        return self

    @property
    def in_slices(self) -> bool:
        """Whether a reader of a bucket copies only the parts that it needs of this file."""
        return self.parts is not None and self.bytes > _FEW_PARTS * self.parts.bytes

    def pieces(self, shapes: Shapes) -> Iterator[Piece]:
        """The fragments. Raises UntrustedError for an invalid one."""
        if self.share is not None:
            yield from even_pieces(shapes, *self.share)
            return
        for text in self.fragments or ():
            match = _FRAGMENT.fullmatch(text)
            if match is None:
                raise UntrustedError(f"{self.name}: {printable(repr(text))} is not parameter:start:numel")
            name, start, numel = match.groups()
            yield Piece(name, int(start), int(numel))


def header_limit(pieces: Iterable[Piece], kinds: int) -> int:
    """The largest header, in bytes, of a file with these fragments and this number of kinds of state."""
    return 8 + _HEADER_BYTES + kinds * sum(len(piece.name) + _HEADER_BYTES for piece in pieces)


@dataclass(frozen=True)
class Progress:
    """How far a run has come. Everything else that changes during a run is a function of `samples_seen`."""

    samples_seen: Count
    step: Count


class _BadStepState(Record):
    """The state of train's rule for bad steps."""

    model_config = ConfigDict(extra="ignore")

    good_norms: list[Annotated[float, Field(ge=0)]] = Field(default_factory=list)
    in_a_row: Count = 0
    skipped: Count = 0
    windows: list[Annotated[list[Count], Field(min_length=2, max_length=2)]] = Field(default_factory=list)


class _GoodputState(Record):
    """The state of train's goodput counter."""

    model_config = ConfigDict(extra="ignore")

    kept_seconds: Annotated[float, Field(ge=0)] = 0.0


class _ClientState(Record):
    """The part of the client state that a resume uses."""

    model_config = ConfigDict(extra="ignore")

    bad_steps: _BadStepState | None = None
    goodput: _GoodputState | None = None


class Manifest(Record):
    """A consistent description of a checkpoint: its files contain every value of every parameter exactly once.

    The aliases are the keys in the file, which older and newer versions share.
    """

    model_config = ConfigDict(extra="ignore")

    schema_name: Literal["ecar-checkpoint-v2", "ecar-checkpoint-v3", "ecar-checkpoint-v4"] = Field(alias="schema")
    progress: Progress
    client_state: dict[str, Any] = Field(alias="notes")  # the training loop's, returned by a restore
    run: Word
    identity: dict[str, dict[str, Any]]
    ema_kinds: dict[EmaKind, Word] = Field(alias="averages")  # description by kind, see ema.ema_kinds
    ema_since: dict[EmaKind, Count] = Field(alias="averages_since")  # first step, see compare.ema_start_steps
    shapes: dict[ParameterName, Shape]
    world_size: Annotated[int, Field(ge=1, le=2**20)]
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    precision: Word
    files: Annotated[tuple[RankFile, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        # Keys that a resume reads without checking that they exist.
        if not {"model", "data"} <= self.identity.keys():
            raise UntrustedError("identity: model or data is missing")
        if "ema" not in self.ema_kinds or self.ema_kinds.keys() != self.ema_since.keys():
            raise UntrustedError("averages: ema is missing, or averages_since has other keys")
        _ClientState.model_validate(self.client_state)

        # The files must cover the parameters without a gap or an overlap.
        if len({file.name for file in self.files}) != len(self.files):
            raise UntrustedError("files: two have the same name")
        if not self.shapes or sum(map(math.prod, self.shapes.values())) > _MAX_VALUES:
            raise UntrustedError(f"shapes: no value, or more than {_MAX_VALUES:,}")
        if any(file.share is not None for file in self.files):
            self._check_shares()
        else:
            self._check_intervals()
        return self

    @property
    def most_kinds(self) -> int:
        """The number of kinds of state in a file of a full checkpoint: master weights, two AdamW moments, EMAs."""
        return MOMENTS_AND_MASTER + len(self.ema_kinds)

    def files_with(self, wanted: Intervals) -> list[RankFile]:
        """The files that contain any element of the intervals [start, stop) of parameters, given by name."""
        if self.files[0].share is None:
            return [file for file in self.files if self._has_any(file, wanted)]

        # Equal shares: the numbers of the files follow from the intervals.
        shares: set[int] = set()
        for name in wanted.keys() & self.shapes.keys():
            length = -(-math.prod(self.shapes[name]) // len(self.files))
            for start, stop in wanted[name]:
                shares.update(range(start // length, (stop - 1) // length + 1))
        return [file for file in self.files if file.share is not None and file.share[0] in shares]

    def copied(self, files: Sequence[RankFile], needed: int) -> int:
        """The approximate bytes that a reader of `needed` bytes copies of these files from a bucket.

        From a file in slices it copies header and table, and parts that are hardly larger than what it needs.
        """
        in_slices = [file for file in files if file.in_slices]
        whole = sum(file.bytes for file in files if not file.in_slices)
        if not in_slices:
            return whole

        # Files with equal shares have equal headers.
        alike = len(in_slices) if in_slices[0].share is not None else 1
        names = [piece.name for file in in_slices[::alike] for piece in file.pieces(self.shapes)]
        headers = alike * self.most_kinds * sum(len(name) + _TYPICAL_HEADER for name in names)
        tables = sum(table_bytes(file.bytes, file.parts.bytes) for file in in_slices if file.parts)
        return whole + headers + tables + needed

    def _has_any(self, file: RankFile, wanted: Intervals) -> bool:
        return any(True for piece in file.pieces(self.shapes) for _ in overlaps(piece, wanted))

    def _check_shares(self) -> None:
        """Check that the files have every share exactly once. Together the shares contain every value."""
        ranks = len(self.files)
        if {file.share for file in self.files} != {(rank, ranks) for rank in range(ranks)}:
            raise UntrustedError(f"files: they must have each of the shares 0 to {ranks - 1} of {ranks} exactly once")

        # No share is larger than the first, so one limit serves all files.
        self._check_bytes(self.files, list(even_pieces(self.shapes, 0, ranks)))

    def _check_intervals(self) -> None:
        """Check that every value is in exactly one fragment."""
        # Collect the intervals of each parameter.
        intervals: dict[str, list[tuple[int, int]]] = {name: [] for name in self.shapes}
        for file in self.files:
            pieces = list(file.pieces(self.shapes))
            for name, start, numel in pieces:
                if name not in intervals:
                    raise UntrustedError(f"{file.name} has {name}, which has no shape")
                intervals[name].append((start, numel))
            self._check_bytes([file], pieces)

        # In order, the intervals of a parameter must join without a gap or an overlap.
        for name, found in intervals.items():
            end = 0
            for start, numel in sorted(found):
                if start != end or numel < 1:
                    fault = "overlap" if start < end else "leave a gap"
                    raise UntrustedError(f"the fragments of {name} {fault} at element {end}")
                end += numel
            if end != math.prod(self.shapes[name]):
                raise UntrustedError(f"the fragments of {name} have {end} of {math.prod(self.shapes[name])} values")

    def _check_bytes(self, files: Iterable[RankFile], pieces: Sequence[Piece]) -> None:
        """Check that no file is larger than its fragments, because files are read completely."""
        values = sum(piece.numel for piece in pieces)
        state = self.most_kinds * values * VALUE_BYTES
        for file in files:
            table = table_bytes(state, file.parts.bytes) if file.parts else 0
            most = state + table + header_limit(pieces, self.most_kinds)
            if file.bytes > most:
                raise UntrustedError(f"{file.name} has {file.bytes:,} bytes, its fragments take at most {most:,}")


def flat_identity(identity: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's identity with its groups "model" and "data" flattened."""
    flat: dict[str, Any] = {}
    for name, value in identity.items():
        flat.update(value if name in ("model", "data") and isinstance(value, dict) else {name: value})
    return flat


def parse_manifest(text: bytes) -> Manifest:
    """Parse the content of checkpoint.json, at most MAX_MANIFEST_BYTES.

    Raises UntrustedError, and OtherSchemaError for a manifest of a different version.
    """
    if len(text) > MAX_MANIFEST_BYTES:
        raise UntrustedError(f"it has {len(text):,} bytes, this version reads at most {MAX_MANIFEST_BYTES:,}")

    # Check the version first: in another version, the other keys may have a different meaning.
    tree = parse_object(text)
    if tree.get("schema") not in (SCHEMA, EVEN_SCHEMA, PARTS_SCHEMA):
        raise OtherSchemaError(
            f"it has schema {printable(repr(tree.get('schema')))}, this version of ecar_dist reads {SCHEMA!r}, "
            f"{EVEN_SCHEMA!r} and {PARTS_SCHEMA!r}; use the version that wrote it"
        )
    return validate_record(text, Manifest)
