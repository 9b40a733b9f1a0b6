"""An edited checkpoint in a bucket with valid hashes: it writes nothing, and hides no other checkpoint."""

import json

import pytest
import xxhash

from ecar_dist.cli import main
from ecar_dist.config.read import config_to_yaml
from ecar_dist.errors import CheckpointError
from ecar_dist.runtime.checkpoint import bucket as checkpoint_bucket
from ecar_dist.runtime.checkpoint.files import MANIFEST, MARKER, marker_of, step_of
from ecar_dist.runtime.checkpoint.storage import newest_whole, open_storage
from ecar_dist.storage.remote import list_files, read_bytes
from ecar_dist.storage.retries import Transfer
from tests.data.object_store import QUICK
from tests.runtime.checkpoint.worlds import load, make_config, save


@pytest.fixture
def config(bucket, tmp_path):
    config = make_config(tmp_path, dir=f"{bucket.url}/runs", keep=2)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/config.yaml").write_text(config_to_yaml(config))
    return config


def steps(config):
    return [step_of(name) for name in open_storage(config).committed()]


def edit(bucket, name, change):
    """The manifest of a checkpoint, with a matching marker."""
    place = f"runs/tiny/{name}"
    tree = json.loads(read_bytes(f"{bucket.url}/{place}/{MANIFEST}", Transfer(QUICK)))
    change(tree)
    text = json.dumps(tree).encode()
    bucket.put(f"{place}/{MANIFEST}", text)
    bucket.put(f"{place}/{MARKER}", marker_of(text))


def files_of(folder):
    return {path for path in folder.rglob("*") if not path.is_relative_to(folder / "cache")}


@pytest.mark.parametrize("name", ["../../../../canary", "../canary.safetensors", "{}/canary", "a/canary.safetensors"])
def test_a_name_that_leaves_the_folder_writes_nothing(bucket, config, tmp_path, capsys, name):
    save(config, seed=1)
    content, (checkpoint,) = b"owned", open_storage(config).committed()
    name = name.format(tmp_path)
    bucket.put(f"runs/tiny/{checkpoint}/{name}".replace("/../", "/"), content)

    def lead_away(tree):
        tree["files"][0].update(name=name, bytes=len(content), xxh3_128=xxhash.xxh3_128_hexdigest(content))

    edit(bucket, checkpoint, lead_away)
    before = files_of(tmp_path)
    bucket.break_on()
    for verb in ("verify", "inspect", "export"):
        assert main(["checkpoint", verb, str(tmp_path / "tiny")]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("ecar-dist: ")
    with pytest.raises(CheckpointError):
        load(config)
    assert files_of(tmp_path) == before
    assert not list(tmp_path.rglob("*canary*"))
    assert not bucket.log("GET", "canary")  # it was not even requested


@pytest.mark.parametrize("file", [MANIFEST, MARKER])
def test_a_too_large_object_is_not_read_and_the_older_checkpoint_is_used(bucket, config, monkeypatch, file):
    for step in (4, 8):
        save(config, seed=step, step=step)
    monkeypatch.setattr(checkpoint_bucket, "MAX_MANIFEST_BYTES", 1 << 16)
    bucket.put(f"runs/tiny/{open_storage(config).committed()[0]}/{file}", b"x" * ((1 << 16) + 1))
    bucket.break_on()
    assert load(config)[0][0].progress.step == 4
    assert step_of(newest_whole(open_storage(config)).name) == 4
    assert not [entry for entry in bucket.log("GET", file) if "step-00000008" in entry["path"]]


def test_a_checkpoint_of_another_version_is_passed_over_and_not_removed(bucket, config, capsys):
    for step in (4, 8):
        save(config, seed=step, step=step)
    edit(bucket, open_storage(config).committed()[0], lambda tree: tree.update(schema="ecar-checkpoint-v9"))
    assert load(config)[0][0].progress.step == 4
    assert "not by this version" in capsys.readouterr().err
    for step in (6, 10, 12):
        save(config, seed=step, step=step, restore=True)
    assert steps(config) == [12, 10, 8]


def test_a_name_with_another_step_than_the_manifest_is_damage(bucket, config):
    for step in (4, 8):
        save(config, seed=step, step=step)
    newest = open_storage(config).committed()[0]
    for name, _ in list_files(f"{bucket.url}/runs/tiny/{newest}", Transfer(QUICK)):
        content = read_bytes(f"{bucket.url}/runs/tiny/{newest}/{name}", Transfer(QUICK))
        bucket.put(f"runs/tiny/{newest.replace('00000008', '00000099')}/{name}", content)
    assert steps(config) == [99, 8, 4]
    assert load(config)[0][0].progress.step == 8


def test_prefixes_with_other_names_are_neither_read_nor_removed(bucket, config):
    save(config, seed=4)
    (original,) = open_storage(config).committed()
    others = ["step-00000012-milestone", f"{original}.bak", "step-00000020"]
    for other in others:
        for name, _ in list_files(f"{bucket.url}/runs/tiny/{original}", Transfer(QUICK)):
            content = read_bytes(f"{bucket.url}/runs/tiny/{original}/{name}", Transfer(QUICK))
            bucket.put(f"runs/tiny/{other}/{name}", content)
    for step in (8, 12, 16):
        save(config, seed=step, step=step, restore=True)
    assert steps(config) == [16, 12]
    left = {name.partition("/")[0] for name, _ in list_files(f"{bucket.url}/runs/tiny", Transfer(QUICK))}
    assert set(others) < left
    assert len(left) == 5
