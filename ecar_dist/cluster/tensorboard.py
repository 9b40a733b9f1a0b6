"""`ecar-dist tensorboard`: many runs in one view, on the login node or as a job, and the ssh line to it."""

from __future__ import annotations

import getpass
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from ecar_dist.cluster.job_script import option_words, parse_option, require_printable
from ecar_dist.cluster.slurm import SlurmError, job_state, submit_script
from ecar_dist.command_line import say
from ecar_dist.errors import ConfigError
from ecar_dist.storage.untrusted import printable

BROWSER_PORT = 6006  # on the user's own machine
_WAITING = ("PENDING", "CONFIGURING", "REQUEUED")
_MARK = "ssh -N -L"
_POLL_SECONDS = 1.0


def logdir_words(runs: Sequence[Path]) -> list[str]:
    """TensorBoard's own arguments for these runs and folders of runs. Raises ConfigError for what it cannot show."""
    for run in runs:
        if not run.is_dir():
            raise ConfigError(f"{run} is no folder; give run directories, or folders that hold some")
    if len(runs) == 1:
        return ["--logdir", str(runs[0].absolute())]
    named = _named(runs)
    for path in named.values():
        if "," in path or ":" in path:
            raise ConfigError(f"{path} has a comma or a colon, which TensorBoard takes for its own; give it alone")
    return ["--logdir_spec", ",".join(f"{name}:{path}" for name, path in named.items())]


def _named(runs: Sequence[Path]) -> dict[str, str]:
    """Absolute paths by the shortest ending that tells them apart."""
    paths = list(dict.fromkeys(Path(os.path.abspath(run)) for run in runs))
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]).lstrip("/") for path in paths]
        if len(set(names)) == len(paths):
            break
    return dict(zip(names, map(str, paths), strict=True))


def serve(runs: Sequence[Path], *, port: int | None, login: str | None, in_job: bool) -> NoReturn:
    """Print how to reach it, then become TensorBoard: in a job for the cluster, else for this machine alone."""
    words = logdir_words(runs)
    port = port or _free_port()
    for line in reach_lines(port, login, in_job=in_job):
        print(line, flush=True)
    listening = ["--bind_all"] if in_job else ["--host", "127.0.0.1"]
    os.execv(sys.executable, [sys.executable, "-m", "tensorboard.main", *words, "--port", str(port), *listening])


def reach_lines(port: int, login: str | None, *, in_job: bool) -> list[str]:
    """The ssh line for the user's own machine, where to look then, and who else can."""
    here = socket.gethostname()
    login = login or (os.environ.get("SLURM_SUBMIT_HOST") if in_job else None) or here
    target, who = ("127.0.0.1", f"log in to {here}") if not in_job else (here, f"reach {here}, so the whole cluster")
    return [
        f"{_MARK} {BROWSER_PORT}:{target}:{port} {getpass.getuser()}@{login}",
        f"on your own machine; then open http://localhost:{BROWSER_PORT}",
        f"TensorBoard has no password: all who can {who}, can see these runs on port {port} while it runs",
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def submit_tensorboard(
    scripts: Path,
    runs: Sequence[Path],
    *,
    sbatch: Sequence[str] = (),
    port: int | None = None,
    login: str | None = None,
) -> tuple[str, Path]:
    """Submit tensorboard.sbatch for these runs; returns the job and its log, which will be in this folder."""
    logdir_words(runs)
    options = {"output": os.path.abspath("ecar-tensorboard-%j.log").replace("%", "%%").replace("%%j", "%j")}
    options |= dict(parse_option(text) for text in sbatch)
    variables = {"VENV": sys.prefix, "ECAR_SLURM": str(scripts.absolute())}
    words = [*(["--port", str(port)] if port else []), *(["--login", login] if login else [])]
    arguments = [*words, *(str(run.absolute()) for run in runs)]
    require_printable("argument of a job script", [*arguments, *variables.values()])
    job = submit_script(scripts / "tensorboard.sbatch", option_words(options), arguments, variables)
    return job, Path(options["output"].replace("%j", job).replace("%%", "%"))


def await_start(job: str, log: Path, seconds: float, tell: Callable[[str], None] = say) -> list[str]:
    """The lines of `reach_lines`, as the job printed them. Raises SlurmError where there are none after `seconds`."""
    end, state, reason = time.monotonic() + seconds, "", ""
    told = ""
    while time.monotonic() < end:
        state, reason = job_state(job)
        if lines := _reach_lines_in(log):
            return lines
        if not state:
            raise SlurmError(f"job {job} has ended; {_last_line(log)}")
        if state in _WAITING and reason not in (told, "None"):
            tell(f"job {job} waits: {reason}")
            told = reason
        time.sleep(_POLL_SECONDS)
    why = f"{state}, {reason}" if state in _WAITING else state
    raise SlurmError(
        f"job {job} is {why} after {seconds:g} s; its ssh line will be in {log}, or take it back: scancel {job}"
    )


def _reach_lines_in(log: Path) -> list[str]:
    """What the newest start of the job printed, if it is all there."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return []
    first = max((number for number, line in enumerate(lines) if line.startswith(_MARK)), default=None)
    return (
        [printable(line) for line in lines[first : first + 3]] if first is not None and len(lines) >= first + 3 else []
    )


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").split("\n")
    except OSError:
        return f"it left no {log}"
    return f"see {log}: {next((printable(line) for line in reversed(lines) if line.strip()), 'it is empty')}"
