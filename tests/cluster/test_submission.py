"""`ecar-dist submit`: what is refused before anything is submitted, and what is written."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from ecar_dist.cli import main
from ecar_dist.config.read import load_config

CPU = ("--gpus-per-node", "0", "--ranks-per-node", "2")


@pytest.fixture
def submit(write_config, tmp_path, monkeypatch, capsys):
    """Submit the tiny run from its own folder; returns status, output and errors."""
    monkeypatch.chdir(tmp_path)

    def call(*words, nodes=2, resources=CPU):
        capsys.readouterr()
        status = main(["submit", str(write_config()), "--nodes", str(nodes), *resources, *map(str, words)])
        return status, *capsys.readouterr()

    return call


def refusal(answer):
    status, _, said = answer
    assert status == 1
    assert said.startswith("ecar-dist: ")
    assert len(said.splitlines()) == 1, said
    return said


def test_it_needs_no_torch(write_config):
    code = "import sys; from ecar_dist.cli import main; status = main(sys.argv[1:]); print('torch' in sys.modules)"
    command = ["submit", str(write_config()), "--nodes", "2", "--pipeline", "digits", "--shards", "x", "--dry-run"]
    done = subprocess.run([sys.executable, "-c", code, *command, *CPU], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stdout + done.stderr


def test_a_dry_run_prints_all_and_does_nothing(submit, tmp_path, monkeypatch):
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    monkeypatch.setenv("PATH", "/nowhere")
    status, out, _ = submit("--dry-run", "train.total_samples=64", "--time", "2:00:00", "--sbatch=--partition=a b")
    assert status == 0
    assert re.search(r"^nodes: 2 .* 2 with 2 ranks", out, re.MULTILINE)
    assert "model state per rank, 4 ranks" in out
    for line in ("--nodes=2", "--ntasks-per-node=2", "--time=2:00:00", "--partition='a b'", f"--chdir={tmp_path}"):
        assert f"\n#SBATCH {line}\n" in out
    assert "#SBATCH --gpus-per-node" not in out
    assert f"#SBATCH --output={tmp_path}/runs/tiny/logs/job-%j.log" in out
    resolved = yaml.safe_load(out.partition("config.yaml\n")[2].partition("config.yaml\n")[2])
    assert resolved["train"]["total_samples"] == 64
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_what_is_written_and_said(submit, slurm, tmp_path):
    status, out, _ = submit("train.total_samples=64", "--launcher", "torchrun", "--max-requeues", "3", "--after", "7")
    assert status == 0
    run = tmp_path / "runs/tiny"
    job = run / "jobs/001"
    assert {path.name for path in job.iterdir()} == {"train.sbatch", "env.sh", "config.yaml", "job", "steps"}
    assert (job / "job").read_text() == "41\n"
    assert load_config(job / "config.yaml").train.total_samples == 64
    (call,) = slurm.calls
    assert call[:2] == ["sbatch", "--parsable"]
    assert call[-1] == str(job / "train.sbatch")
    assert {"--nodes=2", "--dependency=afterany:7", "--kill-on-invalid-dep=yes"} <= set(call)
    script = (job / "train.sbatch").read_text()
    for word in (f"VENV={sys.prefix}", f"ECAR_SLURM={job}", "LAUNCHER=torchrun", "MAX_REQUEUES=3"):
        assert word in script
    for line in ("job 41", f"{run}/logs/job-41.log", f"ecar-dist status {run}", "scancel 41"):
        assert line in out
    assert (run / "logs").is_dir(), "Slurm creates no folder for its output"


def test_every_submission_has_a_folder_of_its_own(submit, slurm, tmp_path):
    assert [submit()[0] for _ in range(3)] == [0, 0, 0]
    assert sorted(path.name for path in (tmp_path / "runs/tiny/jobs").iterdir()) == ["001", "002", "003"]


def test_a_run_directory_with_odd_names(submit, slurm, tmp_path):
    folder = tmp_path / "it's 100% $HOME"
    assert submit(f'run.dir="{folder}"')[0] == 0
    job = folder / "tiny/jobs/001"
    assert f"--output={folder}/tiny/logs/job-%j.log".replace("100%", "100%%") in slurm.calls[0]
    exports = next(line for line in (job / "train.sbatch").read_text().splitlines() if line.startswith("export VENV"))
    assert f"ECAR_SLURM={job}" in shlex.split(exports)


def test_a_chain_is_an_array_one_at_a_time(submit, slurm):
    _, out, _ = submit("--chain", "5")
    assert "--array=1-5%1" in slurm.calls[0]
    assert "logs/job-*.log" in out


def test_a_range_of_nodes(submit, slurm, tmp_path):
    _, out, _ = submit("--min-nodes", "1", "batch.global_batch_size=48", nodes=6, resources=("--gpus-per-node", "1"))
    assert re.search(r"^nodes: 1 to 6 .* 1, 2, 3, 4, 6 with 1 ranks", out, re.MULTILINE)
    assert "--nodes=1-6" in slurm.calls[0]
    assert "MIN_NODES=1" in (tmp_path / "runs/tiny/jobs/001/train.sbatch").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["batch.global_batch_size=24"], "4 x 4 = 16; set batch.global_batch_size=16 or 32"),
        (["batch.global_batch_size=24", "--min-nodes", "1"], "on 2 nodes of 2 ranks: batch.global_batch_size=24"),
        (["--min-nodes", "3"], "--nodes 2"),
        (["--sbatch=-pgpu"], "--sbatch=-pgpu "),
        (["--sbatch=--nodes=3"], "--nodes"),
        (["--scripts", "here"], "no train.sbatch and env.sh in here"),
        (["--device", "B9000"], "'B9000' has no known peak"),
        (["train.total_sample=3"], "did you mean train.total_samples?"),
        (["data.latents=nowhere"], "nowhere/manifest.json"),
        (["data.num_classes=9"], "data.num_classes=9"),
        (["data.latent_size=8"], "data.latent_size=8"),
        (["--vae", "x"], "--pipeline SOURCE"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(submit, slurm, tmp_path, words, said):
    assert said in refusal(submit(*words))
    assert slurm.calls == []
    assert not (tmp_path / "runs").exists()


def test_ranks_are_to_be_given_where_there_are_no_gpus(submit):
    assert "--gpus-per-node 0 needs --ranks-per-node" in refusal(submit(resources=("--gpus-per-node", "0")))


def test_a_model_that_no_device_holds_is_refused(submit):
    large = [
        "model.preset=7B",
        "model.width=null",
        "model.ar_depth=null",
        "model.flow_depth=null",
        "--device",
        "h100",
        "--dry-run",
    ]
    large += ["deepspeed.zero_stage=0", "deepspeed.precision=bf16"]
    said = refusal(submit(*large))
    assert re.search(r"zero_stage=0 on 4 ranks.* 73 GiB usable; use .*deepspeed.zero_stage=2$", said)
    assert submit(*large, "deepspeed.zero_stage=3")[0] == 0
    assert "on 1 ranks" in refusal(submit(*large, "--min-nodes", "1", resources=("--gpus-per-node", "1")))


def test_after_a_job_the_data_may_come_from_it(submit, slurm):
    status, out, _ = submit("data.latents=nowhere", "--after", "7")
    assert status == 0
    assert "job 7" in out


def test_a_folder_that_is_no_run(submit, slurm, tmp_path):
    (tmp_path / "runs/tiny").mkdir(parents=True)
    (tmp_path / "runs/tiny/thesis.tex").write_text("mine")
    assert str(tmp_path / "runs/tiny") in refusal(submit())
    (tmp_path / "runs/tiny/lineage.json").write_text(json.dumps([]))
    assert submit()[0] == 0


def test_a_run_whose_job_has_not_ended(submit, slurm):
    assert submit()[0] == 0
    slurm.does("squeue", "print('41 PENDING')")
    said = refusal(submit())
    assert "job 41 (train)" in said
    assert "PENDING" in said
    assert "--after 41" in said
    assert "scancel 41" in said
    assert "--jobs=41" in slurm.calls[-1]
    assert "--after 41" in refusal(submit("--after", "40"))
    assert submit("--after", "41")[0] == 0


def test_jobs_that_slurm_has_forgotten_have_ended(submit, slurm):
    assert submit()[0] == 0
    slurm.does("squeue", "sys.exit('slurm_load_jobs error: Invalid job id specified')")
    assert submit()[0] == 0
    slurm.does("squeue", "sys.exit('slurm_load_jobs error: Unable to contact slurm controller')")
    assert "Unable to contact slurm controller" in refusal(submit())


def test_a_pipe_in_place_of_the_ids_of_earlier_jobs(submit, slurm, tmp_path):
    assert submit()[0] == 0
    steps = tmp_path / "runs/tiny/jobs/001/steps"
    steps.unlink()
    os.mkfifo(steps)
    assert str(steps) in refusal(submit())


def test_what_sbatch_refuses_leaves_nothing(submit, slurm, tmp_path):
    slurm.does("sbatch", "sys.exit('sbatch: warning: x\\nsbatch: error: Invalid partition name specified')")
    assert refusal(submit()) == "ecar-dist: sbatch: error: Invalid partition name specified\n"
    assert not (tmp_path / "runs/tiny").exists()


def test_without_slurm(submit, monkeypatch):
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))
    assert "sbatch is not on the PATH" in refusal(submit())


def test_a_config_with_a_key_is_for_its_owner_alone(submit, slurm, tmp_path):
    assert submit('checkpoint.dir="s3://key:secret@host/bucket"')[0] == 0
    assert (tmp_path / "runs/tiny/jobs/001/config.yaml").stat().st_mode & 0o077 == 0


def test_a_job_id_is_a_number(submit):
    with pytest.raises(SystemExit):
        submit("--after", "7;rm")
