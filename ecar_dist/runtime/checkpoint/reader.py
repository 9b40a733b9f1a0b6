"""Read any slice of any parameter of a checkpoint, for any number of ranks and ZeRO stage that wrote it.

A fragment records its position in the flattened parameter, so readers do not depend on the writers' layout.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ecar_dist.runtime.checkpoint.files import DamagedError, Needed, all_files, open_fragments, read_manifest
from ecar_dist.runtime.checkpoint.manifest import Manifest

MASTER = "master"  # the fp32 weights
SECOND_MOMENT = "exp_avg_sq"
_BLOCK = 1 << 16  # values checked at a time; they fit in the CPU's cache


class FragmentReader:
    """The values of a committed checkpoint in folder `path`.

    Only files that are `needed` and present are opened: a fetch from a bucket skips the others. Reading a value that
    none of them contains is an error. Raises DamagedError if a file differs from the manifest.
    """

    def __init__(self, path: Path, needed: Needed = all_files, manifest: Manifest | None = None) -> None:
        self._path = path
        self.manifest = manifest or read_manifest(path)
        self.shapes: dict[str, tuple[int, ...]] = dict(self.manifest.shapes)
        self.kinds: set[str] = set()  # `master`, the AdamW moments, the EMAs; an EMA snapshot has only EMAs
        self._pieces: dict[str, list[tuple[int, int, Any]]] = {}  # (start, numel, file) by parameter

        # Opening maps a file and checks its header; values are read later.
        for file in needed(self.manifest):
            if not (path / file.name).exists():
                continue
            handle, self.kinds = open_fragments(path, self.manifest, file, "pt", self.kinds)
            for piece in file.pieces(self.shapes):
                self._pieces.setdefault(piece.name, []).append((piece.start, piece.numel, handle))

    def read(self, kind: str, name: str, start: int, numel: int, *, any_value: bool = False) -> torch.Tensor:
        """Elements [start, start + numel) of the flattened parameter, fp32 on CPU.

        Raises DamagedError if values are missing. Unless `any_value`, also raises it if training cannot resume from a
        value (see `value_problem`).
        """
        value = torch.empty(numel)
        filled = 0

        # Fragments do not overlap: the manifest was checked for that, and the files match the manifest.
        for piece_start, piece_numel, handle in self._pieces.get(name, []) if kind in self.kinds else []:
            low, high = max(start, piece_start), min(start + numel, piece_start + piece_numel)
            if low < high:
                fragment = handle.get_slice(f"{kind}:{name}:{piece_start}")
                value[low - start : high - start] = fragment[low - piece_start : high - piece_start]
                filled += high - low
        if filled != numel:
            raise DamagedError(
                self._path, f"it has {filled} of {numel} values of {kind} {name}, or it belongs to a different model"
            )

        problem = None if any_value else value_problem(kind, value)
        if problem:
            raise DamagedError(self._path, f"{kind} of {name} {problem}")
        return value

    def full(self, kind: str, name: str) -> torch.Tensor:
        """A complete parameter in its shape. Raises like `read`."""
        shape = self.shapes[name]
        return self.read(kind, name, 0, math.prod(shape)).view(shape)


def value_problem(kind: str, values: torch.Tensor) -> str | None:
    """Why training cannot resume from these fp32 CPU values, or None.

    Values must be finite, and second moments of AdamW must not be negative.
    """
    # Use numpy, because this runs in a thread: a process that exits while torch's own threads are busy aborts.
    numbers = values.numpy()
    for start in range(0, len(numbers), _BLOCK):
        block = numbers[start : start + _BLOCK]
        # If any value is NaN, minimum and maximum are NaN. They are faster than `isfinite` for each value.
        with np.errstate(invalid="ignore"):
            least, largest = float(block.min()), float(block.max())
        if not (math.isfinite(least) and math.isfinite(largest)):
            return "is not finite"
        if kind == SECOND_MOMENT and least < 0:
            return "is negative"
    return None
