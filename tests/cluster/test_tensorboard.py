"""`ecar-dist tensorboard`: which runs, how it is reached, and waiting for its job."""

import getpass
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from ecar_dist.cli import main
from ecar_dist.cluster.slurm import SlurmError
from ecar_dist.cluster.tensorboard import await_start, logdir_words, reach_lines
from ecar_dist.errors import ConfigError


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/one", "a/two", "b/one", "with: colon"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


def test_one_folder_or_several_in_one_view(runs):
    assert logdir_words([runs / "a"]) == ["--logdir", f"{runs}/a"]
    assert logdir_words([runs / "a", runs / "b"]) == ["--logdir_spec", f"a:{runs}/a,b:{runs}/b"]


def test_runs_of_one_name_are_told_apart(runs):
    words = logdir_words([runs / "a/one", runs / "b/one", runs / "a/one"])
    assert words == ["--logdir_spec", f"a/one:{runs}/a/one,b/one:{runs}/b/one"]


def test_what_cannot_be_shown_is_refused(runs):
    with pytest.raises(ConfigError, match="nowhere"):
        logdir_words([runs / "a", runs / "nowhere"])
    with pytest.raises(ConfigError, match=re.escape(f"{runs}/with: colon")):
        logdir_words([runs / "a", runs / "with: colon"])
    assert logdir_words([runs / "with: colon"])


def test_how_it_is_reached(monkeypatch):
    monkeypatch.setenv("SLURM_SUBMIT_HOST", "login1")
    here, user = socket.gethostname(), getpass.getuser()
    assert reach_lines(7000, None, in_job=True)[0] == f"ssh -N -L 6006:{here}:7000 {user}@login1"
    assert reach_lines(7000, None, in_job=False)[0] == f"ssh -N -L 6006:127.0.0.1:7000 {user}@{here}"
    assert reach_lines(7000, "hpc.org", in_job=True)[0].endswith(f" {user}@hpc.org")
    for in_job in (True, False):
        for part in ("no password", here, "7000"):
            assert part in reach_lines(7000, None, in_job=in_job)[2]


def test_on_the_login_node_it_serves_this_machine_alone(runs):
    process = subprocess.Popen(
        [sys.executable, "-m", "ecar_dist", "tensorboard", "a", "b"], cwd=runs, stdout=subprocess.PIPE, text=True
    )
    try:
        port = int(re.match(r"ssh -N -L 6006:127\.0\.0\.1:(\d+) ", process.stdout.readline())[1])
        environment = json.loads(_get("127.0.0.1", port, "/data/environment"))
        assert environment["data_location"] == f"a:{runs}/a,b:{runs}/b"
        with open("/proc/net/tcp") as table:
            listening = [line.split()[1] for line in table if line.split()[3] == "0A"]
        assert f"0100007F:{port:04X}" in listening
        assert f"00000000:{port:04X}" not in listening
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def _get(host, port, path):
    end = time.monotonic() + 60
    while True:
        connection = http.client.HTTPConnection(host, port, timeout=10)
        try:
            connection.request("GET", path)
            return connection.getresponse().read()
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.2)


def test_a_job_that_stays_pending_says_why(runs, slurm):
    slurm.does("squeue", "print('PENDING Resources')")
    said = []
    with pytest.raises(SlurmError, match=r"job 9 .*PENDING, Resources.* 2 s.*scancel 9"):
        await_start("9", runs / "log", 2, said.append)
    assert said == ["job 9 waits: Resources"]


def test_a_job_that_ends_at_once_shows_its_last_line(runs, slurm):
    log = runs / "log"
    with pytest.raises(SlurmError, match=f"job 9 .*{log}"):
        await_start("9", log, 2)
    log.write_text("first\nno module tensorboard\n\n")
    with pytest.raises(SlurmError, match=f"job 9 .*{log}: no module tensorboard"):
        await_start("9", log, 2)


def test_the_newest_start_counts(runs, slurm):
    slurm.does("squeue", "print('RUNNING None')")
    (runs / "log").write_text("ssh -N -L old\nx\ny\nz\nssh -N -L new\nopen\n")
    with pytest.raises(SlurmError, match=r"RUNNING.* 1 s"):
        await_start("9", runs / "log", 1)
    (runs / "log").write_text("ssh -N -L old\nx\ny\nz\nssh -N -L new\nopen\nno password\nserving\n")
    assert await_start("9", runs / "log", 1) == ["ssh -N -L new", "open", "no password"]


def test_submitted_as_a_job(runs, slurm, capsys):
    slurm.does("squeue", "print('RUNNING None')")
    (runs / "ecar-tensorboard-41.log").write_text("ssh -N -L new\nopen\nno password\n")
    assert main(["tensorboard", "a", "--submit", "--sbatch=--time=1:00", "--port", "7000", "--login", "hpc"]) == 0
    out = capsys.readouterr().out
    assert "ssh -N -L new\nopen\nno password\n" in out
    assert "scancel 41" in out
    assert slurm.calls[0][:4] == ["sbatch", "--parsable", f"--output={runs}/ecar-tensorboard-%j.log", "--time=1:00"]
    assert slurm.calls[0][5:] == ["--port", "7000", "--login", "hpc", f"{runs}/a"]
    assert os.path.isabs(slurm.calls[0][4])
