"""A process that has imported the product once, and forks for each command that it receives.

Requests and answers are lines of JSON. The child has limits on memory, CPU time and wall-clock time, no network, and an
audit hook. The hook refuses and records what no content of a file may cause: a write outside its folder, a read from
the folder of secrets, the start of another program.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CPU_SECONDS = 10
WALL_SECONDS = 30.0  # a command that waits uses no CPU time, and the machine may be busy
PATIENCE = 3  # seconds before checking whether a command sleeps
MEMORY_BYTES = 2 << 30
TRAINING_BYTES = 6 << 30  # DeepSpeed reserves a bucket of 2 GB, and touches little of it
FILE_BYTES = 1 << 27  # cases may be in memory, and this limits how much of it one can fill
LIGHT = (
    "ecar_dist.cli",
    "ecar_dist.cluster.status",
    "ecar_dist.cluster.fitness",
    "ecar_dist.cluster.submission",
    "ecar_dist.cluster.pipeline",
    "ecar_dist.flow.schedule",
    "ecar_dist.plan.report",
    "ecar_dist.runtime.checkpoint.files",
    "ecar_dist.runtime.checkpoint.folder",
    "ecar_dist.runtime.checkpoint.inspect",
    "xxhash",
)
HEAVY = (
    *LIGHT,
    "s3fs",
    "fsspec.implementations.memory",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "diffusers.models.autoencoders.autoencoder_kl",
    "data_tools.cli",
    "data_tools.encode.run",
    "data_tools.finalize",
    "data_tools.images.index",
    "data_tools.inspection",
    "data_tools.push",
    "data_tools.images.shard",
    "data_tools.encode.status",
    "data_tools.autoencoder.train",
    "ecar_dist.runtime.checkpoint.inspect",
    "ecar_dist.runtime.export.write",
    "ecar_dist.sample.fast",
    "ecar_dist.sample.parity",
    "ecar_dist.sample.pictures",
    "ecar_dist.sample.preview",
    "ecar_dist.train.loop",
    "ecar_dist.train.preflight",
    "ecar_dist.train.start",
    "ecar_dist.evaluate.images",
    "ecar_dist.evaluate.score",
    "torch.utils.tensorboard",
)


class Zygote:
    """The parent's side: `run` forks, waits and returns how the command ended."""

    def __init__(self, modules: tuple[str, ...]) -> None:
        self._modules = modules
        self._process: subprocess.Popen[str] | None = None

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """`task`: words, cwd, environment, writable, unreadable, streams. Restarts the process if it has died."""
        process = self._started()
        assert process.stdin
        assert process.stdout
        process.stdin.write(json.dumps(task) + "\n")
        process.stdin.flush()
        answer: dict[str, Any] = json.loads(process.stdout.readline())
        return answer

    def close(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
            command = [sys.executable, "-m", "tests.fuzz.zygote", *self._modules]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self._process = subprocess.Popen(command, env=environment, text=True, **pipes)  # type: ignore[call-overload]
            assert self._process.stdout
            self._process.stdout.readline()
        return self._process


def serve(modules: list[str]) -> None:
    """The zygote's side: until its standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the output of imports must not mix with the answers
    for module in modules:
        with contextlib.suppress(ImportError):  # a module that was moved is imported when a command needs it
            importlib.import_module(module)
    _insist_briefly()
    import gc

    gc.freeze()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_fork(json.loads(line))), file=answers, flush=True)


def _insist_briefly() -> None:
    """Retry only briefly. Otherwise an unreachable store is retried for minutes."""
    from ecar_dist.storage.retries import RetryPolicy

    RetryPolicy.__init__.__defaults__ = (0.5, 0.5, 1 << 18, 0.01, 0.1)


def _fork(task: dict[str, Any]) -> dict[str, Any]:
    """Run one task in a fork of this process. Returns how it ended, and its time."""
    begun = time.monotonic()
    process = os.fork()
    if process == 0:
        _run(task)
    handle = os.pidfd_open(process)
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    hung = not _wait(poll, process)
    if hung:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGUSR1)  # faulthandler prints where it is
        poll.poll(500)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process, signal.SIGKILL)  # with everything that it started, if it leads its process group by now
    with contextlib.suppress(ProcessLookupError):
        if hung:
            os.kill(process, signal.SIGKILL)
    os.close(handle)
    _, status, usage = os.wait4(process, 0)
    return {
        "status": os.waitstatus_to_exitcode(status),
        "hung": hung,
        "seconds": time.monotonic() - begun,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
    }


def _wait(poll: select.poll, process: int) -> bool:
    """Whether the process ends in time. One that always sleeps, and uses no CPU time, counts as hung."""
    looks: list[str] = []
    for second in range(int(WALL_SECONDS)):
        if poll.poll(1000):
            return True
        if second >= PATIENCE - 1:
            looks.append(_state(process))
        if len(looks) >= 4 and looks[-1].startswith("S") and len(set(looks[-4:])) == 1:
            return False
    return False


def _state(process: int) -> str:
    """State and CPU time so far."""
    with contextlib.suppress(OSError, IndexError):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return f"{fields[0]} {fields[11]} {fields[12]}"
    return "gone"


def _run(task: dict[str, Any]) -> None:
    """Runs in the child. Ends the process as the console script does."""
    status = 99
    try:
        os.setsid()
        for standard, name in enumerate(("stdout", "stderr"), start=1):
            os.dup2(os.open(task["streams"][name], os.O_WRONLY | os.O_APPEND | os.O_CREAT), standard)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
        faulthandler.register(signal.SIGUSR1, file=2, all_threads=False)
        os.environ.clear()
        os.environ.update(task["environment"])
        tempfile.tempdir = None  # the cached folder of the zygote is not that of the task
        os.chdir(task["cwd"])
        if task.get("bucket"):
            _fill_bucket(Path(task["bucket"]))
        noted = os.open(task["streams"]["noted"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + task["memory_bytes"],) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 2))
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        program, *words = task["words"]
        sys.argv = [program, *words]
        sys.addaudithook(_Guard(task["writable"], task["unreadable"], noted))
        status = _call(program, words)
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        with contextlib.suppress(BaseException):
            sys.stderr.flush()
        os._exit(status)


def _call(program: str, words: list[str]) -> int:
    if program == "ecar-dist":
        from ecar_dist.cli import main
    else:
        from data_tools.cli import main
    return main(words)


def _fill_bucket(folder: Path) -> None:
    """The files of a folder as objects of memory://bucket/..., and one under each name that a manifest gives."""
    import fsspec

    store = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if not path.is_file() or path.stat().st_size > FILE_BYTES:
            continue
        store.pipe_file(f"/bucket/{path.relative_to(folder)}", path.read_bytes())
        if path.name == "checkpoint.json":
            with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
                for entry, content in zip(json.loads(path.read_bytes())["files"], _states(path.parent), strict=False):
                    store.pipe_file(f"/bucket/{path.parent.relative_to(folder)}/{entry['name']}", content)


def _states(folder: Path) -> list[bytes]:
    states = (path for path in sorted(folder.glob("state-*")) if path.is_file())  # not a device, which never ends
    return [path.read_bytes() for path in states if path.stat().st_size < FILE_BYTES]


class _Guard:
    """An audit hook. It refuses with an OSError, as if the system had refused, and records what it refused."""

    WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    CHANGES = ("os.mkdir", "os.remove", "os.rmdir", "os.rename", "os.link", "os.symlink", "os.truncate", "os.chmod")
    PROBES = ("gcc", "g++", "cc", "c++", "clang", "ldconfig", "uname")  # libraries look for these, with own arguments
    STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn")

    def __init__(self, writable: list[str], unreadable: list[str], noted: int) -> None:
        self._writable, self._unreadable, self._noted = tuple(writable), tuple(unreadable), noted
        self._busy = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._busy:
            return
        self._busy = True
        try:
            self._look(event, arguments)
        finally:
            self._busy = False

    def _look(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = any(letter in "wax+" for letter in mode) if isinstance(mode, str) else bool(flags & self.WRITES)
            if writes or (isinstance(flags, int) and flags & self.WRITES):
                self._check_write(event, path)
            elif (place := _absolute(path)) and place.startswith(self._unreadable):
                self._refuse(f"read {place}")
        elif event in self.CHANGES:
            for path in self._changed(event, arguments):
                if path and not path.startswith(self._writable):
                    self._refuse(f"{event} {path}")
        elif event in self.STARTS and "ecar_dist.runtime.watchdog.monitor" not in str(arguments[1:2]):
            if os.path.basename(str(arguments[0])) in self.PROBES:
                raise FileNotFoundError(2, "No such file or directory", arguments[0])
            self._refuse(f"start {str(arguments[:2])[:200]}")
        elif event in ("socket.connect", "socket.getaddrinfo") and not _is_here(event, arguments):
            raise OSError(101, "Network is unreachable")  # not the fault of the command

    def _check_write(self, event: str, path: Any) -> None:
        place = _absolute(path)
        if place and not place.startswith(self._writable):
            self._refuse(f"{event} {place}")

    def _changed(self, event: str, arguments: tuple[Any, ...]) -> list[str | None]:
        """The names that change; a link that is removed or renamed is not followed."""
        if event == "os.rename":
            return [_name(arguments[0], arguments[2]), _name(arguments[1], arguments[3])]
        if event in ("os.link", "os.symlink"):
            return [_name(arguments[1], arguments[-1])]
        if event in ("os.remove", "os.rmdir", "os.mkdir"):
            return [_name(arguments[0], arguments[-1])]
        return [_absolute(arguments[0])]

    def _refuse(self, what: str) -> None:
        os.write(self._noted, (what.replace("\n", "\\n") + "\n").encode("utf-8", "backslashreplace"))
        raise PermissionError(13, "Permission denied", what)


def _absolute(path: Any) -> str | None:
    """Where a write to `path` ends up; None for an open file."""
    if isinstance(path, int):
        return None
    try:
        return os.path.realpath(os.fsdecode(path))
    except (OSError, ValueError, TypeError):
        return None  # not a path: the system will report it


def _name(path: Any, folder: Any) -> str | None:
    """The path of a name, without following its last part. `folder`: descriptor of the folder that it is in, or -1."""
    if isinstance(path, int):
        return None
    text = os.fsdecode(path).rstrip("/")
    with contextlib.suppress(OSError, TypeError):
        text = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), text) if folder >= 0 else text
    head, tail = os.path.split(text)
    return os.path.join(_absolute(head or ".") or "/", tail)


def _is_here(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "socket.connect" and arguments[0].family == socket.AF_UNIX:
        return True
    host = arguments[1][0] if event == "socket.connect" else arguments[0]
    return host in (None, "", "localhost", "127.0.0.1", "::1", socket.gethostname(), b"localhost", b"127.0.0.1")


if __name__ == "__main__":
    serve(sys.argv[1:])
