"""The difference of two checkpoints, of one run or of two, whatever numbers of ranks wrote them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ecar_dist.command_line import columns
from ecar_dist.runtime.checkpoint.manifest import Manifest
from ecar_dist.runtime.checkpoint.reader import FragmentReader
from ecar_dist.runtime.checkpoint.report import blocks, headline
from ecar_dist.runtime.export.files import flat_identity
from ecar_dist.storage.untrusted import printable

LARGEST = 10


@dataclass(frozen=True)
class CheckpointDiff:
    """`equal`: the same parameters and kinds with the same values; progress and writers may still differ."""

    equal: bool
    lines: list[str]


@dataclass(frozen=True)
class _Change:
    """How far B is from A, in one parameter or over several: sums of squares, and the largest absolute difference."""

    difference: float
    reference: float
    largest: float

    @property
    def relative(self) -> float:
        """|B - A| / |A| in L2; infinite where A is zero and B is not."""
        if self.reference == 0.0:
            return math.inf if self.difference else 0.0
        return math.sqrt(self.difference / self.reference)

    @staticmethod
    def over(changes: Iterable[_Change]) -> _Change:
        parts = list(changes)
        largest = max((part.largest for part in parts), default=0.0)
        worst = math.nan if any(math.isnan(part.largest) for part in parts) else largest
        return _Change(sum(part.difference for part in parts), sum(part.reference for part in parts), worst)


def diff_checkpoints(a: Path, b: Path) -> CheckpointDiff:
    """Compare two committed checkpoints; both should have been proven whole (see checkpoint_report.find_checkpoint)."""
    ours, theirs = FragmentReader(a), FragmentReader(b)
    heads = _head_lines((a, b), (ours.manifest, theirs.manifest))
    odd = [f"only in {side}: {kind}" for side, kind in _in_one_alone(sorted(ours.kinds), sorted(theirs.kinds))]
    odd += _odd_parameters(ours, theirs)
    changes = _changes(ours, theirs, sorted(ours.kinds & theirs.kinds))
    differ = {key: change for key, change in changes.items() if change.difference != 0.0}  # a NaN differs
    if not odd and not differ:
        kinds, names = {kind for kind, _ in changes}, {name for _, name in changes}
        return CheckpointDiff(True, [*heads, f"equal: {len(names)} tensors of {', '.join(sorted(kinds))}, every value"])
    return CheckpointDiff(False, [*heads, *odd, *_change_lines(changes, differ)])


def _head_lines(paths: tuple[Path, Path], manifests: tuple[Manifest, Manifest]) -> list[str]:
    lines = [
        f"{side} {path}: {headline(manifest)}" for side, path, manifest in zip("AB", paths, manifests, strict=True)
    ]
    ours, theirs = (flat_identity(manifest.identity) for manifest in manifests)
    return lines + [
        printable(f"identity {key}: {ours.get(key)} -> {theirs.get(key)}")
        for key in {**ours, **theirs}
        if ours.get(key) != theirs.get(key)
    ]


def _odd_parameters(a: FragmentReader, b: FragmentReader) -> list[str]:
    """What only one of the two holds, or holds in another shape."""
    lines = [f"only in {side}: parameter {name}" for side, name in _in_one_alone(a.shapes, b.shapes)]
    return lines + [
        f"parameter {name}: {list(a.shapes[name])} -> {list(b.shapes[name])}"
        for name in a.shapes
        if name in b.shapes and a.shapes[name] != b.shapes[name]
    ]


def _in_one_alone(a: Iterable[str], b: Iterable[str]) -> list[tuple[str, str]]:
    ours, theirs = list(a), list(b)
    return [("A", x) for x in ours if x not in theirs] + [("B", x) for x in theirs if x not in ours]


def _changes(a: FragmentReader, b: FragmentReader, kinds: list[str]) -> dict[tuple[str, str], _Change]:
    """By kind and parameter, of what both hold in the same shape."""
    return {
        (kind, name): _Change.over(
            _change(x, y) for x, y in zip(blocks(a, kind, name), blocks(b, kind, name), strict=True)
        )
        for kind in kinds
        for name, shape in a.shapes.items()
        if b.shapes.get(name) == shape
    }


def _change(a: torch.Tensor, b: torch.Tensor) -> _Change:
    same = (a == b) | (a.isnan() & b.isnan())
    apart = torch.where(same, 0.0, b.double() - a.double())
    return _Change(float(apart.square().sum()), float(a.double().square().sum()), float(apart.abs().max()))


def _change_lines(changes: dict[tuple[str, str], _Change], differ: dict[tuple[str, str], _Change]) -> list[str]:
    kinds = list(dict.fromkeys(kind for kind, _ in changes))
    modules = list(dict.fromkeys(_module(name) for _, name in changes))
    rows = [(module or "all", *(_relative(changes, kind, module) for kind in kinds)) for module in [*modules, ""]]
    first = sorted(differ.items(), key=lambda item: -_rank(item[1]))[:LARGEST]
    worst = [(name, kind, f"{change.relative:.3g}", f"{change.largest:.3g}") for (kind, name), change in first]
    return [
        "relative difference |B - A| / |A| by module",
        *columns([("module", *kinds), *rows]),
        f"the {len(first)} largest of {len(differ)} tensors that differ",
        *columns([("parameter", "kind", "relative", "max abs"), *worst]),
    ]


def _relative(changes: dict[tuple[str, str], _Change], kind: str, module: str) -> str:
    """Over the parameters of a module; of all where it is empty."""
    total = _Change.over(
        change for (of, name), change in changes.items() if of == kind and module in ("", _module(name))
    )
    return f"{total.relative:.3g}"


def _rank(change: _Change) -> float:
    """What is no number comes first."""
    return math.inf if math.isnan(change.relative) else change.relative


def _module(name: str) -> str:
    return ".".join(itertools.islice(name.split("."), 2))
