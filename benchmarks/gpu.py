"""Runs the sections of `gpu_sections.py`, each in its own process with its own time limit; see gpu.sh.

Prints a short table, and writes all numbers to gpu-<date>.json: a section that ran earlier that day stays there until
it runs again. A section that fails or runs out of time is a line of the table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = Path(__file__).with_name("gpu_sections.py")
SECONDS = 570  # of all sections together

# Time limit of each section in seconds; they run in this order.
LIMITS = {
    "about": 40,
    "tests": 90,
    "training": 240,
    "step": 150,
    "profile": 90,
    "sampling": 90,
    "resume": 60,
    "sampling-compiled": 600,
}
COMPILING = "sampling-compiled"  # takes many minutes on CPU
SHOWN_OF_ERROR = 3  # lines


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    until = time.monotonic() + options.seconds
    sections: dict[str, Any] = {}
    path = options.out / f"gpu-{datetime.date.today()}.json"
    with tempfile.TemporaryDirectory(prefix="ecar-gpu-", dir=options.work) as work:
        for name in options.sections:
            print(f"{name} ...", flush=True)
            sections[name] = run(name, options, Path(work), until - time.monotonic())
            save(path, options, sections)
    print(table(sections))
    print(f"\nall numbers: {path}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run (default: cuda)")
    parser.add_argument("--preset", help="row of kinds/presets.py (default: XL, on CPU T)")
    parser.add_argument(
        "--sections", nargs="+", choices=tuple(LIMITS), help=f"(default: all, on CPU without {COMPILING})"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all sections (default: {SECONDS})")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder of the result")
    parser.add_argument("--work", help="folder for data, checkpoints and compiled code (default: the temporary one)")
    options = parser.parse_args(arguments)
    on_cpu = options.device == "cpu"
    options.sections = options.sections or [name for name in LIMITS if not (on_cpu and name == COMPILING)]
    options.preset = options.preset or ("XL" if options.device == "cuda" else "T")
    return options


def run(name: str, options: argparse.Namespace, work: Path, seconds: float) -> dict[str, Any]:
    """Run one section. Returns the rows that it completed, and what went wrong."""
    limit = min(LIMITS[name], seconds)
    if limit < 1:
        return {"rows": [], "failed": f"not run, no time left: --sections {name} runs it alone"}
    folder = work / name
    folder.mkdir()
    rows, log = folder / "rows.jsonl", folder / "log"

    # Its own process, so that nothing of it remains, neither GPU memory nor a compiler.
    command = [sys.executable, str(SCRIPT), name, "--device", options.device, "--preset", options.preset]
    began = time.monotonic()
    with open(log, "w") as output:
        process = subprocess.Popen(
            [*command, "--work", str(folder), "--rows", str(rows)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(options.device, folder),
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        _end(process)

    # What it found, even if it did not finish.
    found: dict[str, Any] = {"at": _now(), "commit": _commit(), "seconds": time.monotonic() - began}
    found["rows"] = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    if status is None:
        found["failed"] = f"ended after {limit:.0f} s: --sections {name} runs it alone"
    elif status:
        found["failed"] = " | ".join(log.read_text().strip().splitlines()[-SHOWN_OF_ERROR:])
    return found


def _environment(device: str, folder: Path) -> dict[str, str]:
    """No network; a separate folder for compiled code, because a killed process may leave an incomplete file."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def _end(process: subprocess.Popen) -> None:
    """Kill the process and everything that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def save(path: Path, options: argparse.Namespace, sections: dict[str, Any]) -> None:
    """Add these sections to the file for this day, device and preset."""
    about = {"device": options.device, "preset": options.preset}
    kept: dict[str, Any] = {}
    if path.exists():
        earlier = json.loads(path.read_text())
        if {name: earlier.get(name) for name in about} == about:
            kept = earlier["sections"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "sections": {**kept, **sections}}, indent=1) + "\n")


def table(sections: dict[str, Any]) -> str:
    """A line for each row and each failure."""
    lines = []
    for name, found in sections.items():
        rows = [(row["what"], row["found"]) for row in found["rows"]]
        if "failed" in found:
            rows.append(("FAILED", found["failed"]))
        lines += [(name if not number else "", *row) for number, row in enumerate(rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(2)] if lines else [0, 0]
    return "\n".join(f"{section:{widths[0]}}  {what:{widths[1]}}  {found}" for section, what, found in lines)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _commit() -> str | None:
    found = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


if __name__ == "__main__":
    main()
