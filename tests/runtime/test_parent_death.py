import os
import signal
import subprocess
import sys
import time

from ecar_dist.runtime.watchdog.monitor import process_state

CHILD = (
    "import time; from ecar_dist.runtime.parent_death import die_with_parent;"
    "die_with_parent(); print(1); time.sleep(60)"
)
PARENT = (
    "import subprocess, sys;"
    "child = subprocess.Popen([sys.executable, '-u', '-c', sys.argv[1]], stdout=subprocess.PIPE);"
    "child.stdout.readline(); print(child.pid, flush=True); child.wait()"
)


def test_a_rank_dies_with_its_launcher():
    launcher = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True)
    rank = int(launcher.stdout.readline())
    assert process_state(rank) not in ("", "Z")
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    until = time.monotonic() + 5
    while process_state(rank) not in ("", "Z") and time.monotonic() < until:
        time.sleep(0.05)
    assert process_state(rank) in ("", "Z")
