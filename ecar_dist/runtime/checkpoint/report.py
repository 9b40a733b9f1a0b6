"""What a checkpoint holds, in words for a person. Parameters are read block by block, whatever their size."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ecar_dist.command_line import columns, counted
from ecar_dist.errors import CheckpointError
from ecar_dist.runtime.checkpoint.files import DamagedError, has_marker, step_of, verify
from ecar_dist.runtime.checkpoint.folder import newest_whole, open_place
from ecar_dist.runtime.checkpoint.manifest import Manifest
from ecar_dist.runtime.checkpoint.reader import FragmentReader
from ecar_dist.runtime.export.files import flat_identity
from ecar_dist.runtime.run.directory import RunDirectory
from ecar_dist.storage.untrusted import printable

BLOCK = 1 << 22  # elements read at once


def find_checkpoint(path: Path, step: int | None = None) -> Path:
    """`path` is a checkpoint, or a run: then its checkpoint after `step`, by default the newest; proven whole.

    Raises ConfigError or CheckpointError where there is none, or where it is damaged.
    """
    if has_marker(path):
        verify(path)
        return path
    config = RunDirectory(path).load_config()
    place = open_place(config, path)
    if step is None:
        return newest_whole(place)
    names = {step_of(name): name for name in reversed(place.committed())}
    if step not in names:
        raise CheckpointError(
            f"{place.where} has no checkpoint of step {step}; it has those of {sorted(names) or 'none'}"
        )
    try:
        return place.fetch(names[step])
    except DamagedError as damage:
        raise CheckpointError(f"{place.where}/{names[step]}: {damage.problem}; use an older checkpoint") from None


def inspect_lines(path: Path) -> list[str]:
    """How far it is, who wrote it, what it belongs to, and for each kind of state its size and its numbers."""
    reader = FragmentReader(path)
    manifest = reader.manifest
    size = sum(file.bytes for file in manifest.files)
    head = ("kind", "values", "MiB", "norm", "largest", "not finite")
    rows = [(kind, *_Numbers.of(reader, kind).cells()) for kind in sorted(reader.kinds)]
    return [
        f"{path}: {headline(manifest)}; {len(manifest.files)} files, {size / 2**20:.1f} MiB",
        f"{sum(map(math.prod, reader.shapes.values())):,} parameters in {len(reader.shapes)} tensors",
        *columns([head, *rows]),
        "identity",
        *(printable(f"  {name}: {value}") for name, value in flat_identity(manifest.identity).items()),
        *(printable(textwrap.shorten(f"note {name}: {value}", 120)) for name, value in manifest.notes.items()),
    ]


def headline(manifest: Manifest) -> str:
    progress = manifest.progress
    return (
        f"step {progress.step:,}, {progress.samples_seen:,} samples, written by "
        f"{counted(manifest.world_size, 'rank')} with ZeRO-{manifest.zero_stage}"
    )


def blocks(reader: FragmentReader, kind: str, name: str) -> Iterator[torch.Tensor]:
    """A parameter, flattened, in pieces of at most BLOCK elements, be they numbers or not."""
    numel = math.prod(reader.shapes[name])
    for start in range(0, numel, BLOCK):
        yield reader.read(kind, name, start, min(BLOCK, numel - start), any_value=True)


@dataclass
class _Numbers:
    """Running sums over the values of one kind; what is not finite is counted and left out of the others."""

    count: int = 0
    squares: float = 0.0
    largest: float = 0.0
    not_finite: int = 0

    @staticmethod
    def of(reader: FragmentReader, kind: str) -> _Numbers:
        numbers = _Numbers()
        for name in reader.shapes:
            for block in blocks(reader, kind, name):
                numbers._add(block)
        return numbers

    def _add(self, block: torch.Tensor) -> None:
        finite = block[block.isfinite()]
        self.count += block.numel()
        self.not_finite += block.numel() - finite.numel()
        self.squares += float(finite.double().square().sum())
        self.largest = max(self.largest, float(finite.abs().max()) if finite.numel() else 0.0)

    def cells(self) -> tuple[str, ...]:
        size = f"{self.count * 4 / 2**20:.1f}"
        return f"{self.count:,}", size, f"{math.sqrt(self.squares):.4g}", f"{self.largest:.4g}", f"{self.not_finite:,}"
