"""How the job script handles each way in which training can end, on a real Slurm. A stand-in replaces the training."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import ENDED

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm")]
ROOT = Path(__file__).resolve().parents[2]  # as job scripts name it
PLANS = {
    "done": "",
    "to mend": "print('ecar-dist: this is not a number: x; give one'); leave(1)",
    "fruitless": "leave(93)",
    "never saved": "leave(75)",
    "killed": "if ATTEMPT == 1: os.kill(os.getpid(), signal.SIGKILL)",
    "agent": "if ATTEMPT == 1: note('exit-status', 75); sys.exit(1)",
    "warned": "if ATTEMPT == 1: train_until_told()",
    "deaf": "time.sleep(2)\nif ATTEMPT == 1: train_until_told()",
    "cancelled": "train_until_told()",
    "bad node": "if ATTEMPT == 1: RANK == '0' and note('bad-nodes', NODE); leave(75)",
    "alone": "if ATTEMPT == 1: time.sleep(3); leave(75)",
    "chain": "if LINK == '1': note('bad-nodes', NODE); leave(75)",
}


class Jobs:
    def __init__(self, cluster, folder):
        self.cluster, self.folder = cluster, folder
        self.programs = folder / "environment/bin"
        self.programs.mkdir(parents=True)
        program = self.programs / "ecar-dist"
        program.write_text(f"#!{sys.executable}\n{Path(__file__).with_name('stand_in.py').read_text()}")
        program.chmod(0o755)

    def submit(self, name, plan, *options, **environment):
        """Its log and its run directory are named after the job."""
        run, script = self.folder / name, self.folder / f"{name}.plan"
        script.write_text(PLANS[plan])
        words = ["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--exclude=n4"]
        words += [*options, f"--output={run}.log", "slurm/train.sbatch", str(script), "run.name=x"]
        environment = {"VENV": str(self.programs.parent), "RUN": str(run), **environment}
        return self.cluster.submit(*words, cwd=ROOT, **environment)

    def log(self, name):
        return (self.folder / f"{name}.log").read_text()

    def rank(self, name, job, rank=0):
        return (self.folder / name / f"logs/job-{job}/rank-{rank:05d}.log").read_text()


@pytest.fixture(scope="module")
def jobs(cluster, tmp_path_factory):
    return Jobs(cluster, tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def submitted(jobs):
    """The jobs that only have to be waited for run at the same time: name -> job."""
    last, two = {"MAX_REQUEUES": "1"}, ["--nodes=2", "--ntasks-per-node=2"]
    return {
        "done": jobs.submit("done", "done", *two),
        "some": jobs.submit("some", "done", *two, USABLE="1"),
        "to mend": jobs.submit("to mend", "to mend"),
        "fruitless": jobs.submit("fruitless", "fruitless"),
        "never saved": jobs.submit("never saved", "never saved", **last),
        "killed": jobs.submit("killed", "killed", **last),
        "agent": jobs.submit("agent", "agent", **last),
        "forbidden": jobs.submit("forbidden", "never saved", "--no-requeue"),
        "bad node": jobs.submit("bad node", "bad node", "--exclude=n2,n4"),
        "shrunk": jobs.submit(
            "shrunk", "bad node", "--nodes=1-2", "--ntasks-per-node=2", "--exclude=n[3-7]", MIN_NODES="1"
        ),
        "all bad": jobs.submit("all bad", "bad node", "--exclude=n[2-7]"),
        "chain": jobs.submit("chain", "chain", "--array=1-3%1"),
        "hopeless": jobs.submit("hopeless", "fruitless", "--array=1-3%1"),
        "in vain": jobs.submit("in vain", "never saved", "--array=1-9%1"),
        "unfinished": jobs.submit("unfinished", "never saved", "--array=1-2%1"),
    }


@pytest.mark.parametrize(
    ("name", "state", "status", "restarts", "said"),
    [
        ("done", "COMPLETED", 0, 0, "attempt 1 of at most 51, on n1,n2 (2 of 2 nodes, ranks on each: 2)"),
        ("some", "COMPLETED", 0, 0, "on n1 (1 of 2 nodes, ranks on each: 2)"),
        ("to mend", "FAILED", 1, 0, "ecar-dist: this is not a number: x; give one\n"),
        ("fruitless", "FAILED", 93, 0, "a person must look at"),
        ("never saved", "FAILED", 75, 1, "attempt 2 was the last that MAX_REQUEUES allows"),
        ("killed", "COMPLETED", 0, 1, "training ended with status 137"),
        ("agent", "COMPLETED", 0, 1, "training ended with status 75"),
        ("forbidden", "FAILED", 75, 0, "Slurm does not requeue it: submit it again"),
        ("bad node", "COMPLETED", 0, 1, "continuing without n[2,4],n1"),
        ("shrunk", "COMPLETED", 0, 1, "attempt 2 of at most 51, on n2 (1 of 1 nodes, ranks on each: 2)"),
        ("all bad", "COMPLETED", 0, 1, "too few nodes would be left"),
    ],
)
def test_a_job_ends_or_goes_on(jobs, submitted, name, state, status, restarts, said):
    # Slurm reports a job as FAILED for the moment between the script's own exit and its requeue
    wanted = [one for one in ENDED if one != "FAILED" or state == "FAILED"]
    job = jobs.cluster.wait(submitted[name], wanted, 60)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == (state, f"{status}:0", str(restarts)), jobs.log(name)
    assert said in jobs.log(name)


def test_each_rank_has_its_own_log(jobs, submitted):
    job = submitted["done"]
    jobs.cluster.wait(job)
    for rank in range(4):
        said = jobs.rank("done", job, rank)
        assert said == f"attempt 1: rank {rank} of 4 on n{1 + rank // 2}\n"
    jobs.cluster.wait(submitted["killed"], "COMPLETED")
    assert jobs.rank("killed", submitted["killed"]).count("rank 0 of 1") == 2  # the first attempt's is kept


def test_a_bad_node_is_kept_out_beside_those_that_the_user_excludes(jobs, submitted):
    job = jobs.cluster.wait(submitted["bad node"], "COMPLETED", 60)
    assert job["ExcNodeList"] == "n[2,4],n1"
    assert "on n3 (1 of 1 nodes, " in jobs.log("bad node")


def test_a_node_without_the_environment_is_kept_out(jobs):
    """Its rank never runs, so rank 0 cannot know about it."""
    environment = jobs.programs.parent
    jobs.cluster.hide("n6", environment)  # the second of those that are free
    try:
        job = jobs.submit("alone", "alone", "--nodes=2", "--exclude=n[1-4]")
        assert jobs.cluster.wait(job, "COMPLETED", 60)["Restarts"] == "1"
    finally:
        jobs.cluster.uncover("n6", environment)
    assert "continuing without n[1-4],n6" in jobs.log("alone")
    assert "on n5,n7 (2 of 2 nodes" in jobs.log("alone")


def test_a_chain_goes_on_to_the_end_and_no_further(jobs, submitted):
    cluster = jobs.cluster
    states = {}
    for name in ("chain", "hopeless", "in vain", "unfinished"):
        cluster.until(lambda name=name: ended(cluster, submitted[name]), 60, f"all links of {name} are over")
        states[name] = [(link["JobState"], link["ExitCode"]) for link in cluster.links(submitted[name])]
    assert states["chain"] == [("COMPLETED", "0:0"), ("COMPLETED", "0:0"), ("CANCELLED", "0:0")], jobs.log("chain")
    assert states["hopeless"] == [("FAILED", "93:0"), ("CANCELLED", "0:0")]  # the second stands for links two and three
    assert states["in vain"] == [*[("COMPLETED", "0:0")] * 4, ("FAILED", "1:0"), ("CANCELLED", "0:0")]
    assert "5 starts in a row ended before training" in jobs.log("in vain")
    assert states["unfinished"] == [("COMPLETED", "0:0"), ("FAILED", "75:0")]
    assert "the next link of the chain continues" in jobs.log("chain")
    assert [link["ExcNodeList"] for link in cluster.links(submitted["chain"])] == ["n4", "n4,n1", "n4,n1"]
    assert cluster.attempts(submitted["unfinished"]) == ["FAILED"]  # the last link; none was requeued


def test_a_warning_reaches_the_ranks_whenever_it_comes(jobs):
    cluster = jobs.cluster
    names = {"warned": {}, "early": {"CHECK_SECONDS": "2"}, "deaf": {}, "cancelled": {}}
    sent = {name: jobs.submit(name, name if name in PLANS else "warned", **how) for name, how in names.items()}
    for name in ("warned", "deaf", "cancelled"):
        cluster.until(lambda name=name: "rank 0 of 1" in rank_log(jobs, name, sent[name]), 30, f"{name} runs")
    cluster.signal(sent["warned"])
    cluster.signal(sent["deaf"])
    cluster.call("scancel", sent["cancelled"])
    cluster.wait(sent["early"], "RUNNING")
    cluster.signal(sent["early"])  # while the script asks for the run directory
    for name in ("warned", "early", "deaf"):
        job = cluster.wait(sent[name], "COMPLETED", 60)
        assert job["Restarts"] == "1"
    for name in ("warned", "deaf"):
        assert "told to stop" in jobs.rank(name, sent[name])
    job = cluster.wait(sent["cancelled"])
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
    assert "requeue\n" not in jobs.log("cancelled")


def ended(cluster, chain):
    return all(link["JobState"] in ENDED for link in cluster.links(chain))


def rank_log(jobs, name, job):
    try:
        return jobs.rank(name, job)
    except FileNotFoundError:
        return ""


def test_the_containers_stand_before_every_command(jobs, tmp_path):
    noted = tmp_path / "noted"
    apptainer = tmp_path / "apptainer"
    apptainer.write_text(f'#!/bin/bash\necho "$@" >> {noted}\nexec "${{@:8}}"\n')
    apptainer.chmod(0o755)
    path = f"{tmp_path}:{jobs.cluster.environment['PATH']}"
    image = {"APPTAINER_IMAGE": "image.sif", "IMAGE_VENV": str(jobs.programs.parent), "MOUNTS": "/a,/b"}
    job = jobs.submit("container", "done", PATH=path, **image)
    assert jobs.cluster.wait(job)["JobState"] == "COMPLETED", jobs.log("container")
    program = jobs.programs / "ecar-dist"
    start, plan = f"exec --nv --bind /a,/b --pwd {ROOT} image.sif {program}", jobs.folder / "container.plan"
    assert noted.read_text() == f"{start} check {plan} run.name=x --job 1 1\n{start} train {plan} run.name=x\n"


def test_pyxis_is_told_the_image_and_the_mounts():
    script = 'set -eu; . slurm/env.sh; printf "%s\\n" "${SRUN[@]}" "[$BIN]" "${#INSIDE[@]}"'
    # `submit` exports the VENV of the login node, which does not exist in the image
    env = {**os.environ, "PYXIS_IMAGE": "/images/e.sqsh", "MOUNTS": "/a,/b", "VENV": "/here/.venv"}
    said = subprocess.run(["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    container = ["--container-image=/images/e.sqsh", f"--container-workdir={ROOT}", "--container-mounts=/a:/a,/b:/b"]
    assert said.splitlines() == ["srun", *container, "[]", "0"]


def test_a_site_without_the_environment_says_what_is_missing(tmp_path):
    script = "set -eu; . slurm/env.sh; echo went on"
    env = {**os.environ, "VENV": str(tmp_path)}
    ended = subprocess.run(["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "make install, or set VENV" in ended.stderr
    assert "went on" not in ended.stdout
