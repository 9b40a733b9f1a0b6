"""Reading files that somebody else wrote, or still writes: little of each, whatever it holds, and without waiting."""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

TAIL_BYTES = 1 << 18  # of a file of lines: 30 lines of metrics.jsonl at least
MAX_WORD_BYTES = 1 << 12  # a job's number, a status, names of nodes, a verdict


def read_bytes(path: Path, limit: int, *, whole: bool = False) -> bytes:
    """The last `limit` bytes of a file. Raises ValueError where it is no regular file, or, with `whole`, larger."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # a pipe is not waited for
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is no regular file")
        if whole and found.st_size > limit:
            raise ValueError(f"it is larger than {limit >> 20} MiB")
        file.seek(max(0, found.st_size - limit))
        return file.read(limit)


def objects_at_end(path: Path) -> list[dict[str, Any]]:
    """The JSON objects among the last lines of a file, oldest first. A line that is cut, or junk, is passed over."""
    found = []
    for line in read_bytes(path, TAIL_BYTES).splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(tree := json.loads(line), dict):
                found.append(tree)
    return found


def last_object(path: Path) -> dict[str, Any]:
    """The last of them; empty where there is none."""
    return next(reversed(objects_at_end(path)), {})


def word(path: Path) -> str:
    """A short file's text."""
    return read_bytes(path, MAX_WORD_BYTES, whole=True).decode(errors="replace").strip()


def number(tree: dict[str, Any], name: str) -> float | None:
    """A finite number of a JSON object; None for whatever else stands there."""
    value = tree.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    with contextlib.suppress(OverflowError):
        return float(value) if math.isfinite(value) else None
    return None


def printable(text: str, limit: int = 300) -> str:
    """On one line, and without what a terminal would obey."""
    line = "".join(letter if letter.isprintable() else " " for letter in text[: limit + 1])
    return line if len(line) <= limit else f"{line[:limit]}..."
