"""Drills on ranks that are forked instead of launched: like torchrun, but without seconds of imports.

The fork server's child is the launcher: it leads a session, forks the ranks, ends all once one has failed, and reports
like torchrun. A forked process shows the fork server's environment in /proc, not its own, so the processes of a job are
found by their session; processes that the ranks start themselves carry the mark, as always.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ecar_dist.cli import entry
from ecar_dist.drills import processes
from ecar_dist.drills.processes import Job
from tests.fork_server import CONTEXT

GRACE = 30.0  # seconds, as torchrun's
REPORT = "  rank      : {rank} (local_rank: {rank})\n  exitcode  : {status} (pid: {pid})\n"


class ForkedJob(Job):
    """A Job whose launcher is a fork. `command` is that of `processes.torchrun`, as a drill gives it."""

    def __init__(self, command, environment, log, patience):
        self._mark, self._log, self._patience = os.urandom(8).hex(), log, patience
        self._struck = self._began = time.monotonic()
        log.write_text("")
        self._launcher = Launcher(command, {**environment, processes.MARK: self._mark}, log)
        SESSIONS[self._mark] = self._launcher.pid

    def rank_processes(self):
        if not (found := ranks_file(self._log)).exists():
            return {}
        return {rank: int(pid) for rank, pid in enumerate(found.read_text().split())}


class Launcher:
    """The part of Popen that a Job uses."""

    def __init__(self, command, environment, log):
        ranks, port = (command[command.index(option) + 1] for option in ("--nproc-per-node", "--master-port"))
        words = command[command.index("ecar_dist") + 1 :]
        ranks_file(log).unlink(missing_ok=True)
        self._process = CONTEXT.Process(target=launch, args=(int(ranks), port, words, environment, log, os.getcwd()))
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("launcher", timeout)
        return self.poll()


SESSIONS = {}  # by mark
by_environment = processes.marked


def marked(mark):
    """Replaces `processes.marked`."""
    session = SESSIONS.get(mark)  # None: a job that was launched
    ours = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and in_session(entry, session)]
    return sorted({*ours, *by_environment(mark)})


def in_session(entry, session):
    try:
        state, _, _, found, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return int(found) == session and state != "Z"


def ranks_file(log):
    return log.with_suffix(".ranks")


def launch(ranks, port, words, environment, log, folder):
    """The launcher's process: start the ranks, wait, report."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment, WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(out, standard)
    pids = [os.fork() or rank_main(rank, words) for rank in range(ranks)]
    temporary = ranks_file(log).with_suffix(".tmp")
    temporary.write_text(" ".join(map(str, pids)))
    temporary.rename(ranks_file(log))
    statuses = wait_for_all(pids)
    failed = {pid: status for pid, status in statuses.items() if status}
    for pid, status in failed.items():
        print(REPORT.format(rank=pids.index(pid), status=status, pid=pid), flush=True)
    os._exit(bool(failed))


def rank_main(rank, words):
    os.setpgid(0, 0)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    sys.argv = ["ecar-dist", *words]
    entry()


def wait_for_all(pids):
    """Exit status by process, in the order in which they end. Once one has failed, the others are ended."""
    statuses, until = {}, float("inf")
    while len(statuses) < len(pids):
        pid, code = os.waitpid(-1, os.WNOHANG)
        if pid:
            statuses[pid] = os.waitstatus_to_exitcode(code)
            if statuses[pid] and until == float("inf"):
                until = time.monotonic() + GRACE
                end(pids, statuses, signal.SIGTERM)
        else:
            if time.monotonic() > until:
                end(pids, statuses, signal.SIGKILL)
            time.sleep(0.02)
    return statuses


def end(pids, statuses, number):
    for pid in set(pids) - set(statuses):
        os.kill(pid, number)
