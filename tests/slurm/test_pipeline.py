"""`ecar-dist submit` and the data scripts, on a real Slurm: training, an encode array, the complete pipeline."""

import datetime
import hashlib
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from data_tools.cli import main as ecar_data
from tests.conftest import write_yaml
from tests.slurm.cluster import ENDED

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm")]
ROOT = Path(__file__).parents[2]
ELSEWHERE = "--exclude=n4,n5"  # these two nodes belong to other tests
ENCODING = ("--vae", "dct-f8", "--image-size", "32", "--samples-per-shard", "128")
# Task 2 writes its second shard, but waits before it gives it its name, so that it can be killed there.
STUCK = """\
import os, time
link = os.link
def wait_and_link(source, target):
    if os.environ.get("SLURM_ARRAY_TASK_ID") == "2" and "000006" in str(target):
        time.sleep(300)
    link(source, target)
os.link = wait_and_link
"""
STEPS = ["shard", "encode", "finalize", "train", "evaluate"]


class Site:
    """The cluster as seen from a folder on its login node."""

    def __init__(self, cluster, folder):
        self.cluster, self.folder = cluster, folder

    def submit(self, config, *words):
        """`ecar-dist submit`; returns what it printed."""
        return self.cluster.call(*self.command(config, *words), cwd=self.folder)

    def refused(self, config, *words):
        done = subprocess.run(
            self.command(config, *words), cwd=self.folder, env=self.cluster.environment, capture_output=True, text=True
        )
        assert done.returncode == 1, done.stdout
        return done.stderr

    def command(self, config, *words):
        return [sys.executable, "-m", "ecar_dist", "submit", str(config), f"--sbatch={ELSEWHERE}", *words]

    def tasks(self, job):
        """The fields of every task of a job array, or of the one job."""
        said = self.cluster.call("scontrol", "--oneliner", "show", "job", job).splitlines()
        return [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in said if line.strip()]

    def ended(self, job, seconds=120):
        """Wait for all tasks of a job; returns their states."""
        self.cluster.until(
            lambda: all(task["JobState"] in ENDED for task in self.tasks(job)), seconds, f"job {job} has ended"
        )
        return {task["JobState"] for task in self.tasks(job)}


@pytest.fixture(scope="module")
def site(cluster, tmp_path_factory):
    return Site(cluster, tmp_path_factory.mktemp("a site"))


def jobs_of(folder):
    return dict(line.split() for line in (folder / "steps").read_text().splitlines())


# --- one training run


@pytest.fixture(scope="module")
def submitted(site, make_tree):
    """Two jobs of one run, where the second waits for the first, and the refusal of one that would not wait."""
    folder = site.folder / "single"
    folder.mkdir()
    config = write_yaml(make_tree(folder), folder)
    first = site.submit(config, "--nodes=2", "--gpus-per-node=1", "--time=10")
    refused = site.refused(config, "--nodes=1", "--gpus-per-node=1")
    job = (folder / "runs/tiny/jobs/001/job").read_text().strip()
    site.submit(config, "--nodes=1", "--gpus-per-node=1", "--after", job)
    return folder / "runs/tiny", first, refused


# --- an encode array


@pytest.fixture(scope="module")
def encoding(site, digits):
    """An array of four whose task 2 never ends; returns its id and folder."""
    stuck = site.folder / "stuck"
    stuck.mkdir()
    (stuck / "sitecustomize.py").write_text(STUCK)
    out = site.folder / "encoded"
    return submit_encoding(site, digits, out, "--array=0-3", PYTHONPATH=str(stuck)), out


def submit_encoding(site, digits, out, array, **environment):
    log = f"--output={site.folder}/encode-%A_%a.log"
    words = [array, ELSEWHERE, log, "slurm/encode.sbatch", digits / "images/train", out, *ENCODING]
    environment = {"VENV": sys.prefix, **environment}
    return site.cluster.submit(*words, cwd=ROOT, **environment)


# --- the pipeline


@pytest.fixture(scope="module")
def piped(site, digits, make_tree):
    """The pipeline on a source with a broken link, so that its first step fails: config, words, output."""
    folder = site.folder / "piped"
    source = folder / "source"
    write_images(source)
    tree = make_tree(folder)
    tree["flow"] = {"num_stages": 2}
    tree["sample"] = {"steps_per_stage": 1}
    tree["data"].update(
        latents=str(folder / "latents"),
        num_classes=3,
        train_images=str(folder / "images/train"),
        heldout_images=str(folder / "images/heldout"),
    )
    words = ["--nodes=1", "--gpus-per-node=0", "--ranks-per-node=1", "--pipeline", str(source), "--holdout=0.3"]
    words += ["--encode-tasks=2", "--encode-option=--samples-per-shard=64"]
    config = write_yaml(tree, folder)
    return folder, config, words, site.submit(config, *words)


def write_images(source):
    """Seventy PNGs of each of three digits, and a link to an image that is not there."""
    from sklearn.datasets import load_digits

    data = load_digits()
    for label in range(3):
        (source / f"class {label}").mkdir(parents=True)
        for number, image in enumerate(data.images[data.target == label][:70]):
            picture = Image.fromarray((image * 15.9).astype("uint8")).resize((32, 32))
            picture.convert("RGB").save(source / f"class {label}" / f"{number:03d}.png")
    (source / "class 0/broken.png").symlink_to("nowhere.png")


@pytest.fixture(scope="module", autouse=True)
def side_by_side(submitted, encoding, piped):
    """Everything that takes long starts at the same time."""


def test_a_failing_link_cancels_the_rest_of_the_pipeline(site, piped):
    folder, _, _, out = piped
    jobs = jobs_of(folder / "runs/tiny/jobs/001")
    assert list(jobs) == STEPS
    assert all(re.search(rf"^{step} +{job} ", out, re.MULTILINE) for step, job in jobs.items())
    assert site.ended(jobs["shard"]) == {"FAILED"}
    for step in STEPS[1:]:
        assert site.ended(jobs[step], seconds=20) == {"CANCELLED"}, step
    assert "broken.png" in (folder / f"runs/tiny/logs/shard-{jobs['shard']}.log").read_text()


@pytest.fixture(scope="module")
def mended(site, piped):
    """The same command after the cause is fixed: job ids by step."""
    folder, config, words, _ = piped
    jobs = jobs_of(folder / "runs/tiny/jobs/001")
    for job in jobs.values():
        site.ended(job)
    (folder / "source/class 0/broken.png").unlink()
    site.submit(config, *words)
    return folder, jobs_of(folder / "runs/tiny/jobs/002")


def test_a_killed_task_is_submitted_again_by_itself(site, digits, encoding, mended, tmp_path):
    job, out = encoding
    site.cluster.until(lambda: list(out.glob(".000006*")), 90, "task 2 is at its second shard")
    site.cluster.call("scancel", f"{job}_2")
    assert site.ended(job) == {"COMPLETED", "CANCELLED"}
    assert {path.stem for path in out.glob("0*.json")} == {f"{n:06d}" for n in range(12)} - {"000006", "000010"}
    unsaid = submit_encoding(site, digits, out, "--array=2")
    again = submit_encoding(site, digits, out, "--array=2", TASKS="4")
    finalize = ["--dependency=afterok:" + again, "--kill-on-invalid-dep=yes", f"--output={site.folder}/finalize.log"]
    last = site.cluster.submit(*finalize, ELSEWHERE, "slurm/finalize.sbatch", out, cwd=ROOT, VENV=sys.prefix)
    assert site.ended(last) == {"COMPLETED"}, (site.folder / "finalize.log").read_text()
    assert "task 2 of 4 is done, 2 shards by this run" in (site.folder / f"encode-{again}_2.log").read_text()
    assert site.ended(unsaid) == {"FAILED"}
    assert "give the total number: TASKS=32" in (site.folder / f"encode-{unsaid}_2.log").read_text()
    whole = tmp_path / "whole"
    assert ecar_data(["encode", str(digits / "images/train"), str(whole), *ENCODING]) == 0
    assert ecar_data(["finalize", str(whole)]) == 0
    assert hashes(out) == hashes(whole)
    assert len(hashes(out)) == 12


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.tar")}


def test_a_submitted_run_finishes_in_the_nodes_and_folders_it_was_given(site, submitted):
    run, out, _ = submitted
    job = (run / "jobs/001/job").read_text().strip()
    assert f"submitted job {job}" in out
    log = run / f"logs/job-{job}.log"
    assert site.ended(job) == {"COMPLETED"}, log.read_text()
    (fields,) = site.tasks(job)
    assert (fields["NumNodes"], fields["TresPerNode"], fields["JobName"]) == ("2", "gres:gpu:1", "tiny-train")
    assert fields["TimeLimit"] == "00:10:00"
    assert fields["WorkDir"].startswith(str(site.folder).split()[0])
    assert log.exists()
    assert (run / f"logs/job-{job}/rank-00001.log").exists()
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert {path.name for path in (run / "jobs/001").iterdir()} >= {"train.sbatch", "env.sh", "config.yaml", "job"}


def test_a_second_job_waits_or_is_refused(site, submitted):
    run, _, refused = submitted
    first, second = ((run / f"jobs/{number}/job").read_text().strip() for number in ("001", "002"))
    assert f"job {first} (train) of" in refused
    assert f"--after {first}" in refused
    assert refused.startswith("ecar-dist: ")
    assert len(refused.splitlines()) == 1
    assert site.ended(second) == {"COMPLETED"}
    (before,), (after,) = site.tasks(first), site.tasks(second)
    assert time_of(after, "StartTime") >= time_of(before, "EndTime")
    assert "done at step 6" in (run / f"logs/job-{second}/rank-00000.log").read_text()


def test_the_same_command_goes_on_and_ends_in_scores(site, mended):
    folder, jobs = mended
    logs = folder / "runs/tiny/logs"
    for step in STEPS:
        last = [
            path.read_text()[-1000:] for path in logs.glob(f"{'job' if step == 'train' else step}-{jobs[step]}*.log")
        ]
        assert site.ended(jobs[step]) == {"COMPLETED"}, (step, last)
    scores = json.loads((folder / "runs/tiny/scores.json").read_text())
    assert scores["samples_seen"] == 96
    assert scores["heldout"] == 63
    for before, after in itertools.pairwise(STEPS):
        ends = [time_of(task, "EndTime") for task in site.tasks(jobs[before])]
        assert all(time_of(task, "StartTime") >= max(ends) for task in site.tasks(jobs[after])), after
    assert len(site.tasks(jobs["encode"])) == 2
    assert {path.name for path in (folder / "latents").glob("*.tar")} == {"000000.tar", "000001.tar", "000002.tar"}


def test_a_script_may_be_submitted_again_by_hand(site, mended, tmp_path):
    """From anywhere: the script itself sets where it runs, in which environment, and where its output goes."""
    folder, jobs = mended
    site.ended(jobs["shard"])
    job = site.cluster.submit(folder / "runs/tiny/jobs/002/shard.sbatch", cwd=tmp_path)
    assert site.ended(job) == {"COMPLETED"}
    (fields,) = site.tasks(job)
    assert fields["JobName"] == "tiny-shard"
    assert "nothing to do" in (folder / f"runs/tiny/logs/shard-{job}.log").read_text()


def time_of(fields, name):
    return datetime.datetime.fromisoformat(fields[name])
