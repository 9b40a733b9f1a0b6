"""`ecar-dist init` writes a config that `check` accepts and `train` runs."""

import dataclasses
import subprocess
import sys

import pytest

from ecar_dist.cli import main
from ecar_dist.config.read import config_from_dict, load_config
from ecar_dist.data.prepared import PreparedLatents, find_latents
from ecar_dist.data.shards.manifest import load_manifest, write_manifest
from ecar_dist.errors import DataError
from ecar_dist.plan import proposal
from ecar_dist.plan.proposal import Hardware, propose_config, run_name
from ecar_dist.storage.bounded_yaml import parse_yaml
from tests.fork_server import run_forked

CPU = Hardware("CPU")


def written(folder, tmp_path, capsys, *more):
    capsys.readouterr()
    assert main(["init", str(folder), "--device", "cpu", *more]) == 0
    path = tmp_path / "mine.yaml"
    path.write_text(capsys.readouterr().out)
    return path


@pytest.mark.parametrize("part", ["", "latents"])
def test_it_agrees_with_the_manifest_and_passes_check(digits, tmp_path, capsys, part):
    path = written(digits / part, tmp_path, capsys)
    config = load_config(path)
    data = config.data
    assert (data.latents, data.num_classes, data.latent_channels) == (str(digits / "latents"), 10, 12)
    assert (config.stage_sizes, config.model.patch_size) == ((1, 2, 4), 1)
    assert data.train_images == str(digits / "images/train")
    assert data.heldout_images == str(digits / "images/heldout")
    assert main(["check", str(path)]) == 0


def test_the_class_names_are_in_it(digits, tmp_path, capsys):
    assert "0 0, 1 1, 2 2" in written(digits, tmp_path, capsys).read_text()


def test_it_trains_as_it_is(digits, tmp_path, capsys):
    path = written(digits, tmp_path, capsys, "--name", "first")
    few = [f"run.dir={tmp_path}", "train.total_samples=128", "optim.warmup_samples=64", "sample.every_samples=128"]
    done = run_forked("train", str(path), *few)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "first/samples").is_dir()


def test_it_needs_no_torch(digits):
    code = (
        "import sys; from ecar_dist.cli import main; status = main(sys.argv[1:]); "
        "print(status, 'torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, "init", str(digits)], capture_output=True, text=True, check=True)
    assert done.stderr.split() == ["0", "False"]


def found(digits, *, count=1438, shape=(12, 4, 4), names=("a", "b"), folder="somewhere/latents"):
    manifest = load_manifest(digits / "latents")
    manifest = dataclasses.replace(
        manifest, count=count, moments_shape=shape, num_classes=len(names), class_names=list(names)
    )
    return PreparedLatents(folder, manifest, "dct-f8")


def proposed(*inputs, **named):
    return config_from_dict(parse_yaml(propose_config(*inputs, name="n", **named)))


@pytest.mark.parametrize(
    ("side", "patch", "sides"),
    [(1, 1, (1,)), (2, 1, (1, 2)), (3, 1, (3,)), (6, 1, (3, 6)), (8, 2, (2, 4, 8)), (12, 1, (3, 6, 12))],
)
def test_stages_fit_every_size(digits, side, patch, sides):
    config = proposed(found(digits, shape=(12, side, side)), CPU)
    assert (config.model.patch_size, config.stage_sizes) == (patch, sides)


@pytest.mark.parametrize(("side", "patch"), [(32, 4), (64, 4), (16, 4), (24, 2), (28, 1)])
def test_pixels_get_larger_tokens(digits, side, patch):
    pixels = found(digits, shape=(3, side, side))
    encoder = {**pixels.manifest.encoder, "kind": "identity", "downsample": 1, "latent_channels": 3}
    pixels = dataclasses.replace(pixels, manifest=dataclasses.replace(pixels.manifest, encoder=encoder))
    assert proposed(pixels, CPU).model.patch_size == patch


@pytest.mark.parametrize("count", [1, 9, 100, 700, 5_000, 60_000, 1_281_167])
@pytest.mark.parametrize("device", ["cpu", "A100", "H200"])
def test_the_numbers_fit_the_samples(digits, count, device):
    config = proposed(found(digits, count=count, shape=(12, 32, 32)), Hardware.named(device))
    batch = config.batch.global_batch_size
    assert batch * 8 <= max(count, 64)
    assert config.train.total_samples % batch == 0
    assert config.ema.half_life_samples[0] == config.train.total_samples // 10
    assert config.train.total_samples >= 5 * config.checkpoint.every_samples
    assert (config.model.preset == "T") == (device == "cpu" or count < 4_000)


def test_a_preset_that_does_not_fit_the_memory_gives_way(digits):
    small = Hardware("a small GPU", 8 << 30)
    config = proposed(found(digits, count=2_000_000, shape=(12, 32, 32)), small)
    assert config.model.preset in ("S", "B")
    assert config.batch.micro_batch_size in (8, 16)
    assert proposed(found(digits), small, preset="XL").model.preset == "XL"


def test_odd_names_stay_names(digits):
    folder = 'my "best" 画像: #1/latents'
    names = ["on", "a, b", "# {x}", "ü" * 300]
    assert proposed(found(digits, folder=folder, names=names), CPU).data.latents == folder
    assert proposed(found(digits, folder="null"), CPU).data.latents == "null"
    assert [run_name(text) for text in ("data/my set/", "data/latents", "..", "///", "-x")] == [
        "my-set",
        "data",
        "first",
        "first",
        "x",
    ]


def test_latents_that_are_not_square_are_refused(digits):
    with pytest.raises(DataError, match="4 x 8"):
        propose_config(found(digits, shape=(12, 4, 8)), CPU, name="n")


def test_a_gpu_is_read_from_nvidia_smi(monkeypatch):
    answer = subprocess.CompletedProcess([], 0, "NVIDIA H100 80GB HBM3, 81559\nNVIDIA H100 80GB HBM3, 81559\n")
    monkeypatch.setattr(proposal.subprocess, "run", lambda *_, **__: answer)
    assert Hardware.named("auto") == Hardware("NVIDIA H100 80GB HBM3", 81559 << 20)
    monkeypatch.setattr(proposal.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, "\n"))
    assert Hardware.named("auto") == CPU


def test_the_autoencoder_beside_the_latents_is_found(digits, tmp_path):
    manifest = load_manifest(digits / "latents")
    encoder = {**manifest.encoder, "kind": "kl", "name": "/elsewhere/vae"}
    (tmp_path / "latents").mkdir()
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/config.json").write_text("{}")
    write_manifest(tmp_path / "latents", dataclasses.replace(manifest, encoder=encoder))
    assert find_latents(str(tmp_path)).vae == str(tmp_path / "vae")


def test_held_out_latents_are_for_validation(digits, tmp_path, capsys):
    for name in ("latents", "heldout_latents"):
        (tmp_path / name).mkdir()
        write_manifest(tmp_path / name, load_manifest(digits / "latents"))
    config = load_config(written(tmp_path, tmp_path, capsys))
    assert config.data.heldout_latents == str(tmp_path / "heldout_latents")
    assert config.train.validate_every_samples == config.checkpoint.every_samples


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("images/train", "ecar-data encode"),
        ("nowhere", "does not exist; make it with `ecar-data prepare"),
        ("images", "ecar-data prepare"),
    ],
)
def test_a_folder_without_latents_gets_the_command(digits, capsys, given, said):
    capsys.readouterr()
    assert main(["init", str(digits / given)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
