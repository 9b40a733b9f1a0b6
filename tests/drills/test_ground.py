"""The small copy of a user's run, and the faults that are put into its data."""

import pytest

from ecar_dist.config_file import config_from_dict, load_config
from ecar_dist.data.latent_source import LatentSource
from ecar_dist.data.manifest import load_manifest
from ecar_dist.drills.ground import SAVE_EVERY, STEPS, CannotRunError, Ground, Trial, scaled_down
from ecar_dist.drills.storage_faults import flip, local_latents, spoil
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
    with pytest.raises(ConfigError, match="not a multiple of 4 x 3"):
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


def test_a_spoilt_set_has_one_wrong_byte_and_leaves_the_users_alone(tree, tmp_path, digits):
    config = config_from_dict(tree)
    own = {path: path.read_bytes() for path in (digits / "latents").glob("*.tar")}
    spoilt = spoil(config, tmp_path / "spoilt")
    entries = load_manifest(spoilt.path.parent).shards
    shard = next(place for place, entry in enumerate(entries) if entry.name == spoilt.path.name)
    with pytest.raises(DataError, match=f"{spoilt.path.name} has xxh3_128 .* at or after byte {spoilt.sample_begins};"):
        LatentSource(str(spoilt.path.parent)).store.open(shard)
    assert spoilt.sample_begins < spoilt.flipped
    assert {path: path.read_bytes() for path in own} == own
    flip(spoilt.path, spoilt.flipped)
    LatentSource(str(spoilt.path.parent)).store.open(shard)


@pytest.mark.parametrize("data", [{"latents": "s3://bucket/latents"}, {"latents": None, "images": "images"}])
def test_a_drill_of_local_latents_says_what_it_needs(tree, data):
    tree["data"] |= data
    with pytest.raises(CannotRunError, match=r"needs data\.latents to be a local folder"):
        local_latents(config_from_dict(tree))
