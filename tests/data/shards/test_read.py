import base64
import dataclasses
import errno
import io
import json
import os
import shutil
import subprocess
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset

from ecar_dist.data.shards import write as shard_writer
from ecar_dist.data.shards.manifest import Manifest, load_manifest
from ecar_dist.data.shards.proof import describe_shard
from ecar_dist.data.shards.read import open_latent_shard
from ecar_dist.data.shards.write import ShardContent, seal, write_latent_shard
from ecar_dist.errors import DataError
from tests.data.latent_sets import COUNTS, NUM_CLASSES, SHAPE, restate, write_set


def open_shard(folder, index=0):
    manifest = load_manifest(folder)
    return open_latent_shard(folder / manifest.shards[index].name, manifest.shards[index], manifest)


@pytest.mark.parametrize("flip", [False, True])
def test_what_went_in_comes_out(tmp_path, flip):
    moments, labels = write_set(tmp_path, flip=flip)
    shard = open_shard(tmp_path, 1)
    assert np.array_equal(shard.moments, moments[40:80])
    assert np.array_equal(shard.labels, labels[40:80])
    assert np.array_equal(shard.mirrored, moments[40:80, ..., ::-1] if flip else moments[40:80])
    rows = np.array([5, 0, 39, 5])
    assert np.array_equal(shard.moments[rows], moments[40 + rows])
    assert not shard.moments.flags.writeable
    for side, values in ((False, shard.moments), (True, shard.mirrored)):
        assert np.array_equal(np.load(io.BytesIO(shard.encoded(side)[7].tobytes())), values[7])
    shard.check_samples()


@pytest.mark.parametrize("wrong", ["moments", "mirrored"])
def test_a_number_that_is_not_finite_is_found_on_either_side(tmp_path, wrong):
    sides = {side: np.zeros((3, *SHAPE), np.float16) for side in ("moments", "mirrored")}
    sides[wrong][1, 0, 0, 0] = np.inf
    content = ShardContent(0, sides["moments"], np.array([1, 2, 3]), sides["mirrored"])
    entry = write_latent_shard(tmp_path, 0, content, {})
    form = Manifest(3, NUM_CLASSES, [], SHAPE, True, {}, {}, {}, [entry])
    with pytest.raises(DataError, match=r"000000\.tar .*not finite"):
        open_latent_shard(tmp_path / "000000.tar", entry, form).check_samples()


def test_rows_with_gaps(tmp_path):
    """Keys are the plan's rows. The place in the shard counts only samples that exist."""
    moments, labels = np.random.default_rng(0).normal(size=(3, *SHAPE)).astype(np.float16), np.array([4, 5, 6])
    entry = write_latent_shard(tmp_path, 0, ShardContent(70, moments, labels, missing=(71, 72)), {})
    assert (entry.count, entry.first_row, entry.missing) == (3, 70, (71, 72))
    assert entry.rows.tolist() == [70, 73, 74]
    form = Manifest(3, NUM_CLASSES, [], SHAPE, False, {}, {}, {}, [entry])
    shard = open_latent_shard(tmp_path / "000000.tar", entry, form)
    assert np.array_equal(shard.moments, moments)
    assert shard.labels.tolist() == [4, 5, 6]
    assert (tmp_path / "000000.idx").read_text().split()[1] == "3"
    for wrong in ((71, 73), (73, 74), ()):
        with pytest.raises(DataError, match=r"000000\.tar .*\b(tar name at 0000000000|3 samples )"):
            open_latent_shard(tmp_path / "000000.tar", dataclasses.replace(entry, missing=wrong), form)


def test_the_tar_describes_itself(tmp_path):
    write_set(tmp_path, flip=True)
    shard = open_shard(tmp_path, 2)
    described = shard.description()
    assert (described["first_key"], described["last_key"]) == ("000000000080", "000000000096")
    sums = np.frombuffer(base64.b64decode(described["crc32"]), "<u4")
    assert [zlib.crc32(shard.sample_bytes(row)) for row in range(17)] == sums.tolist()
    layout, data = described["layout"], (tmp_path / "000002.tar").read_bytes()
    for row in (0, 16):
        for member in layout["members"]:
            name = f"{80 + row:012d}.{member['ext']}"
            at = layout["first_offset"] + row * layout["stride"] + member["rel_offset"]
            with tarfile.open(tmp_path / "000002.tar") as tar:
                assert tar.getmember(name).offset_data == at
            if member["ext"] == "latent.npy":
                start = at + member["npy_header_len"]
                values = np.frombuffer(data[start : at + member["nbytes"]], member["dtype"]).reshape(member["shape"])
                assert np.array_equal(values, shard.moments[row])


def test_webdataset_sees_every_sample(tmp_path):
    moments, labels = write_set(tmp_path)
    urls = [str(tmp_path / f"{index:06d}.tar") for index in range(3)]
    reader = webdataset.WebDataset(urls, shardshuffle=False).decode()
    samples = list(reader)
    assert [sample["__key__"] for sample in samples] == [f"{index:012d}" for index in range(97)]
    assert np.array_equal(np.stack([sample["latent.npy"] for sample in samples]), moments)
    assert [sample["cls"] for sample in samples] == labels.tolist()


@pytest.mark.parametrize("with_index", [True, False])
def test_dali_sees_every_sample(tmp_path, with_index):
    from nvidia.dali import fn, pipeline_def, types

    moments, labels = write_set(tmp_path)
    index = {"index_paths": [str(tmp_path / "000001.idx")]} if with_index else {}

    @pipeline_def(batch_size=40, num_threads=1, device_id=None)
    def pipeline():
        read = {"ext": ["latent.npy", "cls"], "missing_component_behavior": "error", **index}
        encoded, label = fn.readers.webdataset(paths=[str(tmp_path / "000001.tar")], **read)
        return fn.decoders.numpy(encoded, dtype=types.FLOAT16), label

    graph = pipeline()
    graph.build()
    assert list(graph.epoch_size().values()) == [40]
    arrays, texts = graph.run()
    assert np.array_equal(np.stack([np.array(arrays.at(row)) for row in range(40)]), moments[40:80])
    assert [int(bytes(np.array(texts.at(row)))) for row in range(40)] == labels[40:80].tolist()


def test_index_equals_that_of_dalis_tool(tmp_path):
    from wds2idx import IndexCreator

    write_set(tmp_path, flip=True)
    with IndexCreator(str(tmp_path / "000000.tar"), str(tmp_path / "theirs.idx"), verbose=False) as creator:
        creator.create_index()
    assert (tmp_path / "theirs.idx").read_bytes() == (tmp_path / "000000.idx").read_bytes()


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar program")
def test_tar_lists_and_extracts(tmp_path):
    moments, _ = write_set(tmp_path)
    listed = subprocess.run(["tar", "tf", tmp_path / "000000.tar"], capture_output=True, text=True, check=True)
    assert listed.stderr == ""
    assert listed.stdout.split()[:2] == ["000000000000.latent.npy", "000000000000.cls"]
    assert listed.stdout.split()[-1] == ".ecar.json"
    subprocess.run(["tar", "xf", tmp_path / "000000.tar", "-C", tmp_path, "000000000007.latent.npy"], check=True)
    assert np.array_equal(np.load(tmp_path / "000000000007.latent.npy"), moments[7])


def test_bytes_depend_on_content_alone(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_set(tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 512)


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [(Path.unlink, "No such file"), (truncate, r"\d bytes"), (flip_a_byte, "xxh3_128")],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, damage, message):
    write_set(tmp_path)
    damage(tmp_path / "000001.tar")
    open_shard(tmp_path, 0)
    with pytest.raises(DataError, match=message) as caught:
        open_shard(tmp_path, 1)
    assert "000001.tar" in str(caught.value)
    assert "\n" not in str(caught.value)


STRIDE = 512 + 512 + 512 + 512  # one block of npy, one of label, and their headers
STRUCTURE = {
    "name": (STRIDE + 5, "tar name .*000000000001.latent.npy"),
    "size": (STRIDE + 130, "tar size|tar checksum"),
    "checksum": (STRIDE + 150, "tar checksum .*000000000001.latent.npy"),
    "type": (STRIDE + 156, "tar magic"),
    "npy header": (STRIDE + 512 + 30, "npy 1.0 fp16"),
    "label header": (STRIDE + 1024 + 3, "tar name .*000000000001.cls"),
}


@pytest.mark.parametrize("part", STRUCTURE)
def test_structure_is_checked_even_if_the_hash_is_right(tmp_path, part):
    at, message = STRUCTURE[part]
    write_set(tmp_path)
    path = tmp_path / "000000.tar"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    restate(tmp_path, load_manifest(tmp_path), 0, xxh3_128=describe_shard(path, 40, 0).xxh3_128)
    with pytest.raises(DataError, match=message):
        open_shard(tmp_path, 0)


def test_fewer_samples_than_stated(tmp_path):
    write_set(tmp_path)
    manifest = load_manifest(tmp_path)
    entry = dataclasses.replace(manifest.shards[0], count=80)
    with pytest.raises(DataError, match=" 80 samples"):
        open_latent_shard(tmp_path / entry.name, entry, manifest)


@pytest.mark.parametrize("bad", [-1, NUM_CLASSES])
def test_a_label_outside_the_classes_names_its_key(tmp_path, bad):
    labels = np.arange(sum(COUNTS)) % NUM_CLASSES
    labels[43] = bad
    write_set(tmp_path, labels=labels)
    with pytest.raises(DataError, match=rf"000001\.tar .*label {bad} .*000000000043\b.* 0\.\.9"):
        open_shard(tmp_path, 1)


def small_content():
    return ShardContent(0, np.zeros((2, *SHAPE), np.float16), np.array([0, 1]))


def test_the_marker_comes_last(tmp_path, monkeypatch):
    """A worker that dies at any point leaves either no marker or a complete shard."""

    def die(*_):
        raise KeyboardInterrupt

    for place in ("_add", "claim_name", "write_dali_index", "write_json"):
        folder = tmp_path / place
        folder.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(shard_writer, place, die)
            with pytest.raises(KeyboardInterrupt):
                write_latent_shard(folder, 0, small_content(), {})
        names = {path.name for path in folder.iterdir()}
        assert "000000.json" not in names
        assert not any(name.endswith(".tmp") for name in names)
        assert ("000000.tar" in names) == (place in ("write_dali_index", "write_json"))
        if "000000.tar" not in names:
            write_latent_shard(folder, 0, small_content(), {"plan_id": "p"})
            assert json.loads((folder / "000000.json").read_text())["plan_id"] == "p"


def test_index_and_marker_are_those_of_the_tar(tmp_path):
    entry = write_latent_shard(tmp_path, 0, small_content(), {"plan_id": "p", "statistics": {"x": 0.1}})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name in ("000000.idx", "000000.json"):
        (tmp_path / name).unlink()
    assert seal(tmp_path / "000000.tar") == entry
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    marker = json.loads(before["000000.json"])
    assert set(marker) == {"entry", "plan_id", "statistics"}
    assert marker["entry"]["sha256"] == entry.sha256


@pytest.mark.parametrize("hard_links", [True, False])
def test_the_first_tar_with_the_name_stays(tmp_path, monkeypatch, hard_links):
    def no_link(*_):
        raise OSError(errno.ENOTSUP, "no hard links here")

    if not hard_links:
        monkeypatch.setattr(os, "link", no_link)
    assert write_latent_shard(tmp_path, 0, small_content(), {}) is not None
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = ShardContent(0, np.ones((2, *SHAPE), np.float16), np.array([0, 1]))
    assert write_latent_shard(tmp_path, 0, other, {}) is None
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("damage", ["other", "cut", "no json", "no tree"])
def test_a_tar_that_does_not_describe_itself(tmp_path, damage):
    write_latent_shard(tmp_path, 0, small_content(), {})
    path = tmp_path / "000000.tar"
    data = path.read_bytes()
    at = data.index(b".ecar.json")
    changed = {
        "other": data[:at] + b"readme.txt" + data[at + 10 :],
        "cut": data[: at - 512] + bytes(1024),
        "no json": data[: at + 512] + b"x" + data[at + 513 :],
        "no tree": data[: at + 512] + data[at + 512 :].replace(b'"first_row": 0', b'"first_ro": 12'),
    }
    path.write_bytes(changed[damage])
    with pytest.raises(DataError, match=r"000000\.tar"):
        seal(path)
