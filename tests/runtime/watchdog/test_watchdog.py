import dataclasses
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from ecar_dist.runtime.watchdog import monitor as monitor_module
from ecar_dist.runtime.watchdog.diagnosis import AGAIN, CALLED, HUNG, RankReport, diagnose
from ecar_dist.runtime.watchdog.heartbeat import LAYOUT, NO_STEP, PHASE_INDEX, PHASES, Heartbeat, read_heartbeat
from ecar_dist.runtime.watchdog.meeting import name_for, take
from ecar_dist.runtime.watchdog.monitor import _IGNORED, MOST_SPEAKERS, Duty, Monitor, read_reports
from ecar_dist.runtime.watchdog.watchdog import KEPT_ATTEMPTS, MAX_MONITORS, Watchdog, _limits, longest_wait
from ecar_dist.runtime.watchdog.watched import innermost_line, process_state
from tests.conftest import free_port
from tests.fork_server import run_ranks
from tests.runtime.watchdog import watched_world

HERE = Path(__file__).parent
SLACK = 20.0  # for starting processes on a busy machine; with all limits less than the 40 s that a rank waits
ALONE = SimpleNamespace(rank=0, size=1, is_first=True, nodes=("here",))
QUICK = {"look_seconds": 0.1, "folder_seconds": 0.1}


def start(folder, size, hang_seconds, failpoint="", waiting=40.0, nodes=1, **duty):
    """Fake ranks, one process each. Their monitors check often; `duty` sets their other limits."""
    numbers = [str(hang_seconds), str(waiting), json.dumps({**QUICK, **duty})]
    command = [sys.executable, str(HERE / "watched_rank.py"), str(folder), *numbers]
    shared = {**os.environ, "ECAR_FAILPOINT": failpoint, "SIZE": str(size), "NODES": str(nodes)}
    pipe = subprocess.PIPE
    return [
        subprocess.Popen(command, env={**shared, "RANK": str(rank)}, stdout=pipe, stderr=pipe, text=True)
        for rank in range(size)
    ]


def end(ranks, within):
    """Exit statuses and the lines that were printed, once all have ended by themselves."""
    until = time.monotonic() + within
    try:
        said = [rank.communicate(timeout=max(0.1, until - time.monotonic()))[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [rank.returncode for rank in ranks], "".join(said).splitlines()


def reports(folder):
    found = [json.loads(path.read_text()) for path in folder.glob("first/rank*.json")]
    return {report["rank"]: report for reports_of_node in found for report in reports_of_node}


def monitor_of(*ranks):
    """The monitor process of one rank or several, once it ignores the signals meant for the ranks."""
    until = time.monotonic() + SLACK
    while len(found := [child for child in children_of(*ranks) if is_alive(child)]) != 1 and time.monotonic() < until:
        time.sleep(0.02)
    (monitor,) = found
    while not all(int(status_of(monitor, "SigIgn"), 16) >> (number - 1) & 1 for number in _IGNORED):
        time.sleep(0.02)
    return monitor


def is_alive(process):
    try:
        return status_of(process, "State") != "Z"
    except OSError:
        return False


def children_of(*ranks):
    """The children of all threads: a thread that replaces a monitor is the parent of the new one."""
    lists = [path.read_text() for rank in ranks for path in Path(f"/proc/{rank.pid}/task").glob("*/children")]
    return [int(child) for child in " ".join(lists).split()]


def status_of(process, field):
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(f"{field}:"))


def seconds_out(line):
    return re.sub(r"for \d+ s", "for N s", line)


def test_a_stopped_rank_is_named_and_the_job_ended(tmp_path):
    ranks = start(tmp_path, 3, 1, "data:rank=1:step=3:stop")
    statuses, lines = end(ranks, 1 + Duty.end_seconds + SLACK)
    assert statuses == [-signal.SIGKILL] * 3
    host = os.uname().nodename
    assert [seconds_out(line) for line in lines] == [
        (
            f"ecar-dist: rank 1 (host {host}, process {ranks[1].pid}) has been stopped by a signal or a debugger in "
            f'phase "data" of step 3 for N s while the others wait in "backward" of step 5; it wrote no stacks '
            f"(process state T); {AGAIN}"
        )
    ]
    assert (tmp_path / "first/verdict.txt").read_text() == lines[0].removeprefix("ecar-dist: ") + "\n"
    found = reports(tmp_path)
    assert [found[rank]["state"] == "T" for rank in (0, 1, 2)] == [False, True, False]
    stacks = Path(found[0]["stacks"])
    assert stacks == tmp_path / "first/ranks-00000-00002.stacks.txt"
    assert re.findall(r"^rank \d", stacks.read_text(), re.MULTILINE) == ["rank 0", "rank 2"]
    assert "watched_rank.py" in found[2]["innermost"]


def test_a_rank_that_holds_pythons_lock_is_named_with_its_stacks(tmp_path):
    statuses, lines = end(start(tmp_path, 3, 1, "data:rank=2:step=3:gil", nodes=3), 1 + Duty.end_seconds + SLACK)
    assert statuses == [-signal.SIGKILL] * 3
    stacks = tmp_path / "first/rank-00002.stacks.txt"
    assert len(lines) == 1
    assert "rank 2" in lines[0]
    assert (
        f'"data" of step 3 for N s while the others wait in "backward" of step 5: its stacks are in {stacks};'
        in seconds_out(lines[0])
    )
    assert "in _strike" in stacks.read_text()


def test_a_killed_rank_ends_the_others_long_before_they_hang(tmp_path):
    slow = "data:rank=0:step=2:delay=0.2"  # the monitor checks, and then not again before the end
    ranks = start(tmp_path, 3, 600, f"{slow},forward:rank=0:step=2:kill")
    statuses, lines = end(ranks, Duty.end_seconds + SLACK)
    assert statuses == [-signal.SIGKILL] * 3
    assert len(lines) == 1
    assert f'process {ranks[0].pid}) has been gone since phase "forward" of step 2: killed or crashed;' in lines[0]
    assert reports(tmp_path)[0]["stacks"] == ""


@pytest.mark.parametrize("nodes", [1, 2])
def test_an_error_of_one_rank_ends_the_others_and_only_that_rank_prints_it(tmp_path, nodes):
    ranks = start(tmp_path, 2, 600, "backward:rank=1:step=2:raise", nodes=nodes, gather_seconds=1)
    statuses, lines = end(ranks, 1 + SLACK)
    assert statuses == [-signal.SIGKILL, 1]
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "RuntimeError: failpoint backward"
    assert not [line for line in lines if line.startswith("ecar-dist")]


def test_a_lost_connection_is_printed_once_if_no_rank_is_known_to_be_gone(tmp_path):
    statuses, lines = end(start(tmp_path, 2, 600, "gloo closed by peer:rank=1:raise"), Duty.end_seconds + SLACK)
    assert statuses == [-signal.SIGKILL, 3]
    assert len(lines) == 1
    assert 'rank 1 lost contact with another rank in phase "checkpoint" of step 4 (failpoint gloo closed' in lines[0]


def test_a_hang_of_one_rank_is_ended_even_if_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    statuses, lines = end(start(tmp_path / "file", 1, 1), 1 + Duty.end_seconds + SLACK)
    assert statuses == [-signal.SIGKILL]
    assert len(lines) == 1
    assert 'has been in phase "backward" of step 5 for N s: it wrote no stacks (process state S);' in seconds_out(
        lines[0]
    )


def test_a_file_system_that_hangs_does_not_keep_the_rank_alive(tmp_path):
    (tmp_path / "first").mkdir()
    os.mkfifo(tmp_path / "first/rank-00000.stacks.txt")  # opening it for writing blocks forever
    statuses, _ = end(start(tmp_path, 1, 1, end_seconds=1), 2 + SLACK)
    assert statuses == [-signal.SIGKILL]


def test_a_slow_first_step_and_a_slow_save_are_not_a_hang(tmp_path):
    slow = "data:step=1:delay=1.5,checkpoint:step=4:delay=1.5"
    statuses, lines = end(start(tmp_path, 1, 1, slow, waiting=0), 4 + SLACK)
    assert (statuses, lines) == ([0], [])
    assert not list(tmp_path.iterdir())


def test_a_job_that_was_suspended_goes_on(tmp_path):
    """Stopped with its monitor, as by a scheduler: the time is not counted. The monitor ignores its own signals."""
    (rank,) = start(tmp_path, 1, 3, "alive:nan")
    assert rank.stdout.readline() == "waiting\n"
    monitor = monitor_of(rank)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(monitor, number)
    os.kill(rank.pid, signal.SIGSTOP)
    time.sleep(0.3)  # until the monitor has seen its last beat
    os.kill(monitor, signal.SIGSTOP)
    time.sleep(4)
    os.kill(monitor, signal.SIGCONT)
    time.sleep(0.1)
    os.kill(rank.pid, signal.SIGCONT)
    assert process_state(monitor) in ("R", "S")
    rank.send_signal(signal.SIGUSR1)
    assert end([rank], SLACK) == ([0], [])


def test_a_clean_end_leaves_no_process_and_no_file(tmp_path):
    (rank,) = start(tmp_path, 1, 600, waiting=0.5)
    assert rank.stdout.readline() == "waiting\n"
    monitor = monitor_of(rank)
    assert int(status_of(monitor, "VmRSS")) < 20 * 1024  # KiB
    assert end([rank], 2 + SLACK) == ([0], [])
    assert process_state(monitor) == ""
    assert not list(tmp_path.iterdir())


def test_an_agreed_error_is_a_clean_end(tmp_path):
    """Every rank raises it, so there is no rank to end, and the monitors print nothing."""
    statuses, lines = end(start(tmp_path, 1, 600, "agreed error:nan"), SLACK)
    assert (statuses, lines[-1]) == ([1], "ecar_dist.errors.DataError: said by this rank")
    assert not list(tmp_path.iterdir())


def test_hang_seconds_0_starts_nothing(tmp_path):
    this = SimpleNamespace(pid=os.getpid())
    before = children_of(this)
    with Watchdog(tmp_path, ALONE, 0, "first") as dog:
        dog.beat("data", 1)
        assert children_of(this) == before
    assert not dog.close()


def test_reports_of_the_last_attempts_are_kept(tmp_path):
    for number in range(KEPT_ATTEMPTS + 3):
        (tmp_path / f"attempt-{number}").mkdir()
        os.utime(tmp_path / f"attempt-{number}", (number, number))
    Watchdog(tmp_path, ALONE, 600, "now").close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"attempt-{number}" for number in range(4, 8)]


def two_ranks(folder, hang_seconds, failpoint):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launcher += ["--master-port", str(free_port()), str(HERE / "watched_world.py"), str(folder), str(hang_seconds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ECAR_FAILPOINT": failpoint}
    return subprocess.Popen(launcher, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_under_torchrun_a_stopped_rank_ends_the_job_with_one_line(tmp_path):
    began = time.monotonic()
    _, lines = end([two_ranks(tmp_path, 2, "data:rank=1:step=40:stop")], 120)
    said = [line for line in lines if line.startswith("ecar-dist")]
    assert len(said) == 1
    assert "rank 1" in said[0]
    assert 'in phase "data" of step 40 for N s while the others wait in "data"' in seconds_out(said[0])
    assert time.monotonic() - began < 60  # the transport itself waits for longer
    assert "in all_reduce" in reports(tmp_path)[0]["innermost"]


def test_a_survivor_of_a_killed_rank_ends_with_status_and_without_a_traceback(tmp_path):
    strike = {1: {"ECAR_FAILPOINT": "data:rank=1:step=40:kill"}}
    ranks = run_ranks(2, free_port(), str(tmp_path), "600", more=strike, main=watched_world.main, timeout=120)
    statuses = [rank.returncode for rank in ranks]
    lines = "".join(rank.stderr for rank in ranks).splitlines()
    assert statuses[1] == -signal.SIGKILL
    assert statuses[0] in (3, -signal.SIGKILL)  # it ends by itself, or its monitor ends it, whichever is first
    said = [line for line in lines if line.startswith("ecar-dist")]
    assert len(said) == 1
    assert said[0].startswith("ecar-dist: rank 1 (host ")
    assert 'has been gone since phase "data" of step 40' in said[0]
    assert not any("Traceback" in line for line in lines)


def heartbeat_of(dog):
    return read_heartbeat(dog._memory[:])


def test_a_beat_says_where_the_rank_is(tmp_path):
    with Watchdog(tmp_path, ALONE, 600, "first") as dog:
        assert heartbeat_of(dog) == Heartbeat(0, 0, "start", NO_STEP)
        for phase, step, heartbeat in (
            ("load", 0, Heartbeat(0, 1, "load", NO_STEP)),
            ("data", 7, Heartbeat(7, 0, "data", 7)),
            ("forward", 7, Heartbeat(7, 1, "forward", 7)),
            ("forward", 7, Heartbeat(7, 2, "forward", 7)),
            ("data", 8, Heartbeat(8, 0, "data", 7)),
        ):
            dog.beat(phase, step)
            assert heartbeat_of(dog) == heartbeat


@pytest.mark.parametrize(
    ("phase", "step", "first_step", "seconds"),
    [
        ("start", 0, NO_STEP, 30),
        ("load", 0, NO_STEP, 30),
        ("data", 7, 7, 30),
        ("backward", 8, 7, 30),
        ("backward", 9, 7, 10),
        ("checkpoint", 9, 7, 30),
        ("preview", 9, 7, 10),
    ],
)
def test_slow_phases_and_the_first_steps_get_more_time(phase, step, first_step, seconds):
    assert Heartbeat(step, 0, phase, first_step).limit(10) == seconds


def test_collectives_wait_longer_than_the_watchdog():
    ten_minutes = datetime.timedelta(minutes=10)
    assert longest_wait(0, ten_minutes) == ten_minutes
    slowest = max(Heartbeat(0, 0, phase, 0).limit(600) for phase in PHASES)
    assert longest_wait(600, ten_minutes).total_seconds() > slowest + Duty.end_seconds


def test_phases_fit_the_memory():
    for phase, index in PHASE_INDEX.items():
        assert read_heartbeat(LAYOUT.pack(3, 2, index, 1)) == Heartbeat(3, 2, phase, 1)


def test_the_innermost_line_is_that_of_the_main_thread():
    stacks = (
        'Thread 0x00007f01 (most recent call first):\n  File "a.py", line 3 in wait\n  File "a.py", line 1 in run\n\n'
        'Current thread 0x00007f02 (most recent call first):\n  File "b.py", line 9 in all_reduce\n  File "c.py"\n'
    )
    assert innermost_line(stacks) == 'File "b.py", line 9 in all_reduce'
    assert innermost_line("") == ""


@pytest.mark.parametrize(("nodes", "monitors"), [(1, 1), (2, 2), (0, 2)])
def test_the_ranks_of_a_node_have_one_monitor_and_those_that_cannot_meet_one_each(tmp_path, nodes, monitors):
    ranks = start(tmp_path, 2, 600, nodes=nodes)
    assert [rank.stdout.readline() for rank in ranks] == ["waiting\n"] * 2
    assert len(children_of(*ranks)) == monitors
    for rank in ranks:
        rank.send_signal(signal.SIGUSR1)
    assert end(ranks, SLACK) == ([0, 0], [])
    assert not list(tmp_path.iterdir())


def test_a_monitor_outlives_the_rank_that_started_it(tmp_path):
    ranks = start(tmp_path, 2, 600)
    assert [rank.stdout.readline() for rank in ranks] == ["waiting\n"] * 2
    monitor = monitor_of(*ranks)
    starter = next(rank for rank in ranks if children_of(rank))
    starter.kill()
    statuses, (line,) = end(ranks, Duty.end_seconds + SLACK)
    assert statuses == [-signal.SIGKILL] * 2
    assert f'process {starter.pid}) has been gone since phase "backward" of step 5' in line
    assert process_state(monitor) in ("", "Z")


def test_a_rank_that_ends_well_leaves_the_monitor_to_the_others(tmp_path):
    ranks = start(tmp_path, 2, 600)
    assert [rank.stdout.readline() for rank in ranks] == ["waiting\n"] * 2
    starter, other = sorted(ranks, key=lambda rank: not children_of(rank))
    monitor = monitor_of(starter)
    starter.send_signal(signal.SIGUSR1)
    assert starter.wait(SLACK) == 0
    assert process_state(monitor) in ("R", "S")
    other.kill()
    statuses, (line,) = end([starter, other], SLACK)
    assert statuses == [0, -signal.SIGKILL]
    assert f"process {other.pid}) has been gone" in line


def test_a_killed_monitor_is_replaced_and_the_ranks_continue(tmp_path):
    ranks = start(tmp_path, 2, 600)
    assert [rank.stdout.readline() for rank in ranks] == ["waiting\n"] * 2
    killed = monitor_of(*ranks)
    os.kill(killed, signal.SIGKILL)
    until = time.monotonic() + SLACK
    while killed in (found := children_of(*ranks)) or len(found) != 1:
        assert time.monotonic() < until
        time.sleep(0.02)
    for rank in ranks:
        rank.send_signal(signal.SIGUSR1)
    statuses, lines = end(ranks, SLACK)
    assert statuses == [0, 0]
    (line,) = lines
    assert re.match(r"warning: the watchdog process of rank \d ended with signal 9; a new one was started", line)


def test_a_replaced_monitor_ends_a_hang(tmp_path):
    (rank,) = start(tmp_path, 1, 1.5)
    assert rank.stdout.readline() == "waiting\n"
    os.kill(monitor_of(rank), signal.SIGKILL)
    statuses, lines = end([rank], 1.5 + Duty.end_seconds + SLACK)
    assert statuses == [-signal.SIGKILL]
    assert len(lines) == 2
    assert 'has been in phase "backward" of step 5' in lines[1]


def test_monitors_that_die_one_after_another_are_replaced_a_few_times(tmp_path):
    (rank,) = start(tmp_path, 1, 600)
    assert rank.stdout.readline() == "waiting\n"
    for _ in range(MAX_MONITORS):
        killed = monitor_of(rank)
        os.kill(killed, signal.SIGKILL)
        while killed in children_of(rank):
            time.sleep(0.02)
    time.sleep(0.3)  # for a fourth one, which must not come
    assert children_of(rank) == []
    rank.send_signal(signal.SIGUSR1)
    statuses, lines = end([rank], SLACK)
    assert statuses == [0]
    assert len(lines) == MAX_MONITORS
    assert lines[-1].endswith("this rank is no longer watched")


def test_monitors_that_turn_a_rank_away_are_not_counted(tmp_path):
    """A killed monitor may still accept the rank's new connection, because its listener closes after its link."""
    listener = take(name_for(f"{tmp_path / 'first'} 0"))  # of node 0
    (rank,) = start(tmp_path, 1, 600)
    with listener:
        listener.settimeout(SLACK)
        for _ in range(MAX_MONITORS + 2):
            listener.accept()[0].close()
    killed = monitor_of(rank)
    os.kill(killed, signal.SIGKILL)
    while killed in children_of(rank):
        time.sleep(0.02)
    monitor_of(rank)
    rank.send_signal(signal.SIGUSR1)
    statuses, (line,) = end([rank], SLACK)
    assert statuses == [0]
    assert line.endswith("a new one was started")


def test_a_file_that_is_not_a_report_is_not_read(tmp_path):
    report = RankReport(1, "gpu07", 4001, HUNG, "forward", 3, 2, 1.5)
    path = tmp_path / "rank-00001.json"
    tree = dataclasses.asdict(report)
    path.write_text(json.dumps([tree]))
    assert read_reports(path, 2) == [report]
    assert read_reports(path, 1) == []
    wrong = [{**tree, "rank": "1"}, {**tree, "seconds": None}, {**tree, "phase": []}, {**tree, "more": 1}, [], None]
    wrong = [*([tree, one] for one in wrong), tree, [], 1, None]
    for text in (*map(json.dumps, wrong), "", "{", "[" * 10**5, "\xff"):
        path.write_text(text, encoding="latin-1")
        assert read_reports(path, 2) == [], text[:40]
    path.unlink()
    for make in (os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")):
        make(path)
        assert read_reports(path, 2) == []
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize("nodes", [1, 16, 128])
def test_the_cost_of_a_fault_is_linear_in_the_nodes(tmp_path, monkeypatch, nodes):
    """All ranks are reported because one hangs: a few monitors read the file of each node once, and one prints."""
    size, written = 8 * nodes, {}
    for node in range(nodes):
        written[node] = [
            RankReport(rank, "gpu07", 4001, HUNG if rank == 5 else CALLED, "forward", 3, 0 if rank == 5 else 2, 9.0)
            for rank in range(8 * node, 8 * node + 8)
        ]
        path = tmp_path / f"ranks-{8 * node:05d}-{8 * node + 7:05d}.json"
        path.write_text(json.dumps([dataclasses.asdict(report) for report in written[node]]))

    read, said = [], set()
    monkeypatch.setattr(monitor_module, "read_reports", lambda *given: read.append(given) or read_reports(*given))
    monkeypatch.setattr(Monitor, "_look", lambda self, seconds: None)
    for node in range(nodes):
        monitor = Monitor(Duty(size, str(tmp_path), 9.0, link=-1))
        ranks = [report.rank for report in written[node]]
        monitor.ranks = [SimpleNamespace(rank=rank, ending="") for rank in ranks]
        if monitor.duty.has_speaker(ranks):
            found = monitor._gather(written[node])
            assert [one.rank for one in found] == list(range(size))
            assert monitor._gather(written[node]) == found  # a second call reads no file again
            monitor._say(diagnose(found, size, "reports"))
        else:
            assert monitor._await_verdict() == []
        said.add((tmp_path / "verdict.txt").read_text())
    assert len(read) == min(nodes, MOST_SPEAKERS) * nodes
    assert [line.partition(" (")[0] for line in said] == ["rank 5"]


def test_many_monitors_look_less_often():
    assert _limits(8) == _limits(1000) == {"folder_seconds": 1.0, "gather_seconds": 4.0, "end_seconds": 8.0}
    assert _limits(4096) == {"folder_seconds": 4.0, "gather_seconds": 7.0, "end_seconds": 14.0}
    assert sum(Duty(4096, "", 1.0, 0).has_speaker([rank]) for rank in range(4096)) == MOST_SPEAKERS
    assert all(Duty(8, "", 1.0, 0).has_speaker([rank]) for rank in range(8))
