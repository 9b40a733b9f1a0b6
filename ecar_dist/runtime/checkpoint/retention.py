"""Which checkpoints stay."""

from __future__ import annotations

from collections.abc import Sequence


def kept(found: Sequence[tuple[str, int]], keep: int, keep_every_samples: int) -> set[str]:
    """Names that stay, of whole checkpoints (name, samples_seen), newest first.

    The newest `keep`, and for good the first at or after each multiple of `keep_every_samples` (0: none).
    """
    names = {name for name, _ in found[:keep]}
    reached = 0  # multiples that an older checkpoint stands for
    for name, samples_seen in reversed(found):
        multiple = samples_seen // keep_every_samples if keep_every_samples else 0
        if multiple > reached:
            names.add(name)
            reached = multiple
    return names
