"""Values out of a committed checkpoint's files, whatever layout wrote them.

A fragment names its place in the flattened parameter, so the reader's layout need not be the writer's.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ecar_dist.runtime.checkpoint.files import DamagedError, Needed, open_fragments, read_manifest
from ecar_dist.runtime.checkpoint.manifest import Manifest

SECOND_MOMENT = "exp_avg_sq"
_BLOCK = 1 << 16  # values looked at together: they fit a cache


class FragmentReader:
    """Reads any slice of any parameter of a committed checkpoint.

    A file that is not `needed`, or was not fetched because nobody here needs it, is passed over; a gap shows when it is
    read. Raises DamagedError where a file does not hold what the manifest says.
    """

    def __init__(self, path: Path, needed: Needed = lambda file: True, manifest: Manifest | None = None) -> None:
        self._path = path
        self.manifest = manifest or read_manifest(path)
        self.shapes: dict[str, tuple[int, ...]] = dict(self.manifest.shapes)
        self.kinds: set[str] = set()  # of what there are fragments: `master`, AdamW's moments, the averages
        self._pieces: dict[str, list[tuple[int, int, Any]]] = {}
        for file in filter(needed, self.manifest.files):
            if not (path / file.name).exists():
                continue
            handle, self.kinds = open_fragments(path, self.manifest, file, "pt", self.kinds)
            for piece in file.pieces():
                self._pieces.setdefault(piece.name, []).append((piece.start, piece.numel, handle))

    def read(self, kind: str, name: str, start: int, numel: int, *, any_value: bool = False) -> torch.Tensor:
        """Elements [start, start + numel) of the flattened parameter, fp32 on CPU.

        Raises DamagedError on a gap, and where a value is one that training cannot go on from (see `value_problem`),
        unless `any_value` is to be read.
        """
        value = torch.empty(numel)
        filled = 0
        # their intervals do not overlap: the manifest was checked for it, and the files against the manifest
        for piece_start, piece_numel, handle in self._pieces.get(name, []) if kind in self.kinds else []:
            low, high = max(start, piece_start), min(start + numel, piece_start + piece_numel)
            if low < high:
                held = handle.get_slice(f"{kind}:{name}:{piece_start}")
                value[low - start : high - start] = held[low - piece_start : high - piece_start]
                filled += high - low
        if filled != numel:
            raise DamagedError(
                self._path, f"it holds {filled} of {numel} values of {kind} {name}, or it is of another model"
            )
        problem = None if any_value else value_problem(kind, value)
        if problem:
            raise DamagedError(self._path, f"{kind} of {name} {problem}")
        return value

    def full(self, kind: str, name: str) -> torch.Tensor:
        """A whole parameter in its own shape. Raises as `read`."""
        shape = self.shapes[name]
        return self.read(kind, name, 0, math.prod(shape)).view(shape)


def value_problem(kind: str, values: torch.Tensor) -> str | None:
    """Why training cannot go on from fp32 CPU values: one is not finite, or a second moment is negative; else None."""
    numbers = values.numpy()  # numpy: a thread of torch's own in the middle of its work aborts a program that ends
    for start in range(0, len(numbers), _BLOCK):
        block = numbers[start : start + _BLOCK]
        # least and largest: both are NaN where any value is, and faster than looking at each
        with np.errstate(invalid="ignore"):
            least, largest = float(block.min()), float(block.max())
        if not (math.isfinite(least) and math.isfinite(largest)):
            return "is not finite"
        if kind == SECOND_MOMENT and least < 0:
            return "is negative"
    return None
