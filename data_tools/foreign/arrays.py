"""Arrays of latents in files of other programs: `.npy`, `.npz`, `.pt` and `.safetensors`. Nothing in them is executed.

A file contains one array, or several named ones. The names are those of LightningDiT (`latents`, `latents_flip`,
`labels`) and MAR (`moments`, `moments_flip`).
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from ecar_dist.data.images.names import readable
from ecar_dist.errors import DataError

EXTENSIONS = (".npy", ".npz", ".pt", ".safetensors")
_LATENTS = ("moments", "latents", "latent")
_FLIPPED = ("moments_flip", "latents_flip", "latent_flip")
_LABELS = ("labels", "label")
_FLOATS = ("float16", "bfloat16", "float32", "float64", "F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class Content:
    """The content of one file. Arrays are read only when rows are taken from them."""

    where: str  # the file, in messages
    latents: Any  # [N, C, H, W] or [C, H, W]: an array, a tensor or a slice of a file
    flipped: Any | None
    labels: np.ndarray | None  # int64 [N]

    @property
    def shape(self) -> tuple[int, ...]:
        return _shape(self.latents)

    @property
    def count(self) -> int:
        return self.shape[0] if len(self.shape) == 4 else 1

    def take(self, rows: Sequence[int] | None) -> tuple[np.ndarray, np.ndarray | None]:
        """Latents and mirrored latents of some rows, float32 [n, C, H, W]; None: the only sample of the file.

        Raises DataError for values that are not finite.
        """
        straight = _floats(self.latents, rows)
        flipped = None if self.flipped is None else _floats(self.flipped, rows)
        if not all(np.isfinite(values).all() for values in (straight, flipped) if values is not None):
            raise DataError(f"{self.where} has values that are not finite (NaN or infinity); write it again")
        return straight, flipped


def open_file(path: Path, where: str) -> Content:
    """Raises DataError that names the file if it cannot be read, or contains no array of latents."""
    try:
        arrays = _arrays(path)
    except DataError:
        raise
    except Exception as error:  # a damaged file can fail in many ways
        raise DataError(f"{where} cannot be read ({_reason(error)}); write it again") from None

    # The arrays by their names.
    latents = _first(arrays, ("", *_LATENTS))
    if latents is None:
        listed = ", ".join(readable(name) for name in sorted(arrays)[:10]) or "nothing"
        raise DataError(f"{where} has {listed}, needs an array named {' or '.join(_LATENTS)}; rename it in the file")
    flipped = _first(arrays, _FLIPPED)
    labels = _first(arrays, _LABELS)

    # Their types and shapes.
    for array in (latents, flipped):
        if array is not None:
            _check(array, where)
    if flipped is not None and _shape(flipped) != _shape(latents):
        raise DataError(f"{where} has mirrored latents of shape {list(_shape(flipped))}, not {list(_shape(latents))}")
    content = Content(where, latents, flipped, None)
    if labels is None:
        return content
    return Content(where, latents, flipped, as_labels(_whole(labels), content.count, where))


def as_labels(array: np.ndarray, count: int, where: str) -> np.ndarray:
    """int64 [count]. Raises DataError unless it has one integer >= 0 for each of `count` samples."""
    flat = array.reshape(-1)
    if flat.dtype.kind not in "iu" or (len(flat) and flat.min() < 0):
        raise DataError(f"{where} has labels of type {array.dtype}; give integers from 0")
    if len(flat) != count:
        raise DataError(f"{where} has {len(flat)} labels for {count} samples; give one for each")
    return flat.astype(np.int64)


def read_label_file(path: Path, count: int) -> np.ndarray:
    """Labels of `.npy`, `.pt`, or a text file with one number per line. Raises DataError."""
    where = readable(str(path))
    try:
        if path.suffix in (".npy", ".pt"):
            (array,) = _arrays(path).values()
            return as_labels(_whole(array), count, where)
        numbers = [int(line) for line in path.read_text(encoding="utf-8").split()]
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"cannot read --labels {where} ({_reason(error)}); give numbers, one per sample") from None
    return as_labels(np.array(numbers, dtype=np.int64), count, where)


def _reason(error: Exception) -> str:
    """The first line of the error message of a library."""
    line = str(error).strip().split("\n")[0] or type(error).__name__
    return f"{readable(line):.200}"


def _arrays(path: Path) -> Mapping[str, Any]:
    """All arrays of a file by name; "" is the name of a single unnamed one."""
    if path.suffix == ".npy":
        return {"": np.load(path, mmap_mode="r", allow_pickle=False)}
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive:  # np.load would also read a pickle under that name
            names = archive.namelist()
        with np.load(path, allow_pickle=False) as file:
            return {name.removesuffix(".npy"): file[name.removesuffix(".npy")] for name in names}
    if path.suffix == ".safetensors":
        file = safe_open(path, framework="pt", device="cpu")
        return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if isinstance(loaded, torch.Tensor):
        return {"": loaded}
    if not isinstance(loaded, dict):
        raise DataError(f"{readable(str(path))} has a {type(loaded).__name__}, not a tensor or a dict; save a tensor")
    return {str(name): value for name, value in loaded.items() if isinstance(value, torch.Tensor)}


def _first(arrays: Mapping[str, Any], names: Sequence[str]) -> Any | None:
    return next((arrays[name] for name in names if name in arrays), None)


def _check(array: Any, where: str) -> None:
    """Raises DataError for an unsupported type or number of dimensions."""
    dtype = str(array.get_dtype() if hasattr(array, "get_dtype") else array.dtype).removeprefix("torch.")
    if dtype not in _FLOATS:
        raise DataError(f"{where} has dtype {readable(dtype)}; save float16, bfloat16, float32 or float64")
    shape = _shape(array)
    if len(shape) not in (3, 4) or 0 in shape:
        raise DataError(f"{where} has shape {list(shape)}; save latents as [C, H, W], or [N, C, H, W] for N samples")


def _shape(array: Any) -> tuple[int, ...]:
    return tuple(array.get_shape() if hasattr(array, "get_shape") else array.shape)


def _floats(array: Any, rows: Sequence[int] | None) -> np.ndarray:
    """float32 [n, C, H, W]."""
    if rows is None:
        return _float32(array[:]).reshape(-1, *_shape(array)[-3:])
    return np.concatenate([_float32(array[row : row + 1]) for row in rows])


def _float32(values: Any) -> np.ndarray:
    return values.float().numpy() if isinstance(values, torch.Tensor) else np.asarray(values, dtype=np.float32)


def _whole(array: Any) -> np.ndarray:
    values = array[:] if _shape(array) else array
    return values.numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
