"""lineage.json: the attempts at a run, oldest first. State and log in one, so it is kept twice.

It is state: its first entry names the run, its last one says whose the run directory is. So it is read strictly, and a
file that breaks the rules, or does not go on from its copy (.lineage.json.copy, written after it, with a hash), is put
aside as lineage.json.damaged-N, and the copy takes its place: it is never written over. Where both are damaged the run
goes on with a new record, and with the name that its checkpoints know (`train/record.py`). It is a log as well: whoever
only reads a run goes on with the copy, or with nothing.
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

MAX_LINEAGE_BYTES = 1 << 26  # MAX_ATTEMPTS of them have about 5 MiB
MAX_ATTEMPTS = 10_000  # on record: the first, and the newest
MAX_REASON = 2000  # characters

Attempts = list[dict[str, Any]]


def _moment(text: str) -> str:
    """Raises ValueError for what is not a date and time of ISO 8601 with its zone."""
    if datetime.datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("it has no time zone")
    return text


Moment = Annotated[str, AfterValidator(_moment)]
Step = Annotated[int, Field(ge=0, le=1 << 53)]


class AttemptEntry(BaseModel):
    """What is known of an entry. Another version may have put more into it."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)

    attempt: Annotated[str, AfterValidator(plain_name)] | None = None
    run: Annotated[str, AfterValidator(plain_name)] | None = None  # where the first attempts are no longer on record
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


_ENTRIES = TypeAdapter(list[AttemptEntry])


class LineageFile:
    """lineage.json at `path`, and its copy beside it."""

    def __init__(self, path: Path) -> None:
        self.path, self.copy = path, path.with_name(f".{path.name}.copy")

    def read(self) -> Attempts:
        """All attempts; none where there is no file. Raises UntrustedError and OSError."""
        return _read(self.path)

    def known(self) -> Attempts:
        """All attempts, of the copy where the file is damaged, none where that is damaged too."""
        for read in (self.read, self._read_copy):
            try:
                return read()
            except (UntrustedError, OSError):
                continue
        return []

    def write(self, attempts: Attempts) -> None:
        """The file, then its copy: of the two, one is whole at any moment."""
        if len(attempts) > MAX_ATTEMPTS:
            attempts = [attempts[0], *attempts[1 - MAX_ATTEMPTS :]]
        write_json(self.path, attempts)
        if self.copy.is_dir():  # a rename does not replace it, as it does whatever else is in the copy's place
            set_aside(self.copy)
        write_json(self.copy, {"attempts": attempts, "sha256": _digest(attempts)})

    def exists(self) -> bool:
        """Whether anything is in the place of the file or of its copy."""
        return os.path.lexists(self.path) or os.path.lexists(self.copy)

    def repair(self) -> bool:
        """Put a damaged file aside and its copy in its place, or in that of one that is gone, and say so. For the run's
        owner only.

        False where the copy is no better: then nothing is known of the run any more, and the file holds no attempt.
        """
        try:
            attempts = self.read()
        except (UntrustedError, OSError) as error:
            return self._put_aside(reason_of(error))
        try:
            goes_on = _goes_on(attempts, self._read_copy())
        except (UntrustedError, OSError):
            return bool(attempts)
        return goes_on or self._put_aside("it is not what was written")

    def _put_aside(self, reason: str | None) -> bool:
        what = f"{self.path} is gone"
        if os.path.lexists(self.path):
            what = f"{self.path} is damaged ({reason}): it is now {set_aside(self.path).name}"
        try:
            attempts = self._read_copy()
        except (UntrustedError, OSError):
            set_aside(self.copy)
            attempts = []
        self.write(attempts)
        then = "its copy has taken its place" if attempts else "there is no whole copy, so the record begins anew"
        print(f"warning: {what}; {then}", file=sys.stderr)
        return bool(attempts)

    def _read_copy(self) -> Attempts:
        """None where there is no copy. Raises UntrustedError and OSError."""
        try:
            tree = parse_json(read_plain_file(self.copy, MAX_LINEAGE_BYTES))
        except FileNotFoundError:
            return []
        if not isinstance(tree, dict) or tree.get("sha256") != _digest(tree.get("attempts")):
            raise UntrustedError("it is not what was written")
        return _checked(tree["attempts"])


def _goes_on(attempts: Attempts, earlier: Attempts) -> bool:
    """Whether the attempts are earlier ones and what came after: facts of the last one of them, and more attempts."""
    if not earlier:
        return True
    *closed, last = earlier
    found = attempts[len(closed)] if len(attempts) > len(closed) else {}
    return attempts[: len(closed)] == closed and all(
        key in found and found[key] == value for key, value in last.items()
    )


def _digest(attempts: Any) -> str:
    return hashlib.sha256(json.dumps(attempts, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> Attempts:
    try:
        return _checked(parse_json(read_plain_file(path, MAX_LINEAGE_BYTES)))
    except FileNotFoundError:
        return []


def _checked(attempts: Any) -> Attempts:
    """Raises UntrustedError for anything but a list of attempts."""
    try:
        _ENTRIES.validate_python(attempts)
    except ValidationError as error:
        raise UntrustedError(first_violation(error)) from None
    if attempts and not (attempts[0].get("run") or attempts[0].get("attempt")):
        raise UntrustedError("its first entry does not name the run")
    return attempts
