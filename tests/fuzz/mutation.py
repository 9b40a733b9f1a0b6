"""Changes to files, each small enough to print: what, where, and the name of a value.

`where` leads to a node of a tree: a key, or a number that chooses among the node's children, however many there are.
So a drawn `where` fits every tree, and one from a known case is readable.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.fuzz import archives
from tests.fuzz.artefacts import own
from tests.fuzz.nasty import FILES, OUTSIDE, STRINGS, VALUES, YAML_VALUES

HUGE = 40 << 30  # bytes of a sparse file: it takes no space, and nobody may read it
LARGEST_COPY = 1 << 26  # bytes
TREE_OPS = ("replace", "delete", "twice", "rename", "add", "nudge", "wrap", "swap", "repeat", "drop")
BYTE_OPS = ("flip", "cut", "append", "insert", "zero", "shift")
KIND_OPS = (
    "content",
    "missing",
    "folder",
    "pipe",
    "link_out",
    "loop",
    "sparse",
    "device",
    "socket",
    "other",
    "copy_as",
)
LINE_OPS = ("line_cut", "line_twice", "line_junk", "line_long", "line_swap", "line_drop", "no_newline")
_MARK = re.compile(r"[\"']?@@(\w)@@(\w+)@@[\"']?")


@dataclass(frozen=True)
class Mutation:
    """`file`: path in the case's folder, or a number that chooses among the case's files.

    `value`: a name of nasty.py, or `=` and the literal text for the file.
    """

    file: str | int
    op: str
    where: tuple[str | int, ...] = ()
    value: str = "none"
    at: float = 0.5  # share of the file's bytes, lines or members


def apply(mutation: Mutation, folder: Path, files: list[str], outside: Path) -> None:
    """Change a file below `folder`. A file that the change does not fit stays as it is."""
    name = mutation.file if isinstance(mutation.file, str) else files[mutation.file % len(files)]
    path = folder / name
    if not os.path.lexists(path) and mutation.op not in ("content", "sparse"):
        return  # an earlier change has removed it
    with contextlib.suppress(*_UNFIT):
        if mutation.op in KIND_OPS:
            _change_kind(mutation, path, folder, files, outside)
        elif not path.is_file() or path.is_symlink() or path.stat().st_size > LARGEST_COPY:
            return
        elif mutation.op in BYTE_OPS:
            _write(path, change_bytes(path.read_bytes(), mutation))
        elif mutation.op in LINE_OPS:
            _write(path, _change_lines(path.read_bytes(), mutation))
        elif path.suffix in (".tar",):
            _write(path, archives.change_tar(path.read_bytes(), mutation, _change_json_bytes))
        elif path.suffix == ".safetensors":
            _write(path, archives.change_tensors(path.read_bytes(), mutation, _change_json_bytes))
        elif path.suffix == ".npy":
            _write(path, archives.change_table(path.read_bytes(), mutation))
        elif path.suffix == ".jsonl":
            _write(path, _change_line_of_json(path.read_bytes(), mutation))
        elif path.suffix == ".json":
            _write(path, _change_json_bytes(path.read_bytes(), mutation))
        elif path.suffix == ".yaml":
            _write(path, _change_yaml(path.read_bytes(), mutation))
    _name_outside(path, outside)


class Unfit(Exception):
    """The file does not have, or no longer has, the form that this change needs."""


_OF_PYTHON = (ValueError, TypeError, LookupError, ArithmeticError, MemoryError, RecursionError)
# errors when reading our own hostile files, after another change of the same file
_UNFIT = (Unfit, IsADirectoryError, NotADirectoryError, struct.error, *_OF_PYTHON)


def _write(path: Path, content: bytes) -> None:
    own(path)
    path.write_bytes(content)


def _name_outside(path: Path, outside: Path) -> None:
    mark = OUTSIDE.encode()
    if path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 24 and path.suffix != ".safetensors":
        content = path.read_bytes()
        if mark in content:
            _write(path, content.replace(mark, str(outside).encode()))


def change_bytes(content: bytes, mutation: Mutation) -> bytes:
    if not content:
        return b"\0"
    place = min(int(mutation.at * len(content)), len(content) - 1)
    step = int(next((part for part in mutation.where if isinstance(part, int)), 1))
    changed = bytearray(content)
    if mutation.op == "flip":
        changed[place] ^= 1 << step % 8
    elif mutation.op == "cut":
        del changed[place:]
    elif mutation.op == "append":
        changed += random.Random(step).randbytes(1 + step * 37)
    elif mutation.op == "insert":
        changed[place:place] = STRINGS.get(mutation.value, "\xff").encode("utf-8", "surrogatepass")
    elif mutation.op == "zero":
        end = min(place + 1 + step * 64, len(changed))
        changed[place:end] = bytes(end - place)
    elif mutation.op == "shift":
        del changed[place : place + 1 + step % 600]
    return bytes(changed)


def _change_kind(mutation: Mutation, path: Path, folder: Path, files: list[str], outside: Path) -> None:
    content = path.read_bytes() if path.is_file() and path.stat().st_size < 1 << 26 else b""
    if mutation.op == "copy_as":  # copy the file, or its folder, under another name
        _copy_beside(path, folder, mutation)
        return
    _remove(path)
    step = int(next((part for part in mutation.where if isinstance(part, int)), 0))
    if mutation.op == "content":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(FILES.get(mutation.value, b""))
    elif mutation.op == "folder":
        (path / "inside").mkdir(parents=True)
    elif mutation.op == "pipe":
        os.mkfifo(path)
    elif mutation.op == "link_out":
        path.symlink_to(outside.with_name("linked") / "kept")  # people link to larger disks, so reading is allowed
    elif mutation.op == "loop":
        path.symlink_to(path.name)
    elif mutation.op == "device":
        path.symlink_to("/dev/zero" if step % 2 else "/dev/full")
    elif mutation.op == "socket":
        import socket

        with contextlib.suppress(OSError):  # its path may be too long
            socket.socket(socket.AF_UNIX).bind(str(path))
    elif mutation.op == "sparse":
        path.write_bytes(content)
        os.truncate(path, HUGE)
    elif mutation.op == "other":
        other = folder / files[step % len(files)]
        path.write_bytes(other.read_bytes() if other.is_file() and other.stat().st_size < 1 << 26 else b"")


def _copy_beside(path: Path, folder: Path, mutation: Mutation) -> None:
    text = STRINGS.get(mutation.value, mutation.value).replace("\0", "").replace("/", "")[:200] or "x"
    source = path.parent if len(mutation.where) % 2 and path.parent != folder else path
    target = source.parent / (text if len(mutation.where) > 2 else source.name + text)
    parts = [part for part in source.rglob("*") if part.is_file()] if source.is_dir() else [source]
    if any(not part.is_file() or part.is_symlink() or part.stat().st_size > LARGEST_COPY for part in parts):
        raise Unfit  # an earlier change has made it endless
    with contextlib.suppress(OSError, UnicodeEncodeError, shutil.Error):
        shutil.copytree(source, target, symlinks=True) if source.is_dir() else shutil.copy(source, target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _change_lines(content: bytes, mutation: Mutation) -> bytes:
    lines = content.split(b"\n")
    place = min(int(mutation.at * len(lines)), len(lines) - 1)
    if mutation.op == "no_newline":
        return content.rstrip(b"\n")
    if mutation.op == "line_cut":
        lines[place] = lines[place][: len(lines[place]) // 2]
    elif mutation.op == "line_twice":
        lines.insert(place, lines[place])
    elif mutation.op == "line_junk":
        lines.insert(place, FILES.get(mutation.value, VALUES.get(mutation.value, "junk").encode()))
    elif mutation.op == "line_long":
        lines[place] = lines[place] * min(10_000, 1 + (1 << 23) // (1 + len(lines[place])))
    elif mutation.op == "line_swap":
        lines[place], lines[0] = lines[0], lines[place]
    elif mutation.op == "line_drop":
        del lines[place]
    return b"\n".join(lines)


def _change_line_of_json(content: bytes, mutation: Mutation) -> bytes:
    lines = content.split(b"\n")
    place = min(int(mutation.at * len(lines)), len(lines) - 1)
    if lines[place].strip():
        lines[place] = _change_json_bytes(lines[place], mutation)
    return b"\n".join(lines)


def _change_json_bytes(content: bytes, mutation: Mutation) -> bytes:
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        raise Unfit from None
    tree = change_tree(tree, mutation)
    return _unmark(json.dumps(tree), quoted=True).encode()


def _change_yaml(content: bytes, mutation: Mutation) -> bytes:
    try:
        tree = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError):  # PyYAML itself, for `!!timestamp soon`
        raise Unfit from None
    if not isinstance(tree, dict):
        raise Unfit
    text = yaml.safe_dump(change_tree(tree, mutation), sort_keys=False, width=10**6)
    return _unmark(text, quoted=False).encode("utf-8", "surrogatepass")


def change_tree(tree: Any, mutation: Mutation) -> Any:
    """The tree with one node changed. New values and keys are marks that `_unmark` turns into text."""
    parent, key = _find(tree, mutation.where)
    if parent is None:
        return _mark(mutation.value) if mutation.op == "replace" else [tree]
    _OPS.get(mutation.op, _replace)(parent, key, mutation)
    return tree


def _find(tree: Any, where: tuple[str | int, ...]) -> tuple[Any, Any]:
    """The parent and the key, or index, of the node; (None, None) for the root."""
    parent, key, node = None, None, tree
    for part in where:
        if isinstance(node, dict) and node:
            step: Any = part if isinstance(part, str) else list(node)[part % len(node)]
            if step not in node:
                break
        elif isinstance(node, list) and node:
            step = part % len(node) if isinstance(part, int) else 0
        else:
            break
        parent, key, node = node, step, node[step]
    return parent, key


def _mark(value: str) -> str:
    return f"@@X@@{value[1:].encode().hex()}@@" if value.startswith("=") else f"@@V@@{value}@@"


def _replace(parent: Any, key: Any, mutation: Mutation) -> None:
    parent[key] = _mark(mutation.value)


def _delete(parent: Any, key: Any, mutation: Mutation) -> None:
    del parent[key]


def _twice(parent: Any, key: Any, mutation: Mutation) -> None:
    if isinstance(parent, dict):
        if re.fullmatch(r"\w+", str(key)):
            parent[f"@@K@@{key}@@"] = _mark(mutation.value)
    else:
        parent.insert(key, parent[key])


def _rename(parent: Any, key: Any, mutation: Mutation) -> None:
    if isinstance(parent, dict):
        known = mutation.value in STRINGS or mutation.value.startswith("=")
        parent[_mark(mutation.value) if known else f"{key}x"] = parent.pop(key)


def _add(parent: Any, key: Any, mutation: Mutation) -> None:
    if isinstance(parent, dict):
        known = mutation.value in STRINGS or mutation.value.startswith("=")
        parent[_mark(mutation.value) if known else "unknown"] = parent[key]
    else:
        parent.append(_mark(mutation.value))


def _nudge(parent: Any, key: Any, mutation: Mutation) -> None:
    value = parent[key]
    if isinstance(value, bool):
        parent[key] = int(value)
    elif isinstance(value, int | float):
        choices = (value + 1, value - 1, -value, value * 2, float(value), str(value), value * 10**12, value // 2)
        parent[key] = choices[int(mutation.at * 8) % 8]
    elif isinstance(value, str):
        choices_of_text = (value + "x", value[:-1], value.upper(), f"/{value}", f"../{value}", f"{value}\n", [value])
        parent[key] = choices_of_text[int(mutation.at * 7) % 7]
    elif isinstance(value, list):
        parent[key] = [*value, *value]


def _wrap(parent: Any, key: Any, mutation: Mutation) -> None:
    parent[key] = [parent[key]] if mutation.at < 0.5 else {"a": parent[key]}


def _swap(parent: Any, key: Any, mutation: Mutation) -> None:
    keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
    other = keys[int(mutation.at * len(keys)) % len(keys)]
    parent[key], parent[other] = parent[other], parent[key]


def _repeat(parent: Any, key: Any, mutation: Mutation) -> None:
    if isinstance(parent, list):
        parent.append(parent[key])
    elif isinstance(parent[key], list) and parent[key]:
        parent[key].append(parent[key][0])


def _drop(parent: Any, key: Any, mutation: Mutation) -> None:
    if isinstance(parent[key], list | dict) and parent[key]:
        node = parent[key]
        del node[0 if isinstance(node, list) else next(iter(node))]


_OPS: dict[str, Callable[[Any, Any, Mutation], None]] = {
    "replace": _replace,
    "delete": _delete,
    "twice": _twice,
    "rename": _rename,
    "add": _add,
    "nudge": _nudge,
    "wrap": _wrap,
    "swap": _swap,
    "repeat": _repeat,
    "drop": _drop,
}


def _unmark(text: str, *, quoted: bool) -> str:
    """Replace marks with what they stand for: the text of a value, or a key a second time."""

    def found(match: re.Match[str]) -> str:
        kind, name = match[1], match[2]
        if kind == "K":
            return f'"{name}"' if quoted else name
        if kind == "X":
            return bytes.fromhex(name).decode()
        known = VALUES if quoted else {**VALUES, **YAML_VALUES}
        return known.get(name, json.dumps(name))

    return _MARK.sub(found, text)
