"""Which rows of a learned table come from which rows of another model's table. All functions are pure.

A table of classes, stages or positions may have different rows in the new model. Its rows are matched by meaning:
classes by name or number, stages by number or by the side of their token grid. Positions of a grid with a different
side are interpolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ecar_dist.models.layers import ClassEmbedding, PositionEmbedding, StageEmbedding
from ecar_dist.storage.untrusted import printable

SHOWN_NAMES = 3  # of new classes in one line


@dataclass(frozen=True)
class Converted:
    """A table of the new model: values [rows, D], and which rows are known, bool [rows]. The others stay as built."""

    values: torch.Tensor
    known: torch.Tensor


@dataclass(frozen=True)
class Segment:
    """Rows `start` .. `start + rows` of the new table, from rows `source` .. of the other one; None: they are new.

    `sides`: of the old and the new token grid, if the rows are positions.
    """

    start: int
    rows: int
    source: int | None
    sides: tuple[int, int] | None = None


@dataclass(frozen=True)
class RowPlan:
    """How one table is filled, and a note about what happens to its rows."""

    segments: tuple[Segment, ...]
    note: str

    @property
    def resizes(self) -> bool:
        return any(one.source is not None and one.sides and one.sides[0] != one.sides[1] for one in self.segments)

    def convert(self, table: torch.Tensor) -> Converted:
        """Convert the other model's table, [rows, D], to the new one."""
        rows = sum(segment.rows for segment in self.segments)
        values = table.new_zeros(rows, table.shape[1], dtype=torch.float32)
        known = torch.zeros(rows, dtype=torch.bool)
        for segment in self.segments:
            if segment.source is None:
                continue
            place = slice(segment.start, segment.start + segment.rows)
            values[place] = _resized(table.float(), segment)
            known[place] = True
        return Converted(values, known)


def _resized(table: torch.Tensor, segment: Segment) -> torch.Tensor:
    """The rows of a segment, [rows, D]: copied, or a grid of positions resized to a different side."""
    assert segment.source is not None
    old, new = segment.sides or (0, 0)
    if old == new:
        return table[segment.source : segment.source + segment.rows]
    grid = table[segment.source : segment.source + old**2].view(1, old, old, -1).permute(0, 3, 1, 2)  # [1, D, h, h]
    grid = F.interpolate(grid, size=(new, new), mode="bilinear", align_corners=False)
    return grid.permute(0, 2, 3, 1).reshape(new**2, -1)


def plan_rows(
    source: nn.Module, target: nn.Module, old_names: Sequence[str] | None, new_names: Sequence[str] | None
) -> RowPlan | None:
    """How the table `target` is filled from the table `source`; None for modules without rows of a known meaning.

    old_names, new_names: of the classes, or None if they are not known.
    """
    if isinstance(source, ClassEmbedding) and isinstance(target, ClassEmbedding):
        return plan_classes(source.num_embeddings - 1, target.num_embeddings - 1, old_names, new_names)
    if isinstance(source, StageEmbedding) and isinstance(target, StageEmbedding):
        return plan_stages(source.sides, target.sides)
    if isinstance(source, PositionEmbedding) and isinstance(target, PositionEmbedding):
        return plan_positions(source.sides, target.sides)
    return None


def plan_classes(old: int, new: int, old_names: Sequence[str] | None, new_names: Sequence[str] | None) -> RowPlan:
    """Classes by name if both models have unique names, else by number if the counts agree. The null label is kept."""
    # The old row of each new class.
    if _unique(old_names) and _unique(new_names):
        assert old_names is not None
        assert new_names is not None
        row_of = {name: row for row, name in enumerate(old_names)}
        rows = [row_of.get(name) for name in new_names]
        how = "by name"
    elif old == new:
        rows = list(range(new))
        how = "by number"
    else:
        rows = [None] * new
        how = "kept, since their names are not known"

    # What is new, and the row of the null label.
    fresh = [number for number, row in enumerate(rows) if row is None]
    note = f"{new - len(fresh):,} of {new:,} classes {how}"
    if fresh:
        named = [printable(new_names[number], 30) if new_names else str(number) for number in fresh[:SHOWN_NAMES]]
        more = f" and {len(fresh) - SHOWN_NAMES:,} more" if len(fresh) > SHOWN_NAMES else ""
        note += f"; new: {', '.join(named)}{more}"
    segments = [Segment(number, 1, row) for number, row in enumerate([*rows, old])]
    return RowPlan(tuple(segments), note)


def _unique(names: Sequence[str] | None) -> bool:
    return names is not None and len(set(names)) == len(names)


def pair_stages(old: Sequence[int], new: Sequence[int]) -> list[int | None]:
    """For each stage of the new model, its stage in the old one: by number if the counts agree, else by grid side."""
    if len(old) == len(new):
        return list(range(len(new)))
    return [old.index(side) if side in old else None for side in new]


def plan_stages(old: Sequence[int], new: Sequence[int]) -> RowPlan:
    """One row per stage."""
    pairs = pair_stages(old, new)
    return RowPlan(tuple(Segment(k, 1, source) for k, source in enumerate(pairs)), _stage_note(pairs))


def plan_positions(old: Sequence[int], new: Sequence[int]) -> RowPlan:
    """A grid of positions per stage. Grids with a different side are interpolated."""
    pairs = pair_stages(old, new)
    starts = [sum(side**2 for side in old[:k]) for k in range(len(old))]
    segments = []
    start = 0
    for k, source in enumerate(pairs):
        sides = None if source is None else (old[source], new[k])
        segments.append(Segment(start, new[k] ** 2, None if source is None else starts[source], sides))
        start += new[k] ** 2

    # The note.
    resized = [one.sides for one in segments if one.sides and one.sides[0] != one.sides[1]]
    note = ", ".join(f"{a}x{a} -> {b}x{b} interpolated" for a, b in resized)
    return RowPlan(tuple(segments), note if resized and None not in pairs else f"{_stage_note(pairs)} {note}".strip())


def _stage_note(pairs: Sequence[int | None]) -> str:
    kept = ", ".join(f"{k} from {source}" for k, source in enumerate(pairs) if source is not None)
    fresh = ", ".join(str(k) for k, source in enumerate(pairs) if source is None)
    return f"stages {kept}" + (f"; new: {fresh}" if fresh else "")
