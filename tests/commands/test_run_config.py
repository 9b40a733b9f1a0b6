"""A tau that loses variance is refused when a run is planned or started, and nowhere else."""

import re
import shutil
import subprocess
import sys

import pytest

from ecar_dist.cli import main
from ecar_dist.config.read import config_to_yaml, load_config
from ecar_dist.runtime.run.directory import RunDirectory
from tests.conftest import write_yaml
from tests.fork_server import run_forked

SMALL = "flow.context.tau=0.01"
ALLOWED = "flow.context.allow_small_tau=true"
SUBMIT = ("--nodes", "1", "--gpus-per-node", "0", "--ranks-per-node", "1", "--dry-run")


def refusal(capsys, *words):
    capsys.readouterr()
    assert main(list(map(str, words))) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("command", [("check",), ("plan",), ("submit", *SUBMIT)])
def test_a_small_tau_is_refused_with_the_steps_it_needs(write_config, capsys, command):
    name, *options = command
    said = refusal(capsys, name, write_config(), SMALL, *options)
    assert re.search(r"flow\.context\.tau=0\.01 .* 0\.1: 8 .* 95% .* 67 steps", said)
    assert ALLOWED in said
    assert main([name, str(write_config()), SMALL, ALLOWED, *options]) == 0


def test_training_refuses_it_before_it_makes_a_directory(write_config, tmp_path):
    done = run_forked("train", str(write_config()), SMALL)
    assert done.returncode == 1
    assert re.search("95% .* 67 steps", done.stderr)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        ["flow.context.tau=0.1"],
        [SMALL, "flow.context.mode=class_only"],
        [SMALL, "flow.num_stages=1"],
        [SMALL, "model.kind=pyramid"],
        [SMALL, "flow.gamma=-0.2"],  # the jump noise adds variance at the start
        [SMALL, "flow.context.allow_unsafe=true"],
        ["flow.context.tau=0", "flow.context.mode=gamma_relaxed", "flow.gamma=-0.2"],
    ],
)
def test_what_loses_no_variance_or_is_asked_for_is_let_through(write_config, overrides):
    assert main(["check", str(write_config()), *overrides]) == 0


def test_so_small_a_tau_has_no_number_of_steps(write_config, capsys):
    said = refusal(capsys, "check", write_config(), "flow.context.tau=1e-9")
    assert re.search("95% .* more than 4,096 steps", said)


def test_the_word_that_allows_it_is_no_part_of_the_model(write_config):
    config = write_config()
    with_it, without = load_config(config, [SMALL, ALLOWED]), load_config(config, [SMALL])
    assert with_it.model_identity == without.model_identity


def test_a_run_from_before_the_rule_goes_on_and_can_be_read(make_tree, tmp_path, capsys):
    """Its config.yaml has a small tau, and not the key that allows it."""
    tree = make_tree(tmp_path)
    tree["flow"] = {"context": {"tau": 0.01}}
    config, run = write_yaml(tree, tmp_path), tmp_path / "runs/tiny"
    assert run_forked("train", str(config), ALLOWED, "train.total_samples=32").returncode == 0
    old = RunDirectory(run).load_config().model_dump(mode="json")
    del old["flow"]["context"]["allow_small_tau"]
    (run / "config.yaml").write_text(
        config_to_yaml(load_config(write_yaml(old, tmp_path))).replace("    allow_small_tau: false\n", "")
    )
    write_yaml(tree, tmp_path)
    done = run_forked("train", str(config), "train.total_samples=64")
    assert done.returncode == 0, done.stderr
    assert "resuming at step 2" in done.stdout
    assert sum("warning: flow.context.tau=0.01" in line for line in done.stderr.splitlines()) == 1
    assert main(["sample", str(run), "--labels", "0", "--count", "1", "--out", str(tmp_path / "drawn")]) == 0
    assert main(["checkpoint", "export", str(run), "--out", str(tmp_path / "export")]) == 0
    shutil.rmtree(run)
    assert "flow.context.tau=0.01" in refusal(capsys, "check", config)


def test_the_rule_needs_no_torch(write_config):
    code = "import sys; from ecar_dist.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "check", str(write_config()), SMALL], capture_output=True, text=True
    )
    assert done.stdout == "1 False\n"
