"""One rule decides whether data match a config, for `check`, `submit` and training."""

import dataclasses
import subprocess
import sys

import pytest

from ecar_dist.cli import main
from ecar_dist.config.read import config_from_dict
from ecar_dist.data.fit import absent_sets, check_fits, local_sets
from ecar_dist.data.shards.manifest import load_manifest, write_manifest
from ecar_dist.errors import DataError
from ecar_dist.train.sources import check_data

CPU = ("--gpus-per-node", "0", "--ranks-per-node", "1", "--dry-run")
EVERYTHING = {
    "data.num_classes": ("5", "10"),
    "data.latent_channels": ("4", "12"),
    "data.latent_size": ("8", "4"),
    "vae.kind": ("kl", "dct"),
    "vae.downsample": ("16", "8"),
}
WRONG = [f"{key}={wrong}" for key, (wrong, _) in EVERYTHING.items()] + ["vae.path=somewhere"]


def refusal(capsys, *words):
    capsys.readouterr()
    assert main(list(map(str, words))) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_check_names_every_value_that_differs_at_once(write_config, digits, capsys):
    said = refusal(capsys, "check", write_config(), *WRONG)
    for key, (wrong, right) in EVERYTHING.items():
        assert f"{key}={wrong}" in said
        assert f"{key}={right}" in said.partition("; set ")[2]
    assert str(digits / "latents") in said


def test_submit_and_training_hold_the_same_rule(write_config, tree, capsys):
    checked = refusal(capsys, "check", write_config(), *WRONG).removeprefix("ecar-dist: ")
    submitted = refusal(capsys, "submit", write_config(), "--nodes", "1", *CPU, *WRONG)
    assert submitted.removeprefix("ecar-dist: ") == checked
    for assignment in WRONG:
        key, _, value = assignment.partition("=")
        section, _, name = key.partition(".")
        tree[section][name] = int(value) if value.isdigit() else value
    with pytest.raises(DataError) as caught:
        check_data(config_from_dict(tree))
    assert str(caught.value) == checked


def test_what_one_command_prints_can_be_given_to_the_next(write_config, capsys):
    said = refusal(capsys, "check", write_config(), *WRONG)
    assert main(["check", str(write_config()), *WRONG, *said.partition("; set ")[2].split()]) == 0


def test_each_set_of_a_mixture_is_compared(tree, digits, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    found = load_manifest(digits / "latents")
    write_manifest(other, dataclasses.replace(found, num_classes=12, class_names=[str(n) for n in range(12)]))
    del tree["data"]["latents"]
    tree["data"]["mixture"] = [{"latents": str(place), "weight": 1} for place in (digits / "latents", other)]
    tree["data"]["num_classes"] = 9
    config = config_from_dict(tree)
    with pytest.raises(DataError) as caught:
        check_fits(config, local_sets(config))
    assert "data.num_classes=10" in str(caught.value)
    assert "data.num_classes=12" in str(caught.value)


def test_images_are_compared(write_config, digits, capsys):
    images = ["data.latents=", f"data.images={digits / 'images/train'}", "data.num_classes=9"]
    assert "set data.num_classes=10" in refusal(capsys, "check", write_config(), *images)


@pytest.mark.parametrize("made", [False, True])
def test_data_that_are_not_finished_are_not_compared(write_config, tmp_path, capsys, made):
    place = tmp_path / "later"
    if made:
        place.mkdir()
    assert main(["check", str(write_config()), f"data.latents={place}", "data.num_classes=5"]) == 0
    assert f"# {place} has no manifest.json yet" in capsys.readouterr().out


def test_data_behind_a_url_are_not_asked_for(tree):
    tree["data"]["latents"] = "s3://bucket/latents"
    config = config_from_dict(tree)
    assert (local_sets(config), absent_sets(config)) == ([], [])


def test_a_manifest_is_read_without_torch(write_config):
    code = (
        "import sys; from ecar_dist.cli import main; status = main(sys.argv[1:]); print(status, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, "check", str(write_config())], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr
