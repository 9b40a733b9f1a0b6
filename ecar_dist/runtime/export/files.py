"""The files of an export: what a reader needs, and nothing about who writes it.

    OUT/model.safetensors                      the weights; or, where they are more than one file's worth,
        model-00001-of-00002.safetensors ...   shards, and
        model.safetensors.index.json           which parameter lies in which
        config.json                            facts for a loader, and size and hash of every file of weights
        config.yaml                            the resolved config of the run
        README.md, parity.json                 the model card; what the export was compared with

The names and the index are those of the Hugging Face hub. Everything may come from a stranger: it is checked against
what the models below say, names and sizes first, before it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field

from ecar_dist.errors import CheckpointError
from ecar_dist.runtime.checkpoint.files import DamagedError, hash_file, open_tensors, sized_file
from ecar_dist.runtime.checkpoint.manifest import Reached, WeightsFile
from ecar_dist.storage.untrusted import (
    MAX_JSON_BYTES,
    AnyRecord,
    Record,
    UntrustedError,
    path_inside,
    printable,
    read_record,
)

FACTS, CONFIG, CARD = "config.json", "config.yaml", "README.md"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SCHEMA = "ecar-export-v1"
MAX_HEADER_BYTES = MAX_JSON_BYTES  # of a file of weights
_STORED_AS = {"fp32": "F32", "bf16": "BF16"}


class ExportFacts(Record):
    """config.json, as far as a loader needs it; the rest is for people."""

    model_config = ConfigDict(extra="ignore")

    schema_name: Literal["ecar-export-v1"] = Field(alias="schema")
    dtype: Literal["fp32", "bf16"]
    files: Annotated[tuple[WeightsFile, ...], Field(min_length=1)]
    progress: Reached
    identity: dict[str, Any]


class _Index(Record):
    model_config = ConfigDict(extra="ignore")

    weight_map: dict[str, str]


def is_export(path: Path) -> bool:
    return (path / FACTS).exists()


def read_facts(path: Path) -> ExportFacts:
    """config.json of an export. Raises CheckpointError where it is not one of ours."""
    return _read(path, FACTS, ExportFacts)


def flat_identity(identity: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's identity without its grouping into what the model is and what the data are."""
    flat: dict[str, Any] = {}
    for name, value in identity.items():
        flat.update(value if name in ("model", "data") and isinstance(value, dict) else {name: value})
    return flat


class ExportReader(Mapping[str, torch.Tensor]):
    """Parameters by name, as they were stored, each read when it is asked for.

    Every file is checked against its size, header and hash before any value is read. Raises CheckpointError where one
    is missing, damaged, or named so that it lies elsewhere, and on reading a value that is not finite.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.facts = path, read_facts(path)
        opened = {file.name: _opened(path, file, self.facts.dtype) for file in self.facts.files}
        self._where = {name: handle for handle in opened.values() for name in handle.keys()}  # noqa: SIM118
        if len(self._where) != sum(len(handle.keys()) for handle in opened.values()):
            raise CheckpointError(f"{path} holds a parameter twice; export the run again")
        if len(opened) > 1:
            self._check_index(_read(path, INDEX, _Index), opened)

    def _check_index(self, index: _Index, opened: dict[str, Any]) -> None:
        """The index is for other readers; what it says must be what the files hold."""
        holds = {name: file for file, handle in opened.items() for name in handle.keys()}  # noqa: SIM118
        if index.weight_map != holds:
            raise CheckpointError(f"{self.path / INDEX} does not match the files beside it; export the run again")

    def __getitem__(self, name: str) -> torch.Tensor:
        value: torch.Tensor = self._where[name].get_tensor(name)
        if not value.isfinite().all():
            raise CheckpointError(f"{self.path}: {printable(name)} is not finite; export the run again")
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def _read(path: Path, name: str, model: type[AnyRecord]) -> AnyRecord:
    try:
        return read_record(path_inside(path, name), model)
    except OSError as error:
        raise CheckpointError(f"cannot read {path / name}: {error.strerror}; copy the folder again, whole") from None
    except UntrustedError as error:
        raise CheckpointError(
            f"{path / name} is damaged, or not of an export of this program: {error}; copy the folder again, whole, "
            f"or export the run again"
        ) from None


def _opened(path: Path, file: WeightsFile, dtype: str) -> Any:
    """A file of the export that has its recorded size and hash, and holds values of the recorded type."""
    try:
        found = sized_file(path, file)
        handle = open_tensors(found, "pt", MAX_HEADER_BYTES)
        types = {name: handle.get_slice(name).get_dtype() for name in handle.keys()}  # noqa: SIM118
        odd = next((name for name, stored in types.items() if stored != _STORED_AS[dtype]), None)
        if odd is not None:
            raise UntrustedError(f"holds {printable(odd)}, which is not {dtype}")
        if hash_file(found) != file.xxh3_128:
            raise UntrustedError("does not have its recorded hash")
    except DamagedError as damage:
        raise CheckpointError(f"{path}: {damage.problem}; copy the folder again, whole") from None
    except (OSError, UntrustedError) as error:
        problem = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path / file.name} {problem}; copy the folder again, whole") from None
    return handle
