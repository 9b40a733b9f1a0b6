"""The wheel, in its own environment without a checkout: commands work from an empty folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml

from ecar_dist.cli import main
from ecar_dist.cluster.job_script import find_scripts
from ecar_dist.errors import ConfigError
from ecar_dist.package_files import CONFIGS, SLURM, copy_package_folder, package_folder
from tests.sample.made_models import make_model_run

ROOT = Path(__file__).parents[1]
ALONE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

# In the wheel's environment: both programs in one process, which imports torch once.
DRIVER = """
import contextlib, io, json, sys, time
import ecar_dist, data_tools.cli, ecar_dist.cli
statuses = {}
for words in json.load(open(sys.argv[1])):
    program = data_tools.cli.main if words[0] == "ecar-data" else ecar_dist.cli.main
    said = io.StringIO()
    began = time.perf_counter()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = program(words[1:])
        except SystemExit as ended:
            status = ended.code
    print(f"{time.perf_counter() - began:.1f} s {' '.join(words)}", file=sys.stderr)
    statuses[" ".join(words)] = status if status == 0 else [status, said.getvalue()[-500:]]
print(json.dumps({"home": ecar_dist.__file__, "statuses": statuses}))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of an environment with the wheel, and the libraries of this one without their .pth files."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("NOT RUN: this is not a git checkout, so it has no list of files to copy")
    for name in listed.stdout.splitlines():
        if name.partition("/")[0] in ("ecar_dist", "data_tools", "slurm", "configs", "pyproject.toml", "README.md"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name, follow_symlinks=False)

    # Build and install without the network.
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", str(source), "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder / "dist")]
    subprocess.run([*pip, *build], check=True, env=ALONE)
    venv.create(folder / "venv")
    python = folder / "venv/bin/python"
    (wheel,) = (folder / "dist").iterdir()
    install = ["--python", str(python), "install", "--no-deps", "--ignore-installed", str(wheel)]
    subprocess.run([*pip, *install], check=True, env=ALONE)
    (site,) = (folder / "venv/lib").glob("python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    return python


def test_every_command_works_from_an_empty_folder(python, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    run = make_model_run(tmp_path)
    # A config whose latents are created by the commands.
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["data"]["latents"] = "latents"
    (empty / "mine.yaml").write_text(yaml.safe_dump(tree))
    commands = [
        ["ecar-dist", "check", str(package_folder(CONFIGS) / "imagenet256_xl.yaml")],
        ["ecar-dist", "plan", "mine.yaml"],
        ["ecar-data", "shard", "digits", "images"],
        ["ecar-data", "encode", "images", "latents", "--vae", "dct-f8", "--image-size", "32", "--decoder", "pil"],
        ["ecar-data", "finalize", "latents"],
        ["ecar-data", "verify", "latents"],
        ["ecar-dist", "init", "latents", "--device", "cpu", "--slurm", "jobs"],
        ["ecar-dist", "submit", "mine.yaml", "--nodes", "1", "--dry-run", "batch.global_batch_size=32"],
        ["ecar-dist", "status", str(run)],
        ["ecar-dist", "sample", str(run), "--labels", "cats", "--count", "1", "--out", "samples"],
        ["ecar-dist", "checkpoint", "list", str(run)],
        ["ecar-dist", "checkpoint", "verify", str(run)],
        ["ecar-dist", "checkpoint", "inspect", str(run)],
        ["ecar-dist", "checkpoint", "diff", str(run), str(run)],
        ["ecar-dist", "checkpoint", "export", str(run), "--out", "export"],
    ]
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    done = subprocess.run(
        [str(python), "-c", DRIVER, str(tmp_path / "commands.json")],
        cwd=empty,
        env=ALONE,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert Path(report["home"]).is_relative_to(python.parents[1])
    assert report["statuses"] == {" ".join(words): 0 for words in commands}
    assert (empty / "samples/grid.png").exists()


def test_the_programs_start(python, tmp_path):
    for program in ("ecar-dist", "ecar-data"):
        done = subprocess.run(
            [str(python.parent / program), "--version"],
            cwd=tmp_path,
            env=ALONE,
            capture_output=True,
            text=True,
        )
        assert done.stdout.startswith(f"{program} ")


def test_the_folders_of_the_package_are_those_of_the_repository(python):
    (site,) = python.parents[1].glob("lib/python*/site-packages")
    for name in (SLURM, CONFIGS):
        ours = {path.name: path.read_bytes() for path in (ROOT / name).iterdir()}
        assert {path.name: path.read_bytes() for path in package_folder(name).iterdir()} == ours
        assert {path.name: path.read_bytes() for path in (site / "ecar_dist/shipped" / name).iterdir()} == ours


def test_job_scripts_are_copied_to_be_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_scripts(None) == package_folder(SLURM)
    copied = copy_package_folder(SLURM, tmp_path / "slurm")
    assert {path.name for path in copied} >= {"train.sbatch", "env.sh"}
    assert find_scripts(None) == Path("slurm")
    assert main(["init", "--slurm", "jobs", "--examples", "examples"]) == 0
    assert {path.name for path in copied} == {path.name for path in (tmp_path / "jobs").iterdir()}
    assert (tmp_path / "examples/digits_cpu.yaml").exists()
    assert main(["init"]) == 1
    with pytest.raises(ConfigError) as raised:
        copy_package_folder(SLURM, tmp_path / "slurm")
    assert "env.sh" in str(raised.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError):
        copy_package_folder(SLURM, tmp_path / "file")


def test_a_checkout_finds_its_own_files():
    config = package_folder(CONFIGS) / "imagenet256_b_dct.yaml"
    assert config.resolve() == ROOT / "configs/imagenet256_b_dct.yaml"
    assert main(["check", str(config)]) == 0
