"""`ecar-dist tensorboard`: several runs in one view, on the login node or as a job, and the ssh command to reach it."""

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
_SSH = "ssh -N -L"  # the start of the first of the three `reach_lines`
_POLL_SECONDS = 1.0


def logdir_words(runs: Sequence[Path]) -> list[str]:
    """TensorBoard's arguments for run directories and folders of them. Raises ConfigError if it cannot show them."""
    for run in runs:
        if not run.is_dir():
            raise ConfigError(f"{run} is not a folder; give run directories, or folders of run directories")
    if len(runs) == 1:
        return ["--logdir", str(runs[0].absolute())]

    # Several runs need names.
    named = _named(runs)
    for path in named.values():
        if "," in path or ":" in path:
            raise ConfigError(f"{path} has a comma or a colon, which TensorBoard uses as separators; give it alone")
    return ["--logdir_spec", ",".join(f"{name}:{path}" for name, path in named.items())]


def _named(runs: Sequence[Path]) -> dict[str, str]:
    """Absolute paths by name: the shortest ending of the paths that differs for all of them."""
    paths = list(dict.fromkeys(Path(os.path.abspath(run)) for run in runs))
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]).lstrip("/") for path in paths]
        if len(set(names)) == len(paths):
            break
    return dict(zip(names, map(str, paths), strict=True))


def serve(runs: Sequence[Path], *, port: int | None, login: str | None, in_job: bool) -> NoReturn:
    """Print how to reach TensorBoard, then run it in this process.

    In a job it listens on all interfaces, otherwise on localhost.
    """
    words = logdir_words(runs)
    port = port or _free_port()
    for line in reach_lines(port, login, in_job=in_job):
        print(line, flush=True)
    listening = ["--bind_all"] if in_job else ["--host", "127.0.0.1"]
    os.execv(sys.executable, [sys.executable, "-m", "tensorboard.main", *words, "--port", str(port), *listening])


def reach_lines(port: int, login: str | None, *, in_job: bool) -> list[str]:
    """The ssh command for the user's own machine, the address to open afterwards, and who else can open it."""
    here = socket.gethostname()
    if in_job:
        login = login or os.environ.get("SLURM_SUBMIT_HOST") or here
        target = here
        who = f"everybody who can reach {here}, which is everybody on the cluster"
    else:
        login = login or here
        target = "127.0.0.1"
        who = f"everybody who can log in to {here}"
    return [
        f"{_SSH} {BROWSER_PORT}:{target}:{port} {getpass.getuser()}@{login}",
        f"on your own machine; then open http://localhost:{BROWSER_PORT}",
        f"TensorBoard has no password: {who} can see these runs on port {port} while it runs",
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
    """Submit tensorboard.sbatch for these runs; returns the job id and the log, which Slurm creates in this folder."""
    logdir_words(runs)  # raises if the job would fail

    # The name of the log has the job id. Other percent signs are not marks of Slurm.
    options = {"output": os.path.abspath("ecar-tensorboard-%j.log").replace("%", "%%").replace("%%j", "%j")}
    options |= dict(parse_option(text) for text in sbatch)

    variables = {"VENV": sys.prefix, "ECAR_SLURM": str(scripts.absolute())}
    words = [*(["--port", str(port)] if port else []), *(["--login", login] if login else [])]
    arguments = [*words, *(str(run.absolute()) for run in runs)]
    require_printable("argument of a job script", [*arguments, *variables.values()])
    job = submit_script(scripts / "tensorboard.sbatch", option_words(options), arguments, variables)
    return job, Path(options["output"].replace("%j", job).replace("%%", "%"))


def await_start(job: str, log: Path, seconds: float, tell: Callable[[str], None] = say) -> list[str]:
    """Wait until the job has printed its `reach_lines`; returns them. Raises SlurmError after `seconds`.

    tell: is called with the reason why the job waits, whenever it changes.
    """
    end = time.monotonic() + seconds
    state = ""
    reason = ""
    told = ""
    while time.monotonic() < end:
        # The state first: a job that ends now has written its log.
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
        f"job {job} is {why} after {seconds:g} s; it will print the ssh command in {log}; to cancel it: scancel {job}"
    )


def _reach_lines_in(log: Path) -> list[str]:
    """The three lines of the newest start of the job; empty until all of them are in the log."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return []
    first = max((number for number, line in enumerate(lines) if line.startswith(_SSH)), default=len(lines))
    found = [printable(line) for line in lines[first : first + 3]]
    return found if len(found) == 3 else []


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").split("\n")
    except OSError:
        return f"it left no {log}"
    return f"see {log}: {next((printable(line) for line in reversed(lines) if line.strip()), 'it is empty')}"
