"""`ecar-dist submit --pipeline`: five jobs from a config, and arguments that contradict the config."""

import pytest

from ecar_dist.cli import main
from tests.conftest import write_yaml

CPU = ("--gpus-per-node", "0", "--ranks-per-node", "1")


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "my images/a"
    folder.mkdir(parents=True)
    (folder / "1.png").write_bytes(b"")
    return folder.parent


@pytest.fixture
def pipeline(tree, tmp_path, source, monkeypatch, capsys):
    """Submit the pipeline of the tiny run; returns status, output and errors."""
    monkeypatch.chdir(tmp_path)
    tree["data"].update(latents="sets/latents", train_images="sets/images/train", heldout_images=None)

    def call(*words, resources=CPU):
        capsys.readouterr()
        config = write_yaml(tree, tmp_path)
        command = ["submit", str(config), "--nodes", "2", "--pipeline", str(source), *resources, *map(str, words)]
        return main(command), *capsys.readouterr()

    return call


def scripts_of(calls):
    return [call[-1].rpartition("/")[2] for call in calls if call[0] == "sbatch"]


def waits_of(calls):
    return [next((word for word in call if word.startswith("--dependency")), None) for call in calls]


def test_five_jobs_that_wait_for_each_other(pipeline, slurm, source, tmp_path):
    status, out, _ = pipeline("--holdout", "0.1", "--encode-tasks", "3", "--after", "7", "--sbatch=--partition=cpu")
    assert status == 0
    names = ["shard", "encode", "finalize", "train", "evaluate"]
    assert scripts_of(slurm.calls) == [f"{name}.sbatch" for name in names]
    assert waits_of(slurm.calls) == [
        "--dependency=afterany:7",
        *(f"--dependency=afterok:{job}" for job in (41, 42, 43, 44)),
    ]
    assert all({"--kill-on-invalid-dep=yes", "--partition=cpu"} <= set(call) for call in slurm.calls)
    job = tmp_path / "runs/tiny/jobs/001"
    text = {name: (job / f"{name}.sbatch").read_text() for name in names}
    assert f"set -- ecar-data shard '{source}' sets/images --holdout 0.1 " in text["shard"]
    assert "DONE=sets/images/heldout/manifest.json" in text["shard"]
    assert "set -- sets/images/train sets/latents --vae dct-f8 --image-size 32 " in text["encode"]
    assert "#SBATCH --array=0-2\n" in text["encode"]
    assert "TASKS=3" in text["encode"]
    assert "set -- sets/latents " in text["finalize"]
    assert f"set -- {job}/config.yaml " in text["train"]
    assert f"set -- ecar-dist evaluate {tmp_path}/runs/tiny " in text["evaluate"]
    assert "heldout_images: sets/images/heldout" in (job / "config.yaml").read_text()
    assert (job / "job").read_text() == "44\n"
    assert [line.split()[:3] for line in out.splitlines() if line.split()[0] in names] == [
        ["shard", "41", "afterany:7"],
        *([name, str(41 + n), f"afterok:{40 + n}"] for n, name in enumerate(names[1:], 1)),
    ]
    assert "same command" in out


def test_gpus_are_for_encode_train_and_evaluate(pipeline, slurm, tmp_path):
    assert pipeline(resources=("--gpus-per-node", "2"))[0] == 0
    asked = [[word for word in call if word.startswith("--gpus")] for call in slurm.calls]
    assert asked == [[], [], [], ["--gpus-per-node=2"], ["--gpus=1"]]
    job = tmp_path / "runs/tiny/jobs/001"
    asking = [
        name for name in ("shard", "encode", "finalize") if "\n#SBATCH --gpus" in (job / f"{name}.sbatch").read_text()
    ]
    assert asking == ["encode"]
    assert pipeline()[0] == 0
    assert "--gpus" not in (tmp_path / "runs/tiny/jobs/002/encode.sbatch").read_text()


def test_what_stands_is_not_made_again(pipeline, slurm, tmp_path, digits):
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets/images").symlink_to(digits / "images")
    _, out, _ = pipeline()
    assert scripts_of(slurm.calls) == ["encode.sbatch", "finalize.sbatch", "train.sbatch", "evaluate.sbatch"]
    assert waits_of(slurm.calls)[0] is None
    assert any(line.split()[:2] == ["shard", "-"] for line in out.splitlines())
    (tmp_path / "sets/latents").symlink_to(digits / "latents")
    assert pipeline()[0] == 0
    assert scripts_of(slurm.calls)[4:] == ["train.sbatch", "evaluate.sbatch"]
    status, _, said = pipeline("data.num_classes=9")
    assert (status, "data.num_classes=9" in said) == (1, True)


def test_a_chain_is_scored_however_it_ends(pipeline, slurm):
    assert pipeline("--chain", "3")[0] == 0
    assert waits_of(slurm.calls)[-1] == "--dependency=afterany:44"


def test_what_was_submitted_before_a_refusal_is_cancelled(pipeline, slurm, tmp_path):
    slurm.does("sbatch", "print(41) if 'shard.sbatch' in sys.argv[-1] else sys.exit('sbatch: error: no such array')")
    status, _, said = pipeline()
    assert status == 1
    assert said.startswith("ecar-dist: sbatch: error: no such array; ")
    assert said.endswith(": 41 (shard)\n")
    assert slurm.calls[-1] == ["scancel", "41"]
    assert not (tmp_path / "runs/tiny").exists()


def test_a_dry_run_prints_every_script(pipeline, tmp_path, slurm):
    status, out, _ = pipeline("--dry-run", "--encode-option=--flip=store", "--label", "cls")
    assert status == 0
    for name in ("shard", "encode", "finalize", "train", "evaluate"):
        assert f"jobs/001/{name}.sbatch\n#!/usr/bin/env bash" in out
    assert "ecar-data encode sets/images/train sets/latents --vae dct-f8 --image-size 32 --flip=store --tasks 32" in out
    assert "afterok:JOB-4" in out
    assert not (tmp_path / "runs").exists()
    assert slurm.calls == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--holdout", "0"], "--holdout 0 "),
        (["data.latents=s3://b/x"], "data.latents is s3://b/x"),
        (["--vae", "dct-f32"], "--vae dct-f32, but the config has dct-f8; "),
        (["--shards", "other"], "; set data.train_images=other/train"),
        (["data.heldout_images=x"], "; set data.heldout_images=sets/images/heldout"),
        (["data.train_images=null"], "give --shards DIR, or set data.train_images"),
        (["--classes", "x.txt"], "--classes x.txt "),
        (["--pipeline", "nowhere"], "--pipeline nowhere "),
    ],
)
def test_what_the_config_contradicts_is_refused_before_anything_is_submitted(pipeline, slurm, words, said):
    status, _, error = pipeline(*words)
    assert status == 1
    assert said in error
    assert len(error.splitlines()) == 1
    assert slurm.calls == []


@pytest.mark.parametrize(("kind", "given", "vae"), [("kl", None, "my/vae"), ("dc", "a/copy", "a/copy")])
def test_which_autoencoder_encodes(pipeline, slurm, tmp_path, kind, given, vae):
    words = ["--vae", given] if given else []
    assert pipeline(*words, f"vae.kind={kind}", "vae.path=my/vae")[0] == 0
    assert f" --vae {vae} --image-size 32" in (tmp_path / "runs/tiny/jobs/001/encode.sbatch").read_text()
