"""Nothing that a user may receive can run code, write elsewhere, or fill the memory. No secret is stored."""

import ast
import io
import json
import os
import pickle
import re
import stat
import tarfile
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from pydantic import TypeAdapter

from data_tools.cli import main as ecar_data
from ecar_dist.command_line import run_command
from ecar_dist.config.read import load_config
from ecar_dist.data.shards import manifest as manifest_module
from ecar_dist.data.shards.cache import CacheOptions, ShardCache
from ecar_dist.data.shards.entries import ShardEntry
from ecar_dist.data.shards.manifest import MANIFEST_NAME, load_image_manifest, load_manifest
from ecar_dist.errors import CheckpointError, ConfigError, DataError
from ecar_dist.runtime.checkpoint.files import MANIFEST, MARKER, marker_of, read_manifest
from ecar_dist.vae.build import open_codec_by_spec
from ecar_dist.vae.pretrained import new_autoencoder
from tests.conftest import read_metrics, start_ranks, train_on_ranks
from tests.data.image_sets import encoded, write_tar
from tests.fork_server import run_forked

ROOT = Path(__file__).parents[1]
PRODUCT = sorted(path for room in ("ecar_dist", "data_tools") for path in (ROOT / room).rglob("*.py"))
FORBIDDEN_CALLS = {"eval", "exec", "extractall", "system", "popen", "yaml.unsafe_load", "load_module"}
FORBIDDEN_IMPORTS = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}


class Canary:
    """Unpickling it creates its path."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def forbidden(tree):
    """The calls and imports of one file that could execute what it reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from (name for name in names if name.split(".")[0] in FORBIDDEN_IMPORTS)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if called in FORBIDDEN_CALLS or called.split(".")[-1] in {"extractall", "unsafe_load"}:
                yield called
            if keywords.get("shell") == "True" or keywords.get("verify") == "False":
                yield f"{called}(shell or no verification)"
            if called == "torch.load" and keywords.get("weights_only") != "True":
                yield called
            if called == "np.load" and keywords.get("allow_pickle") != "False":
                yield called
            if called == "yaml.load" and keywords.get("Loader") != "_StrictLoader":
                yield called


def test_no_code_that_runs_what_it_reads():
    assert len(PRODUCT) > 100
    found = [f"{path.relative_to(ROOT)}: {call}" for path in PRODUCT for call in forbidden(ast.parse(path.read_text()))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "torch.load(f, weights_only=False)",
        "tar.extractall('.')",
        "run('x', shell=True)",
        "np.load(f)",
        "yaml.load(f, Loader=yaml.Loader)",
    ],
)
def test_the_search_for_such_code_finds_it(line):
    assert list(forbidden(ast.parse(line)))


def test_yaml_of_a_config_makes_no_objects(tmp_path):
    canary = tmp_path / "canary"
    (tmp_path / "x.yaml").write_text(f"run: !!python/object/apply:os.mkdir ['{canary}']\n")
    with pytest.raises(ConfigError, match="line 1 is not valid YAML: could not determine a constructor"):
        load_config(tmp_path / "x.yaml")
    assert not canary.exists()


@pytest.mark.parametrize("name", ["../up", "a/b", "x; touch y", "$(id)", "-rf", ""])
def test_a_run_name_is_a_plain_name(tmp_path, name, tree, write_config):
    tree["run"]["name"] = name
    with pytest.raises(ConfigError, match=r"run\.name"):
        load_config(write_config())


def test_a_pickled_autoencoder_is_not_opened(tmp_path):
    model = new_autoencoder((8, 16), 4, layers_per_block=1)
    model.save_pretrained(tmp_path / "vae", safe_serialization=False)
    assert not list((tmp_path / "vae").glob("*.safetensors"))
    with (tmp_path / "vae/diffusion_pytorch_model.bin").open("wb") as file:
        pickle.dump(Canary(tmp_path / "canary"), file)
    with pytest.raises(ConfigError, match="safetensors"):
        open_codec_by_spec(str(tmp_path / "vae"))
    assert not (tmp_path / "canary").exists()


def pickled(canary):
    return pickle.dumps(Canary(canary))


def test_what_is_pickled_in_a_tar_of_images_is_never_loaded(tmp_path):
    """As a member that WebDataset would decode by its name, as an image, and as the label."""
    canary = tmp_path / "canary"
    hostile = {
        "a part of a sample": [("a.jpg", encoded(1)), ("a.cls", b"1"), ("a.pyd", pickled(canary))],
        "an image": [("a.pickle", pickled(canary)), ("a.cls", b"1")],
        "an image by name": [("a.jpg", pickled(canary)), ("a.cls", b"1")],
        "a label": [("a.jpg", encoded(1)), ("a.cls", pickled(canary))],
    }
    for number, members in enumerate(hostile.values()):
        write_tar(tmp_path / f"{number}.tar", members)
        for command in ("shard", "index"):
            made = tmp_path / f"{command}{number}"
            status = ecar_data([command, str(tmp_path / f"{number}.tar"), str(made)])
            assert status in (0, 1)
            if status == 0:
                ecar_data(["encode", str(made), str(tmp_path / f"{command}{number}-x"), "--vae", "dct-f8"])
    assert not canary.exists()


def test_an_array_of_objects_is_not_loaded(tmp_path):
    """A table of images, or an array for evaluation, whose file is an object array: numpy would unpickle it."""
    canary, file = tmp_path / "canary", io.BytesIO()
    np.save(file, np.array([Canary(canary)], dtype=object), allow_pickle=True)
    write_tar(tmp_path / "0.tar", [("a.jpg", encoded(1)), ("a.cls", b"1")])
    assert ecar_data(["index", str(tmp_path / "0.tar"), str(tmp_path / "index")]) == 0
    table, path = tmp_path / "index/000000.npy", tmp_path / "index" / MANIFEST_NAME
    table.write_bytes(file.getvalue())
    tree = json.loads(path.read_text())
    tree["shards"][0]["table_xxh3_128"] = xxhash.xxh3_128_hexdigest(file.getvalue())
    write_manifest_tree(path, tree)
    assert ecar_data(["encode", str(tmp_path / "index"), str(tmp_path / "latents"), "--vae", "dct-f8"]) == 1
    assert not canary.exists()


def write_manifest_tree(path, tree):
    """Write it with the correct identity of its content, as a skilled attacker would."""
    del tree["dataset_id"]
    kind = manifest_module.ImageManifest
    content = {name: value for name, value in tree.items() if name != "schema"}
    manifest_module.write_manifest(path.parent, TypeAdapter(kind).validate_python(content))


@pytest.mark.parametrize(
    "source", ["pipe:touch {}", "pipe::touch {}", "simplecache::pipe:touch {}", "!touch {}", "|touch {}"]
)
def test_no_place_of_data_is_a_command(tmp_path, source, capsys):
    canary = tmp_path / "canary"
    place = source.format(canary)
    with pytest.raises(DataError):
        load_manifest(place)
    assert ecar_data(["index", place, str(tmp_path / "index")]) == 1
    assert ecar_data(["shard", place, str(tmp_path / "shards")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert not canary.exists()


LINKS = {"symbolic": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "device": tarfile.CHRTYPE, "fifo": tarfile.FIFOTYPE}


@pytest.mark.parametrize("kind", LINKS)
def test_links_and_devices_in_a_tar_are_refused_before_anything_is_read_or_made(tmp_path, kind, capsys):
    (tmp_path / "secret").write_bytes(encoded(1))
    before = sorted(tmp_path.iterdir())
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        member = tarfile.TarInfo("a.jpg")
        member.type, member.linkname = LINKS[kind], str(tmp_path / "secret")
        tar.addfile(member)
    for command in ("index", "shard"):
        assert ecar_data([command, str(tmp_path / "0.tar"), str(tmp_path / "made")]) == 1
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert line.startswith("ecar-data: ")
        assert str(tmp_path / "0.tar") in line
        assert not [path for path in (tmp_path / "made").glob("*") if path.is_file()]
    assert [path for path in sorted(tmp_path.iterdir()) if path.name not in ("0.tar", "made")] == before


def test_a_remote_shard_is_cached_in_its_folder_whatever_it_is_named(tmp_path):
    def entries(*names):
        return [ShardEntry(name, 1, 1, index, "0" * 32, "0" * 64) for index, name in enumerate(names)]

    for name in ("../../up.tar", "/etc/up.tar"):
        cache = ShardCache("s3://bucket/set", "id", entries(name), CacheOptions(tmp_path))
        for use in (cache.open, cache.where, lambda index, cache=cache: cache.prefetch([index])):
            with pytest.raises(DataError, match="leads out"):
                use(0)
        cache.close()
    names = ["a/b.tar", "..\\up.tar"]
    cache = ShardCache("s3://bucket/set", "id", entries(*names), CacheOptions(tmp_path))
    cache.close()
    paths = [cache._path(entry) for entry in cache.entries]
    assert {path.resolve().parent for path in paths} == {tmp_path / "id"}
    assert len({path.name for path in paths}) == len(names)


BOMBS = {
    "depth of lists": "[" * 100_000,
    "depth of objects": '{"a":' * 100_000,
    "a deep value": '{"schema": "%s", "x": ' + "[" * 900 + "]" * 900 + "}",
    "a number": '{"schema": "%s", "x": ' + "9" * 5000 + "}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_json_made_to_exhaust_us_is_refused_in_one_line(tmp_path, name):
    """The manifests of a set of latents, of images and of a checkpoint, with correct hashes."""
    for kind, file, load in (
        ("ecar-latents-v1", MANIFEST_NAME, load_manifest),
        ("ecar-images-v1", MANIFEST_NAME, load_image_manifest),
        ("ecar-checkpoint-v2", MANIFEST, read_manifest),
    ):
        text = BOMBS[name].replace("%s", kind)
        (tmp_path / file).write_text(text)
        (tmp_path / MARKER).write_bytes(marker_of(text.encode()))
        with pytest.raises((DataError, CheckpointError)) as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


def test_a_manifest_beyond_its_bound_is_not_read(tmp_path, monkeypatch):
    (tmp_path / MANIFEST_NAME).write_text(" " * 2000)
    monkeypatch.setattr(manifest_module, "MAX_MANIFEST_BYTES", 1000)
    with pytest.raises(DataError, match=r"2,000 bytes, at most 1,000"):
        load_manifest(tmp_path)


# The first releases without these: CVE-2025-32434 and CVE-2026-24747 (torch), CVE-2024-43497 (deepspeed).
OLDEST = {"torch": (2, 10), "deepspeed": (0, 15, 1)}


def test_libraries_with_known_holes_are_not_accepted_and_what_a_run_needs_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = {re.match(r"[\w-]+", line)[0]: re.search(r">=([\d.]+)", line) for line in project["dependencies"]}
    for name, oldest in OLDEST.items():
        assert tuple(map(int, bounds[name][1].split("."))) >= oldest
    pinned = set(re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text().lower(), re.MULTILINE))
    assert bounds.keys() <= {name.replace("_", "-") for name in pinned}


def test_a_checkpoint_that_is_a_pickle_is_refused_and_not_loaded(tmp_path, write_config):
    """The hash is correct, as an attacker would make sure. A file that is not safetensors is still not read."""
    config = write_config()
    train_on_ranks(1, config, "train.total_samples=32")
    (checkpoint,) = (tmp_path / "runs/tiny/checkpoints").iterdir()
    manifest = json.loads((checkpoint / "checkpoint.json").read_text())
    (entry,) = manifest["files"]
    torch.save(Canary(tmp_path / "canary"), checkpoint / entry["name"])
    content = (checkpoint / entry["name"]).read_bytes()
    entry.update(bytes=len(content), xxh3_128=xxhash.xxh3_128_hexdigest(content))
    text = json.dumps(manifest)
    (checkpoint / "checkpoint.json").write_text(text)
    (checkpoint / "COMMITTED").write_text(xxhash.xxh3_128_hexdigest(text.encode()))
    done = run_forked("train", str(config))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert re.match(r"ecar-dist: .*state-00000-of-00001.safetensors is not a safetensors file", line)
    assert not (tmp_path / "canary").exists()


def test_nobody_else_may_write_what_we_write(tmp_path, write_config):
    config, before = write_config(), os.umask(0)
    try:
        train_on_ranks(1, config, "train.total_samples=16")
        assert ecar_data(["shard", "digits", str(tmp_path / "images")]) == 0
    finally:
        os.umask(before)
    made = [*(tmp_path / "runs").rglob("*"), *(tmp_path / "images").rglob("*")]
    assert len(made) > 8
    assert not [path for path in made if path.stat().st_mode & stat.S_IWOTH]


def test_a_command_keeps_the_rest_of_the_users_mask():
    before = os.umask(0o027)
    try:
        assert run_command("x", lambda: 0) == 0
        assert os.umask(0) == 0o027
    finally:
        os.umask(before)


def test_no_secret_of_the_environment_is_in_what_a_run_leaves(tmp_path, write_config):
    """Keys come from the environment: no file and no line of a run, or of one that fails, contains them."""
    secrets = {"AWS_ACCESS_KEY_ID": "AKIACANARY0123456789", "AWS_SECRET_ACCESS_KEY": "canary-secret-0123456789"}
    config = write_config()
    environment = {**secrets, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    done = run_forked("train", str(config), "log.tensorboard=true", "train.total_samples=32", more=environment)
    process = start_ranks(1, config, "data.latents=s3://u:canary-pw@b/none", **environment)
    try:
        printed = done.stdout + done.stderr + "".join(process.communicate(timeout=120))
    except Exception:
        process.kill()
        raise
    assert len(read_metrics(config)) == 2
    left = b"".join(path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()) + printed.encode()
    assert len(left) > 10_000
    assert not re.findall(rb"AKIACANARY\w*|canary-secret\S*|canary-pw", left)
