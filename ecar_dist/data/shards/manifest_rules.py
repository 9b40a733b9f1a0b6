"""What the fields of a manifest may be: their types, ranges and sums.

A manifest may come from anybody. Whatever passes these rules leads nowhere out of its folder, asks for no absurd memory
and overflows no array, so the code behind them need not ask again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Annotated, Any, Protocol

from pydantic import AfterValidator, Field

from ecar_dist.data.shards.tar_index import BLOCK
from ecar_dist.storage.untrusted import CONTROL_CHARACTER, Record, UntrustedError, plain_name, printable, relative_name

MAX_ROWS = 10**12  # keys have 12 digits
MAX_BYTES = 1 << 53
MAX_SIDE = 1 << 16
MAX_MOMENTS = 1 << 31  # values of one sample
MAX_TEXT = 4096  # characters of a name or place


class _Entry(Protocol):
    """What is looked at of an entry: one shard, or one class directory."""

    @property
    def name(self) -> str: ...

    @property
    def bytes(self) -> int: ...

    @property
    def count(self) -> int: ...

    @property
    def first_index(self) -> int: ...


def visible(text: str) -> str:
    """A text for people: MAX_TEXT characters at most, none that a terminal would obey. Raises UntrustedError."""
    if len(text) > MAX_TEXT:
        raise UntrustedError(f"it has {len(text):,} characters, at most {MAX_TEXT:,} are read")
    if CONTROL_CHARACTER.search(text):
        raise UntrustedError(f"{printable(repr(text), 80)} has control characters or is not UTF-8")
    return text


def plain_tree(tree: dict[str, Any]) -> dict[str, Any]:
    """Facts of no fixed form: texts for people, and finite numbers that int64 holds. Raises UntrustedError."""
    for key, value in tree.items():
        visible(key)
        for one in value if isinstance(value, list) else [value]:
            _plain_value(key, one)
    return tree


def check_failures(tree: dict[str, Any]) -> dict[str, Any]:
    """Raises pydantic's ValidationError for anything but the fields of `Failures`."""
    Failures.model_validate(tree)
    return tree


def check_moments(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Raises UntrustedError for a sample that is too large to be one."""
    if math.prod(shape) > MAX_MOMENTS:
        raise UntrustedError(f"{list(shape)} are {math.prod(shape):,} values, at most {MAX_MOMENTS:,} are read")
    return shape


def check_channels(encoder: dict[str, Any], shape: Sequence[int]) -> None:
    """The moments are the encoder's, as far as it says what it makes. Raises UntrustedError."""
    channels, deterministic = encoder.get("latent_channels"), encoder.get("deterministic")
    if isinstance(channels, int) and isinstance(deterministic, bool):
        expected = channels if deterministic else 2 * channels
        if shape[0] != expected:
            raise UntrustedError(f"moments_shape is {list(shape)}, its encoder makes {expected} channels")


def check_entries(entries: Sequence[_Entry], count: int, num_classes: int, class_names: Sequence[str]) -> None:
    """The entries follow each other without a gap and add up. Raises UntrustedError naming the first that does not."""
    if len(class_names) != num_classes:
        raise UntrustedError(f"it has {len(class_names)} class names for {num_classes} classes")
    first, names = 0, set()
    for entry in entries:
        if entry.name in names:
            raise UntrustedError(f"it lists {entry.name!r} twice")
        names.add(entry.name)
        if entry.first_index != first:
            raise UntrustedError(f"{entry.name!r} begins at sample {entry.first_index}, the one before ends at {first}")
        first += entry.count
    if first != count:
        raise UntrustedError(f"its shards have {first} samples in all, it says {count}")


def check_tar(entry: _Entry, hashes: Sequence[str]) -> None:
    """A tar has its hashes, and room for its samples. Raises UntrustedError."""
    if not all(hashes):
        raise UntrustedError(f"{entry.name!r} has no hash")
    if entry.count * 2 * BLOCK > entry.bytes:
        raise UntrustedError(f"{entry.name!r} has {entry.bytes} bytes, too few for {entry.count} samples")


def check_rows(entry: _Entry, first_row: int, missing: Sequence[int], after: int) -> int:
    """The first row behind a latent shard, whose rows begin at `after` or later. Raises UntrustedError."""
    end = first_row + entry.count + len(missing)
    rising = all(one < other for one, other in itertools.pairwise(missing))
    inside = not missing or first_row <= missing[0] <= missing[-1] < end
    if first_row < after or end > MAX_ROWS or not rising or not inside:
        raise UntrustedError(f"the rows of {entry.name!r} are not {entry.count} rising ones from {after} on")
    return end


def _plain_value(key: str, value: Any) -> None:
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
Xxh3 = Annotated[str, Field(pattern=r"^([0-9a-f]{32})?$")]  # empty in a class directory: nobody read its files
Sha256 = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
Side = Annotated[int, Field(strict=True, ge=1, le=MAX_SIDE)]
MomentsShape = Annotated[tuple[Side, ...], Field(min_length=3, max_length=3), AfterValidator(check_moments)]
Tree = Annotated[dict[str, Any], AfterValidator(plain_tree)]
FailureCount = Annotated[dict[str, Any], AfterValidator(check_failures)]


class Failures(Record):
    """How many images were left out, and the file beside the manifest that lists them."""

    count: Count
    file: PlainName | None
