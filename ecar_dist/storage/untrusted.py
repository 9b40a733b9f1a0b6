"""Read what others may have written or damaged: plain files, JSON and names, each with limits.

Every file whose content decides what happens next is read here. There are three kinds of readers:

    state    `read_record`: strict. Anything but a record of the given schema is an error.
    logs     `JsonLines`: tolerant. A damaged line is skipped and counted; a log never stops a run.
    names    `relative_name`, `plain_name`, `path_inside`: a name in a file never leads out of its folder.

Content errors are `UntrustedError`, a short phrase without a path or a fix: only the caller knows what the file is for.
System errors remain OSError. Nothing here blocks on a pipe, and nothing is read before its size is known.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Generic, TypeVar, cast

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from ecar_dist.storage.redaction import redact_text

MAX_JSON_BYTES = 64 << 20  # the manifest of a checkpoint with 100,000 files or parameters has about 15 MiB
MAX_JSON_DEPTH = 32
MAX_NAME_BYTES = 1024  # S3's own limit for a key
MAX_LOG_BYTES = 1 << 33  # ten million lines; a larger file is not a log of ours
MAX_LINE_BYTES = 1 << 24  # bad_steps.jsonl: the samples of a global batch of a million
# terminal control characters, ends of lines, and lone surrogates, which are not UTF-8
CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_ADAPTERS: dict[type, TypeAdapter[Any]] = {}
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
# characters that `isprintable` rejects but file names contain: spaces of all widths (macOS writes them), joiners and
# tags of emoji, and bytes that are not UTF-8, which become lone surrogates
_HARMLESS = re.compile("[\ud800-\udfff\xa0\u1680\u2000-\u200a\u200c\u200d\u202f\u205f\u3000\U000e0020-\U000e007f]")


class UntrustedError(ValueError):
    """What is wrong with a file's content, or with a name, as a short phrase: "it is not a regular file".

    The phrase may repeat a key or a name in the file, so secrets in URLs are removed.
    """

    def __init__(self, phrase: str) -> None:
        super().__init__(redact_text(phrase))


STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Record(BaseModel):
    """Base of every JSON object that the product reads back: typed, frozen, finite numbers only, no unknown keys."""

    model_config = STRICT


T = TypeVar("T")
AnyRecord = TypeVar("AnyRecord", bound=BaseModel)


def read_plain_file(path: Path, limit: int) -> bytes:
    """All bytes of a regular file of at most `limit` bytes.

    Raises UntrustedError for anything that is not a regular file (without waiting for a pipe) and for a larger file,
    OSError if it cannot be read.
    """
    with open_plain_file(path, limit) as file:
        content = file.read(limit + 1)
    if len(content) > limit:  # it has grown since its size was looked up
        raise _too_large(len(content), limit)
    return content


def open_plain_file(path: Path, limit: int | None = None) -> BinaryIO:
    """A regular file of at most `limit` bytes, open for reading.

    Raises UntrustedError for anything else (without waiting for a pipe), OSError if it cannot be opened.
    """
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115 - the caller closes it
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode):
        file.close()
        raise UntrustedError("it is not a regular file")
    if limit is not None and found.st_size > limit:
        file.close()
        raise _too_large(found.st_size, limit)
    return file


def _too_large(size: int, limit: int) -> UntrustedError:
    return UntrustedError(f"it has {size:,} bytes, at most {limit:,} are read")


def parse_json(text: bytes, *, foreign: bool = False) -> Any:
    """The value of a JSON document. Raises UntrustedError.

    Stricter than `json.loads`: no NaN or Infinity, no key given twice, no lone surrogates (which cannot be printed),
    and at most MAX_JSON_DEPTH nested levels. For `foreign` documents, which other programs write, only the depth is
    checked.
    """
    try:
        document = text.decode("utf-8")
        rules: dict[str, Any] = (
            {} if foreign else {"parse_constant": _refuse_constant, "object_pairs_hook": _unique_keys}
        )
        value = json.loads(document, **rules)
    except UnicodeDecodeError as error:
        raise UntrustedError(f"it is not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise UntrustedError(f"it is nested deeper than {MAX_JSON_DEPTH}") from None
    except UntrustedError:
        raise
    except ValueError as error:
        raise UntrustedError(f"it is not JSON: {str(error).splitlines()[0]}") from None

    # What the parser accepts.
    if _deeper_than(value, MAX_JSON_DEPTH):
        raise UntrustedError(f"it is nested deeper than {MAX_JSON_DEPTH}")
    if not foreign and "\\u" in document and _LONE_SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise UntrustedError("it contains half of a surrogate pair")
    return value


def parse_object(text: bytes) -> dict[str, Any]:
    """The JSON object in a document, with any content. Raises UntrustedError."""
    value = parse_json(text)
    if not isinstance(value, dict):
        raise UntrustedError(f"it contains a JSON {type(value).__name__}, not an object")
    return value


def parse_record(text: bytes, model: type[AnyRecord]) -> AnyRecord:
    """The record in a JSON document. Raises UntrustedError naming the first field that breaks the schema."""
    parse_object(text)
    return validate_record(text, model)


def adapter_of(kind: type[T]) -> TypeAdapter[T]:
    """The validator of a type. Building it takes milliseconds, so it is built once."""
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


def parse_dataclass(text: bytes, kind: type[T]) -> T:
    """The instance of a dataclass in a JSON document, which must have all of its fields. Raises UntrustedError.

    The dataclass sets `__pydantic_config__ = STRICT`.
    """
    found = parse_object(text)
    if absent := [field.name for field in dataclasses.fields(cast(Any, kind)) if field.name not in found]:
        raise UntrustedError(f"{absent[0]} is missing")
    try:
        return adapter_of(kind).validate_json(text)
    except ValidationError as error:
        raise UntrustedError(first_violation(error)) from None


def validate_record(text: bytes, model: type[AnyRecord]) -> AnyRecord:
    """The record in a document that `parse_json` has accepted. Raises as `parse_record` does."""
    try:
        # from the text: in strict mode, JSON arrays become tuples only if pydantic parses the text
        return model.model_validate_json(text)
    except ValidationError as error:
        raise UntrustedError(first_violation(error)) from None


def first_violation(error: ValidationError) -> str:
    """The first broken rule on one line: which field, and the rule."""
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"]))
    message = first["msg"][:1].lower() + first["msg"][1:]
    message = message.removeprefix("value error, ")  # a validator's own message
    return printable(f"{key}: {message}" if key else message)


def read_record(path: Path, model: type[AnyRecord], limit: int = MAX_JSON_BYTES) -> AnyRecord:
    """The record in a JSON file. Raises UntrustedError, and OSError if the file cannot be read."""
    return parse_record(read_plain_file(path, limit), model)


class JsonLines(Generic[T]):
    """The lines of a JSONL file, oldest first, each as `parse` returns it. A damaged line does not affect the others.

        with JsonLines(path, parse_object) as lines:
            entries = list(lines)
        if lines.damaged: ...

    `parse` takes the bytes of one line and raises UntrustedError for a damaged one (`parse_object` takes any JSON
    object). Damaged lines are skipped and counted in `damaged`. A torn last line is skipped but not counted: a kill may
    have cut it, or its writer has not finished it.

    tail: read only the lines that begin in the last `tail` bytes, whatever the size of the file.
    max_bytes: without `tail`, a larger file is refused.
    max_line_bytes: a longer line counts as damaged, and is never held in memory in full.

    Opening raises FileNotFoundError, UntrustedError if the path is not a regular file (without waiting for a pipe) or
    the file is too large, and OSError if it cannot be read.
    """

    def __init__(
        self,
        path: Path,
        parse: Callable[[bytes], T],
        *,
        tail: int | None = None,
        max_bytes: int = MAX_LOG_BYTES,
        max_line_bytes: int = MAX_LINE_BYTES,
    ) -> None:
        self.damaged = 0
        self._parse = parse
        self._max_line_bytes = max_line_bytes
        self._file = open_plain_file(path, None if tail is not None else max_bytes)
        self._end = os.fstat(self._file.fileno()).st_size  # what is appended from now on is not read

        # Skip the line that the tail cuts. Start one byte earlier: if a line ends there, only its newline is skipped.
        if tail is not None and self._end > tail:
            self._file.seek(self._end - tail - 1)
            self._next_line()

    def __enter__(self) -> JsonLines[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[T]:
        while line := self._next_line():
            if len(line) > self._max_line_bytes:
                self.damaged += 1
                continue
            try:
                entry = self._parse(line)
            except UntrustedError:
                # A torn line lacks both the newline and the last brace. A line that lacks only one of them was changed.
                torn = not line.endswith(b"\n") and b"}" not in line
                self.damaged += not torn
                continue
            yield entry

    def _next_line(self) -> bytes:
        """The next line, or the beginning of one that is too long. Empty at the end."""
        if self._file.tell() >= self._end:
            return b""
        line = self._file.readline(self._max_line_bytes + 1)
        piece = line
        while len(piece) > self._max_line_bytes and not piece.endswith(b"\n"):
            piece = self._file.readline(self._max_line_bytes + 1)
        return line


def plain_name(name: object) -> str:
    """A file name as we create them: letters, digits, `_`, `.` and `-`, not beginning with one of the last two.

    Raises UntrustedError for anything else.
    """
    if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name) or len(name) > 255:
        raise UntrustedError(f"{printable(repr(name))} is not a plain file name")
    return name


def relative_name(name: object) -> str:
    """A name from a manifest, a tar or a listing that stays below its folder: `class/picture 1.jpg`.

    Raises UntrustedError for an absolute name, for `..`, `.` or an empty part, and for characters that are not
    printable (a newline, NUL, ESC).
    """
    if not isinstance(name, str) or not name or len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
        raise UntrustedError(f"{printable(repr(name))} is not a name of 1 to {MAX_NAME_BYTES} bytes")
    if _PLAIN_NAME.fullmatch(name):  # a shortcut for most names, ten times faster
        return name
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise UntrustedError(f"{printable(repr(name))} leads out of its folder")
    if not is_one_line(name):
        raise UntrustedError(f"{printable(repr(name))} has characters that are not printable")
    return name


def is_one_line(text: str) -> bool:
    """Whether nothing in the text ends a line, ends a string or controls a terminal."""
    return text.isprintable() or _HARMLESS.sub("", text).isprintable()


def path_inside(folder: Path, name: object) -> Path:
    """The file `name` in `folder`; it need not exist. Raises UntrustedError.

    Names that lead elsewhere are refused, and so is a link with a target outside `folder`.
    """
    path = folder / relative_name(name)
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except RuntimeError:  # how Python before 3.13 reports ELOOP
        raise UntrustedError(f"{printable(repr(name))} is a link to itself") from None
    if not inside:
        raise UntrustedError(f"{printable(repr(name))} is a link out of its folder")
    return path


def printable(text: str, limit: int = 300) -> str:
    """The text on one line, without control characters."""
    line = "".join(letter if letter.isprintable() else " " for letter in text[: limit + 1])
    return line if len(line) <= limit else f"{line[:limit]}..."


def _refuse_constant(name: str) -> Any:
    raise UntrustedError(f"it contains {name}, which is not a JSON number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise UntrustedError(f"it has the key {printable(repr(twice))} twice")
    return tree


def _deeper_than(tree: Any, depth: int) -> bool:
    level = [tree]
    for _ in range(depth):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
    return bool(level)
