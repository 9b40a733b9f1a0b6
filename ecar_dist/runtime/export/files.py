"""The files of an export, and how to read them.

    OUT/model.safetensors                      the weights; if they need more than one file,
        model-00001-of-00002.safetensors ...   shards, and
        model.safetensors.index.json           the shard of each parameter
        config.json                            facts for a loader, with size and hash of every file of weights
        config.yaml                            the resolved config of the run
        README.md, parity.json                 the model card; the comparison of the export with the run
        model_index.json, pipeline.py          make the folder a diffusers pipeline
        quantization.json                      quantised exports only, instead of parity.json: the costs and changes

A quantised export (`ecar-dist quantize`) stores some matrices as integers. It has its own schema, so that older
versions refuse it. Its config.json lists those layers.

File names and index follow the Hugging Face hub. An export may come from anybody, so names, sizes and hashes are
checked before any weight is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, ConfigDict, Field, model_validator

from ecar_dist.errors import CheckpointError, reason_of
from ecar_dist.runtime.checkpoint.files import DamagedError, open_tensors, sized_file
from ecar_dist.runtime.checkpoint.manifest import Progress, WeightsFile
from ecar_dist.storage.hashing import hash_file
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
PIPELINE_INDEX, PIPELINE = "model_index.json", "pipeline.py"
SCHEMA = "ecar-export-v1"
QUANTIZED_SCHEMA = "ecar-export-v2"
QUANTIZATION = "quantization.json"
MAX_HEADER_BYTES = MAX_JSON_BYTES  # of a file of weights
_COPY = "copy the whole folder again"
_STORED_AS = {"fp32": "F32", "bf16": "BF16"}
_INTEGERS = {4: "U8", 8: "I8"}  # of quantised weights, by their bits; two 4-bit weights share one byte


def _known_schema(name: str) -> str:
    if name not in (SCHEMA, QUANTIZED_SCHEMA):
        raise UntrustedError(
            f"it has schema {printable(name, 60)!r}, this version of ecar_dist reads {SCHEMA!r} and "
            f"{QUANTIZED_SCHEMA!r}; use the version that wrote it"
        )
    return name


class QuantizedLayer(Record):
    """Bits of a layer's weights, and whether its input is rotated. Its activations have 8 bits."""

    weights: Literal[4, 8]
    rotated: bool


class Quantization(Record):
    """The layers with integer weights, by name."""

    model_config = ConfigDict(extra="ignore")

    layers: Annotated[dict[str, QuantizedLayer], Field(min_length=1)]


class ExportFacts(Record):
    """The part of config.json that a loader needs. quantization: only in a quantised export."""

    model_config = ConfigDict(extra="ignore")

    schema_name: Annotated[str, AfterValidator(_known_schema)] = Field(alias="schema")
    dtype: Literal["fp32", "bf16"]
    files: Annotated[tuple[WeightsFile, ...], Field(min_length=1)]
    progress: Progress
    identity: dict[str, Any]
    average: dict[str, Any] = Field(default_factory=dict)
    class_names: list[str] | None = None  # older exports have none
    quantization: Quantization | None = None

    @model_validator(mode="after")
    def _of_its_schema(self) -> ExportFacts:
        if (self.quantization is None) != (self.schema_name == SCHEMA):
            raise UntrustedError(f"it has schema {self.schema_name}, which does not match its key quantization")
        return self

    def stored_type(self, name: str) -> str:
        """The safetensors type of a tensor."""
        layer, _, part = name.rpartition(".")
        if self.quantization is None or layer not in self.quantization.layers:
            return _STORED_AS[self.dtype]
        return _INTEGERS[self.quantization.layers[layer].weights] if part == "weight" else "F32"


class _Index(Record):
    model_config = ConfigDict(extra="ignore")

    weight_map: dict[str, str]


def is_export(path: Path) -> bool:
    return (path / FACTS).exists()


def read_facts(path: Path) -> ExportFacts:
    """config.json of an export. Raises CheckpointError if it is missing or not from an export of ecar_dist."""
    return _read(path, FACTS, ExportFacts)


class ExportReader(Mapping[str, torch.Tensor]):
    """Parameters by name, in the stored type, each read on access.

    Size, header and hash of every file are checked first. Raises CheckpointError if a file is missing, damaged or
    outside the folder, and if a value that is read is not finite.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts = read_facts(path)

        # Hash and open every file. A parameter may be in only one file.
        opened = {file.name: _opened(path, file, self.facts) for file in self.facts.files}
        self._where = {name: handle for handle in opened.values() for name in handle.keys()}  # noqa: SIM118
        if len(self._where) != sum(len(handle.keys()) for handle in opened.values()):
            raise CheckpointError(f"{path} has a parameter twice; export the run again")
        if len(opened) > 1:
            self._check_index(_read(path, INDEX, _Index), opened)

    def _check_index(self, index: _Index, opened: dict[str, Any]) -> None:
        """Other readers trust the index, so it must match the files."""
        stored = {name: file for file, handle in opened.items() for name in handle.keys()}  # noqa: SIM118
        if index.weight_map != stored:
            raise CheckpointError(f"{self.path / INDEX} does not match the files next to it; export the run again")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(handle.get_slice(name).get_shape()) for name, handle in self._where.items()}

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
        raise CheckpointError(f"cannot read {path / name}: {reason_of(error)}; {_COPY}") from None
    except UntrustedError as error:
        raise CheckpointError(
            f"{path / name} is damaged, or not from an export of ecar_dist: {error}; {_COPY}, or export the run again"
        ) from None


def _opened(path: Path, file: WeightsFile, facts: ExportFacts) -> Any:
    """Open a file of the export after checking its size, header and hash."""
    # Check header and type before the hash: they are small, and the hash needs the complete file.
    try:
        found = sized_file(path, file)
        handle = open_tensors(found, "pt", MAX_HEADER_BYTES)
        types = {name: handle.get_slice(name).get_dtype() for name in handle.keys()}  # noqa: SIM118
        odd = next((name for name, stored in types.items() if stored != facts.stored_type(name)), None)
        if odd is not None:
            expected = facts.stored_type(odd) if facts.quantization else facts.dtype
            raise UntrustedError(f"has {printable(odd)}, which is not {expected}")
        if (digest := hash_file(found)) != file.xxh3_128:
            raise UntrustedError(f"has xxh3_128 {digest}, {FACTS} says {file.xxh3_128}")
    except DamagedError as damage:
        raise CheckpointError(f"{path}: {damage.problem}; {_COPY}") from None
    except (OSError, UntrustedError) as error:
        raise CheckpointError(f"{path / file.name} {reason_of(error)}; {_COPY}") from None
    return handle
