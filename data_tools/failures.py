"""Images that cannot be used: listed in `errors.jsonl`, and limited in number by `--max-bad`.

Tasks that share the work write one list each, `errors-3-of-8.jsonl`; `finalize` merges the lists.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecar_dist.data.shards.manifest_rules import Count
from ecar_dist.errors import ConfigError, DataError
from ecar_dist.storage.atomic import atomic_write

ERRORS_NAME = "errors.jsonl"
TASK_ERRORS = "errors-*-of-*.jsonl"
MAX_BAD = 1e-3  # default of --max-bad, as a share of all images
MAX_IN_A_ROW = 100  # more bad images in a row mean a broken source or decoder, not chance


@dataclass(frozen=True)
class Failure:
    """One image without a sample."""

    row: Count  # of the plan; train-vae: index in the source
    key: str  # in the source
    shard: str  # of the source
    stage: str  # "decode" or "encode"
    error: str
    name: str = ""  # original file name; empty in markers of earlier versions


def errors_name(task: int, tasks: int) -> str:
    """The file in which one of several tasks lists its failures."""
    return ERRORS_NAME if tasks == 1 else f"errors-{task}-of-{tasks}.jsonl"


class FailureTally:
    """Enforces the limit on the failures of one output folder.

    `elsewhere` returns the number of failures in addition to those passed to `check`. `name`: the file that lists
    them, for messages. Raises ConfigError for a `max_bad` outside [0, 1].
    """

    def __init__(
        self,
        out: Path,
        count: int,
        max_bad: float,
        elsewhere: Callable[[], int] = lambda: 0,
        name: str = ERRORS_NAME,
    ) -> None:
        if not 0.0 <= max_bad <= 1.0:
            raise ConfigError(f"--max-bad {max_bad} is outside [0, 1]; give the share of images that may be left out")
        self._count = count
        self._max_bad = max_bad
        self._elsewhere = elsewhere
        self._listed = f"{'all' if name == ERRORS_NAME else 'those of this task'} are listed in {out / name}"

    def check(self, failures: Sequence[Failure]) -> None:
        """Raises DataError if these (at least one) and those elsewhere are more than max_bad x count."""
        self.check_number(len(failures) + self._elsewhere(), failures[-1])

    def check_number(self, failed: int, last: Failure) -> None:
        """Raises DataError if `failed` images are more than max_bad x count."""
        if failed > self._max_bad * self._count:
            raise DataError(
                f"{failed} of {self._count} images failed, --max-bad {self._max_bad:g} allows "
                f"{int(self._max_bad * self._count)}; the last: {last.error}; {self._listed}; repair the source and "
                f"use a new folder, or raise --max-bad"
            )

    def check_run(self, run: Sequence[Failure]) -> None:
        """`run`: failures without a good image between them. Raises DataError if they are more than MAX_IN_A_ROW."""
        if len(run) > MAX_IN_A_ROW:
            raise DataError(
                f"{len(run)} images failed in a row, {MAX_IN_A_ROW} are allowed; the last: {run[-1].error}; "
                f"{self._listed}; check source, decoder and autoencoder"
            )


def write_failures(path: Path, failures: Iterable[Failure]) -> int:
    """List failures in a file, or remove it if there are none. Returns their number, and keeps none in memory."""
    rest = iter(failures)
    first = next(rest, None)
    if first is None:
        path.unlink(missing_ok=True)
        return 0
    number = 0
    with atomic_write(path) as file:
        for failure in itertools.chain([first], rest):
            file.write(error_line(dataclasses.asdict(failure)))
            number += 1
    return number


def write_errors(folder: Path, errors: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object per line."""
    with atomic_write(folder / ERRORS_NAME) as file:
        file.writelines(map(error_line, errors))


def error_line(error: Mapping[str, Any]) -> bytes:
    """One line of errors.jsonl."""
    return f"{json.dumps(error, sort_keys=True)}\n".encode()
