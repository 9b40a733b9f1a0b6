"""One fork server for all tests: it imports once what would take each of its children seconds to import.

A fork server has one list of imports, read when the first child starts, so the list is here.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from ecar_dist.cli import entry

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "s3fs",
        "deepspeed.runtime.zero.muon.muon_optimizer",  # and with it torch._inductor: otherwise each engine imports them
        "tests.probed_deepspeed",
        "ecar_dist.plan.report",
        "ecar_dist.sample.preview",
        "ecar_dist.train.loop",
        "ecar_dist.train.start",
        "tests.data.shards.test_cache",
        "tests.data.test_loader",
        "tests.data_tools.workers",
        "tests.runtime.checkpoint.test_crash",
        "tests.runtime.checkpoint.test_lone_save",
    ]
)
STREAMS = ("stdout", "stderr")
GRACE = 20.0  # seconds for the other ranks to end by themselves once one has failed


class Forked:
    """`ecar-dist WORDS` in a fork of the server, with the caller's environment, folder and umask, plus `more`."""

    def __init__(
        self,
        words: Sequence[str],
        more: Mapping[str, str] | None = None,
        before: Callable[[], None] | None = None,
        main: Callable[[], object] = entry,
    ) -> None:
        """`before`, a module-level function, is called in the fork before the command; `main` instead of it."""
        self._folder = tempfile.TemporaryDirectory(prefix="forked-")
        for name in STREAMS:
            (Path(self._folder.name) / name).touch()
        umask = os.umask(0)
        os.umask(umask)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(more or {})}
        streams = self._folder.name
        inputs = (words, environment, os.getcwd(), umask, streams, before, main)
        self.process = CONTEXT.Process(target=_run, args=inputs)
        self.process.start()

    def text(self) -> str:
        """Its output so far, from both streams."""
        return "".join((Path(self._folder.name) / name).read_text(errors="replace") for name in STREAMS)

    def end(self) -> subprocess.CompletedProcess[str]:
        """Its exit status and output. It is killed if it has not ended."""
        self.process.kill()
        self.process.join()
        said = [(Path(self._folder.name) / name).read_text(errors="replace") for name in STREAMS]
        self._folder.cleanup()
        return subprocess.CompletedProcess("ecar-dist", self.process.exitcode, *said)


def run_forked(
    *words: str, timeout: float = 120, more: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run one process without a launcher, to its end."""
    forked = Forked(words, more)
    forked.process.join(timeout)
    return forked.end()


def run_ranks(
    count: int,
    port: int,
    *words: str,
    timeout: float = 300,
    each: Mapping[int, Sequence[str]] | None = None,
    more: Mapping[int, Mapping[str, str]] | None = None,
    before: Callable[[], None] | None = None,
    main: Callable[[], object] = entry,
) -> list[subprocess.CompletedProcess[str]]:
    """Run the ranks of `fork_ranks` to their end."""
    ranks = fork_ranks(count, port, *words, each=each, more=more, before=before, main=main)
    _wait([rank.process for rank in ranks], time.monotonic() + timeout)
    return [rank.end() for rank in ranks]


def fork_ranks(
    count: int,
    port: int,
    *words: str,
    each: Mapping[int, Sequence[str]] | None = None,
    more: Mapping[int, Mapping[str, str]] | None = None,
    before: Callable[[], None] | None = None,
    main: Callable[[], object] = entry,
) -> list[Forked]:
    """Start the ranks of one world, with the variables that torchrun would give them.

    `each` and `more` add words and variables for some of the ranks; `before` and `main` are as in `Forked`.
    """
    world = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = []
    for rank in range(count):
        environment = {**world, "RANK": str(rank), "LOCAL_RANK": str(rank), **(more or {}).get(rank, {})}
        ranks.append(Forked([*words, *(each or {}).get(rank, ())], environment, before, main))
    return ranks


def _wait(ranks: Sequence[BaseProcess], until: float) -> None:
    """Wait until all have ended, or until GRACE after one has failed."""
    while alive := [rank.sentinel for rank in ranks if rank.exitcode is None]:
        if any(rank.exitcode for rank in ranks):
            until = min(until, time.monotonic() + GRACE)
        if not wait(alive, max(0.0, until - time.monotonic())):
            return


def _run(
    words: Sequence[str],
    environment: Mapping[str, str],
    folder: str,
    umask: int,
    streams: str,
    before: Callable[[], None] | None,
    main: Callable[[], object],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for standard, name in enumerate(STREAMS, start=1):
        os.dup2(os.open(Path(streams) / name, os.O_WRONLY | os.O_APPEND), standard)
    os.umask(umask)
    sys.argv = ["ecar-dist", *words]
    if before:
        before()
    main()
