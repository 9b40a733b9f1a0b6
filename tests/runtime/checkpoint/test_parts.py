"""Files in a bucket with hashes of their parts: other layouts copy only what they need, and verify it."""

import copy
import json
import re

import pytest
import torch

from ecar_dist.runtime.checkpoint import bucket as checkpoint_bucket
from ecar_dist.runtime.checkpoint.files import DamagedError, verify
from ecar_dist.runtime.checkpoint.reader import FragmentReader
from ecar_dist.runtime.checkpoint.restore import intervals_of, needed_by
from ecar_dist.runtime.checkpoint.storage import newest_whole, open_storage
from ecar_dist.storage.remote import read_bytes
from ecar_dist.storage.retries import Transfer
from tests.data.object_store import QUICK
from tests.runtime.checkpoint.test_bucket_edited import edit
from tests.runtime.checkpoint.worlds import State, load, make_config, save

SHAPES = {f"layer.{number}.weight": (128, 128) for number in range(4)}
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
RANKS = 4


class Node:
    """Rank 1 of 4, on its own node. `shares`: under ZeRO 3, otherwise 2."""

    def __init__(self, config, shares):
        self.storage = open_storage(config)
        (self.name,) = self.storage.committed()
        self.fragments = State(1, RANKS, 1, SHAPES, shares=shares).fragments
        self.bytes = 4 * len(KINDS) * sum(one.numel for one in self.fragments)

    def fetch(self):
        self.storage.release(self.name)
        needed = needed_by(self.fragments)
        return FragmentReader(self.storage.fetch(self.name, (1, RANKS), needed, intervals_of(self.fragments)), needed)

    def has_all(self, reader):
        full = State(0, 1, 1, SHAPES).full
        full["ema"] = full["master"]
        places = {name: number * 128 * 128 for number, name in enumerate(SHAPES)}
        return all(
            torch.equal(
                reader.read(kind, one.name, one.start, one.numel),
                full[kind][places[one.name] + one.start :][: one.numel],
            )
            for kind in KINDS
            for one in self.fragments
        )


@pytest.fixture
def config(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_bucket._PendingObjects, "part_bytes", 1024)
    return make_config(tmp_path, dir=f"{bucket.url}/runs")


def copied(bucket):
    """The bytes of all file ranges that were requested."""
    ranges = [re.fullmatch(r"bytes=(\d+)-(\d+)", entry["range"]) for entry in bucket.log("GET", ".safetensors")]
    return sum(int(found[2]) - int(found[1]) + 1 for found in ranges)


@pytest.mark.parametrize("shares", [False, True])
def test_a_node_of_the_other_stage_copies_little_more_than_its_state(bucket, config, capsys, shares):
    save(config, RANKS, shapes=SHAPES, shares=shares)
    node = Node(config, not shares)
    bucket.break_on()
    assert node.has_all(node.fetch())
    assert node.bytes < copied(bucket) < 1.2 * node.bytes  # four times that with complete files
    folder = newest_whole(node.storage)
    verify(folder)  # complete, although parts of its files were there before
    assert json.loads((folder / "checkpoint.json").read_text())["schema"] == "ecar-checkpoint-v4"

    # All ranks, and what they print.
    loaded = load(config, 2, shapes=SHAPES, shares=not shares)
    expected = [State(rank, 2, 1, SHAPES, shares=not shares).partitions[0] for rank in range(2)]
    assert all(torch.equal(state.partitions[0], values) for (_, state, _), values in zip(loaded, expected, strict=True))
    assert "re-sharding" not in capsys.readouterr().out


def at_value(body, number):
    """The position of a value in a file."""
    return 8 + int.from_bytes(body[:8], "little") + 4 * number


def test_damage_is_found_in_each_part_that_is_needed(bucket, config):
    save(config, RANKS, shapes=SHAPES)
    node = Node(config, True)
    bucket.break_on(*({"kind": "corrupt", "match": "state-00003", "at": at} for at in (40, 500)))
    assert node.has_all(node.fetch()), "in transit: it is asked for again"
    name = f"runs/tiny/{node.name}/state-00003-of-00004.safetensors"
    body = read_bytes(f"{bucket.url}/{name}", Transfer(QUICK))
    for place in (30, at_value(body, 5000), len(body) - 5):  # header, a value of this node, table
        bucket.put(name, body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :])
        with pytest.raises(DamagedError, match=r"state-00003-of-00004\.safetensors"):
            node.fetch()
    place = at_value(body, 12000)
    bucket.put(name, body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :])
    assert node.has_all(node.fetch()), "nobody here needs that part"
    bucket.put(name, body[:-8])
    with pytest.raises(DamagedError, match=rf"state-00003-of-00004\.safetensors has {len(body) - 8} bytes"):
        node.fetch()


EDITS = {
    "no hashes": lambda file: file.pop("parts"),
    "larger parts": lambda file: file["parts"].update(bytes=2048),
    "parts of no bytes": lambda file: file["parts"].update(bytes=0),
    "another hash": lambda file: file["parts"].update(xxh3_128="0" * 32),
}


def test_an_edited_manifest_is_damage(bucket, config):
    save(config, RANKS, shapes=SHAPES)
    node = Node(config, True)
    files = {}
    edit(bucket, node.name, lambda tree: files.update(all=copy.deepcopy(tree["files"])))
    for change in EDITS.values():
        changed = copy.deepcopy(files["all"])
        change(changed[2])
        edit(bucket, node.name, lambda tree, changed=changed: tree.update(files=changed))
        with pytest.raises(DamagedError):
            node.fetch()
    edit(bucket, node.name, lambda tree: tree.update(files=files["all"]))
    assert node.has_all(node.fetch())
