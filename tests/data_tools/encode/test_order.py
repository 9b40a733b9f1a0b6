"""Encodings in chunks: another order of the same samples, read in pieces."""

import json
import shlex

import numpy as np
import pytest

from data_tools.encode import plan as plan_module
from data_tools.encode import settings as settings_module
from data_tools.encode.plan import read_plan
from data_tools.encode.settings import plan
from data_tools.finalize import finalize
from ecar_dist.data.images.shards import ImageShards
from ecar_dist.data.shards.manifest import load_manifest
from ecar_dist.data.shards.read import open_latent_shard
from ecar_dist.errors import ConfigError, DataError
from tests.data_tools.bad_images import BAD, write_bad_image_shards
from tests.data_tools.image_folders import content, encode_small


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """24 images in tars of 10, 10 and 4; three are bad."""
    return write_bad_image_shards(tmp_path_factory.mktemp("bad"))


def samples_of(out):
    """Source index -> moments and label."""
    settled, manifest, found = read_plan(out), load_manifest(out), {}
    for index, entry in enumerate(manifest.shards):
        shard = open_latent_shard(out / entry.name, entry, manifest)
        sources = settled.source_indices(index)[entry.rows - settled.rows(index).start]
        found.update(
            zip(sources.tolist(), zip(shard.moments.tolist(), shard.labels.tolist(), strict=True), strict=True)
        )
    return found


def test_chunks_have_the_same_samples_in_another_order(images, tmp_path, monkeypatch):
    chosen = {"samples_per_shard": 12, "max_bad": 0.125, "batch_size": 4}
    encode_small(images, tmp_path / "one by one", **chosen)
    reads, read_tar = [], ImageShards._read_tar
    monkeypatch.setattr(
        ImageShards, "_read_tar", lambda self, *where: reads.append(where[1:]) or read_tar(self, *where)
    )
    for tasks in (2, 1):
        reads.clear()
        for task in reversed(range(tasks)):
            encode_small(images, tmp_path / f"{tasks}", chunk=4, task=task, tasks=tasks, **chosen)
    assert len(reads) == 1 + 6 + 1  # to measure sizes, the chunks, and one chunk that spans two tars
    for out in tmp_path.iterdir():
        finalize(out, max_bad=0.125)
    assert content(tmp_path / "1") == content(tmp_path / "2")
    found = samples_of(tmp_path / "1")
    assert sorted(found) == sorted(set(range(24)) - set(BAD))
    assert found == samples_of(tmp_path / "one by one")
    rows = [json.loads(line)["row"] for line in (tmp_path / "1/errors.jsonl").read_text().splitlines()]
    order = np.concatenate([read_plan(tmp_path / "1").source_indices(index) for index in range(2)])
    assert rows == np.flatnonzero(np.isin(order, BAD)).tolist()
    assert load_manifest(tmp_path / "1").preprocessing["order"] == {"name": "chunks-feistel-v1", "chunk": 4}


def test_a_folder_keeps_the_order_in_which_it_was_begun(images, tmp_path, monkeypatch, capsys):
    """Even if the default for a new folder is different; and the printed command names the order."""

    def planned(out, **chosen):
        plan(images, tmp_path / out, vae="dct-f8", image_size=16, decoder="pil", **{"samples_per_shard": 128, **chosen})
        command = shlex.split(capsys.readouterr().out.splitlines()[-1])
        return read_plan(tmp_path / out).order, command[command.index("--chunk") + 1 :][
            :1
        ] if "--chunk" in command else None

    assert planned("old") == (None, None)
    for module in (settings_module, plan_module):
        monkeypatch.setattr(module, "CHUNKED_FROM", 24)
    order, words = planned("new")
    assert (order.chunk, words) == (2, ["2"])
    assert planned("new", chunk=2) == (order, ["2"])
    assert planned("old") == planned("old", chunk=1) == (None, ["1"])
    for out, chunk in (("old", 2), ("new", 1), ("new", 4)):
        with pytest.raises(DataError, match=r"its order is .*--chunk"):
            planned(out, chunk=chunk)
    with pytest.raises(ConfigError, match=r"--chunk 129 .* 128"):
        planned("other", chunk=129)
