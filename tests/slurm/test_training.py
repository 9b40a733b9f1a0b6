"""Training jobs on a real Slurm, and the faults that strike them: each ends like an undisturbed job.

All are submitted together. Slurm runs as many at the same time as its licences allow, one per rank. A fault strikes a
job when it has trained far enough. The tests wait and check.
"""

import itertools
import json
import threading
import time
from pathlib import Path

import pytest

from ecar_dist.runtime.checkpoint.inspect import diff_checkpoints, find_checkpoint
from tests.conftest import losses, write_yaml
from tests.slurm.cluster import ENDED
from tests.train.test_elastic import FP32_TOLERANCE

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm")]
ROOT = Path(__file__).parents[2]
STEPS = 6
SLOW = "train.step:delay=0.8"
STALLED = ",".join(f"train.step:step={step}:delay=8" for step in (5, 6))  # while a node is lost
SLEEPY = ",".join(f"train.step:step={step}:delay=9" for step in range(3, 11))  # 72 s: longer than the time limit
# The delays give a fault the time to strike. They are for the first start of a job, or the first link of a chain.
ENV_SH = """\
. slurm/env.sh
if (( ${SLURM_RESTART_COUNT:-0} > 0 || ${SLURM_ARRAY_TASK_ID:-1} > 1 )); then unset ECAR_FAILPOINT; fi
"""
GOES_ON = [one for one in ENDED if one != "FAILED"]  # Slurm reports FAILED from a script's exit to its requeue


class Site:
    """The jobs of these tests, by the names of their runs."""

    def __init__(self, cluster, config, folder):
        self.cluster, self.config, self.folder, self.jobs = cluster, config, folder, {}
        self.all_submitted = threading.Event()
        (folder / "slurm").mkdir()
        (folder / "slurm/env.sh").write_text(ENV_SH)

    def submit(self, name, nodes, ranks, *overrides, options=("--exclude=n[4-7]",), run=None, **environment):
        words = [f"--nodes={nodes}", f"--ntasks-per-node={ranks}", f"--gpus-per-node={ranks}", "--cpus-per-task=1"]
        words += [f"--licenses=ranks:{int(str(nodes)[-1]) * ranks}", *options]
        words += [f"--output={self.folder / name}.log", "slurm/train.sbatch", self.config, f"run.name={run or name}"]
        environment = {"ECAR_SLURM": str(self.folder / "slurm"), **environment}
        self.jobs[name] = self.cluster.submit(*words, *overrides, cwd=ROOT, **environment)

    def run(self, name):
        return self.folder / "runs" / name

    def log(self, name):
        return (self.folder / f"{name}.log").read_text()

    def rank_log(self, name, rank=0):
        return (self.run(name) / f"logs/job-{self.jobs[name]}/rank-{rank:05d}.log").read_text()

    def metrics(self, name):
        path = self.run(name) / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def attempts(self, name):
        """How each attempt ended: its reason in lineage.json, None for one that was killed."""
        return [one.get("reason") for one in json.loads((self.run(name) / "lineage.json").read_text())]

    def finished(self, name, restarts=1):
        """Wait until the job has completed; returns its metrics."""
        job = self.cluster.wait(self.jobs[name], GOES_ON if restarts else ENDED, 300)
        assert (job["JobState"], job["Restarts"]) == ("COMPLETED", str(restarts)), self.log(name)
        return self.metrics(name)

    def same_weights(self, name, reference):
        a, b = (find_checkpoint(self.run(one)) for one in (name, reference))
        return diff_checkpoints(a, b).equal


class Faults:
    """The faults that strike jobs, each as soon as its job has logged a given number of steps."""

    def __init__(self, site):
        self.site, self.waiting, self.errors = site, [], []
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch)

    def strike(self, name, after, action):
        self.waiting.append((name, after, action))

    def _watch(self):
        while self.waiting and not self.over.wait(0.1):
            due = [one for one in self.waiting if len(self.site.metrics(one[0])) >= one[1]]
            for name, after, action in due:
                self.waiting.remove((name, after, action))
                try:
                    action()
                except AssertionError as error:
                    self.errors.append(f"{name}: {error}")


@pytest.fixture(scope="module")
def site(cluster, make_tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    tree = make_tree(folder) | {"deepspeed": {"precision": "fp32", "zero_stage": 2}}
    site = Site(cluster, write_yaml(tree, folder), folder)
    latents = Path(tree["data"]["latents"])
    cluster.hide("n5", latents)
    faults = Faults(site)
    limited = [
        "--exclude=n[4-7]",
        "--time=1",
        "--signal=B:USR1@5",
    ]  # Slurm checks every 30 s: the warning comes 25 to 55 s after the start
    site.submit("limited", 1, 1, "train.total_samples=160", options=limited, ECAR_FAILPOINT=SLEEPY)
    faults.strike("limited", 1, lambda: submit_the_others(site, faults))
    faults.thread.start()
    assert site.all_submitted.wait(120), site.log("limited")
    yield site
    cluster.uncover("n5", latents)
    faults.over.set()
    faults.thread.join()
    assert not faults.errors


def submit_the_others(site, faults):
    """Only once the limited job runs: they would take the processors, and its time would be up before it started."""
    cluster = site.cluster
    site.submit("second", 1, 1, "train.total_samples=160", run="limited")
    site.submit("cut", "1-2", 2, options=["--exclude=n[1-3,5-6]"], ECAR_FAILPOINT=STALLED)
    site.submit("daemon", 2, 1, options=["--partition=spare"], ECAR_FAILPOINT=SLEEPY)
    site.submit("pair", 2, 1)
    site.submit("blind", 2, 1, options=["--exclude=n[1-2,4,7]"])
    site.submit("chain", 1, 1, options=["--exclude=n[4-7]", "--array=1-3%1"], ECAR_FAILPOINT=SLOW)
    site.submit("requeued", 2, 1, ECAR_FAILPOINT=SLOW)
    site.submit("nan", 1, 1, options=["--exclude=n[4-7]", "--array=1-2%1"], ECAR_FAILPOINT="train.loss:nan")
    site.submit("four", 2, 2)
    site.submit("warned", 2, 1, ECAR_FAILPOINT=SLOW)
    site.submit("agents", 2, 2, LAUNCHER="torchrun", ECAR_FAILPOINT=SLOW)
    faults.strike("cut", 4, lambda: cluster.power_cut("n7"))
    faults.strike("daemon", 2, lambda: cluster.kill_slurmd(second_node(site.log("daemon"), attempt=1)))
    faults.strike("chain", 2, lambda: cluster.signal(cluster.job(f"{site.jobs['chain']}_1")["JobId"]))
    faults.strike("requeued", 2, lambda: cluster.call("scontrol", "requeue", site.jobs["requeued"]))
    faults.strike("warned", 2, lambda: cluster.signal(site.jobs["warned"]))
    faults.strike("agents", 2, lambda: cluster.signal(site.jobs["agents"]))
    site.all_submitted.set()


def test_two_nodes_with_two_ranks_each_train_to_the_end(site):
    metrics = site.finished("four", restarts=0)
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    story = site.rank_log("four")
    assert "4 ranks on cpu, ZeRO-2" in story
    assert f"done at step {STEPS}" in story
    logs = sorted(path.name for path in (site.run("four") / f"logs/job-{site.jobs['four']}").glob("rank-*"))
    assert logs == [f"rank-{rank:05d}.log" for rank in range(4)]
    assert "attempt 1 of at most 51, on n1,n2 (2 of 2 nodes, ranks on each: 2)" in site.log("four")


def test_a_preempted_job_comes_to_the_same_weights(site):
    metrics = site.finished("warned")
    assert losses(metrics) == losses(site.finished("pair", restarts=0))
    assert site.same_weights("warned", "pair")
    assert site.attempts("warned") == ["signal", "done"]
    story = site.rank_log("warned")
    stopped = story.split("stopped on a signal at step ")[1].split(":")[0]
    assert f"resuming at step {stopped} " in story  # not an earlier one: the warning left enough time to save
    assert "attempt 2 of at most 51" in site.log("warned")


def test_a_job_requeued_by_hand_comes_to_the_same_weights(site):
    assert losses(site.finished("requeued")) == losses(site.finished("pair", restarts=0))
    assert site.same_weights("requeued", "pair")
    assert site.attempts("requeued")[-1] == "done"


def test_a_node_that_is_lost_leaves_the_job_to_the_others(site):
    try:
        metrics = site.finished("cut")
        assert "on n4,n7 (2 of 2 nodes, " in site.log("cut")
        assert "NODE_FAIL" in site.cluster.attempts(site.jobs["cut"])
        assert "on n4 (1 of 1 nodes, " in site.log("cut")
        assert losses(metrics) == pytest.approx(losses(site.finished("pair", restarts=0)), abs=FP32_TOLERANCE)
        assert "resuming" in site.rank_log("cut")
    finally:
        site.cluster.restore("n7")


def test_a_node_that_fails_the_preflight_is_named_and_kept_out(site):
    assert losses(site.finished("blind")) == losses(site.finished("pair", restarts=0))
    assert site.same_weights("blind", "pair")
    assert "node n5 failed the preflight" in site.rank_log("blind")
    assert "continuing without n[1-2,4,7],n5" in site.log("blind")
    assert "attempt 2 of at most 51, on n3,n6 " in site.log("blind")


def test_a_second_job_on_one_run_directory_is_refused(site):
    job = site.cluster.wait(site.jobs["second"], seconds=120)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "1:0", "0")
    (line,) = [line for line in site.log("second").splitlines() if line.startswith("ecar-dist: ")]
    assert f"Slurm job {site.jobs['limited']}" in line
    assert "wait for its end" in line


def test_a_time_limit_is_no_end(site):
    job = site.cluster.wait(site.jobs["limited"], GOES_ON, 240)
    assert job["JobState"] == "COMPLETED"
    ends = site.attempts("limited")
    assert ends == ["signal"] * int(job["Restarts"]) + ["done"]
    assert len(ends) > 1
    # another job's attempt to use its directory did no harm
    assert [line["step"] for line in site.metrics("limited")] == list(range(1, 11))


def test_one_agent_of_torchrun_a_node(site):
    assert losses(site.finished("agents")) == losses(site.finished("four", restarts=0))
    assert site.attempts("agents") == ["signal", "done"]
    assert f"done at step {STEPS}" in site.rank_log("agents", 0)
    logs = {path.name for path in (site.run("agents") / f"logs/job-{site.jobs['agents']}").glob("*.log")}
    assert logs == {f"rank-{rank:05d}.log" for rank in range(4)} | {"agent-00000.log", "agent-00001.log"}


def test_a_chain_of_jobs_does_without_requeue(site):
    links = links_of(site, "chain")
    assert [link["JobState"] for link in links] == ["COMPLETED", "COMPLETED", "CANCELLED"]
    assert [link.get("Restarts", "0") for link in links] == ["0", "0", "0"]
    assert losses(site.metrics("chain")) == pytest.approx(losses(site.finished("pair", restarts=0)), abs=FP32_TOLERANCE)
    assert site.attempts("chain") == ["signal", "done"]


def test_a_fruitless_job_is_not_run_again(site):
    links = links_of(site, "nan")
    assert [link["JobState"] for link in links] == ["FAILED", "CANCELLED"]
    assert (links[0]["ExitCode"], links[0]["Restarts"]) == ("93:0", "0")
    assert "ecar-dist: step 3 is bad like those before it" in site.log("nan")


def links_of(site, name):
    """The links of a chain, once all have ended."""
    for _ in itertools.repeat(None, 1200):
        links = site.cluster.links(site.jobs[name])
        if all(link["JobState"] in ENDED for link in links):
            return links
        time.sleep(0.1)
    raise AssertionError(f"{name} does not end: {links}")


def test_a_node_whose_daemon_dies_is_given_up(site):
    """Its rank keeps running for a while, as an orphan that must not get in the way of the next attempt."""
    cluster = site.cluster
    metrics = site.finished("daemon")
    lost = second_node(site.log("daemon"), attempt=1)
    try:
        assert "NODE_FAIL" in cluster.attempts(site.jobs["daemon"])
        assert lost not in nodes_of(site.log("daemon"), attempt=2)
        assert losses(metrics) == losses(site.finished("pair", restarts=0))
        assert site.same_weights("daemon", "pair")
    finally:
        cluster.power_cut(lost)
        cluster.restore(lost)


def nodes_of(log, attempt):
    return log.split(", on ")[attempt].split()[0].split(",")


def second_node(log, attempt):
    """The second node: the job script runs on the first."""
    return nodes_of(log, attempt)[1]
