"""Sets that version 0.1 wrote, a few KB each. Every later version must still read them, with the same ids.

`golden/images` has two tars of six pictures in two classes, one of them damaged; `golden/indexed` has the same pictures
in their class folders; `golden/latents` is what `encode --vae dct-f8 --image-size 16 --flip store` made of the tars.
"""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from data_tools.encode.commit import is_committed, read_marker
from data_tools.encode.plan import read_plan
from data_tools.inspection import stats, verify
from ecar_dist.data.images.shards import ImageShards
from ecar_dist.data.shards.manifest import load_image_manifest, load_manifest
from ecar_dist.data.shards.read import open_latent_shard
from ecar_dist.errors import DataError
from ecar_dist.vae.codec import EncoderIdentity

GOLDEN = Path(__file__).parent / "golden"


def test_latents_of_the_first_version_are_read():
    manifest = load_manifest(GOLDEN / "latents")
    assert manifest.dataset_id == "12999c481eb5faa3a2716ee3ad64659e994bdcf6287ea59f452320465d9ac755"
    shards = [open_latent_shard(GOLDEN / "latents" / entry.name, entry, manifest) for entry in manifest.shards]
    assert [shard.entry.rows.tolist() for shard in shards] == [[0, 2, 3], [4, 5]]
    assert np.concatenate([shard.labels for shard in shards]).tolist() == [0, 0, 1, 0, 1]
    moments = np.concatenate([shard.moments for shard in shards]).astype(np.float64)
    assert moments.shape == (5, 12, 2, 2)
    assert moments.mean(axis=(0, 2, 3)).tolist() == pytest.approx(manifest.statistics["raw_mean"])


def test_a_plan_and_its_markers_of_the_first_version_are_read():
    plan = read_plan(GOLDEN / "latents")
    assert plan.plan_id == "5835192a17d4657f76c1e3c92b16cdbbd4f6f1c2808373c5c31245eb5722ed98"
    assert [is_committed(GOLDEN / "latents", index, plan) for index in range(3)] == [True, True, False]
    assert read_marker(GOLDEN / "latents", 0).failures[0].row == 1


JUNK = (b"", b"{", b"[" * 10**5, b"\xff", b"null", b"[]")


def variants(path):
    """The file with each of its fields set to an invalid value, and junk instead of the file."""
    tree = json.loads(path.read_bytes())
    for key in tree:
        for value in ([], {}, 0.5, -1, 10**30, [[1]], "\x1b"):
            yield json.dumps({**tree, key: value}).encode()
    yield from JUNK


def test_a_damaged_plan_is_one_line(tmp_path):
    path = tmp_path / "plan.json"
    for text in variants(GOLDEN / "latents/plan.json"):
        path.write_bytes(text)
        with pytest.raises(DataError) as caught:
            read_plan(tmp_path)
        assert str(caught.value).isprintable()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError):
        read_plan(tmp_path)


def test_a_damaged_marker_is_not_accepted(tmp_path):
    path = tmp_path / "000000.json"
    whole = read_marker(GOLDEN / "latents", 0)
    for text in variants(GOLDEN / "latents/000000.json"):
        path.write_bytes(text)
        found = read_marker(tmp_path, 0)
        assert found in (None, dataclasses.replace(whole, plan_id="\x1b"), dataclasses.replace(whole, failures=()))
    for make in (os.mkfifo, os.mkdir):
        path.unlink()
        make(path)
        assert read_marker(tmp_path, 0) is None


def test_images_of_the_first_version_are_read():
    ids = {name: load_image_manifest(GOLDEN / name).dataset_id for name in ("images", "indexed")}
    assert ids == {
        "images": "f971cf340c61b76901e222067775c7edcf1263e75adca2534a3039130036c9e4",
        "indexed": "09bab1c670d418b7822df3ecfaa75cb0c973e3372fe524318baf47f833ace98a",
    }
    tars, files = (ImageShards(GOLDEN / name) for name in ids)
    assert [record.data for record in tars.read_many(range(6))] == [record.data for record in files.read_many(range(6))]
    assert tars.labels().tolist() == [0, 0, 0, 1, 1, 1]


def test_the_tools_read_them(capsys):
    verify(GOLDEN / "latents")
    stats(GOLDEN / "latents")
    said = capsys.readouterr().out
    assert "5 samples verified" in said
    assert "errors.jsonl" in said


def test_an_encoder_identity_of_other_types_is_refused():
    encoder = load_manifest(GOLDEN / "latents").encoder
    assert EncoderIdentity.from_dict(encoder).to_dict() == encoder
    wrong = {"latent_channels": "12", "downsample": 0, "scaling_factor": 0.0, "deterministic": 1, "more": 1}
    wrong |= {"input_range": [0.0], "shift_factor": None, "kind": [], "name": float("nan")}
    for key, value in wrong.items():
        with pytest.raises(DataError, match=key):
            EncoderIdentity.from_dict({**encoder, key: value})
