"""The rules for the fields of a manifest: their types, their ranges, and how they add up.

A manifest may come from anywhere. After these checks, its names stay inside their folder, its sizes fit into memory and
its numbers fit into int64, so the rest of the code does not check them again.
"""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import numpy as np
from pydantic import AfterValidator, Field

from ecar_dist.data.shards.tar_index import BLOCK
from ecar_dist.storage.untrusted import CONTROL_CHARACTER, Record, UntrustedError, plain_name, printable, relative_name

MAX_ROWS = 10**12  # keys have 12 digits
MAX_BYTES = 1 << 53
MAX_SIDE = 1 << 16
MAX_MOMENTS = 1 << 31  # values of one sample
MAX_TEXT = 4096  # characters of a string


class _Entry(Protocol):
    """The fields of an entry that these rules read. An entry is one shard or one class directory."""

    @property
    def name(self) -> str: ...

    @property
    def bytes(self) -> int: ...

    @property
    def count(self) -> int: ...

    @property
    def first_index(self) -> int: ...


def visible(text: str) -> str:
    """A string that is safe to print: at most MAX_TEXT characters, no control characters. Raises UntrustedError."""
    if len(text) > MAX_TEXT:
        raise UntrustedError(f"it has {len(text):,} characters, but the limit is {MAX_TEXT:,}")
    if CONTROL_CHARACTER.search(text):
        raise UntrustedError(f"{printable(repr(text), 80)} has control characters or is not UTF-8")
    return text


def plain_tree(tree: dict[str, Any]) -> dict[str, Any]:
    """A dictionary without a fixed schema: printable strings, finite numbers in the range of int64, lists and
    dictionaries of these. Raises UntrustedError."""
    for key, value in tree.items():
        visible(key)
        for element in value if isinstance(value, list) else [value]:
            _check_plain(key, element)
    return tree


def check_failures(tree: dict[str, Any]) -> dict[str, Any]:
    """Raises pydantic's ValidationError if the tree does not have the fields of `Failures`."""
    Failures.model_validate(tree)
    return tree


def check_moments(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Raises UntrustedError for more than MAX_MOMENTS values."""
    if math.prod(shape) > MAX_MOMENTS:
        raise UntrustedError(f"{list(shape)} has {math.prod(shape):,} values, but the limit is {MAX_MOMENTS:,}")
    return shape


def check_channels(encoder: dict[str, Any], shape: Sequence[int]) -> None:
    """Compare the channels of the moments with those of the encoder, if stated. Raises UntrustedError."""
    channels = encoder.get("latent_channels")
    deterministic = encoder.get("deterministic")
    if isinstance(channels, int) and isinstance(deterministic, bool):
        expected = channels if deterministic else 2 * channels
        if shape[0] != expected:
            raise UntrustedError(f"moments_shape is {list(shape)}, but its encoder makes {expected} channels")


def check_class_names(num_classes: int, class_names: Sequence[str]) -> None:
    """Raises UntrustedError unless each class has a name."""
    if len(class_names) != num_classes:
        raise UntrustedError(f"it has {len(class_names)} class names for {num_classes} classes")


def check_total(samples: int, count: int) -> None:
    """Raises UntrustedError unless the shards have as many samples as the set."""
    if samples != count:
        raise UntrustedError(f"its shards have {samples} samples in total, but it states {count}")


def check_codebooks(kinds: Sequence[tuple[int, int]]) -> None:
    """Check that no two codebooks have the same patch size and the same number of codes. Raises UntrustedError."""
    if len(set(kinds)) != len(kinds):
        raise UntrustedError("it lists two codebooks of the same size and patch size")


def check_entries(entries: Sequence[_Entry], count: int, num_classes: int, class_names: Sequence[str]) -> None:
    """Check that the entries follow each other without a gap and add up to `count`.

    Raises UntrustedError that names the first wrong entry.
    """
    check_class_names(num_classes, class_names)
    first = 0
    names = set()
    for entry in entries:
        if entry.name in names:
            raise UntrustedError(f"it lists {entry.name!r} twice")
        names.add(entry.name)
        if entry.first_index != first:
            raise UntrustedError(f"{entry.name!r} begins at sample {entry.first_index}, the one before ends at {first}")
        first += entry.count

    check_total(first, count)


def check_tar(entry: _Entry, hashes: Sequence[str]) -> None:
    """Check that a tar has hashes and enough bytes for its samples. Raises UntrustedError."""
    if not all(hashes):
        raise UntrustedError(f"{entry.name!r} has no hash")
    if entry.count * 2 * BLOCK > entry.bytes:
        raise UntrustedError(f"{entry.name!r} has {entry.bytes} bytes, too few for {entry.count} samples")


def check_rows(entry: _Entry, first_row: int, missing: Sequence[int], after: int) -> int:
    """Check the rows of a latent shard, which must not begin before row `after`. Returns the row after its last.

    Raises UntrustedError.
    """
    end = first_row + entry.count + len(missing)
    rising = all(one < other for one, other in itertools.pairwise(missing))
    inside = not missing or first_row <= missing[0] <= missing[-1] < end
    if first_row < after or end > MAX_ROWS or not rising or not inside:
        raise UntrustedError(f"the rows of {entry.name!r} are not {entry.count} ascending rows from {after} on")
    return end


@dataclass(frozen=True)
class TableTotals:
    """The totals of the rows of a table that have been checked so far, which the next row has to follow."""

    shards: int = 0
    samples: int = 0
    missing: int = 0
    row: int = 0  # after the last row of the plan that a shard covers
    name: bytes = b""


def check_table_rows(rows: np.ndarray, missing: np.ndarray, before: TableTotals | None) -> TableTotals:
    """Check the rules of `check_entries`, `check_tar` and `check_rows` for some rows of a `ShardTable`, all at once.

    rows: [n], of at most 2^15 shards, so that no sum of valid values overflows int64. missing: their missing rows,
    int64. The names must be plain, and ascend by length first, so none appears twice. Returns the totals with these
    rows. Raises UntrustedError that names the first wrong shard.
    """
    before = before or TableTotals()

    # The ranges, without which the sums below could overflow.
    counts, gaps, first_rows = rows["count"], rows["missing"], rows["first_row"]
    _check_all(before, (counts >= 1) & (counts <= MAX_ROWS), "count")
    _check_all(before, (gaps >= 0) & (gaps <= MAX_ROWS), "number of missing rows")
    _check_all(before, (first_rows >= 0) & (first_rows <= MAX_ROWS), "first row")
    _check_all(before, (rows["bytes"] <= MAX_BYTES) & (counts <= rows["bytes"] // (2 * BLOCK)), "size")

    # Each shard follows the one before.
    samples = before.samples + np.cumsum(counts)
    gap_ends = before.missing + np.cumsum(gaps)
    _check_all(before, (rows["first_index"] == samples - counts) & (samples <= MAX_ROWS), "first index")
    _check_all(before, (rows["missing_at"] == gap_ends - gaps) & (gap_ends <= MAX_ROWS), "missing rows")
    ends = first_rows + counts + gaps
    _check_all(before, (first_rows >= np.append(before.row, ends[:-1])) & (ends <= MAX_ROWS), "first row")
    _check_names(before, rows["name"])

    # The missing rows ascend within their shard.
    if len(missing) != gaps.sum():
        raise UntrustedError(f"the list of missing rows is incomplete for shards from {before.shards} on")
    if len(missing):
        owners = np.repeat(np.arange(len(rows)), gaps)
        falls = np.flatnonzero((np.diff(missing) <= 0) & (np.diff(owners) == 0))
        outside = (missing < first_rows[owners]) | (missing >= ends[owners])
        outside[falls] = True
        wrong = np.zeros(len(rows), dtype=bool)
        wrong[owners[outside]] = True
        _check_all(before, ~wrong, "missing rows")
    return TableTotals(
        before.shards + len(rows), int(samples[-1]), int(gap_ends[-1]), int(ends[-1]), rows["name"][-1].item()
    )


def _check_all(before: TableTotals, right: np.ndarray, what: str) -> None:
    if not right.all():
        raise UntrustedError(f"shard {before.shards + int(right.argmin())} has a wrong {what}")


def _check_names(before: TableTotals, names: np.ndarray) -> None:
    """Check all names at once, as uint8 [n, width]: plain names in folders, ascending by length, then by bytes."""
    letters = np.ascontiguousarray(names).view(np.uint8).reshape(len(names), -1)
    filled = letters != 0
    lengths = filled.sum(axis=1)

    # A part of a name begins with a letter, a digit or _, so it is neither empty nor a dot. Zeros are only at the end.
    starts = np.ones_like(filled)
    starts[:, 1:] = letters[:, :-1] == ord("/")
    allowed = np.where(starts, _NAME_START[letters], _NAME_PART[letters]) | ~filled
    padded_right = filled == (np.arange(letters.shape[1]) < lengths[:, None])
    last = letters[np.arange(len(names)), np.maximum(lengths - 1, 0)]
    _check_all(before, allowed.all(axis=1) & padded_right.all(axis=1) & (lengths > 0) & (last != ord("/")), "name")

    earlier = np.append(np.array([before.name], names.dtype), names[:-1])
    earlier_lengths = np.append(len(before.name), lengths[:-1])
    rises = (lengths > earlier_lengths) | ((lengths == earlier_lengths) & (names > earlier))
    _check_all(before, rises, "place: its name does not follow the one before")


def _table_of(letters: str) -> np.ndarray:
    table = np.zeros(256, dtype=bool)
    table[[ord(letter) for letter in letters]] = True
    return table


# As `plain_name`, for each part of a path.
_NAME_START = _table_of(string.ascii_letters + string.digits + "_")
_NAME_PART = _table_of(string.ascii_letters + string.digits + "_.-/")


def _check_plain(key: str, value: Any) -> None:
    if isinstance(value, dict):
        plain_tree(value)
    elif isinstance(value, str):
        visible(value)
    elif isinstance(value, list):
        raise UntrustedError(f"{printable(key, 80)} is a list of lists")
    elif isinstance(value, float) and not math.isfinite(value):
        raise UntrustedError(f"{printable(key, 80)} is not finite")
    elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise UntrustedError(f"{printable(key, 80)} is outside the range of int64")


PlainName = Annotated[str, AfterValidator(plain_name)]
RelativeName = Annotated[str, AfterValidator(visible), AfterValidator(relative_name)]
Visible = Annotated[str, AfterValidator(visible)]
Count = Annotated[int, Field(strict=True, ge=0, le=MAX_ROWS)]
Samples = Annotated[int, Field(strict=True, ge=1, le=MAX_ROWS)]  # of a set, or of one of its shards
Bytes = Annotated[int, Field(strict=True, ge=0, le=MAX_BYTES)]
Classes = Annotated[int, Field(strict=True, ge=1, lt=1 << 31)]
Flag = Annotated[bool, Field(strict=True)]
Xxh3 = Annotated[str, Field(pattern=r"^([0-9a-f]{32})?$")]  # empty for a class directory
Sha256 = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
Side = Annotated[int, Field(strict=True, ge=1, le=MAX_SIDE)]
MomentsShape = Annotated[tuple[Side, ...], Field(min_length=3, max_length=3), AfterValidator(check_moments)]
Tree = Annotated[dict[str, Any], AfterValidator(plain_tree)]
FailureCount = Annotated[dict[str, Any], AfterValidator(check_failures)]


class Failures(Record):
    """The number of images that could not be encoded, and the file next to the manifest that lists them."""

    count: Count
    file: PlainName | None
