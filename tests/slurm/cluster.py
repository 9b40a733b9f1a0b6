"""A real, throw-away Slurm cluster on one machine: each node in its own namespaces, no part of Slurm replaced.

`Cluster` starts it and takes it down. A node has its own processes, host name, address and mounts, and fake GPUs.
The commands of Slurm (sbatch, scontrol, ...) are called from this machine as from a login node, with
`Cluster.environment`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).parent
INSTALL = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge iproute2"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter", "setpriv")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")
GPUS = 4

# Everything that would make a test wait is short here.
SLURM_CONF = """\
ClusterName=throwaway
SlurmctldHost=login({net}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/slurmd.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
Licenses=ranks:6
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/attempts
MailProg=/bin/true
SlurmdTimeout=5
MessageTimeout=4
TCPTimeout=1
KillWait=15
MinJobAge=86400
ReturnToService=2
EnforcePartLimits=ALL
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
{nodes}
PartitionName=all Nodes=n[1-{first}] Default=YES MaxTime=INFINITE State=UP
PartitionName=spare Nodes=n[{second}-{last}] MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why no cluster can run on this machine, and the fix; None if one can."""
    path = os.environ["PATH"] + os.pathsep + "/usr/sbin"
    absent = [name for name in PROGRAMS if not shutil.which(name, path=path)]
    if absent:
        return f"no {', '.join(absent)} here: {INSTALL}"
    if os.geteuid() != 0:
        return "Slurm's daemons and their namespaces need root"
    tried = subprocess.run(["unshare", "--pid", "--net", "--uts", "--ipc", "--mount", "--fork", "true"], check=False)
    return "this machine forbids new namespaces (unshare): run on one that allows them" if tried.returncode else None


class Cluster:
    """Runs from the constructor to `down`. It also ends with this process, whatever ends that."""

    def __init__(self, folder: Path, nodes: int, spare: int) -> None:
        """`nodes` nodes in the default partition, starting with n1, and `spare` more in the partition `spare`."""
        all_nodes = nodes + spare
        self.folder = folder
        self.nodes = [f"n{number + 1}" for number in range(all_nodes)]
        self.net = _free_net()
        lines = [
            f"NodeName={name} NodeAddr={self.net}.{11 + index} CPUs=64 RealMemory=8000 Gres=gpu:{GPUS}"
            for index, name in enumerate(self.nodes)
        ]
        folder.chmod(0o755)  # munge requires that all users can reach its socket
        self.conf = folder / "slurm.conf"
        self.conf.write_text(
            SLURM_CONF.format(
                net=self.net, folder=folder, nodes="\n".join(lines), first=nodes, second=nodes + 1, last=all_nodes
            )
        )
        (folder / "gres.conf").write_text(f"NodeName=n[1-{all_nodes}] Name=gpu File={folder}/dev/gpu[0-{GPUS - 1}]\n")
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # the plugin that starts without cgroups
        self.environment = {**_without_slurm(os.environ), "SLURM_CONF": str(self.conf), "VENV": sys.prefix}
        self.environment["PATH"] += os.pathsep + "/usr/sbin"
        self._site = self._switch_on()
        try:
            self._connect()
            self.until(lambda: self.states().count("idle") == all_nodes, 30, "all nodes are idle")
        except BaseException:
            self.down()
            raise

    def _switch_on(self) -> subprocess.Popen[bytes]:
        spaces = ["--pid", "--net", "--uts", "--ipc", "--mount", "--fork", "--kill-child", "--mount-proc"]
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", *spaces, "bash", str(HERE / "site.sh")]
        command += [str(self.folder), self.net, str(len(self.nodes)), str(GPUS)]
        with open(self.folder / "site.out", "wb") as out:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=self.environment, start_new_session=True
            )

    def _connect(self) -> None:
        """A virtual cable from this machine into the cluster's network. It disappears with its far end."""
        self.until(lambda: (self.folder / "ready").exists(), 20, "the site is up")
        children = Path(f"/proc/{self._site.pid}/task/{self._site.pid}/children").read_text()
        self._inside, name = children.split()[0], f"login{self._site.pid}"
        _call("ip", "link", "add", name, "type", "veth", "peer", "name", "uplink", "netns", self._inside)
        _call("ip", "addr", "add", f"{self.net}.254/24", "dev", name)
        _call("ip", "link", "set", name, "up")
        self._enter(None, "ip", "link", "set", "uplink", "master", "bridge", "up")

    def down(self) -> None:
        """End every process of the cluster, jobs included."""
        self._site.kill()
        self._site.wait()

    # --- jobs

    def submit(self, *words: str | Path, cwd: Path | None = None, **environment: str) -> str:
        """`sbatch WORDS`; returns the job's id. Raises AssertionError with Slurm's message if it is refused."""
        return self.call("sbatch", "--parsable", *words, cwd=cwd, **environment).strip().split(";")[0]

    def call(self, *words: str | Path, cwd: Path | None = None, **environment: str) -> str:
        """Run a command as on the login node; returns what it printed."""
        ended = subprocess.run(
            [str(word) for word in words],
            cwd=cwd,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert ended.returncode == 0, f"{words}: {ended.stdout}{ended.stderr}"
        return ended.stdout

    def job(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        return self.links(job)[0]

    def links(self, array: str) -> list[dict[str, str]]:
        """The same for each job of an array, in order. Those that never came to run are one entry."""
        said = self.call("scontrol", "--oneliner", "show", "job", array).splitlines()
        jobs = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in said if line]
        return sorted(jobs, key=lambda job: int(re.match(r"\d*", job.get("ArrayTaskId", ""))[0] or 0))

    def wait(self, job: str, states: str | Sequence[str] = ENDED, seconds: float = 90) -> dict[str, str]:
        """Wait until the job is in one of the states; returns its fields."""
        wanted = (states,) if isinstance(states, str) else states
        self.until(lambda: self.job(job)["JobState"] in wanted, seconds, lambda: f"{wanted}, not {self.job(job)}")
        return self.job(job)

    def signal(self, job: str, *, batch_shell: bool = True, name: str = "USR1") -> None:
        """Signal only the batch shell, as Slurm does before a job's end, or else every process of the job's steps."""
        words = ["scancel", *(["--batch"] if batch_shell else []), f"--signal={name}", job]
        subprocess.run(words, env=self.environment, check=False)  # on a link of a chain it may fail after it signalled

    def attempts(self, job: str) -> list[str]:
        """How each finished attempt of a job ended, as Slurm has recorded it, in order."""
        path = self.folder / "log" / "attempts"
        lines = path.read_text().splitlines() if path.exists() else []
        return [re.search(r"JobState=(\S+)", line)[1] for line in lines if line.startswith(f"JobId={job} ")]

    # --- nodes

    def states(self) -> list[str]:
        said = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--format=%t"],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return said.stdout.split()

    def power_cut(self, node: str) -> None:
        """Kill every process of the node at once, without any notice."""
        self._enter(None, "kill", "-KILL", self._first_process(node))

    def kill_slurmd(self, node: str) -> None:
        """Kill only the daemon; tasks and their slurmstepd keep running."""
        pid = (self.folder / f"slurmd.{node}.pid").read_text().strip()
        self.on(node, "kill", "-KILL", pid)

    def restore(self, node: str) -> None:
        """Switch a node on again."""
        number = str(self.nodes.index(node) + 1)
        self._enter(None, "bash", str(HERE / "node.sh"), str(self.folder), self.net, number)

    def hide(self, node: str, folder: Path) -> None:
        """Make the folder look empty on this node, until `uncover`."""
        self.on(node, "mount", "-t", "tmpfs", "none", str(folder))

    def uncover(self, node: str, folder: Path) -> None:
        self.on(node, "umount", str(folder))

    def on(self, node: str, *command: str) -> str:
        """Run a command in all namespaces of a node, as root on it would."""
        return self._enter(self._first_process(node), *command)

    def _first_process(self, node: str) -> str:
        return (self.folder / f"{node}.pid").read_text().strip()

    def _enter(self, node: str | None, *command: str) -> str:
        enter = ["nsenter", "--target", self._inside, "--pid", "--net", "--uts", "--ipc", "--mount"]
        if node:
            enter += ["nsenter", "--target", node, "--pid", "--net", "--uts", "--ipc", "--mount"]
        return _call(*enter, *command, env=self.environment)

    # --- waiting

    def until(self, true, seconds: float, what) -> None:
        """Wait until `true()`. Raises AssertionError if it does not become true in time."""
        end = time.monotonic() + seconds
        while not true():
            said = what if isinstance(what, str) else what()
            assert time.monotonic() < end, f"waited {seconds} s in vain: {said}; see {self.folder}"
            time.sleep(0.1)


def _without_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """Without the variables of a cluster on which this process itself may be running."""
    return {name: value for name, value in environment.items() if not name.startswith(("SLURM", "SBATCH"))}


def _free_net() -> str:
    """Three octets of a private network that this machine has no address in."""
    taken = _call("ip", "-4", "-oneline", "addr")
    return next(net for net in (f"10.77.{(os.getpid() + n) % 255}" for n in range(255)) if f" {net}." not in taken)


def _call(*command: str, env: Mapping[str, str] | None = None) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=env)
    assert ended.returncode == 0, f"{command}: {ended.stdout}{ended.stderr}"
    return ended.stdout
