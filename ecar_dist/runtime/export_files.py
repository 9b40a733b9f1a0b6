"""The files of an export: what a reader needs, and nothing about who writes it.

    OUT/model.safetensors                      the weights; or, where they are more than one file's worth,
        model-00001-of-00002.safetensors ...   shards, and
        model.safetensors.index.json           which parameter lies in which
        config.json                            facts for a loader, and size and hash of every file of weights
        config.yaml                            the resolved config of the run
        README.md, parity.json                 the model card; what the export was compared with

The names and the index are those of the Hugging Face hub. Everything may come from a stranger: see untrusted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ecar_dist.errors import CheckpointError
from ecar_dist.runtime.checkpoint_files import hash_file
from ecar_dist.runtime.untrusted import file_inside, read_json

FACTS, CONFIG, CARD = "config.json", "config.yaml", "README.md"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SCHEMA = "ecar-export-v1"


def is_export(path: Path) -> bool:
    return (path / FACTS).exists()


def read_facts(path: Path) -> dict[str, Any]:
    """config.json of an export. Raises CheckpointError where it is none of ours."""
    facts = read_json(path / FACTS)
    needed = {"files": list, "progress": dict, "identity": dict, "average": dict, "source": dict}
    if facts.get("schema") != SCHEMA or any(not isinstance(facts.get(name), kind) for name, kind in needed.items()):
        raise CheckpointError(
            f"{path / FACTS} is no export of this program (schema {facts.get('schema')!r}, {SCHEMA!r} is read); "
            f"export the run again"
        )
    return facts


def flat_identity(identity: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's identity without its grouping into what the model is and what the data are."""
    flat: dict[str, Any] = {}
    for name, value in identity.items():
        flat.update(value if name in ("model", "data") else {name: value})
    return flat


class ExportReader(Mapping[str, torch.Tensor]):
    """Parameters by name, as they were stored, each read when it is asked for.

    Every file is checked against its size and hash before any is opened. Raises CheckpointError where one is missing,
    damaged, or named so that it lies elsewhere.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.facts = path, read_facts(path)
        files = [_checked(path, entry) for entry in self.facts["files"]]
        try:
            opened = {file.name: safe_open(file, framework="pt") for file in files if file.name != INDEX}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {path} ({error}); export the run again") from None
        self._where = {name: handle for handle in opened.values() for name in handle.keys()}  # noqa: SIM118
        if len(opened) > 1:
            self._check_index(read_json(file_inside(path, INDEX)), opened)

    def _check_index(self, index: dict[str, Any], opened: dict[str, Any]) -> None:
        """The index is for other readers; what it says must be what the files hold."""
        says = index.get("weight_map")
        holds = {name: file for file, handle in opened.items() for name in handle.keys()}  # noqa: SIM118
        if says != holds:
            raise CheckpointError(f"{self.path / INDEX} does not match the files beside it; export the run again")

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._where[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def _checked(folder: Path, entry: Any) -> Path:
    """A file of the export that has its recorded size and hash."""
    entry = entry if isinstance(entry, dict) else {}
    path = file_inside(folder, entry.get("name"))
    try:
        if path.stat().st_size != entry.get("bytes"):
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes, {entry.get('bytes')} were written; copy the folder again"
            )
        if hash_file(path) != entry.get("xxh3_128"):
            raise CheckpointError(f"{path} does not have its recorded hash; copy the folder again, whole")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; copy the folder again, whole") from None
    return path
