"""No text in a config, on the command line or in the name of a folder becomes a command in a job script."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ecar_dist.cli import main
from ecar_dist.cluster.job_script import EXPORTS_TITLE, option_words, render
from ecar_dist.config.read import load_config
from ecar_dist.errors import ConfigError
from tests.conftest import write_yaml

CPU = ("--gpus-per-node", "0", "--ranks-per-node", "1")
UNPRINTABLE = {"newline": "\n", "CR": "\r", "NUL": "\0", "ESC": "\x1b", "C1": "\x85", "line separator": "\u2028"}
SHELL = """it's a "b" $(touch hacked) `touch hacked`; touch hacked & $HOME # %j \\ end"""
COMMAND = "touch hacked #"
ROOT = Path(__file__).resolve().parents[2]

# replaces every program that a job script may start, and records how it was called
STAND_IN = """\
#!{python}
import json, os, sys
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
with open({calls!r}, "a") as calls:
    calls.write(json.dumps([name, *words]) + "\\n")
if name in ("srun", "apptainer"):
    rest = words[words.index("image.sif") + 1:] if name == "apptainer" else words
    while rest and rest[0].startswith("--"):
        rest.pop(0)
    os.execvp(rest[0], rest)
elif name == "scontrol":
    print("n1")
elif words[:1] == ["check"]:
    print(os.environ["RUN"], "1", sep="\\n")
elif words[:1] == ["train"]:
    open(os.path.join(os.environ["ECAR_JOB_LOGS"], "exit-status"), "w").write("0")
"""


class Site:
    """A folder to submit from, and the programs that its job scripts call."""

    def __init__(self, folder, monkeypatch, capsys):
        self.folder, self.calls_file, self._capsys = folder, folder / "calls", capsys
        self.programs = folder / f"venv {SHELL}" / "bin"
        self.programs.mkdir(parents=True)
        for name in ("ecar-dist", "ecar-data", "python", "srun", "scontrol", "scancel", "apptainer"):
            path = self.programs / name
            path.write_text(STAND_IN.format(python=sys.executable, calls=str(self.calls_file)))
            path.chmod(0o755)
        monkeypatch.setattr(sys, "prefix", str(self.programs.parent))

    def submit(self, config, *words):
        self._capsys.readouterr()
        status = main(["submit", str(config), "--nodes", "1", *CPU, *words])
        return status, *self._capsys.readouterr()

    def run(self, script, **environment):
        """Run a job script as Slurm would; returns what it called."""
        self.calls_file.unlink(missing_ok=True)
        slurm = {
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_JOB_NODELIST": "n1",
            "SLURM_NTASKS_PER_NODE": "1",
            "SLURM_ARRAY_TASK_ID": "0",
            "SLURM_ARRAY_TASK_COUNT": "1",
            "SLURM_ARRAY_TASK_MAX": "0",
            "SLURM_NODEID": "0",
        }
        if "train" in script.name:
            slurm = {name: value for name, value in slurm.items() if "ARRAY" not in name}
        env = {**os.environ, **slurm, "PATH": f"{self.programs}:{os.environ['PATH']}", **environment}
        done = subprocess.run(
            ["bash", str(script)], cwd=self.folder, env=env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert [path for path in self.folder.rglob("*") if path.name.startswith("hacked")] == []
        return [json.loads(line) for line in self.calls_file.read_text().splitlines()]


@pytest.fixture
def site(tmp_path, monkeypatch, capsys, slurm):
    monkeypatch.chdir(tmp_path)
    return Site(tmp_path, monkeypatch, capsys)


def comments_are_whole(script: Path) -> list[str]:
    """Check that every line before the body is a comment; returns the options in them, as sbatch reads them."""
    head = script.read_text().partition(f"\n{EXPORTS_TITLE}\n")[0]
    assert all(line.startswith("#") or not line for line in head.splitlines()), head
    directives = [line.removeprefix("#SBATCH ") for line in head.splitlines() if line.startswith("#SBATCH ")]
    return [word for line in directives for word in shlex.split(line)]


# ---- what cannot be printed is refused, wherever it comes from


def values(bad: str, folder: Path) -> dict[str, tuple[dict, list[str]]]:
    """For each value that may reach a script: changes to the config's tree, and words of the command line."""
    text = f"a{bad}{COMMAND}"
    images = {"data": {"latents": "sets/latents", "train_images": "sets/images/train"}}
    pipeline = ["--pipeline", str(folder / "images")]
    return {
        "run.name": ({"run": {"name": text}}, []),
        "run.dir": ({"run": {"dir": text}}, []),
        "checkpoint.dir": ({"checkpoint": {"dir": text}}, []),
        "data.latents": ({"data": {"latents": text}}, ["--after", "7"]),
        "data.images": ({"data": {"latents": None, "images": text}}, ["--after", "7"]),
        "data.cache.dir": ({"data": {"cache": {"dir": text}}}, []),
        "data.train_images": ({"data": {"latents": "x", "train_images": f"{text}/train"}}, pipeline),
        "data.heldout_images": ({"data": {**images["data"], "heldout_images": text}}, pipeline),
        "vae.path": ({"vae": {"kind": "kl", "path": text}}, []),
        "--pipeline": (images, ["--pipeline", f"{text}*.tar"]),
        "--shards": ({"data": {"latents": "sets/latents"}}, [*pipeline, "--shards", text]),
        "--label": (images, [*pipeline, "--label", f"json:{text}"]),
        "--encode-option": (images, [*pipeline, "--encode-option", text]),
        "--sbatch value": ({}, [f"--sbatch=--account={text}"]),
        "--sbatch name": ({}, [f"--sbatch=--par{bad}tition=x"]),
        "--time": ({}, ["--time", text]),
    }


@pytest.mark.parametrize("bad", UNPRINTABLE.values(), ids=UNPRINTABLE)
def test_each_value_with_a_character_that_is_not_printable_is_refused(site, tree, tmp_path, slurm, bad):
    (tmp_path / "images/a").mkdir(parents=True)
    (tmp_path / "images/a/1.png").touch()
    for name, (changes, words) in values(bad, tmp_path).items():
        changed = {section: {**content} for section, content in tree.items()}
        for section, content in changes.items():
            changed[section] = {**changed.get(section, {}), **content}
        status, _, said = site.submit(write_yaml(changed, tmp_path), *words)
        assert status == 1, name
        assert len(said.split("\n")) == 2, (name, said)
        assert said.rstrip("\n").isprintable(), (name, said)
        assert "internal" not in said
        assert not (tmp_path / "runs").exists(), name
    assert slurm.calls == []


@pytest.mark.parametrize("bad", UNPRINTABLE.values(), ids=UNPRINTABLE)
def test_so_are_overrides(site, tree, tmp_path, slurm, bad):
    config = write_yaml(tree, tmp_path)
    for key in ("run.dir", "run.name", "checkpoint.dir"):
        override = f"{key}={json.dumps(f'a{bad}{COMMAND}')}"
        assert site.submit(config, override)[0] == 1
        with pytest.raises(ConfigError):
            load_config(config, [override])
    assert slurm.calls == []


@pytest.mark.parametrize("bad", [text for text in UNPRINTABLE.values() if text != "\0"])
def test_so_are_the_names_of_the_folder_and_of_the_environment(site, tree, tmp_path, slurm, monkeypatch, bad):
    config = write_yaml(tree, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "prefix", f"/venv{bad}{COMMAND}")
        assert site.submit(config)[0] == 1
    folder = tmp_path / f"here{bad}{COMMAND}"
    folder.mkdir()
    monkeypatch.chdir(folder)
    status, _, said = site.submit(config)
    assert status == 1
    assert len(said.splitlines()) == 1
    assert main(["tensorboard", "--submit", "."]) == 1
    assert slurm.calls == []


@pytest.mark.parametrize("bad", UNPRINTABLE.values(), ids=UNPRINTABLE)
def test_the_two_makers_of_scripts_refuse_them_by_themselves(bad):
    template = "#!/bin/bash\n#SBATCH --nodes=1\necho\n"
    for make in (
        lambda: render(template, {"output": f"a{bad}b"}, {}, []),
        lambda: render(template, {}, {"VENV": f"a{bad}b"}, []),
        lambda: render(template, {}, {}, [f"a{bad}b"]),
        lambda: option_words({"output": f"a{bad}b"}),
    ):
        with pytest.raises(ConfigError) as refused:
            make()
        assert str(refused.value).isprintable()


@pytest.mark.parametrize("bad", ["\n", "\r", "\x1b"])
@pytest.mark.parametrize("name", ["PYXIS_IMAGE", "APPTAINER_IMAGE", "MOUNTS", "IMAGE_VENV", "VENV"])
def test_the_sites_file_refuses_them(tmp_path, name, bad):
    env = {**os.environ, name: f"/a{bad}{COMMAND}", "PYXIS_IMAGE" if name != "APPTAINER_IMAGE" else name: f"/a{bad}x"}
    done = subprocess.run(
        ["bash", "-c", f". {shlex.quote(str(ROOT / 'slurm/env.sh'))}; echo went on"],
        cwd=tmp_path, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "went on" not in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["MAX_REQUEUES", "MIN_NODES"])
def test_a_number_is_not_evaluated(site, tmp_path, name):
    done = subprocess.run(
        ["bash", str(ROOT / "slurm/train.sbatch"), "config.yaml"],
        cwd=tmp_path,
        env={
            **os.environ,
            "ECAR_SLURM": str(ROOT / "slurm"),
            "VENV": str(site.programs.parent),
            "SLURM_JOB_ID": "7",
            name: "a[$(touch hacked)]",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert name in done.stderr
    assert not (tmp_path / "hacked").exists()


def test_what_sbatch_says_is_a_job_or_an_error(site, tree, tmp_path, slurm):
    slurm.does("sbatch", "print('--x\\n41 \\x1b[2J')")
    status, _, said = site.submit(write_yaml(tree, tmp_path))
    assert status == 1
    assert said.rstrip("\n").isprintable()
    assert not (tmp_path / "runs/tiny").exists()


# ---- what can be printed arrives unchanged


def test_a_training(site, tree, tmp_path, slurm):
    tree["run"]["dir"] = str(tmp_path / f"runs {SHELL}")
    tree["checkpoint"] = {"dir": str(tmp_path / SHELL)}
    words = [f"--sbatch=--account={SHELL}", f"--sbatch=--comment={SHELL}", "--time", SHELL]
    status, _, said = site.submit(write_yaml(tree, tmp_path), *words)
    assert status == 0, said
    run = tmp_path / f"runs {SHELL}/tiny"
    script = run / "jobs/001/train.sbatch"
    options = comments_are_whole(script)
    logs = str(run / "logs").replace("%", "%%")
    for option in (f"--account={SHELL}", f"--comment={SHELL}", f"--time={SHELL}", f"--output={logs}/job-%j.log"):
        assert option in options
        assert option in slurm.calls[0]
    calls = site.run(script, RUN=str(run))
    config = str(run / "jobs/001/config.yaml")
    assert ["ecar-dist", "check", config, "--job", "1", "1"] in calls
    assert ["ecar-dist", "train", config] in calls
    (launch,) = [call for call in calls if call[0] == "srun"]
    assert f"--output={logs}/job-7/rank-%5t.log" in launch
    assert (run / "logs/job-7/exit-status").read_text() == "0"


def test_a_run_directory_with_spaces_at_its_ends(site, tree, tmp_path):
    tree["run"]["dir"] = " runs "
    assert site.submit(write_yaml(tree, tmp_path))[0] == 0
    run = tmp_path / " runs /tiny"
    site.run(run / "jobs/001/train.sbatch", RUN=f"{run} ")
    assert (tmp_path / " runs /tiny /logs/job-7/exit-status").exists()


def test_a_pipeline(site, tree, tmp_path, slurm):
    source = tmp_path / f"images {SHELL}"
    (source / "a").mkdir(parents=True)
    (source / "a/1.png").touch()
    classes = tmp_path / f"classes {SHELL}"
    classes.write_text("a\n")
    latents, shards = f"latents {SHELL}", f"shards {SHELL}"
    tree["data"].update(latents=latents, train_images=None, heldout_images=None)
    words = ["--pipeline", str(source), "--shards", shards, "--label", f"json:{SHELL}", "--classes", str(classes)]
    words += ["--encode-option", SHELL, "--encode-tasks", "1", f"--sbatch=--account={SHELL}"]
    status, _, said = site.submit(write_yaml(tree, tmp_path), *words)
    assert status == 0, said
    job = tmp_path / "runs/tiny/jobs/001"
    called = {}
    for name in ("shard", "encode", "finalize", "evaluate"):
        assert f"--account={SHELL}" in comments_are_whole(job / f"{name}.sbatch")
        (called[name],) = site.run(job / f"{name}.sbatch")
    said = ["--holdout", "0.05", "--label", f"json:{SHELL}", "--classes", str(classes)]
    assert called["shard"] == ["ecar-data", "shard", str(source), shards, *said]
    encoding = ["--vae", "dct-f8", "--image-size", "32", SHELL, "--task", "0", "--tasks", "1"]
    assert called["encode"] == ["ecar-data", "encode", f"{shards}/train", latents, *encoding]
    assert called["finalize"] == ["ecar-data", "finalize", latents]
    assert called["evaluate"] == ["ecar-dist", "evaluate", str(tmp_path / "runs/tiny")]


def test_a_container(site, tree, tmp_path):
    """Image, mounts and folders of the site arrive unchanged. The command inside is the same."""
    assert site.submit(write_yaml(tree, tmp_path))[0] == 0
    run = tmp_path / "runs/tiny"
    script, train = run / "jobs/001/train.sbatch", ["train", str(run / "jobs/001/config.yaml")]
    inside = {"IMAGE_VENV": str(site.programs.parent), "RUN": str(run), "MOUNTS": f"/a,/b {SHELL}"}
    calls = site.run(script, PYXIS_IMAGE=f"/images/{SHELL}", **inside)
    for call in calls:
        if call[0] == "srun":
            assert call[1] == f"--container-image=/images/{SHELL}"
            assert call[2] == f"--container-workdir={tmp_path}"
            assert call[3] == f"--container-mounts=/a:/a,/b {SHELL}:/b {SHELL}"
    assert ["ecar-dist", *train] in calls
    calls = site.run(script, APPTAINER_IMAGE="image.sif", **inside)
    start = ["apptainer", "exec", "--nv", "--bind", f"/a,/b {SHELL}", "--pwd", str(tmp_path), "image.sif"]
    assert [*start, str(site.programs / "ecar-dist"), *train] in calls


def test_a_folder_that_is_reached_by_a_link(tmp_path):
    """Job scripts use its name without the link, as Slurm does. A container sees it under both names."""
    real, link = tmp_path / "gpfs/alice", tmp_path / "home"
    real.mkdir(parents=True)
    link.symlink_to(real)
    shutil.copyfile(ROOT / "slurm/env.sh", real / "env.sh")
    script = 'set -eu; . ./env.sh; printf "%s\\n" "${SRUN[@]}"'
    env = {name: value for name, value in os.environ.items() if name not in ("PWD", "MOUNTS", "APPTAINER_IMAGE")}

    def words(**environment):
        started = {**env, "PYXIS_IMAGE": "i", **environment}
        return subprocess.run(
            ["bash", "-c", script], cwd=link, env=started, capture_output=True, text=True, check=True
        ).stdout.splitlines()[2:]  # fmt: skip

    assert words() == [f"--container-workdir={real}", f"--container-mounts={real}:{real}"]
    both = f"--container-mounts={real}:{real},{link}:{link}"
    assert words(PWD=str(link)) == [f"--container-workdir={real}", both]
    assert words(PWD=str(link), MOUNTS=f"{link},/a") == [f"--container-workdir={real}", f"{both},/a:/a"]
    assert words(PWD=str(link), MOUNTS="/a") == [f"--container-workdir={real}", "--container-mounts=/a:/a"]
