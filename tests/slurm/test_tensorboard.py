"""TensorBoard as a job on a real Slurm, accessed over the cluster's network."""

import http.client
import json
import re
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm")]
ROOT = Path(__file__).parents[2]
ELSEWHERE = "--exclude=n4,n5"  # these two nodes belong to other tests
SSH_LINE = re.compile(r"^ssh -N -L 6006:(n\d+):(\d+) (\S+)@(\S+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs in one folder, and one in another."""
    from torch.utils.tensorboard import SummaryWriter

    folder = tmp_path_factory.mktemp("boards")
    for name, loss in (("wide/a", 1.5), ("wide/b", 2.5), ("deep", 3.5)):
        with SummaryWriter(folder / name / "tb") as writer:
            writer.add_scalar("train/loss", loss, 7)
    return folder


def get(cluster, node, port, path):
    """The answer of the server on a node, once there is one."""
    end = time.monotonic() + 60
    while True:
        connection = http.client.HTTPConnection(f"{cluster.net}.{10 + int(node[1:])}", int(port), timeout=10)
        try:
            connection.request("GET", path)
            if answer := json.loads(connection.getresponse().read()):
                return answer
        except OSError:
            pass
        assert time.monotonic() < end, f"{node}:{port} does not answer"
        time.sleep(0.2)


def test_it_is_submitted_and_shows_many_runs(cluster, runs):
    command = [sys.executable, "-m", "ecar_dist", "tensorboard", "wide", "deep", "--submit", f"--sbatch={ELSEWHERE}"]
    out = cluster.call(*command, "--login", "login.hpc.org", cwd=runs)
    node, port, _, login = SSH_LINE.search(out).groups()
    assert login == "login.hpc.org"
    job = re.search(r"scancel (\d+)", out)[1]
    tags = get(cluster, node, port, "/data/plugin/scalars/tags")
    assert set(tags) == {"wide/a/tb", "wide/b/tb", "deep/tb"}
    ((_, step, value),) = get(cluster, node, port, "/data/plugin/scalars/scalars?run=wide/b/tb&tag=train/loss")
    assert (step, value) == (7, 2.5)
    cluster.call("scancel", job)
    assert cluster.wait(job)["JobState"] == "CANCELLED"


def test_by_plain_sbatch_the_ssh_line_is_in_its_log(cluster, runs, tmp_path):
    log = tmp_path / "board.log"
    words = [ELSEWHERE, f"--output={log}", "slurm/tensorboard.sbatch", runs / "wide"]
    job = cluster.submit(*words, cwd=ROOT, VENV=sys.prefix)
    cluster.until(lambda: log.exists() and SSH_LINE.search(log.read_text()), 60, "the ssh line is there")
    node, port, _, login = SSH_LINE.search(log.read_text()).groups()
    assert (node, login) == (cluster.job(job)["NodeList"], cluster.call("hostname").strip())
    assert set(get(cluster, node, port, "/data/plugin/scalars/tags")) == {"a/tb", "b/tb"}
    assert "no password" in log.read_text()
    cluster.call("scancel", job)
    assert cluster.wait(job)["JobState"] == "CANCELLED"
