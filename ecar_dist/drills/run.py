"""Run drills one after another, and report what was expected and what was seen."""

from __future__ import annotations

import contextlib
import difflib
import shlex
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from ecar_dist.command_line import counted
from ecar_dist.config.read import load_config
from ecar_dist.drills import rank_faults, storage_faults
from ecar_dist.drills.evidence import Finding
from ecar_dist.drills.ground import CannotRunError, Ground
from ecar_dist.drills.processes import UnexpectedError
from ecar_dist.drills.table import Row, circumstances, markdown, passed, summary, text_lines, tree
from ecar_dist.errors import ConfigError
from ecar_dist.storage.atomic import atomic_write, write_json


@dataclass(frozen=True)
class Drill:
    """The description of a fault, and the function that injects it and checks the outcome."""

    fault: str
    run: Callable[[Ground], Iterator[Finding]]


DRILLS = {
    "kill-rank": Drill("SIGKILL of a rank in a step", rank_faults.kill_rank),
    "hang-rank": Drill("SIGSTOP of a rank in a step", rank_faults.hang_rank),
    "slow-rank": Drill("a rank gets a third of its time", rank_faults.slow_rank),
    "nan": Drill("the loss of one rank is NaN", rank_faults.nan),
    "torn-checkpoint": Drill("SIGKILL of a rank in a save, then a truncated file", storage_faults.torn_checkpoint),
    "corrupt-shard": Drill("a flipped byte in a latent shard", storage_faults.corrupt_shard),
    "s3-503": Drill("bursts of 503 from an S3 server", storage_faults.s3_503),
    "disk-full": Drill("no space for the second checkpoint", storage_faults.disk_full),
    "preempt": Drill("SIGTERM to all ranks in a step", rank_faults.preempt),
    "resize": Drill("killed, then different ranks and ZeRO stage, twice", rank_faults.resize),
}
ALL = "all"


def run_drills(
    names: Sequence[str],
    config_path: Path,
    overrides: Sequence[str] = (),
    *,
    ranks: int = 2,
    keep: Path | None = None,
    skip: Sequence[str] = (),
    json_file: Path | None = None,
    markdown_file: Path | None = None,
) -> int:
    """Run drills on small copies of the run of a config.

    Args:
        names: names of drills, or `all`.
        keep: an empty folder for runs and logs; None: a temporary one.
        skip: drills to skip; they do not count.

    Returns the exit status: 0 if everything is as expected.
    Raises ConfigError for an unknown drill, an invalid config, and a number of ranks that the config does not allow.
    """
    # Check everything before anything starts.
    chosen = _chosen(names)
    _chosen(skip)
    config = load_config(config_path, list(overrides))
    if not Path("/proc/self/environ").exists():
        raise ConfigError("drills find their processes in /proc, which this system lacks; run them on Linux")

    # Run the drills.
    folder = _empty_folder(keep) if keep else Path(tempfile.mkdtemp(prefix="ecar-drill-"))
    with ended_by_signals(), _dropped_on_interrupt(None if keep else folder):
        ground = Ground(config, folder, ranks)
        print(f"{counted(ranks, 'rank')} on {ground.device}, {ground.precision}; runs and logs in {folder}", flush=True)
        rows = [_row(name, ground, name in skip, keep is not None) for name in chosen]

    # Report. Logs of failed drills are kept.
    command = shlex.join(["ecar-dist", "drill", *names, str(config_path), *overrides])
    facts = circumstances(command, f"{ranks} on {ground.device}, {ground.precision}")
    print("\n".join(["", *text_lines(rows), summary(rows)]), flush=True)
    if keep is None and passed(rows):
        shutil.rmtree(folder)
    else:
        print(f"logs: {folder / 'logs'}")
    if json_file is not None:
        write_json(json_file, tree(rows, facts))
    if markdown_file is not None:
        with atomic_write(markdown_file) as file:
            file.write(markdown(rows, facts).encode())
    return 0 if passed(rows) else 1


def _chosen(names: Sequence[str]) -> list[str]:
    for name in names:
        if name not in (ALL, *DRILLS):
            close = difflib.get_close_matches(name, DRILLS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"choose from {ALL}, {', '.join(DRILLS)}"
            raise ConfigError(f"there is no drill {name!r}; {hint}")
    return [name for name in DRILLS if name in names or ALL in names]


def _row(name: str, ground: Ground, skipped: bool, keep: bool) -> Row:
    """Run one drill. The quiet run comes first if it does not exist yet; it does not count towards the drill's time."""
    fault = DRILLS[name].fault
    if skipped:
        return Row(name, fault, (), 0.0, "skipped", "skipped by --skip")
    print(f"{name}: {fault} ...", flush=True)
    ground.prepare()
    findings: list[Finding] = []
    began = time.monotonic()
    try:
        for finding in DRILLS[name].run(ground):
            findings.append(finding)
    except CannotRunError as reason:
        return Row(name, fault, (), 0.0, "not run", str(reason))
    except UnexpectedError as surprise:
        findings.append(Finding("the job continues until the fault strikes", str(surprise), False))
    row = Row.of(name, fault, [_anonymous(one, ground) for one in findings], time.monotonic() - began)
    print(f"{name}: {row.outcome} after {row.seconds:.0f} s", flush=True)
    if not keep:
        ground.clear(name)
    return row


def _anonymous(finding: Finding, ground: Ground) -> Finding:
    """Without the name and folder of this machine, because a result may be published."""
    seen = finding.seen.replace(f"{ground.folder}/", "").replace(f"host {socket.gethostname()}", "host HOST")
    return replace(finding, seen=seen)


def _empty_folder(keep: Path) -> Path:
    if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise ConfigError(f"{keep} is not empty; give --keep a new folder, or remove it")
    return keep.absolute()


@contextlib.contextmanager
def _dropped_on_interrupt(folder: Path | None) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        raise


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block like Ctrl-C, so that it ends the processes it started."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
