"""One case: a command, the files that it finds, and the property that every command keeps with any files.

The property: an exit status of the table; the error on one line at the end of stderr; no traceback; time and memory
within bounds; no file made, changed or read outside its folder; no program started; no secret and no control character
of a terminal in the output.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz import artefacts
from tests.fuzz.artefacts import PRISTINE
from tests.fuzz.mutation import Mutation, apply
from tests.fuzz.nasty import OUTSIDE, SECRETS
from tests.fuzz.seals import seal
from tests.fuzz.zygote import CPU_SECONDS, HEAVY, LIGHT, MEMORY_BYTES, TRAINING_BYTES, Zygote

STATUSES = (0, 1, 75, 93, 130)
MAX_ERROR = 4_500  # characters of an error
MOST_STAGED = 1 << 28  # bytes on disk, or in memory, that a case's own files may take
MAX_LINES = 60  # of stderr, including warnings of libraries
LIGHT_COMMANDS = ("check", "plan", "status", "submit")
_FRAME = re.compile(r'File "[^"]*/((?:ecar_dist|data_tools)/[^"]+)", line (\d+),? in (\S+)')
_USAGE = re.compile(r"^ecar-(dist|data)[\w -]*: error: ")


@dataclass(frozen=True)
class Case:
    """`words`: the program and its arguments. `needs`: the artefacts in its folder."""

    words: tuple[str, ...]
    needs: tuple[str, ...] = ()
    mutations: tuple[Mutation, ...] = ()
    sealed: bool = False
    bucket: bool = False  # `checkpoint.dir` of the run is memory://bucket, with the artefact of that name in it
    statuses: tuple[int, ...] = STATUSES
    damage: bool = False  # bytes that a hash covers were changed, so status 0 is wrong

    def dump(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def parse(text: str) -> Case:
        tree = json.loads(text)
        mutations = tuple(Mutation(**{**one, "where": tuple(one["where"])}) for one in tree.pop("mutations"))
        lists = {name: tuple(value) for name, value in tree.items() if isinstance(value, list)}
        return Case(**{**tree, **lists}, mutations=mutations)


@dataclass(frozen=True)
class Outcome:
    status: int
    stdout: str
    stderr: str
    noted: list[str]
    hung: bool
    seconds: float
    cpu_seconds: float
    strayed: list[str] = field(default_factory=list)
    changed: bool = True


class Runner:
    """Runs cases, each in its own folder, which is removed afterwards."""

    def __init__(self) -> None:
        self._light, self._heavy = Zygote(LIGHT), Zygote(HEAVY)
        self._root = tempfile.TemporaryDirectory(prefix="fuzz-", dir=artefacts.fast_folder())

    def close(self) -> None:
        self._light.close()
        self._heavy.close()
        self._root.cleanup()

    def run(self, case: Case, keep: Path | None = None) -> Outcome:
        """`keep`: an empty folder to run in, which is not removed."""
        root = keep or Path(tempfile.mkdtemp(dir=self._root.name))
        given, outside = root / "given", root / "outside"
        for folder in (given, outside, root / "linked", root / "home", root / "tmp"):
            folder.mkdir()
        for folder in (outside, root / "linked"):
            (folder / "kept").write_text("kept\n")
        before = _listing(PRISTINE.root)
        try:
            stage(case, given, outside)
            changed = not case.damage or _differs(given, PRISTINE.root)
            taken = sum(path.lstat().st_blocks for path in given.rglob("*")) * 512
            assert taken < MOST_STAGED, f"{taken:,} bytes staged; this is the suite's fault"
            if case.bucket:
                _move_bucket(given, root / "bucket")
            answer = self._zygote(case).run(self._task(case, root))
            strayed = [f"{name} in {root}" for name in sorted(os.listdir(root)) if name not in _OURS]
            for folder in (outside, root / "linked"):
                if {path.name: path.read_text() for path in folder.iterdir()} != {"kept": "kept\n"}:
                    strayed.append(f"{folder} was changed")
            if before != _listing(PRISTINE.root):
                strayed.append("the original of a linked file was changed")
            stdout, stderr, noted = (_read(root / name) for name in ("stdout", "stderr", "noted"))
            return Outcome(
                answer["status"],
                stdout,
                stderr,
                noted.splitlines(),
                answer["hung"],
                answer["seconds"],
                answer["cpu_seconds"],
                strayed,
                changed,
            )
        finally:
            if keep is None:
                shutil.rmtree(root, ignore_errors=True)

    def _zygote(self, case: Case) -> Zygote:
        light = case.words[0] == "ecar-dist" and len(case.words) > 1 and case.words[1] in LIGHT_COMMANDS
        return self._light if light else self._heavy

    def _task(self, case: Case, root: Path) -> dict[str, Any]:
        named = root / "given/named"
        words = [word.replace(OUTSIDE, str(named)) for word in case.words]
        environment = {
            "PATH": str(root / "nothing"),
            "HOME": str(root / "home"),
            "TMPDIR": str(root / "tmp"),
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "AWS_ACCESS_KEY_ID": "AKIAENVIRONMENT0",
            "AWS_SECRET_ACCESS_KEY": SECRETS["environment"],
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        return {
            "words": words,
            "cwd": str(root / "given"),
            "environment": environment,
            "writable": [f"{root / name}" for name in ("given", "home", "tmp")]
            + ["/dev/null", "/dev/full", "/dev/shm/torch_", "/proc/"],
            # an index states where its images are, and that may be anywhere
            "unreadable": [] if "index" in case.needs else [str(root / "outside")],
            "streams": {name: str(root / name) for name in ("stdout", "stderr", "noted")},
            "memory_bytes": TRAINING_BYTES if "train" in words[:2] else MEMORY_BYTES,
            "bucket": str(root / "bucket") if case.bucket else None,
        }


_OURS = {"given", "outside", "linked", "home", "tmp", "stdout", "stderr", "noted", "bucket"}


def stage(case: Case, given: Path, outside: Path) -> None:
    """Copy what the case needs, and change it."""
    for name in case.needs:
        artefacts.copy(PRISTINE.root / name, given / name)
    if case.bucket:
        path = given / artefacts.RUN / "config.yaml"
        path.write_text(path.read_text().replace("  dir: null\n  overlap", "  dir: memory://bucket\n  overlap"))
        if (path := given / "config.yaml").exists():
            path.write_text(path.read_text().replace("checkpoint:\n", "checkpoint:\n  dir: memory://bucket\n"))
    files = PRISTINE.files(*case.needs)
    for mutation in case.mutations:
        apply(mutation, given, files, outside)
    if case.sealed:
        seal(given, PRISTINE.root)


def _move_bucket(given: Path, bucket: Path) -> None:
    """Out of the command's sight. `_fill_bucket` adds an object under each name that the manifests give."""
    (given / "bucket").rename(bucket)


def problems(case: Case, outcome: Outcome) -> Iterator[tuple[str, str]]:
    """What breaks the property: (cause, what was seen)."""
    said = outcome.stdout + outcome.stderr
    if outcome.hung or outcome.status in (-24, -9) or outcome.cpu_seconds > CPU_SECONDS:
        yield f"hang at {_place(outcome.stderr, newest_first=True)}", f"{outcome.seconds:.1f} s"
        return
    if "Traceback (most recent call last)" in said:
        last = [line for line in outcome.stderr.splitlines() if line.strip()][-1:]
        kind = last[0].partition(":")[0] if last else ""
        yield f"traceback {kind} at {_place(outcome.stderr)}", last[0][:300] if last else ""
    elif outcome.status == 2 and _is_usage(outcome.stderr):
        pass
    elif outcome.status not in case.statuses:
        yield f"status {outcome.status} of {_command(case)}", said[-300:]
    elif outcome.status == 1 and (fault := _fault_of_lines(case, outcome.stderr)):
        yield f"{fault} of {_command(case)}", outcome.stderr[-300:]
    if case.damage and outcome.changed and outcome.status == 0:
        yield f"damage goes unseen by {_command(case)}", said[-300:]
    for what in outcome.noted:
        yield f"outside: {re.sub(r'/[^ ]*', 'PATH', what)[:60]} by {_command(case)}", what
    for what in outcome.strayed:
        yield f"strayed by {_command(case)}", what
    for name, secret in SECRETS.items():
        if secret in said and not (name != "environment" and any("insert" in one.op for one in case.mutations)):
            place = next(line for line in said.splitlines() if secret in line)
            yield f"secret ({name}) printed by {_command(case)}", place[:300]
    odd = {letter for letter in said if unicodedata.category(letter) == "Cc" and letter not in "\n\r\t"}
    if odd and outcome.status != 2:
        place = next(line for line in re.split(r"[\n\r]", said) if odd & set(line))
        yield f"a terminal's letter printed by {_command(case)}", repr(place[:300])


def _is_usage(stderr: str) -> bool:
    lines = stderr.splitlines()
    return bool(lines) and "usage: " in stderr and any(_USAGE.match(line) for line in lines)


def _fault_of_lines(case: Case, stderr: str) -> str | None:
    lines = [line for line in re.split(r"[\n\r]", stderr) if line.strip()]
    ours = [line for line in lines if line.startswith(f"{case.words[0]}: ")]
    if case.words[1:2] == ("status",) and not ours:
        return None  # of several runs: the table reports it
    if len(ours) != 1:
        return f"{len(ours)} lines of error"
    if lines[-1] != ours[0]:
        return "an error that is not the last line"
    if len(ours[0]) > MAX_ERROR:
        return "an error without end"
    if len(lines) > MAX_LINES:
        return "too many lines"
    return None


def _place(stderr: str, *, newest_first: bool = False) -> str:
    frames = _FRAME.findall(stderr)
    if not frames:
        return "?"
    file, line, function = frames[0] if newest_first else frames[-1]
    return f"{file}:{line} {function}"


def _command(case: Case) -> str:
    return " ".join(case.words[1 : 3 if case.words[1:2] == ("checkpoint",) else 2])


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for root, _, names in os.walk(folder):
        for name in names:
            status = os.stat(os.path.join(root, name))
            found[os.path.join(root, name)] = (status.st_size, status.st_mtime_ns)
    return found


def _differs(given: Path, pristine: Path) -> bool:
    for path in given.rglob("*"):
        before = pristine / path.relative_to(given)
        parted = path.is_file() and before.is_file() and path.stat().st_ino != before.stat().st_ino
        if parted and path.read_bytes() != before.read_bytes():
            return True
    return False


def _read(path: Path) -> str:
    return path.read_bytes()[: 1 << 22].decode("utf-8", "surrogateescape") if path.exists() else ""
