"""Images that could not be encoded: listed, counted, and bounded."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

from data_tools.encode.markers import Failure, read_marker
from ecar_dist.errors import ConfigError, DataError
from ecar_dist.storage.atomic import atomic_write

ERRORS_NAME = "errors.jsonl"
MAX_BAD = 1e-3  # share of images, unless the user says otherwise
MAX_IN_A_ROW = 100  # so many bad images one after the other are a broken source or decoder, not chance
_MARKER_NAME = re.compile(r"(\d{6,})\.json")


class FailureTally:
    """The failures of all shards that have a marker, and the bound on them."""

    def __init__(self, out: Path, count: int, max_bad: float) -> None:
        if not 0.0 <= max_bad <= 1.0:
            raise ConfigError(f"--max-bad {max_bad} is outside [0, 1]; give the share of images that may be left out")
        self._out, self._count, self._max_bad = out, count, max_bad
        self._committed: dict[int, tuple[Failure, ...]] = {}  # a marker is read once, as it never changes

    def check(self, uncommitted: Sequence[Failure] = ()) -> None:
        """Raises DataError where these and the committed failures are more than max_bad x count."""
        failures = self._by_row(uncommitted)
        if len(failures) > self._max_bad * self._count:
            last = uncommitted[-1] if uncommitted else failures[max(failures)]
            raise DataError(
                f"{len(failures)} of {self._count} images failed, --max-bad {self._max_bad:g} allows "
                f"{int(self._max_bad * self._count)}; the last: {last.error}; all are in {self._out / ERRORS_NAME}; "
                "repair the source and start anew in another folder, or raise --max-bad"
            )

    def check_run(self, run: Sequence[Failure]) -> None:
        """Raises DataError where failures without a good image between them are too many for chance."""
        if len(run) > MAX_IN_A_ROW:
            raise DataError(
                f"{len(run)} images failed in a row, {MAX_IN_A_ROW} are allowed; the last: {run[-1].error}; all are "
                f"in {self._out / ERRORS_NAME}; check source, decoder and autoencoder"
            )

    def write(self, uncommitted: Sequence[Failure] = ()) -> int:
        """Assemble errors.jsonl: a line for each failure, by row; no file where there is none. Returns their number."""
        failures = self._by_row(uncommitted)
        path = self._out / ERRORS_NAME
        if not failures:
            path.unlink(missing_ok=True)
            return 0
        lines = [json.dumps(dataclasses.asdict(failures[row]), sort_keys=True) for row in sorted(failures)]
        with atomic_write(path) as file:
            file.write(("\n".join(lines) + "\n").encode())
        return len(failures)

    def _by_row(self, uncommitted: Sequence[Failure]) -> dict[int, Failure]:
        for path in self._out.iterdir():
            name = _MARKER_NAME.fullmatch(path.name)
            if name and int(name[1]) not in self._committed:
                marker = read_marker(self._out, int(name[1]))
                if marker is not None:
                    self._committed[int(name[1])] = marker.failures
        committed = [failure for failures in self._committed.values() for failure in failures]
        return {failure.row: failure for failure in [*committed, *uncommitted]}
