"""`checkpoint inspect` and `checkpoint diff`: what a checkpoint contains, and how two of them differ.

Parameters are read in blocks, so that memory does not grow with their size.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ecar_dist.command_line import columns, counted
from ecar_dist.errors import CheckpointError
from ecar_dist.runtime.checkpoint.compare import differences
from ecar_dist.runtime.checkpoint.files import has_marker, step_of, verify
from ecar_dist.runtime.checkpoint.manifest import Manifest, flat_identity
from ecar_dist.runtime.checkpoint.reader import FragmentReader
from ecar_dist.runtime.checkpoint.storage import CheckpointStorage, newest_whole, open_storage
from ecar_dist.runtime.run.directory import RunDirectory
from ecar_dist.storage.untrusted import printable

BLOCK = 1 << 22  # elements read at a time
LARGEST = 10  # changes that are listed individually


def find_checkpoint(path: Path, step: int | None = None) -> Path:
    """A local folder with a verified checkpoint: `path`, or the one of run `path` at `step` (default: the newest).

    Raises ConfigError or CheckpointError if there is none, or if it is damaged.
    """
    if has_marker(path):
        verify(path)
        return path
    storage = open_storage(RunDirectory(path).load_config(), path)
    return newest_whole(storage) if step is None else fetch_step(step, storage)


def fetch_step(step: int, *storages: CheckpointStorage) -> Path:
    """A local folder with the verified checkpoint of a step, from the first storage that has it.

    Raises a CheckpointError that lists the available steps.
    """
    found: set[int] = set()
    for storage in storages:
        # A bucket may have several checkpoints of one step: take the newest.
        names = {step_of(name): name for name in reversed(storage.committed())}
        if step in names:
            return storage.fetch(names[step])
        found |= names.keys()
    raise CheckpointError(
        f"{storages[0].where} has no checkpoint of step {step}; available steps: {sorted(found) or 'none'}"
    )


def inspect_lines(path: Path) -> list[str]:
    """Progress, writer, size and statistics of every kind of state, identity and client state of a checkpoint."""
    reader = FragmentReader(path)
    manifest = reader.manifest
    size = sum(file.bytes for file in manifest.files)
    parameters = sum(map(math.prod, reader.shapes.values()))
    rows = [_Statistics.of(reader, kind).row(kind) for kind in sorted(reader.kinds)]
    return [
        f"{path}: {_headline(manifest)}; {len(manifest.files)} files, {size / 2**20:.1f} MiB",
        f"{parameters:,} parameters in {len(reader.shapes)} tensors",
        *columns([("kind", "values", "MiB", "norm", "largest", "not finite"), *rows]),
        "identity",
        *(printable(f"  {name}: {value}") for name, value in flat_identity(manifest.identity).items()),
        "client state",
        *(printable(textwrap.shorten(f"  {name}: {value}", 120)) for name, value in manifest.client_state.items()),
    ]


@dataclass(frozen=True)
class CheckpointDiff:
    """`equal`: same parameters, kinds of state and values. Progress and writers may still differ."""

    equal: bool
    lines: list[str]


def diff_checkpoints(a: Path, b: Path) -> CheckpointDiff:
    """Compare two checkpoints, of one run or two, written by any number of ranks. Both must be verified."""
    readers = FragmentReader(a), FragmentReader(b)
    lines = _head_lines((a, b), (readers[0].manifest, readers[1].manifest))
    missing = _missing_lines(*readers)
    changes = _changes(*readers)

    # `!= 0.0`, because a NaN also counts as a difference.
    different = {key: change for key, change in changes.items() if change.difference != 0.0}
    if not missing and not different:
        kinds = sorted({kind for kind, _ in changes})
        names = {name for _, name in changes}
        return CheckpointDiff(True, [*lines, f"equal: {len(names)} tensors of {', '.join(kinds)}, every value"])
    return CheckpointDiff(False, [*lines, *missing, *_change_lines(changes, different)])


@dataclass
class _Statistics:
    """Sums over all values of one kind. Non-finite values are counted, and excluded from the other numbers."""

    count: int = 0
    squares: float = 0.0
    largest: float = 0.0
    not_finite: int = 0

    @staticmethod
    def of(reader: FragmentReader, kind: str) -> _Statistics:
        total = _Statistics()
        for name in reader.shapes:
            for block in _blocks(reader, kind, name):
                finite = block[block.isfinite()]
                total.count += block.numel()
                total.not_finite += block.numel() - finite.numel()
                total.squares += float(finite.double().square().sum())
                total.largest = max(total.largest, float(finite.abs().max()) if finite.numel() else 0.0)
        return total

    def row(self, kind: str) -> tuple[str, ...]:
        mib = f"{self.count * 4 / 2**20:.1f}"
        norm = f"{math.sqrt(self.squares):.4g}"
        return kind, f"{self.count:,}", mib, norm, f"{self.largest:.4g}", f"{self.not_finite:,}"


@dataclass(frozen=True)
class _Change:
    """The change from A to B in one or several tensors: sums of squares, and the largest absolute difference."""

    difference: float  # sum of (b - a)^2
    reference: float  # sum of a^2
    largest: float

    @property
    def relative(self) -> float:
        """|B - A| / |A| in L2; infinite if A is zero and B is not."""
        if self.reference == 0.0:
            return math.inf if self.difference else 0.0
        return math.sqrt(self.difference / self.reference)

    @staticmethod
    def of(a: torch.Tensor, b: torch.Tensor) -> _Change:
        same = (a == b) | (a.isnan() & b.isnan())
        apart = torch.where(same, 0.0, b.double() - a.double())
        return _Change(float(apart.square().sum()), float(a.double().square().sum()), float(apart.abs().max()))

    @staticmethod
    def over(changes: Iterable[_Change]) -> _Change:
        parts = list(changes)
        largest = [part.largest for part in parts] or [0.0]
        worst = math.nan if any(map(math.isnan, largest)) else max(largest)
        return _Change(sum(part.difference for part in parts), sum(part.reference for part in parts), worst)


def _changes(a: FragmentReader, b: FragmentReader) -> dict[tuple[str, str], _Change]:
    """The change of every tensor that both have in the same shape, by kind and parameter."""
    return {
        (kind, name): _Change.over(
            _Change.of(x, y) for x, y in zip(_blocks(a, kind, name), _blocks(b, kind, name), strict=True)
        )
        for kind in sorted(a.kinds & b.kinds)
        for name, shape in a.shapes.items()
        if b.shapes.get(name) == shape
    }


def _blocks(reader: FragmentReader, kind: str, name: str) -> Iterator[torch.Tensor]:
    """A flattened parameter in blocks of at most BLOCK elements, including non-finite values."""
    numel = math.prod(reader.shapes[name])
    for start in range(0, numel, BLOCK):
        yield reader.read(kind, name, start, min(BLOCK, numel - start), any_value=True)


def _headline(manifest: Manifest) -> str:
    progress = manifest.progress
    return (
        f"step {progress.step:,}, {progress.samples_seen:,} samples, written by "
        f"{counted(manifest.world_size, 'rank')} with ZeRO-{manifest.zero_stage}"
    )


def _head_lines(paths: tuple[Path, Path], manifests: tuple[Manifest, Manifest]) -> list[str]:
    heads = zip("AB", paths, manifests, strict=True)
    lines = [f"{side} {path}: {_headline(manifest)}" for side, path, manifest in heads]
    ours, theirs = (flat_identity(manifest.identity) for manifest in manifests)
    changed = differences(theirs, ours)
    return lines + [printable(f"identity {key}: {ours.get(key)} -> {theirs.get(key)}") for key in changed]


def _missing_lines(a: FragmentReader, b: FragmentReader) -> list[str]:
    """Kinds and parameters that only one of the two has, and parameters whose shapes differ."""
    lines = []
    for one, other, side in ((a, b, "A"), (b, a, "B")):
        lines += [f"only in {side}: {kind}" for kind in sorted(one.kinds - other.kinds)]
        lines += [f"only in {side}: parameter {name}" for name in one.shapes if name not in other.shapes]
    for name, shape in a.shapes.items():
        if b.shapes.get(name, shape) != shape:
            lines.append(f"parameter {name}: {list(shape)} -> {list(b.shapes[name])}")
    return lines


def _change_lines(changes: dict[tuple[str, str], _Change], different: dict[tuple[str, str], _Change]) -> list[str]:
    """A table by module and kind, and the tensors that differ most."""
    kinds = list(dict.fromkeys(kind for kind, _ in changes))
    modules = list(dict.fromkeys(_module(name) for _, name in changes))
    by_module = [("module", *kinds)]
    for module in [*modules, "all"]:
        cells = []
        for kind in kinds:
            inside = (
                change for (of, name), change in changes.items() if of == kind and module in ("all", _module(name))
            )
            cells.append(f"{_Change.over(inside).relative:.3g}")
        by_module.append((module, *cells))

    # A NaN change comes first.
    def rank(change: _Change) -> float:
        return math.inf if math.isnan(change.relative) else change.relative

    most = sorted(different.items(), key=lambda item: -rank(item[1]))[:LARGEST]
    by_tensor = [("parameter", "kind", "relative", "max abs")]
    by_tensor += [(name, kind, f"{change.relative:.3g}", f"{change.largest:.3g}") for (kind, name), change in most]
    return [
        "relative difference |B - A| / |A| by module",
        *columns(by_module),
        f"the {len(most)} largest of {len(different)} tensors that differ",
        *columns(by_tensor),
    ]


def _module(name: str) -> str:
    return ".".join(itertools.islice(name.split("."), 2))
