"""Nothing that a user may be handed can run code, write elsewhere, or fill the memory; no secret is written down."""

import ast
import json
import os
import pickle
import re
import stat
from pathlib import Path

import pytest
import torch

from data_tools.cli import main as ecar_data
from ecar_dist.command_line import run_command
from ecar_dist.config_file import load_config
from ecar_dist.errors import ConfigError
from ecar_dist.vae.build import open_codec_by_spec
from ecar_dist.vae.pretrained import new_autoencoder
from tests.conftest import read_metrics, start_ranks, train_on_ranks

ROOT = Path(__file__).parents[1]
PRODUCT = sorted(path for room in ("ecar_dist", "data_tools") for path in (ROOT / room).rglob("*.py"))
FORBIDDEN_CALLS = {"eval", "exec", "extractall", "system", "popen", "yaml.unsafe_load", "torch.load", "load_module"}
FORBIDDEN_IMPORTS = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}


class Canary:
    """Unpickling it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def forbidden(tree):
    """The calls and imports of one file that could run what it reads."""
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
            if called == "np.load" and keywords.get("allow_pickle") != "False":
                yield called
            if called == "yaml.load" and keywords.get("Loader") != "_StrictLoader":
                yield called


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_that_runs_what_it_reads(path):
    assert not list(forbidden(ast.parse(path.read_text())))


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


def test_a_checkpoint_that_is_a_pickle_is_refused_and_not_loaded(tmp_path, write_config):
    """The hash is right, as an attacker would see to: what is no safetensors file is still not read."""
    import xxhash

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
    process = start_ranks(1, config)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in out + error
    assert re.search(r"ecar-dist: .*state-00000-of-00001.safetensors", error)
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
    """Keys come from the environment: no file and no line of a run, or of one that fails, holds them."""
    secrets = {"AWS_ACCESS_KEY_ID": "AKIACANARY0123456789", "AWS_SECRET_ACCESS_KEY": "canary-secret-0123456789"}
    config = write_config()
    printed = ""
    for overrides in (["log.tensorboard=true", "train.total_samples=32"], ["data.latents=s3://u:canary-pw@b/none"]):
        process = start_ranks(1, config, *overrides, **secrets, AWS_ENDPOINT_URL="http://127.0.0.1:9")
        try:
            printed += "".join(process.communicate(timeout=120))
        except Exception:
            process.kill()
            raise
    assert len(read_metrics(config)) == 2
    left = b"".join(path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()) + printed.encode()
    assert len(left) > 10_000
    assert not re.findall(rb"AKIACANARY\w*|canary-secret\S*|canary-pw", left)
