"""A rank, or the launcher, dies in a step: the job ends at once, leaves nothing behind, and the run can continue."""

import os
import signal
from pathlib import Path

import pytest

from tests.conftest import losses, read_metrics, train_on_ranks, write_yaml
from tests.train.struck_ranks import Struck, is_stopped, launch


def left_in_shared_memory():
    return {path.name for path in Path("/dev/shm").iterdir() if "deepspeed" in path.name or "torch_" in path.name}


@pytest.fixture(scope="module")
def deaths(undisturbed, tmp_path_factory):
    """How the ranks of one command ended, by the kind of death; how the launcher ended; the config; what was left in
    shared memory; and the folders that were created for compiled code."""
    folder, shared = tmp_path_factory.mktemp("deaths"), left_in_shared_memory()
    tree, _ = undisturbed
    tree = tree | {"run": tree["run"] | {"dir": str(folder / "runs")}}
    config, ended = write_yaml(tree, folder), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "extensions"))
        for name, point in {
            "an error of rank 1": "train.step:rank=1:step=2:raise",
            "SIGKILL of rank 0": "train.step:rank=0:step=6:kill",
        }.items():
            with Struck(config, failpoint=point) as job:
                ended[name] = job.end()
        with Struck(config, failpoint="train.step:rank=1:step=7:stop") as job:
            job.strike(1, signals=[signal.SIGSEGV])
            ended["SIGSEGV of rank 1"] = job.end()
        launcher = kill_launcher(config, folder / "launcher.txt")
        train_on_ranks(2, config)
    return ended, launcher, config, left_in_shared_memory() - shared, list(folder.glob("extensions"))


def kill_launcher(config, log):
    """Kill the launcher while one of the ranks is stopped."""
    with launch(config, log, failpoint="train.step:rank=1:step=8:stop") as job:
        job.wait_for(lambda: is_stopped(job.rank_processes().get(1, 0)), "rank 1 at its failpoint")
        assert "/dev/shm" not in Path(f"/proc/{job.rank_processes()[1]}/maps").read_text()  # it may be full
        os.kill(job.pid, signal.SIGKILL)
        return job.end()


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("an error of rank 1", 1, "RuntimeError: failpoint train.step"),
        ("SIGKILL of rank 0", -signal.SIGKILL, "ecar-dist: rank 0 "),
        ("SIGSEGV of rank 1", -signal.SIGSEGV, "ecar-dist: rank 1 "),
    ],
)
def test_a_death_ends_the_job_and_is_said_once(deaths, name, status, words):
    ended = deaths[0][name]
    rank = int(name[-1])
    assert ended.statuses[rank] == status, ended.text
    assert ended.statuses[1 - rank] not in (0, 1)  # 75, unless it was killed: it has nothing to fix
    assert ended.seconds < 60  # since the start, if there was no signal
    assert not ended.orphans
    assert ended.text.count(words) == 1, ended.text


def test_a_crash_leaves_its_stacks(deaths):
    text = deaths[0]["SIGSEGV of rank 1"].text
    assert "Fatal Python error: Segmentation fault" in text
    assert "train_step" in text


def test_ranks_do_not_outlive_their_launcher(deaths):
    """The kernel ends them: one rank was stopped, and could not have noticed the death itself."""
    ended = deaths[1]
    assert ended.status == -signal.SIGKILL
    assert not ended.orphans


def test_the_same_command_goes_on_after_every_death(deaths, undisturbed):
    _, _, config, *_ = deaths
    assert losses(read_metrics(config)) == undisturbed[1]
    assert [line["step"] for line in read_metrics(config)] == list(range(1, 11))


def test_nothing_is_compiled_and_nothing_is_left_in_shared_memory(deaths):
    """So no stale lock of a compiler can delay a start, and a full /dev/shm does no harm."""
    assert deaths[3:] == (set(), [])
