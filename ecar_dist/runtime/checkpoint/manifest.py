"""checkpoint.json: what a checkpoint says of itself, checked as a whole before any of it is used.

The writer checks the bytes that it is about to commit by `parse_manifest`, and every reader those that it finds: what
the one commits, the other takes. Keys that this version does not know are ignored: a later one may add facts of its
own, and changes SCHEMA where what is here changes its meaning.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from ecar_dist.storage.untrusted import (
    MAX_JSON_BYTES,
    Record,
    UntrustedError,
    parse_object,
    plain_name,
    printable,
    validate_record,
)

SCHEMA = "ecar-checkpoint-v2"
MAX_MANIFEST_BYTES = MAX_JSON_BYTES
VALUE_BYTES = 4  # of an fp32 value
MOMENTS_AND_MASTER = 3  # kinds of state besides the averages
_LARGEST = 2**63 - 1  # of any count
_MAX_VALUES = 2**43  # of all parameters together
_HEADER_BYTES = 200  # of a tensor in a file's header, besides its name
_FRAGMENT = re.compile(r"([A-Za-z0-9_.\-]{1,512}):(\d{1,19}):(\d{1,19})", re.ASCII)


class OtherSchemaError(UntrustedError):
    """The manifest is of another version of ecar_dist, for which it may be whole."""


class Piece(NamedTuple):
    """Elements [start, start + numel) of the flattened parameter `name`."""

    name: str
    start: int
    numel: int


def _weights_name(name: str) -> str:
    if not plain_name(name).endswith(".safetensors"):
        raise UntrustedError(f"{name} is not named *.safetensors")
    return name


def _word(text: str) -> str:
    if printable(text) != text:
        raise UntrustedError("it is longer than 300 characters, or has some that are not printable")
    return text


Count = Annotated[int, Field(ge=0, le=_LARGEST)]
Word = Annotated[str, AfterValidator(_word)]
Hash = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
AverageName = Annotated[str, Field(pattern="^ema[0-9]{0,6}$")]
ParameterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]{1,512}$")]
Shape = Annotated[tuple[Annotated[int, Field(ge=1, le=_MAX_VALUES)], ...], Field(max_length=16)]


class WeightsFile(Record):
    """A file of tensors: a plain name, its size in bytes and its hash. Raises ValidationError for anything else."""

    model_config = ConfigDict(extra="ignore")

    name: Annotated[str, AfterValidator(_weights_name)]
    bytes: Count
    xxh3_128: Hash


class RankFile(WeightsFile):
    """A rank's file: for each fragment, `parameter:start:numel`, it holds one tensor of every kind of state."""

    fragments: tuple[str, ...]

    def pieces(self) -> Iterator[Piece]:
        """The fragments. Raises UntrustedError for one of another form."""
        for text in self.fragments:
            match = _FRAGMENT.fullmatch(text)
            if match is None:
                raise UntrustedError(f"{self.name}: {printable(repr(text))} is not parameter:start:numel")
            name, start, numel = match.groups()
            yield Piece(name, int(start), int(numel))

    def header_limit(self, kinds: int) -> int:
        """Bytes that the header of such a file with so many kinds of state has at most."""
        return 8 + kinds * (sum(map(len, self.fragments)) + len(self.fragments) * _HEADER_BYTES) + _HEADER_BYTES


class Reached(Record):
    """How far the run was: both counts from its start."""

    model_config = ConfigDict(extra="ignore")

    samples_seen: Count
    step: Count


class _BadStepNotes(Record):
    """As train.bad_steps makes them."""

    model_config = ConfigDict(extra="ignore")

    good_norms: list[Annotated[float, Field(ge=0)]] = Field(default_factory=list)
    in_a_row: Count = 0
    skipped: Count = 0
    windows: list[Annotated[list[Count], Field(min_length=2, max_length=2)]] = Field(default_factory=list)


class _GoodputNotes(Record):
    """As train.goodput makes them."""

    model_config = ConfigDict(extra="ignore")

    kept_seconds: Annotated[float, Field(ge=0)] = 0.0


class _Notes(Record):
    """What a run that resumes takes from the notes."""

    model_config = ConfigDict(extra="ignore")

    bad_steps: _BadStepNotes | None = None
    goodput: _GoodputNotes | None = None


class Manifest(Record):
    """A checkpoint's description, whole and consistent: `files` hold every value of every parameter exactly once.

    `averages`: what each average is, by its kind; `averages_since`: the step that it goes back to. `notes` belong to
    the caller of the store: those of train are checked, and of all size and depth are bounded.
    """

    model_config = ConfigDict(extra="ignore")

    schema_name: Literal["ecar-checkpoint-v2"] = Field(alias="schema")
    progress: Reached
    notes: dict[str, Any]
    run: Word
    identity: dict[str, dict[str, Any]]
    averages: dict[AverageName, Word]
    averages_since: dict[AverageName, Count]
    shapes: dict[ParameterName, Shape]
    world_size: Annotated[int, Field(ge=1, le=2**20)]
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    precision: Word
    files: Annotated[tuple[RankFile, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if not {"model", "data"} <= self.identity.keys():
            raise UntrustedError("identity: it lacks model or data")
        if "ema" not in self.averages or self.averages.keys() != self.averages_since.keys():
            raise UntrustedError("averages: they lack ema, or averages_since names others")
        _Notes.model_validate(self.notes)
        if len({file.name for file in self.files}) != len(self.files):
            raise UntrustedError("files: a name is there twice")
        if not self.shapes or sum(map(math.prod, self.shapes.values())) > _MAX_VALUES:
            raise UntrustedError(f"shapes: they have no value, or more than {_MAX_VALUES:,}")
        self._check_intervals()
        return self

    @property
    def most_kinds(self) -> int:
        """Of state, in each file: the master weights, AdamW's two moments, the averages."""
        return MOMENTS_AND_MASTER + len(self.averages)

    def _check_intervals(self) -> None:
        """Every value is in one fragment, and no file is larger than its fragments can be: it will be read whole."""
        held: dict[str, list[tuple[int, int]]] = {name: [] for name in self.shapes}
        for file in self.files:
            values = 0
            for name, start, numel in file.pieces():
                if name not in held:
                    raise UntrustedError(f"{file.name} holds {name}, which has no shape")
                held[name].append((start, numel))
                values += numel
            most = self.most_kinds * values * VALUE_BYTES + file.header_limit(self.most_kinds)
            if file.bytes > most:
                raise UntrustedError(f"{file.name} has {file.bytes:,} bytes, its fragments take at most {most:,}")
        for name, pieces in held.items():
            end = 0
            for start, numel in sorted(pieces):
                if start != end or numel < 1:
                    fault = "overlap" if start < end else "leave a gap"
                    raise UntrustedError(f"the fragments of {name} {fault} at element {end}")
                end += numel
            if end != math.prod(self.shapes[name]):
                raise UntrustedError(f"the fragments of {name} hold {end} of {math.prod(self.shapes[name])} values")


def parse_manifest(text: bytes) -> Manifest:
    """The manifest in the bytes of checkpoint.json. Raises UntrustedError, and OtherSchemaError for another version's.

    Bounded by MAX_MANIFEST_BYTES, which the caller looks at before reading.
    """
    if len(text) > MAX_MANIFEST_BYTES:
        raise UntrustedError(f"it has {len(text):,} bytes, at most {MAX_MANIFEST_BYTES:,} are read")
    tree = parse_object(text)
    if tree.get("schema") != SCHEMA:
        raise OtherSchemaError(
            f"it has schema {printable(repr(tree.get('schema')))}, this version of ecar_dist reads {SCHEMA!r}; use the "
            f"version that wrote it"
        )
    return validate_record(text, Manifest)
