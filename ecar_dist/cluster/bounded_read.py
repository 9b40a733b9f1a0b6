"""What `status` reads of files that somebody else wrote, or still writes: little of each, whatever it holds."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

from ecar_dist.storage.untrusted import parse_objects, read_plain_file, read_tail

TAIL_BYTES = 1 << 18  # of a file of lines: 30 lines of metrics.jsonl at least
MAX_WORD_BYTES = 1 << 12  # a job's number, a status, names of nodes, a verdict


def objects_at_end(path: Path) -> list[dict[str, Any]]:
    """The JSON objects among the last lines of a file, oldest first. A line that is cut, or junk, is passed over.

    Raises UntrustedError and OSError.
    """
    return parse_objects(read_tail(path, TAIL_BYTES).splitlines())


def last_object(path: Path) -> dict[str, Any]:
    """The last of them; empty where there is none. Raises as `objects_at_end`."""
    return next(reversed(objects_at_end(path)), {})


def word(path: Path) -> str:
    """A short file's text. Raises UntrustedError and OSError."""
    return read_plain_file(path, MAX_WORD_BYTES).decode(errors="replace").strip()


def number(tree: dict[str, Any], name: str) -> float | None:
    """A finite number of a JSON object; None for whatever else stands there."""
    value = tree.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    with contextlib.suppress(OverflowError):
        return float(value) if math.isfinite(value) else None
    return None
