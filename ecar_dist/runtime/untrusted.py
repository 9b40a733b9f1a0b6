"""Reading what somebody may have handed to the user: JSON within bounds, and names that stay in their folder.

Weights are safetensors and facts are JSON, so nothing is executed. What is left to do harm is a file name that leads
elsewhere, and a document made to fill the memory or the stack.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ecar_dist.errors import CheckpointError

MAX_JSON_BYTES = 64 << 20  # a manifest of 100,000 files or parameters has about 15 MiB
MAX_JSON_DEPTH = 32
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError where it is missing, damaged, too large or too deep."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
        if len(text) > MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {MAX_JSON_BYTES >> 20} MiB")
        tree = json.loads(text)
        if not isinstance(tree, dict):
            raise ValueError("it is no JSON object")
        if _deeper_than(tree, MAX_JSON_DEPTH):
            raise ValueError(f"it is nested deeper than {MAX_JSON_DEPTH}")
        return tree
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; copy the folder again, whole") from None
    except (ValueError, RecursionError) as error:
        problem = "it is nested too deep" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise CheckpointError(f"{path} is damaged: {problem}; copy the folder again, whole") from None


def file_inside(folder: Path, name: Any) -> Path:
    """The regular file `name` of `folder`, which need not exist. Raises CheckpointError for one that lies elsewhere.

    A link is refused where its target is not in the folder itself.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise CheckpointError(
            f"{folder} names a file {name!r}: a plain name without folders is the rule; do not use it"
        )
    path = folder / name
    if path.is_symlink() and path.resolve().parent != folder.resolve():
        raise CheckpointError(f"{path} is a link out of its folder; put the file itself there")
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is no regular file; copy the folder again, whole")
    return path


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
