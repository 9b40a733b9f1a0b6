"""From a bucket of images to a trained run, as a user does it: index, encode in two tasks, push, train from the URL."""

import itertools
import json
import os
import signal
import time
from collections import Counter

import numpy as np
import pytest

from data_tools.cli import main as ecar_data
from ecar_dist.cli import main as ecar_dist
from ecar_dist.data.loader import SampleLoader, Share
from ecar_dist.data.order.stream import SampleStream
from ecar_dist.data.shards.manifest import load_manifest
from ecar_dist.data.shards.store import CacheOptions
from ecar_dist.data.sources import LatentSource
from ecar_dist.storage.remote import list_files
from tests.conftest import losses, train_on_ranks
from tests.data.image_sets import members_of, samples, write_tar
from tests.data.object_store import object_store, s3_server
from tests.fork_server import Forked
from tests.train.struck_ranks import is_stopped

__all__ = ["object_store", "s3_server"]

COUNT = 120
ENCODE = ["--vae", "dct-f8", "--image-size", "32", "--samples-per-shard", "16"]


@pytest.fixture
def bucket(object_store, tmp_path):
    """Two foreign tars under images/ of the bucket; one image of the 120 is garbage."""
    content = samples(COUNT)
    content[77] = ("000077", b"\xff\xd8\xff\xe0 and nothing more", 7)
    for number, half in enumerate((content[:50], content[50:])):
        write_tar(tmp_path / "half.tar", members_of(half))
        object_store.put(f"images/train-{number:03d}.tar", (tmp_path / "half.tar").read_bytes())
    return object_store


def prepare(bucket, folder):
    """index, encode in two tasks, finalize, push; returns the URL of the latents."""
    index, latents = str(folder / "index"), str(folder / "latents")
    assert ecar_data(["index", f"{bucket.url}/images/train-{{000..001}}.tar", index]) == 0
    for task in ("0", "1"):
        encode = ["encode", index, latents, *ENCODE, "--task", task, "--tasks", "2", "--max-bad", "0.01"]
        assert ecar_data(encode) == 0
    assert ecar_data(["finalize", latents, "--max-bad", "0.01"]) == 0
    assert ecar_data(["verify", latents]) == 0
    assert ecar_data(["push", latents, f"{bucket.url}/latents"]) == 0
    return f"{bucket.url}/latents"


def test_from_a_bucket_of_tars_to_a_run_that_streams(bucket, tree, write_config, tmp_path, capfd):
    url = prepare(bucket, tmp_path)
    (failure,) = map(json.loads, (tmp_path / "latents/errors.jsonl").read_text().splitlines())
    assert failure["key"] == "000077"
    assert load_manifest(url) == load_manifest(tmp_path / "latents")
    assert load_manifest(url).count == COUNT - 1
    tree["data"]["latents"] = url
    config = write_config()
    local = train_on_ranks(1, config, "run.name=local", f"data.latents={tmp_path / 'latents'}")
    bucket.break_on({"kind": "status", "status": 503, "match": "latents/00000", "times": 2})
    remote = train_on_ranks(2, config, "run.name=remote")
    assert losses(remote) == pytest.approx(losses(local), abs=1e-6)
    assert remote[-1]["data/downloaded_gib"] > 0
    fetched = [entry["path"] for entry in bucket.log("GET", ".tar") if entry["fault"] is None]
    assert len(bucket.log("GET", ".tar")) == len(fetched) + 2
    assert set(Counter(fetched).values()) == {1, 2}  # both ranks, one cache: every shard once, and
    assert len(fetched) == 8 + 1  # the beginning of the first one by the node's preflight
    straight = train_on_ranks(1, config, "run.name=images", f"data.images={tmp_path / 'index'}", "data.latents=null",
                              "data.on_bad=substitute", "data.max_bad=0.01", "data.num_classes=10")  # fmt: skip
    assert np.isfinite(losses(straight)).all()
    assert "verysecretvalue" not in "".join(capfd.readouterr())


def test_a_run_keeps_its_checkpoints_in_a_bucket(object_store, write_config, tmp_path, capsys):
    """Saved despite errors of the store, resumed by more ranks, read by every command that reads a run."""
    config, there = write_config(), f"checkpoint.dir={object_store.url}/checkpoints"
    local = train_on_ranks(1, config, "run.name=local")
    object_store.break_on({"kind": "status", "status": 503, "method": "PUT", "times": 3})
    train_on_ranks(1, config, "run.name=remote", there, "train.total_samples=64")
    remote = train_on_ranks(2, config, "run.name=remote", there, "ema.snapshot_every_samples=80")
    assert losses(remote) == pytest.approx(losses(local), abs=1e-6)
    assert len(object_store.log("PUT", ".safetensors")) > 3
    run = tmp_path / "runs/remote"
    assert not list(run.rglob("*.safetensors"))
    moved = run.rename(tmp_path / "elsewhere")
    capsys.readouterr()
    for verb in ("list", "verify"):
        assert ecar_dist(["checkpoint", verb, str(moved)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split("/step-")[1][:8] for line in lines] == ["00000006", "00000004", "00000002"]
        assert all(line.startswith(f"{object_store.url}/checkpoints/remote/") for line in lines)
    assert ecar_dist(["checkpoint", "inspect", str(moved), "--step", "4"]) == 0
    assert ecar_dist(["checkpoint", "export", str(moved), "--out", str(tmp_path / "export")]) == 0
    assert "equal the run's" in capsys.readouterr().out
    assert ecar_dist(["sample", str(moved), "--labels", "1", "--count", "1", "--out", str(tmp_path / "drawn")]) == 0
    assert "step-00000006" in capsys.readouterr().out
    assert [name for name, _ in list_files(f"{object_store.url}/checkpoints/remote/ema") if name.endswith("COMMITTED")]


def test_a_stop_signal_ends_a_run_that_waits_for_data(bucket, tree, write_config, tmp_path):
    tree["data"]["latents"] = prepare(bucket, tmp_path)
    bucket.break_on({"kind": "status", "status": 503, "match": ".tar", "skip": 1, "times": None})  # not the preflight
    job = Forked(("train", str(write_config())), {"ECAR_FAILPOINT": "data.take:step=1:stop"})
    while not is_stopped(job.process.pid) and job.process.is_alive():
        time.sleep(0.05)
    os.kill(job.process.pid, signal.SIGCONT)
    time.sleep(1)
    assert job.process.is_alive()
    os.kill(job.process.pid, signal.SIGTERM)
    job.process.join(60)
    ended = job.end()
    assert ended.returncode == 75, ended.stderr
    assert ended.stdout.splitlines()[-1] == f"stopped on a signal at step 0: {tmp_path}/runs/tiny"


def test_each_node_downloads_its_own_lanes_only(bucket, tmp_path):
    """Two nodes with one rank and one cache each download little more than the set together, not twice the set."""
    url = prepare(bucket, tmp_path)
    bucket.break_on()
    needed = sum(entry.bytes for entry in load_manifest(url).shards)
    for rank in range(2):
        source = LatentSource(url, CacheOptions(root=tmp_path / f"node{rank}"))
        counts = [entry.count for entry in source.manifest.shards]
        stream = SampleStream([counts], seed=0, global_batch_size=8, lanes=2, window_shards=1)
        share = Share(8, 4, rank, 2, node_ranks=(rank,))
        with SampleLoader([source], stream, share, seed=0) as loader:
            for _ in itertools.islice(loader, 10):  # 80 of 119 positions
                pass
    fetched = sum(entry["bytes"] for entry in bucket.log("GET", ".tar"))
    assert fetched < 1.6 * needed
    assert all(list(tmp_path.glob(f"node{rank}/*/*.tar")) for rank in range(2))
