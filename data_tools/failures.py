"""Images that cannot be used: listed in `errors.jsonl`, and limited in number by `--max-bad`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecar_dist.data.shards.manifest_rules import Count
from ecar_dist.errors import ConfigError, DataError
from ecar_dist.storage.atomic import atomic_write

ERRORS_NAME = "errors.jsonl"
MAX_BAD = 1e-3  # default of --max-bad, as a share of all images
MAX_IN_A_ROW = 100  # more bad images in a row are a broken source or decoder, not chance


@dataclass(frozen=True)
class Failure:
    """One image without a sample."""

    row: Count  # of the plan; train-vae: index in the source
    key: str  # in the source
    shard: str  # of the source
    stage: str  # "decode" or "encode"
    error: str
    name: str = ""  # original file name; empty in markers of earlier versions


class FailureTally:
    """Counts the failures of one output folder and enforces the limit on them.

    `committed` returns the failures of finished shards, including those of other tasks. Raises ConfigError for a
    `max_bad` outside [0, 1].
    """

    def __init__(
        self, out: Path, count: int, max_bad: float, committed: Callable[[], Iterable[Failure]] = tuple
    ) -> None:
        if not 0.0 <= max_bad <= 1.0:
            raise ConfigError(f"--max-bad {max_bad} is outside [0, 1]; give the share of images that may be left out")
        self._out = out
        self._count = count
        self._max_bad = max_bad
        self._committed = committed

    def check(self, uncommitted: Sequence[Failure] = ()) -> None:
        """Raises DataError if these and the committed failures are more than max_bad x count."""
        failures = self._by_row(uncommitted)
        if len(failures) > self._max_bad * self._count:
            last = uncommitted[-1] if uncommitted else failures[max(failures)]
            raise DataError(
                f"{len(failures)} of {self._count} images failed, --max-bad {self._max_bad:g} allows "
                f"{int(self._max_bad * self._count)}; the last: {last.error}; all are listed in "
                f"{self._out / ERRORS_NAME}; repair the source and use a new folder, or raise --max-bad"
            )

    def check_run(self, run: Sequence[Failure]) -> None:
        """`run`: failures without a good image between them. Raises DataError if they are more than MAX_IN_A_ROW."""
        if len(run) > MAX_IN_A_ROW:
            raise DataError(
                f"{len(run)} images failed in a row, {MAX_IN_A_ROW} are allowed; the last: {run[-1].error}; all are "
                f"listed in {self._out / ERRORS_NAME}; check source, decoder and autoencoder"
            )

    def write(self, uncommitted: Sequence[Failure] = ()) -> int:
        """Write errors.jsonl, sorted by row, or remove it if there are no failures. Returns the number of failures."""
        failures = self._by_row(uncommitted)
        if failures:
            write_errors(self._out, [dataclasses.asdict(failures[row]) for row in sorted(failures)])
        else:
            (self._out / ERRORS_NAME).unlink(missing_ok=True)
        return len(failures)

    def _by_row(self, uncommitted: Sequence[Failure]) -> dict[int, Failure]:
        return {failure.row: failure for failure in [*self._committed(), *uncommitted]}


def write_errors(folder: Path, errors: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    with atomic_write(folder / ERRORS_NAME) as file:
        file.write("".join(json.dumps(error, sort_keys=True) + "\n" for error in errors).encode())
