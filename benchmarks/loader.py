"""Our loader against other streaming loaders, as ratios measured in one run.

`python benchmarks/loader.py` takes under two minutes: on a busy machine it runs fewer rounds, and skips parts for
which no time is left. `--full` measures everything, longer and more precisely. `--peers-python` names an interpreter
with the libraries that this one lacks (benchmarks/peers.txt). The last line is JSON. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cold
import contenders
import growth
import rounds
import traffic
import watching
from contenders import BATCH, CONTENDERS, WARM_UP

REFERENCE = "ours"
_NEEDED = (REFERENCE, WARM_UP, "memcpy")  # they run in this interpreter
_INSTALL = "python -m venv peers && peers/bin/pip install -r benchmarks/peers.txt, then --peers-python peers/bin/python"
_WAYS = {"by the clock": "by_the_clock", "in CPU time": "in_cpu_time"}


@dataclass(frozen=True)
class Plan:
    samples: int
    rounds: int
    seconds: float  # per contender and round
    cold_repeats: int
    set_sizes: tuple[int, ...]
    names: tuple[str, ...]  # contenders
    remote: bool  # whether to stream from an S3 server, which alone takes minutes on a busy machine
    compare_until: float  # seconds from the start; the rounds end then
    last_part: float  # seconds from the start; none of the other parts begins later


QUICK = Plan(12_288, 15, 0.2, 5, (10_000, 1_000_000), contenders.QUICK, False, 60, 85)
FULL = Plan(
    81_920, 15, 3.0, 15, (10_000, 1_000_000, 10_000_000, 100_000_000), tuple(CONTENDERS), True, math.inf, math.inf
)


@dataclass(frozen=True)
class Target:
    """All `values` must be at least `bound`, or at most `bound` with `at_most`. None: not measured."""

    what: str
    values: dict[str, float] | None
    bound: float
    at_most: bool = False

    def __str__(self) -> str:
        if self.values is None:
            return f"NOT MEASURED  {self.what}"

        met = all(value <= self.bound if self.at_most else value >= self.bound for value in self.values.values())
        found = ", ".join(f"{value:.3g} {name}".strip() for name, value in self.values.items())
        wanted = f"{'<=' if self.at_most else '>='} {self.bound:g}"
        return f"{'met   ' if met else 'MISSED'}  {self.what}: {found}; wanted {wanted}"


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    with _work_folder(options.work) as work:
        result = _measure(work, FULL if options.full else QUICK, (sys.executable, options.peers_python))
    result["hardware"] = options.hardware or rounds.hardware()
    _report(result)
    rounds.publish(result, options.save, unprinted=["contenders"])


def _measure(work: Path, plan: Plan, pythons: Sequence[str]) -> dict[str, Any]:
    began = time.monotonic()
    contenders.write_arrays(work / "arrays", plan.samples)
    homes, missing = _prepare(work, pythons, plan.names)
    speed = _compare(work, homes, missing, plan, began + plan.compare_until)

    # The other parts, as time permits.
    watched = {name: work / CONTENDERS[name].folder for name in (REFERENCE, WARM_UP)}
    parts: dict[str, Callable[[], Any]] = {
        "cold": lambda: _first_pass(work, plan.cold_repeats),
        "watching": lambda: watching.cost(watched),
        "start_up": lambda: growth.start_up(work, plan.set_sizes),
        "bytes_per_sample_held_while_reading": lambda: growth.held_while_reading(work),
        "bytes_fetched_over_needed": lambda: _traffic(work, plan.remote),
    }
    measured: dict[str, Any] = {}
    for name, measure in parts.items():
        in_time = time.monotonic() - began < plan.last_part
        measured[name] = measure() if in_time else None
        print(f"{name} {'measured' if in_time else 'skipped: no time left, see --full'}", flush=True)
    return {**speed, "not_measured": missing, **measured, "seconds": time.monotonic() - began}


def _traffic(work: Path, remote: bool) -> dict[str, Any]:
    planned = traffic.planned_traffic((1, 2, 3, 4, 8, 16))
    measured = traffic.measured_traffic(work, (1, 2, 3)) if remote else None
    return {
        f"planned, {traffic.PLANNED_SHARDS} shards, 8 ranks a node": planned,
        f"measured, {traffic.MEASURED_SHARDS} shards, 1 rank a node": measured,
    }


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="more samples, more and longer rounds")
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter for peers that are missing here")
    parser.add_argument("--work", type=Path, help="empty folder for the data, kept (default: temporary, removed)")
    parser.add_argument("--save", type=Path, help="also write everything measured to this JSON file")
    parser.add_argument("--hardware", help="what to call the machine (default: its cores and processor)")
    return parser.parse_args(arguments)


@contextlib.contextmanager
def _work_folder(named: Path | None) -> Iterator[Path]:
    if named:
        named.mkdir(parents=True, exist_ok=True)
        yield named
        return
    folder = Path(tempfile.mkdtemp(prefix="ecar-benchmark-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _prepare(work: Path, pythons: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Write the files of the contenders `names`.

    Returns the interpreter of each contender that can be measured, and for each of the others the reason why not.
    """
    homes: dict[str, str] = {}
    missing: dict[str, str] = {}
    for name in names:
        module = CONTENDERS[name].modules[0]
        python = rounds.interpreter_with(module, pythons)
        if python is None:
            missing[name] = f"{module} is not installed; {_INSTALL}"
        else:
            homes[name] = python

    # Our own files need no other process, and readers of our tars have nothing to write.
    writers = []
    for name in homes:
        contender = CONTENDERS[name]
        if contender.write is contenders.already_written:
            continue
        if name in _NEEDED:
            (work / contender.folder).mkdir()
            contender.write(work / "arrays", work / contender.folder)
        else:
            writers.append(name)

    # The others in parallel, because most of their time goes into imports.
    print(f"writing {', '.join(writers)} ...", flush=True)
    with ThreadPoolExecutor(max(1, len(writers))) as pool:
        written = {name: pool.submit(rounds.write_files, name, homes[name], work) for name in writers}
        for name, done in written.items():
            try:
                done.result()
            except RuntimeError as error:
                _mark_missing(name, error, missing)
                del homes[name]
    return homes, missing


def _compare(work: Path, homes: dict[str, str], missing: dict[str, str], plan: Plan, deadline: float) -> dict[str, Any]:
    """Measure all contenders alternately: medians by contender, and ratios to ours within rounds."""
    with contextlib.ExitStack() as stack:
        # They open their data in parallel, and are then measured one at a time.
        contestants = []
        for one in [stack.enter_context(rounds.Contestant(name, python, work)) for name, python in homes.items()]:
            try:
                one.opened()
                contestants.append(one)
            except RuntimeError as error:
                _mark_missing(one.name, error, missing)
        measured = rounds.take_turns(contestants, plan.rounds, plan.seconds, deadline)
    ours = measured[REFERENCE]
    print(f"{len(ours)} rounds of {plan.seconds} s each, batches of {BATCH}, {plan.samples} samples", flush=True)
    return {
        "rounds": len(ours),
        "contenders": {one.name: rounds.summary(measured[one.name]) | one.opened() for one in contestants},
        "times_ours": {name: rounds.ratio(theirs, ours) for name, theirs in measured.items()},
        "times_ours_in_cpu": {name: rounds.ratio(theirs, ours, "cpu") for name, theirs in measured.items()},
    }


def _first_pass(work: Path, repeats: int) -> dict[str, float] | None:
    files = sorted((work / CONTENDERS[REFERENCE].folder).glob("*.tar"))
    with rounds.Contestant(REFERENCE, sys.executable, work, "epochs") as contestant:
        contestant.opened()
        contestant.measure()  # warm-up: the next calls measure only reading
        return cold.cold_share(files, lambda: contestant.measure()["seconds"], repeats)


def _mark_missing(name: str, error: RuntimeError, missing: dict[str, str]) -> None:
    """Report a peer that fails as not measured. Raises the error of a contender that the ratios need."""
    if name in _NEEDED:
        raise error
    missing[name] = str(error)


def _targets(result: dict[str, Any]) -> list[Target]:
    """A speed target must be met both by the clock and in CPU time, because a busy machine distorts one of them."""
    clock = result["times_ours"]
    cpu = result["times_ours_in_cpu"]
    cold_rate = result["cold"]
    start = result["start_up"]
    held = result["bytes_per_sample_held_while_reading"]
    return [
        Target("speed over webdataset (shuffle, decode, batch)", _best(clock, cpu, ("webdataset",)), 30),
        Target("speed over the better of MDS and litdata", _best(clock, cpu, ("mds", "litdata")), 7),
        Target("time over memcpy", {"by the clock": 1 / clock["memcpy"], "in CPU time": 1 / cpu["memcpy"]}, 2, True),
        *(
            Target(
                f"cost of watching for changes, {name}",
                {how: found[key] for how, key in _WAYS.items()},
                watching.AT_MOST,
                True,
            )
            for name, found in (result["watching"] or {}).items()
        ),
        Target("cold-file rate over the disk's own", cold_rate and {"": cold_rate["share_of_disk"]}, 0.7),
        Target("memory per sample at start, bytes", start and {"": start["bytes_per_sample"]}, 16, True),
        Target("memory per sample held, bytes", {"": held} if held is not None else None, 16, True),
    ]


def _best(clock: dict[str, float], cpu: dict[str, float], names: Sequence[str]) -> dict[str, float] | None:
    """The time of the fastest of these contenders over ours; None if one of them was not measured."""
    if not set(names) <= set(clock):
        return None
    return {"by the clock": min(clock[name] for name in names), "in CPU time": min(cpu[name] for name in names)}


def _report(result: dict[str, Any]) -> None:
    columns = ("us/sample", "x ours", "CPU-s/M", "x ours", "p50 ms", "p99 ms", "start s", "own MiB")
    print("\n" + " " * 20 + "".join(f"{column:>10}" for column in columns) + "  version")
    for name, row in result["contenders"].items():
        figures = (row["us_per_sample"], result["times_ours"][name])
        figures += (row["cpu_seconds_per_million"], result["times_ours_in_cpu"][name])
        figures += tuple(row[what] for what in ("batch_p50_ms", "batch_p99_ms", "start_seconds", "private_mib"))
        print(
            f"{name:20}" + "".join(f"{figure:10.2f}" for figure in figures), _version(name, row["versions"]), sep="  "
        )
    for name, why in result["not_measured"].items():
        print(f"{name:20}NOT MEASURED: {why}")

    seconds = (result["start_up"] or {"seconds": {}})["seconds"]
    starts = ", ".join(f"{size:,} samples {spent:.3f} s" for size, spent in seconds.items()) or "NOT MEASURED"
    print(f"\nfrom the manifest to the first locations, resumed half-way: {starts}")
    for how, shares in (result["bytes_fetched_over_needed"] or {}).items():
        said = ", ".join(f"{nodes} nodes {share:.2f}" for nodes, share in shares.items()) if shares else "NOT MEASURED"
        print(f"bytes fetched over bytes needed in an epoch, {how}: {said}")
    print(*_targets(result), sep="\n")


def _version(name: str, versions: dict[str, str]) -> str:
    return next((f"{key} {versions[key]}" for key in CONTENDERS[name].distributions if key in versions), "")


if __name__ == "__main__":
    main()
