"""The small copy of a user's run, and the faults that are injected into its data."""

import json

import pytest

from ecar_dist.config.read import config_from_dict, load_config
from ecar_dist.data.shards.manifest import load_manifest
from ecar_dist.data.sources import LatentSource
from ecar_dist.drills.ground import SAVE_EVERY, STEPS, CannotRunError, Ground, Trial, scaled_down
from ecar_dist.drills.processes import Ended
from ecar_dist.drills.rank_faults import from_step
from ecar_dist.drills.storage_faults import damage, flip, local_latents, says_room
from ecar_dist.errors import ConfigError, DataError


def test_the_copy_is_short_and_apart_and_else_the_same(tree, tmp_path):
    tree["train"] = {"total_samples": 10**9, "hang_seconds": 77.0}
    tree["optim"] |= {"warmup_samples": 10**6, "cooldown_samples": 10**6, "schedule": "cooldown"}
    tree["sample"], tree["log"] = {"every_samples": 1000}, {"every_steps": 50}
    tree["checkpoint"] = {"every_samples": 10**6, "keep": 2, "dir": "s3://bucket/checkpoints"}
    config = config_from_dict(tree)
    small = scaled_down(config, tmp_path / "drill")
    assert small.total_steps == STEPS
    assert small.checkpoint.every_samples == SAVE_EVERY * 16
    assert (small.checkpoint.keep, small.checkpoint.dir) == (3, None)
    assert (small.log.every_steps, small.log.tensorboard, small.sample.every_samples) == (1, False, 0)
    assert small.optim.warmup_samples + small.optim.cooldown_samples <= small.train.total_samples
    assert small.run_directory == tmp_path / "drill/runs/quiet"
    for same in ("model", "flow", "vae", "batch", "deepspeed"):
        assert getattr(small, same) == getattr(config, same)
    assert small.data.latents == config.data.latents
    assert small.train.hang_seconds == 77.0


def test_ranks_that_do_not_divide_the_batch_are_refused_at_once(tree, tmp_path):
    with pytest.raises(ConfigError, match="4 x 3 = 12"):
        Ground(config_from_dict(tree), tmp_path, 3)


def test_all_launches_of_a_trial_have_one_run_directory(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("ECAR_FAILPOINT", "train.step:kill")
    started = []
    monkeypatch.setattr("ecar_dist.drills.ground.Job", lambda *job: started.append(job))
    ground = Ground(config_from_dict(tree), tmp_path, 2)
    trial = Trial(ground, "nan", ("optim.eps=1e-7",), {"AWS_REGION": "x"})
    trial.start("train.hang_seconds=5", failpoint="train.loss:nan")
    trial.start(ranks=4, prefix=["nsenter"])
    (first, first_environment, *_), (second, second_environment, log, _) = started
    assert first[first.index("train") :] == [
        "train", str(ground.config_file), "run.name=nan", "optim.eps=1e-7", "train.hang_seconds=5"
    ]  # fmt: skip
    assert second[0] == "nsenter"
    assert second[second.index("--nproc-per-node") + 1] == "4"
    assert second[-2:] == ["run.name=nan", "optim.eps=1e-7"]
    assert first_environment["ECAR_FAILPOINT"] == "train.loss:nan"
    assert "ECAR_FAILPOINT" not in second_environment, "a fault of the user's own"
    assert second_environment["AWS_REGION"] == "x"
    assert log.name == "nan-2.txt"
    assert load_config(ground.config_file).run.name == "quiet"


def test_where_a_run_went_on_from_is_not_known_of_one_that_did_not_get_so_far(tree, tmp_path):
    trial = Trial(Ground(config_from_dict(tree), tmp_path, 2), "nan")
    assert trial.resumed_from() is None
    trial.path.mkdir(parents=True)
    for attempts, found in (
        ([], None),
        ([{"attempt": "a"}], None),
        ([{"attempt": "a", "resumed_from_step": None}], 0),
        ([{"attempt": "a"}, {"attempt": "b", "resumed_from_step": 20}], 20),
    ):
        (trial.path / "lineage.json").write_text(json.dumps(attempts))
        assert trial.resumed_from() == found
    assert from_step(trial, 20).ok
    (trial.path / "lineage.json").write_text(json.dumps([{"attempt": "a", "resumed_from_step": 20}, {"attempt": "b"}]))
    assert not from_step(trial, 20).ok
    assert not from_step(trial, 0).ok, "a run that never started to train"


class AtStep:
    """A job that is always at the step asked for; each poll commits the next checkpoint."""

    def __init__(self, checkpoints):
        self.checkpoints, self.asked = checkpoints, []

    def reach(self, step):
        self.asked.append(step)

    def wait_for(self, happened, what):
        for step in (0, SAVE_EVERY, 2 * SAVE_EVERY):
            if happened():
                break
            (path := self.checkpoints / f"step-{step:08d}").mkdir(parents=True)
            (path / "COMMITTED").touch()
        self.asked.append(what)


@pytest.mark.parametrize(("step", "due"), [(15, 10), (20, 10), (22, 20)])
def test_a_fault_waits_for_the_checkpoint_before_it(step, due, tree, tmp_path):
    trial = Trial(Ground(config_from_dict(tree), tmp_path, 2), "nan")
    job = AtStep(trial.checkpoints)
    trial.reach(job, step)
    assert job.asked == [step, f"checkpoint of step {due}"]
    assert trial.newest_step() == due


def test_only_the_runs_of_one_drill_are_dropped(tree, tmp_path):
    ground = Ground(config_from_dict(tree), tmp_path, 2)
    for name in ("nan", "nan-passed-over", "quiet"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    ground.clear("nan")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["quiet"]


@pytest.mark.parametrize(
    ("text", "ok"),
    [
        ("ecar-dist: no (it needs 31.0 MiB, and 5.0 MiB are free); ...\n", True),
        ("ecar-dist: no (it needs 31.0 GiB, and 5.0 MiB are free); ...\n", False),
        ("ecar-dist: no (it needs 27.0 MiB, and 5.0 MiB are free); ...\n", False),
        ("ecar-dist: no (it needs 31.0 MiB)\n", False),
        ("warning: no (it needs 31.0 MiB, and 5.0 MiB are free); ...\n", False),
        ("", False),
    ],
)
def test_what_a_full_disk_needs_is_compared_with_a_checkpoint(text, ok):
    assert says_room(Ended(1, text, 1.0), 30 << 20).ok is ok


def test_a_damaged_set_has_one_wrong_byte_and_leaves_the_users_alone(tree, tmp_path, digits):
    config = config_from_dict(tree)
    own = {path: path.read_bytes() for path in (digits / "latents").glob("*.tar")}
    damaged = damage(config, tmp_path / "damaged")
    entries = load_manifest(damaged.path.parent).shards
    shard = next(place for place, entry in enumerate(entries) if entry.name == damaged.path.name)
    with pytest.raises(
        DataError, match=f"{damaged.path.name} has xxh3_128 .* at or after byte {damaged.sample_begins};"
    ):
        LatentSource(str(damaged.path.parent)).store.open(shard)
    assert damaged.sample_begins < damaged.flipped
    assert {path: path.read_bytes() for path in own} == own
    flip(damaged.path, damaged.flipped)
    LatentSource(str(damaged.path.parent)).store.open(shard)


@pytest.mark.parametrize("data", [{"latents": "s3://bucket/latents"}, {"latents": None, "images": "images"}])
def test_a_drill_of_local_latents_says_what_it_needs(tree, data):
    tree["data"] |= data
    with pytest.raises(CannotRunError, match=r"data\.latents must be"):
        local_latents(config_from_dict(tree))
