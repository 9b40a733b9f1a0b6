"""Checkpoints in a bucket, on a real S3 server: marker last, damage found, faults survived, leftovers removed."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from ecar_dist.errors import CheckpointError, DataError
from ecar_dist.runtime.checkpoint.files import step_of, verify
from ecar_dist.runtime.checkpoint.manifest import Progress
from ecar_dist.runtime.checkpoint.reader import FragmentReader
from ecar_dist.runtime.checkpoint.storage import newest_whole, open_ema_storage, open_storage
from ecar_dist.runtime.ema import ShardedEma
from ecar_dist.storage.remote import list_files, read_bytes, remove
from ecar_dist.storage.retries import Transfer
from tests.data.object_store import QUICK
from tests.fork_server import Forked
from tests.runtime.checkpoint.worlds import Ranks, State, load, make_config, save, store_of


@pytest.fixture
def config(bucket, tmp_path):
    return make_config(tmp_path, dir=f"{bucket.url}/runs", keep=2)


def objects(bucket):
    """Names under the run's prefix, without the attempt."""
    return [name for name, _ in list_files(f"{bucket.url}/runs/tiny", Transfer(QUICK))]


def steps(config):
    return [step_of(name) for name in open_storage(config).committed()]


def holds(loaded, seed):
    """Whether every rank has the weights of `seed`."""
    return all(
        torch.equal(fragment.of(state.partitions), fragment.of(State(rank, len(loaded), seed).partitions))
        for rank, (_, state, _) in enumerate(loaded)
        for fragment in state.fragments
    )


def test_save_and_restore_in_a_bucket(bucket, config, tmp_path):
    assert load(config)[0][0] is None
    for step in (4, 8, 12):
        save(config, 2, seed=step, step=step)
    assert steps(config) == [12, 8]
    names = {name.partition("/")[2] for name in objects(bucket)}
    assert names == {
        "COMMITTED",
        "checkpoint.json",
        "state-00000-of-00002.safetensors",
        "state-00001-of-00002.safetensors",
    }
    loaded = load(config, 3)
    assert holds(loaded, 12)
    assert loaded[0][0].path.startswith(f"{bucket.url}/runs/tiny/step-00000012-")
    assert loaded[0][0].conversion == "written by 2 ranks with ZeRO-2, read by 3 ranks with ZeRO-2"
    puts = [entry["path"].rpartition("/")[2] for entry in bucket.log("PUT", "step-00000012")]
    assert puts[-2:] == ["checkpoint.json", "COMMITTED"]
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]  # nothing stays on the node


def test_each_node_downloads_the_files_of_its_ranks_once(bucket, config):
    save(config, 4, seed=1)
    bucket.break_on()
    assert holds(load(config, 4, ranks=Ranks(4, per_node=4)), 1)
    files = [entry["path"] for entry in bucket.log("GET", ".safetensors")]
    assert len(files) == len(set(files)) == 4
    bucket.break_on()
    assert holds(load(config, 2), 1)  # rank 0 needs the files of ranks 0 and 1, rank 1 the others
    assert len(bucket.log("GET", ".safetensors")) == 4
    bucket.break_on()

    place = open_storage(config)
    folder = place.fetch(place.committed()[0], needed=lambda manifest: manifest.files[:1])
    assert len(bucket.log("GET", ".safetensors")) == 1
    assert torch.equal(FragmentReader(folder).read("master", "a", 0, 5), State(0, 1, 1).full["master"][:5])


MANY_TENSORS = {f"layer.{number}.weight": (32, 32) for number in range(16)}


def written_for(config, capsys, written, read, per_node, **layout):
    """What a restore by `read` ranks reports about the bytes that a node copies."""
    save(config, written, seed=1, shapes=MANY_TENSORS, **layout)
    capsys.readouterr()
    other = {} if layout else {"shares": True}
    load(config, read, ranks=Ranks(read, per_node), shapes=MANY_TENSORS, **other)
    return [line for line in capsys.readouterr().out.splitlines() if "re-sharding" in line]


def test_a_restore_that_reads_more_than_its_share_says_so_with_the_numbers(bucket, config, capsys):
    """From ZeRO 2 to 3 on four nodes: each rank needs a part of every parameter, so it reads all files."""
    (line,) = written_for(config, capsys, 8, 8, 2)
    assert "step-00000004" in line
    assert "written by 8 ranks with ZeRO-2, read by 8 ranks with ZeRO-3" in line
    assert "the first node copies 0.3 MiB for its 0.1 MiB of state" in line
    assert 4 <= float(line.split(" of state, ")[1].split(" times")[0]) < 4.3  # plus the headers
    (back,) = written_for(config, capsys, 8, 8, 2, shares=True)
    assert "written by 8 ranks with ZeRO-3, read by 8 ranks with ZeRO-2" in back


def test_a_restore_of_its_share_says_nothing(bucket, config, capsys):
    assert not written_for(config, capsys, 2, 2, 2)  # a single node reads everything, and needs everything
    save(config, 8, seed=1, shapes=MANY_TENSORS)
    capsys.readouterr()
    load(config, 4, ranks=Ranks(4, 2), shapes=MANY_TENSORS)
    assert "re-sharding" not in capsys.readouterr().out


def test_a_burst_of_503_is_retried(bucket, config):
    bucket.break_on(
        {"kind": "status", "status": 503, "method": "PUT", "match": ".safetensors", "times": 2},
        {"kind": "status", "status": 503, "method": "PUT", "match": "COMMITTED", "times": 1},
        {"kind": "status", "status": 503, "match": ".safetensors", "times": 2},
    )
    assert save(config, 2, seed=1).failures == 0
    assert holds(load(config, 2), 1)


def test_a_rejected_upload_is_a_failed_save_in_one_line(bucket, config, capsys):
    save(config, seed=1)
    bucket.break_on({"kind": "status", "status": 403, "method": "PUT", "match": ".safetensors", "times": None})
    with pytest.raises(
        CheckpointError, match=r"step 8 was not saved: rank 0: writing s3://.* failed at once: HTTP 403"
    ):
        save(config, 2, seed=2, step=8)
    assert steps(config) == [4]
    bucket.break_on({"kind": "status", "status": 403, "method": "PUT", "times": None})
    with pytest.raises(DataError, match="HTTP 403"):  # at the start, not after an hour
        load(config)
    assert "verysecret" not in capsys.readouterr().err


def test_an_unreachable_store_is_not_a_damaged_checkpoint(bucket, config):
    save(config, seed=1)
    save(config, seed=2, step=8)
    bucket.break_on({"kind": "status", "status": 403, "match": "checkpoint.json", "times": None})
    with pytest.raises(DataError, match="HTTP 403"):
        load(config, 2)


def flip(bucket, name):
    body = bytearray(read_bytes(f"{bucket.url}/runs/tiny/{name}", Transfer(QUICK)))
    body[-5] ^= 1
    bucket.put(f"runs/tiny/{name}", bytes(body))


def cut(bucket, name):
    bucket.put(f"runs/tiny/{name}", read_bytes(f"{bucket.url}/runs/tiny/{name}", Transfer(QUICK))[:-8])


def gone(bucket, name):
    remove(f"{bucket.url}/runs/tiny/{name}", Transfer(QUICK))


@pytest.mark.parametrize("damage", [flip, cut, gone])
@pytest.mark.parametrize("file", ["state-00001-of-00002.safetensors", "checkpoint.json"])
def test_a_damaged_object_is_named_and_the_older_checkpoint_is_used(bucket, config, capsys, damage, file):
    save(config, 2, seed=1, step=4)
    save(config, 2, seed=2, step=8)
    newest, before = open_storage(config).committed()
    damage(bucket, f"{newest}/{file}")
    loaded = load(config, 2)
    assert holds(loaded, 1)
    (warning,) = capsys.readouterr().err.splitlines()
    assert f"{bucket.url}/runs/tiny/{newest} is damaged" in warning
    assert warning.endswith(f"{before} is used instead")
    assert not list(open_storage(config)._scratch.glob("step-*"))  # the local copies of both have been removed
    assert newest_whole(open_storage(config)).name == before
    save(config, 2, seed=3, step=6, restore=True)
    assert steps(config) == [6, 4]  # the damaged one has been removed


def test_a_body_corrupted_in_transit_is_downloaded_again(bucket, config):
    save(config, seed=1)
    bucket.break_on({"kind": "corrupt", "match": ".safetensors", "at": 700})
    assert holds(load(config), 1)
    assert len(bucket.log("GET", ".safetensors")) == 2


def test_readers_outside_of_training(bucket, config):
    save(config, 2, seed=1)
    place = open_storage(config)
    folder = newest_whole(place)
    verify(folder)
    assert place.manifest(folder.name).progress.step == 4
    assert torch.equal(FragmentReader(folder).full("ema", "c"), State(0, 1, 1).full["master"][34:])
    with pytest.raises(CheckpointError, match=f"{bucket.url}/runs/tiny/ema contains no checkpoint"):
        newest_whole(open_ema_storage(config))


def save_step_8():
    folder, place = sys.argv[1:]
    save(make_config(Path(folder), dir=place, keep=2), seed=2, step=8)


@pytest.mark.parametrize("match", [".safetensors", "checkpoint.json"])
def test_a_kill_in_an_upload_leaves_nothing_that_a_reader_sees(bucket, config, tmp_path, match):
    """The object has reached the store, but its writer does not know yet."""
    save(config, seed=1, step=4)
    bucket.break_on({"kind": "delay", "method": "PUT", "match": match, "delay": 60})
    child = Forked((str(tmp_path), f"{bucket.url}/runs"), main=save_step_8)
    deadline = time.monotonic() + 60
    while not any("step-00000008" in name and name.endswith(match) for name in objects(bucket)):
        assert time.monotonic() < deadline, child.text()
        time.sleep(0.05)
    child.end()
    bucket.break_on()
    assert steps(config) == [4]
    assert holds(load(config), 1)
    save(config, seed=3, step=12)
    assert {step_of(name) for name in objects(bucket)} == {4, 12}
    assert not list(Path(tmp_path / "cache").rglob("*.tmp"))  # its temporary files on the node


def test_ema_snapshots_in_a_bucket(bucket, config):
    def run(world):
        state = State(world.rank, world.size, 1)
        ema = ShardedEma(state.partitions, config.ema)
        with store_of(config, world) as store:
            for step in (2, 4, 6, 8):
                store.begin(Progress(step * 16, step), state, ema, {}, checkpoint=step % 4 == 0, ema_snapshot=True)
                store.finish()

    Ranks(1)(run)
    place = open_ema_storage(config)
    assert [step_of(name) for name in place.committed()] == [8, 6, 4, 2]
    assert steps(config) == [8, 4]
    folder = place.fetch(place.committed()[0])
    assert FragmentReader(folder).kinds == {"ema"}
    assert json.loads((folder / "checkpoint.json").read_text())["progress"]["step"] == 8
