"""lineage.json: the attempts at a run, oldest first. It is both state and log, so it is kept twice.

As state: its first entry names the run, its last entry shows which attempt owns the run directory. So it is read
strictly. A file that breaks the rules, or is not a continuation of its copy (.lineage.json.copy, written after it, with
a hash), is set aside as lineage.json.damaged-N and never overwritten, and the copy takes its place. If both are damaged
the run continues with a new record, and with the name in its checkpoints (`train/record.py`). As a log: if the file is
damaged, a command that only reads a run uses the copy, or nothing.

Code for a single process: only rank 0 calls it.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ecar_dist.errors import reason_of
from ecar_dist.storage.atomic import set_aside, write_json
from ecar_dist.storage.untrusted import UntrustedError, first_violation, parse_json, plain_name, read_plain_file

MAX_LINEAGE_BYTES = 1 << 26  # MAX_ATTEMPTS entries take about 5 MiB
MAX_ATTEMPTS = 10_000  # on record: the first, and the newest
MAX_REASON = 2000  # characters

Attempts = list[dict[str, Any]]


def _moment(text: str) -> str:
    """Raises ValueError for what is not an ISO 8601 date and time with a time zone."""
    if datetime.datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("it has no time zone")
    return text


Moment = Annotated[str, AfterValidator(_moment)]
Step = Annotated[int, Field(ge=0, le=1 << 53)]


class AttemptEntry(BaseModel):
    """The known fields of an entry. Another version may have added more."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)

    attempt: Annotated[str, AfterValidator(plain_name)] | None = None
    run: Annotated[str, AfterValidator(plain_name)] | None = None  # if the first attempts are no longer on record
    started: Moment | None = None
    ended: Moment | None = None
    reason: str | None = None
    host: str | None = None
    job: str | None = None
    chain: str | None = None
    checkpoints: str | None = None
    newest_step: Step | None = None
    resumed_from_step: Step | None = None
    world_size: Annotated[int, Field(ge=1)] | None = None
    zero_stage: int | None = None
    device: str | None = None
    precision: str | None = None
    dataset_ids: list[str] | None = None
    heldout_id: str | None = None  # of the data set of the validation loss
    initial_weights: dict[str, Any] | None = None  # where the weights of a new run came from: path, what, step, hash


_ENTRIES = TypeAdapter(list[AttemptEntry])


class LineageFile:
    """lineage.json at `path`, and its copy next to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.copy = path.with_name(f".{path.name}.copy")

    def read(self) -> Attempts:
        """All attempts; none if there is no file. Raises UntrustedError and OSError."""
        try:
            return _checked(parse_json(read_plain_file(self.path, MAX_LINEAGE_BYTES)))
        except FileNotFoundError:
            return []

    def known(self) -> Attempts:
        """All attempts; those of the copy if the file is damaged, none if both are."""
        for read in (self.read, self._read_copy):
            try:
                return read()
            except (UntrustedError, OSError):
                continue
        return []

    def write(self, attempts: Attempts) -> None:
        """Write the file, then its copy: one of the two is intact at any moment."""
        if len(attempts) > MAX_ATTEMPTS:
            attempts = [attempts[0], *attempts[1 - MAX_ATTEMPTS :]]
        write_json(self.path, attempts)
        if self.copy.is_dir():  # the one thing that a rename does not replace
            set_aside(self.copy)
        write_json(self.copy, {"attempts": attempts, "sha256": _digest(attempts)})

    def exists(self) -> bool:
        """Whether there is anything at the path of the file or of its copy."""
        return os.path.lexists(self.path) or os.path.lexists(self.copy)

    def repair(self) -> bool:
        """Replace a damaged or missing file by its copy, with a warning. For the owner of the run only.

        False if the copy is damaged too: then nothing is known about the run any more, and the file has no attempts.
        """
        try:
            attempts = self.read()
        except (UntrustedError, OSError) as error:
            return self._replace(reason_of(error))
        try:
            continues = _continues(attempts, self._read_copy())
        except (UntrustedError, OSError):
            return bool(attempts)
        return continues or self._replace("it is not what was written")

    def _replace(self, reason: str | None) -> bool:
        # what is wrong with the file
        what = f"{self.path} is gone"
        if os.path.lexists(self.path):
            what = f"{self.path} is damaged ({reason}): it is now {set_aside(self.path).name}"

        # what takes its place
        try:
            attempts = self._read_copy()
        except (UntrustedError, OSError):
            set_aside(self.copy)
            attempts = []
        self.write(attempts)
        outcome = "its copy has taken its place" if attempts else "there is no intact copy, so a new record begins"
        print(f"warning: {what}; {outcome}", file=sys.stderr)
        return bool(attempts)

    def _read_copy(self) -> Attempts:
        """No attempts if there is no copy. Raises UntrustedError and OSError."""
        try:
            tree = parse_json(read_plain_file(self.copy, MAX_LINEAGE_BYTES))
        except FileNotFoundError:
            return []
        if not isinstance(tree, dict) or tree.get("sha256") != _digest(tree.get("attempts")):
            raise UntrustedError("it is not what was written")
        return _checked(tree["attempts"])


def _continues(attempts: Attempts, earlier: Attempts) -> bool:
    """Whether `attempts` is `earlier` with more facts in its last entry, or more entries."""
    if not earlier:
        return True
    *closed, last = earlier
    found = attempts[len(closed)] if len(attempts) > len(closed) else {}
    return attempts[: len(closed)] == closed and all(
        key in found and found[key] == value for key, value in last.items()
    )


def _digest(attempts: Any) -> str:
    return hashlib.sha256(json.dumps(attempts, sort_keys=True).encode()).hexdigest()


def _checked(attempts: Any) -> Attempts:
    """Raises UntrustedError for anything but a list of attempts."""
    try:
        _ENTRIES.validate_python(attempts)
    except ValidationError as error:
        raise UntrustedError(first_violation(error)) from None
    if attempts and not (attempts[0].get("run") or attempts[0].get("attempt")):
        raise UntrustedError("its first entry does not name the run")
    return attempts
