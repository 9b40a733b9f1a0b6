"""`ecar-data prepare`: the individual commands in sequence, each done once, no matter when it is killed."""

import os
import signal

import pytest

from data_tools import cli
from data_tools.cli import main
from ecar_dist.data.images.shards import ImageShards
from ecar_dist.data.shards.manifest import load_image_manifest, load_manifest
from tests.data_tools.image_folders import CLASSES, PER_CLASS, content, write_image_folder
from tests.fork_server import CONTEXT

STEPS = ("shard", "encode", "finalize")
RUN = ("shard", "encode", "finalize", "encode", "finalize")  # the second time for the held-out images


@pytest.fixture
def pictures(tmp_path):
    return write_image_folder(tmp_path / "pictures")


def prepare(pictures, out, *more):
    return main(["prepare", str(pictures), str(out), "--holdout", "0.25", "--device", "cpu", *more])


def everything(out):
    """All files but plan.json, which names the folder of the images."""
    found = content(out / "latents") | {"plan.json": b""}
    heldout = content(out / "heldout_latents") | {"plan.json": b""}
    return [content(out / "images/train"), content(out / "images/heldout"), found, heldout]


def test_one_command_makes_a_finished_set(pictures, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare(pictures, out) == 0
    printed = capsys.readouterr().out
    assert [line.split()[2] for line in printed.splitlines() if line.startswith("$ ecar-data")] == list(RUN)
    assert f"ecar-dist init {out} > mine.yaml" in printed
    manifest = load_manifest(out / "latents")
    assert (manifest.count, manifest.class_names) == (len(CLASSES) * PER_CLASS * 3 // 4, list(CLASSES))
    assert manifest.moments_shape == (12, 4, 4)  # 20-pixel images, four latent pixels at least
    assert load_image_manifest(out / "images/heldout").count == len(CLASSES) * PER_CLASS // 4
    assert load_manifest(out / "heldout_latents").count == len(CLASSES) * PER_CLASS // 4


def test_what_is_complete_is_not_repeated(pictures, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare(pictures, out) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix in (".tar", ".json", ".npy")}
    del before[out / "prepare.json"]
    capsys.readouterr()
    assert prepare(pictures, out) == 0
    printed = capsys.readouterr().out
    assert printed.count("already done") == len(RUN)
    assert "$ ecar-data" not in printed
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_same_command_continues_after_a_kill(pictures, tmp_path, step, when):
    out = tmp_path / "out"
    process = CONTEXT.Process(target=die_in_prepare, args=(step, when, pictures, out))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert prepare(pictures, out) == 0
    assert prepare(pictures, tmp_path / "undisturbed") == 0
    assert everything(out) == everything(tmp_path / "undisturbed")


def die_in_prepare(step, when, pictures, out):
    original = cli.COMMANDS[step]

    def deadly(**values):
        if when == "after":
            original(**values)
        os.kill(os.getpid(), signal.SIGKILL)

    cli.COMMANDS[step] = deadly
    prepare(pictures, out)


def test_an_autoencoder_can_be_trained(pictures, tmp_path, monkeypatch, capsys):
    original = cli.COMMANDS["train-vae"]
    monkeypatch.setitem(
        cli.COMMANDS, "train-vae", lambda **values: original(**{**values, "channels": 8, "batch_size": 4})
    )
    out = tmp_path / "out"
    words = ("--vae", "train", "--vae-steps", "2", "--vae-channels", "3")
    assert prepare(pictures, out, *words) == 0
    encoder = load_manifest(out / "latents").encoder
    assert (encoder["kind"], encoder["downsample"], encoder["name"]) == ("kl", 4, str(out / "vae"))
    assert encoder["latent_channels"] == 3
    capsys.readouterr()
    assert prepare(pictures, out, *words) == 0
    assert capsys.readouterr().out.count("already done") == len(RUN) + 1


def test_nothing_is_held_out_on_request(pictures, tmp_path):
    assert prepare(pictures, tmp_path / "out", "--holdout", "0", "--image-size", "16", "--flip", "store") == 0
    assert len(ImageShards(tmp_path / "out/images")) == len(CLASSES) * PER_CLASS
    manifest = load_manifest(tmp_path / "out/latents")
    assert (manifest.has_flip, manifest.moments_shape) == (True, (12, 2, 2))


def refusal(capsys, *words):
    capsys.readouterr()
    assert main([str(word) for word in words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--vae", "dct-f16"], "dct-f8, dct-f32"),
        (["--image-size", "30"], "give e.g. 32"),
        (["--background", "pink"], "#rrggbb"),
        (["--holdout", "2"], "--holdout 2.0"),
        (["--max-bad", "-1"], "--max-bad -1.0"),
        (["--label", "txt"], "--label txt"),
        (["--classes", "none.txt"], "--classes none.txt"),
    ],
)
def test_a_mistake_for_a_later_step_is_found_before_the_first(pictures, tmp_path, capsys, more, said):
    assert said in refusal(capsys, "prepare", pictures, tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [["--seed", "1"], ["--image-size", "16"], ["--vae", "dct-f32"], ["--flip", "store"]])
def test_another_command_is_refused_in_the_same_folder(pictures, tmp_path, capsys, more):
    assert prepare(pictures, tmp_path / "out") == 0
    said = refusal(capsys, "prepare", pictures, tmp_path / "out", "--holdout", "0.25", "--device", "cpu", *more)
    assert more[0] in said
    assert "another folder" in said


def test_a_folder_with_other_content_is_left_alone(pictures, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    assert "mine.txt" in refusal(capsys, "prepare", pictures, tmp_path / "out")
    assert content(tmp_path / "out") == {"mine.txt": b"mine"}


def test_two_commands_at_once_do_not_mix(pictures, tmp_path, capsys, monkeypatch):
    said = []
    original = cli.COMMANDS["encode"]

    def meanwhile(**values):
        said.append(refusal(capsys, "prepare", pictures, tmp_path / "out", "--holdout", "0.25", "--device", "cpu"))
        original(**values)

    monkeypatch.setitem(cli.COMMANDS, "encode", meanwhile)
    assert prepare(pictures, tmp_path / "out") == 0
    assert "another `ecar-data prepare`" in said[0]
