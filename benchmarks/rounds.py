"""Contenders measured alternately, each in its own process, so that other load affects all of them equally."""

from __future__ import annotations

import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

LEAST_ROUNDS = 3
SCRIPT = Path(__file__).with_name("serving.py")
ROOT = SCRIPT.parent.parent
_FIND = """
import importlib.util, sys
try:
    sys.exit(importlib.util.find_spec(sys.argv[1]) is None)
except ModuleNotFoundError:  # the package around it is not there
    sys.exit(1)
"""


def interpreter_with(module: str, pythons: Sequence[str]) -> str | None:
    """The first interpreter that has `module`."""
    for python in pythons:
        if _run([python, "-c", _FIND, module], capture_output=True).returncode == 0:
            return python
    return None


class Contestant:
    """A `serving.py serve` (or `epochs`) process, which opens its data immediately. Then it is measured on demand.

    Each method raises RuntimeError with the end of the process's error output if the process died.
    """

    def __init__(self, name: str, python: str, work: Path, action: str = "serve") -> None:
        self.name = name
        self._log = work / f"{name.replace(', ', '-').replace(' ', '-')}.log"
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                [python, str(SCRIPT), action, name, str(work)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(),
            )
        self._opened: dict[str, Any] | None = None

    def opened(self) -> dict[str, Any]:
        """What the process reports when its data is open and verified: wait for it before the first measurement."""
        if self._opened is None:
            self._opened = self._answer()
        return self._opened

    def measure(self, seconds: float = 0.0) -> dict[str, Any]:
        """One round of at least `seconds`, or one pass."""
        assert self._process.stdin is not None
        print(json.dumps({"seconds": seconds}), file=self._process.stdin, flush=True)
        return self._answer()

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            said = self._log.read_text().strip().splitlines()[-3:]
            raise RuntimeError(f"{self.name} ended with {self._process.wait()}: {' | '.join(said)}")
        return json.loads(line)


def take_turns(
    contestants: Sequence[Contestant], rounds: int, seconds: float, deadline: float = math.inf
) -> dict[str, list[dict[str, Any]]]:
    """`rounds` measurements of each, one per round, in an order that rotates from round to round.

    The first round is discarded: in it, pages are mapped and first epochs are opened. After `deadline`, a value of
    `time.monotonic`, no round begins once there are LEAST_ROUNDS.
    """
    results: dict[str, list[dict[str, Any]]] = {contestant.name: [] for contestant in contestants}
    for number in range(rounds + 1):
        if number > LEAST_ROUNDS and time.monotonic() > deadline:
            break
        first = number % len(contestants)
        for contestant in (*contestants[first:], *contestants[:first]):
            measured = contestant.measure(seconds)
            if number:
                results[contestant.name].append(measured)
    return results


def summary(rounds: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians over rounds; latency percentiles over all batches of all rounds."""
    latencies = np.concatenate([measured["latencies"] for measured in rounds]) * 1e3
    return {
        "us_per_sample": statistics.median(per_sample(rounds, "wall")),
        "cpu_seconds_per_million": statistics.median(per_sample(rounds, "cpu")),
        "batch_p50_ms": float(np.percentile(latencies, 50)),
        "batch_p99_ms": float(np.percentile(latencies, 99)),
        "private_mib": rounds[-1]["private_mib"],
    }


def ratio(above: Sequence[dict[str, Any]], below: Sequence[dict[str, Any]], what: str = "wall") -> float:
    """The median over rounds of the ratio within a round: what slows down a complete round drops out."""
    pairs = zip(per_sample(above, what), per_sample(below, what), strict=True)
    return statistics.median(one / other for one, other in pairs)


def per_sample(rounds: Sequence[dict[str, Any]], what: str) -> list[float]:
    """Microseconds per sample, which are also seconds per million samples."""
    return [measured[what] / measured["samples"] * 1e6 for measured in rounds]


def write_files(name: str, python: str, work: Path) -> None:
    """Write the files of a contender. Raises RuntimeError with the end of the error output if that fails."""
    done = _run([python, str(SCRIPT), "write", name, str(work)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"writing {name} failed: {' | '.join(done.stderr.strip().splitlines()[-3:])}")


def environment() -> dict[str, str]:
    """One thread for each contender's arithmetic, and the project importable from any working directory."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def publish(result: dict[str, Any], save: Path | None, *, unprinted: Sequence[str] = ()) -> None:
    """Write the result and the command that made it as JSON: to the file `save`, if given, and as the last line."""
    result = {**result, "command": shlex.join(["python", *sys.argv])}
    if save:
        save.parent.mkdir(parents=True, exist_ok=True)
        save.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name not in unprinted}))


def _run(command: Sequence[str], **how: Any) -> subprocess.CompletedProcess:
    return subprocess.run(command, env=environment(), check=False, **how)


def hardware() -> str:
    """Cores and the processor's name."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{os.cpu_count()} cores, {names[0].partition(': ')[2] if names else 'unknown processor'}"
