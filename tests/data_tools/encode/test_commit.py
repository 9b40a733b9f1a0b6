"""A worker may die anywhere, or race another for a shard: the finished set is complete, and on the CPU identical."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from data_tools.encode import commit as commit_module
from data_tools.encode.commit import is_committed, recover
from data_tools.encode.plan import read_plan
from data_tools.encode.run import EncodeWorker
from data_tools.finalize import finalize
from data_tools.inspection import verify
from ecar_dist.data.shards.manifest import load_manifest
from ecar_dist.data.shards.read import open_latent_shard
from ecar_dist.errors import DataError
from tests.data_tools.bad_images import write_bad_image_shards
from tests.data_tools.image_folders import content, encode_small
from tests.data_tools.workers import CONTEXT, PLACES, SHARD, die_at, race, start


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_bad_image_shards(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """Encoded without a kill; three images are bad."""
    out = tmp_path_factory.mktemp("whole") / "latents"
    encode_small(images, out, max_bad=0.2)
    finalize(out, max_bad=0.2)
    assert {"errors.jsonl", "manifest.json", "plan.json"} < set(content(out))
    return out


@pytest.mark.parametrize("place", PLACES)
def test_killed_anywhere_a_rerun_gives_the_same_files(images, whole, tmp_path, place):
    out = tmp_path / "latents"
    worker = start(die_at, place, images, out, {"max_bad": 0.2})
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    left = content(out)
    assert any(name.endswith(".tmp") for name in left) == (
        place not in ("before the temporary", "before the index", "after the index", "after the marker")
    )
    stamps = {path.name: path.stat().st_mtime_ns for path in out.glob("00000[01].*")}
    assert len(stamps) == (0 if "plan" in place else 6)
    encode_small(images, out, max_bad=0.2)
    finalize(out, max_bad=0.2)
    assert content(out) == content(whole)
    assert all((out / name).stat().st_mtime_ns == stamp for name, stamp in stamps.items()), "finished work was repeated"


def test_an_orphaned_tar_is_kept_not_made_again(images, whole, tmp_path, monkeypatch):
    out = shutil.copytree(whole, tmp_path / "latents")
    monkeypatch.setattr(EncodeWorker, "encode_shard", lambda *_: pytest.fail("encoded again"))
    for name in (f"{SHARD:06d}.idx", f"{SHARD:06d}.json"):
        (out / name).unlink()
    stamp = (out / f"{SHARD:06d}.tar").stat()
    encode_small(images, out, max_bad=0.2)
    assert os.path.samestat((out / f"{SHARD:06d}.tar").stat(), stamp)
    assert content(out) == content(whole)


def flip_a_value(path):
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a value": flip_a_value,
    "cut": lambda path: os.truncate(path, 2000),
    "empty": lambda path: os.truncate(path, 0),
    "no tar": lambda path: path.write_bytes(b"no tar" * 1000),
    "no statistics": lambda path: path.write_bytes(path.read_bytes().replace(b'"statistics"', b'"statisticz"')),
    "another shard": lambda path: path.write_bytes(path.with_name("000000.tar").read_bytes()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_tar_without_marker_that_is_not_whole_is_made_again(images, whole, tmp_path, damage):
    out = shutil.copytree(whole, tmp_path / "latents")
    DAMAGES[damage](out / f"{SHARD:06d}.tar")
    (out / f"{SHARD:06d}.json").unlink()
    encode_small(images, out, max_bad=0.2)
    assert content(out) == content(whole)


@pytest.mark.parametrize("left", ["a whole tar", *DAMAGES])
def test_a_tar_that_appears_while_the_shard_is_encoded(images, whole, tmp_path, monkeypatch, left):
    """Another worker was faster and died at once. Its tar is completed, or replaced with ours."""
    out, original = tmp_path / "latents", EncodeWorker.encode_shard

    def slow(worker, plan, shard_index):
        content = original(worker, plan, shard_index)
        if shard_index == SHARD:
            path = shutil.copy(whole / f"{SHARD:06d}.tar", out)
            DAMAGES.get(left, lambda _: None)(Path(path))
        return content

    monkeypatch.setattr(EncodeWorker, "encode_shard", slow)
    encode_small(images, out, max_bad=0.2)
    finalize(out, max_bad=0.2)
    assert content(out) == content(whole)


def test_a_tar_of_another_plan_is_made_again(images, whole, tmp_path):
    encode_small(images, tmp_path / "other", max_bad=0.2, seed=1)
    out = shutil.copytree(whole, tmp_path / "latents")
    for kind in ("tar", "idx", "json"):
        shutil.copy(tmp_path / f"other/{SHARD:06d}.{kind}", out)
    assert not is_committed(out, SHARD, read_plan(out))
    encode_small(images, out, max_bad=0.2)
    assert content(out) == content(whole)


def test_only_the_file_that_was_found_bad_is_dropped(whole, tmp_path, monkeypatch):
    """While one worker checks a bad tar, another may replace it with a good one."""
    out = shutil.copytree(whole, tmp_path / "latents")
    path, good = out / f"{SHARD:06d}.tar", (out / f"{SHARD:06d}.tar").read_bytes()
    flip_a_value(path)

    def replaced_while_proving(*_):
        (tmp_path / "theirs").write_bytes(good)
        os.replace(tmp_path / "theirs", path)
        raise DataError("bad")

    with monkeypatch.context() as patch:
        patch.setattr(commit_module, "_prove", replaced_while_proving)
        assert not recover(out, SHARD, read_plan(out))
    assert path.read_bytes() == good
    assert recover(out, SHARD, read_plan(out))


def test_two_workers_at_every_shard_at_once(images, tmp_path):
    """Their autoencoders differ, as on different GPUs: each shard must be of one worker, with that worker's marker."""
    clean = write_bad_image_shards(tmp_path, bad=())
    encode_small(clean, tmp_path / "calm")
    finalize(tmp_path / "calm")
    barrier = CONTEXT.Barrier(2)
    workers = [start(race, barrier, offset, clean, tmp_path / "out") for offset in (1.0, 2.0)]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    finalize(tmp_path / "out")
    verify(tmp_path / "out")
    assert not [name for name in content(tmp_path / "out") if name.endswith(".tmp")]
    calm, raced = load_manifest(tmp_path / "calm"), load_manifest(tmp_path / "out")
    for before, after in zip(calm.shards, raced.shards, strict=True):
        expected = open_latent_shard(tmp_path / "calm" / before.name, before, calm).moments.astype(np.float32)
        found = open_latent_shard(tmp_path / "out" / after.name, after, raced).moments.astype(np.float32)
        offsets = np.unique(np.round(found - expected, 1))
        assert offsets.tolist() in ([1.0], [2.0])
