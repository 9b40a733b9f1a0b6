"""Write a quantised export: integers and their scales in safetensors, with a description that loaders read."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ecar_dist.config.run import RunConfig
from ecar_dist.errors import CheckpointError, reason_of
from ecar_dist.quantize.linear import ACTIVATION_BITS, QuantizedLinear
from ecar_dist.runtime.checkpoint.tensor_file import TensorEntry
from ecar_dist.runtime.export.files import QUANTIZED_SCHEMA
from ecar_dist.runtime.export.write import DTYPES, GIB, write_texts, write_weights
from ecar_dist.storage.atomic import sync_to_disk, temporary_beside


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder that is renamed to `out` after the block. Raises CheckpointError if it cannot be written."""
    temporary = temporary_beside(out)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(out)
        sync_to_disk(out.parent)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {out}: {reason_of(error)}; free space there, or choose another folder"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_quantized(
    folder: Path,
    config: RunConfig,
    facts: dict[str, Any],
    model: nn.Module,
    about: dict[str, Any],
    max_shard_gib: float = 5.0,
) -> int:
    """Fill a folder with an export of a quantised model; returns the bytes of its weights.

    facts: config.json of the original model. about: how it was quantised, for people.
    """
    entries = tensor_entries(model, DTYPES[facts["dtype"]])
    files = write_weights(folder, entries, int(max_shard_gib * GIB))

    described = {
        name: {"weights": layer.weight_bits, "rotated": layer.rotated}
        for name, layer in sorted(quantized_layers(model).items())
    }
    quantization = {**about, "activations": ACTIVATION_BITS, "layers": described}
    write_texts(
        folder, config, {**facts, "schema": QUANTIZED_SCHEMA, "files": files, "quantization": quantization}, None
    )
    return sum(file["bytes"] for file in files)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantised layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def tensor_entries(model: nn.Module, dtype: torch.dtype) -> list[TensorEntry]:
    """What is stored for a model: integers, scales and biases of quantised layers as they are, the rest in `dtype`."""
    layers = quantized_layers(model)
    entries = []
    for name, value in model.state_dict().items():
        stored = value.dtype if name.rpartition(".")[0] in layers else dtype
        entries.append(TensorEntry(name, stored, tuple(value.shape), _producer(value, stored)))
    return entries


def _producer(value: torch.Tensor, dtype: torch.dtype) -> Any:
    return lambda: value.to(dtype)
