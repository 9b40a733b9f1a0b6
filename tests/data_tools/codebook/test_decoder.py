"""`ecar-data fit-codebook --hybrid`: the decoder learns to decode codes, and no latent changes."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_tools.autoencoder import steps as training_steps
from data_tools.cli import main
from data_tools.codebook import decoder, fit
from data_tools.finalize import finalize
from ecar_dist.command_line import EX_TEMPFAIL
from ecar_dist.errors import ConfigError
from ecar_dist.runtime.peers import RemoteError
from ecar_dist.vae.build import open_codec_by_spec
from ecar_dist.vae.codec import check_same_encoder
from ecar_dist.vae.pretrained import TUNED_NAME
from tests.conftest import free_port
from tests.data_tools.image_folders import content, encode_small
from tests.data_tools.workers import ecar_data
from tests.fork_server import run_ranks

WEIGHTS = "diffusion_pytorch_model.safetensors"
FIT = ["--size", "32", "--patch-size", "1", "--iterations", "3"]


@pytest.fixture(scope="module")
def images(digits):
    return digits / "images/heldout"


@pytest.fixture(scope="module")
def encoded(images, tmp_path_factory):
    """An autoencoder of digits, and the latents that it made of them."""
    folder = tmp_path_factory.mktemp("hybrid")
    small = ["--image-size", "16", "--channels", "8", "--batch-size", "16", "--device", "cpu"]
    training = ["train-vae", str(images), str(folder / "vae"), *small, "--steps", "60", "--learning-rate", "4e-3"]
    assert main(training) == 0
    encode_small(images, folder / "latents", vae=str(folder / "vae"), samples_per_shard=200, batch_size=64)
    finalize(folder / "latents")
    return folder


@pytest.fixture
def latents(encoded, tmp_path):
    return shutil.copytree(encoded / "latents", tmp_path / "latents")


def architecture(folder):
    config = json.loads((folder / "config.json").read_text())
    return {name: value for name, value in config.items() if not name.startswith("_")}


def test_codes_decode_better_latents_hardly_worse_and_the_encoder_stays_to_the_bit(encoded, images, latents, capsys):
    tuning = ["--hybrid", str(images), "--steps", "60", "--batch-size", "16", "--learning-rate", "4e-3"]
    assert main(["fit-codebook", str(latents), *FIT, *tuning]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    z, tuned_z, z_q, tuned_z_q = map(float, re.findall(r"0\.\d{4}", said))
    assert tuned_z_q < 0.9 * z_q
    assert tuned_z < 1.05 * z

    # The weights of the decoder have changed, and no others.
    folder = latents / "decoder-p1-v32"
    before, after = load_file(encoded / "vae" / WEIGHTS), load_file(folder / WEIGHTS)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert {name.partition(".")[0] for name in changed} == {"decoder", "post_quant_conv"}
    assert architecture(folder) == architecture(encoded / "vae")
    assert str(encoded) not in (folder / "config.json").read_text()

    # It still counts as the same autoencoder, so its latents are accepted.
    ours, theirs = (open_codec_by_spec(str(path)) for path in (folder, encoded / "vae"))
    check_same_encoder(theirs.identity, ours.identity, "here")
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(ours.encode(pixels), theirs.encode(pixels))
    assert main(["preview", str(latents), "--vae", str(folder), "--out", str(latents.parent / "sheet.png")]) == 0
    assert main(["verify", str(latents)]) == 0

    # A second run replaces nothing.
    files = content(folder)
    assert main(["fit-codebook", str(latents), *FIT, *tuning]) == 1
    assert "remove it to tune the decoder again" in capsys.readouterr().err
    assert content(folder) == files


def test_two_ranks_fit_the_codes_and_tune_the_decoder_of_one(encoded, images, latents, tmp_path):
    alone = shutil.copytree(encoded / "latents", tmp_path / "alone")
    tuning = [*FIT, "--hybrid", str(images), "--steps", "2", "--batch-size", "8"]
    assert main(["fit-codebook", str(alone), *tuning]) == 0
    ended = run_ranks(2, free_port(), "fit-codebook", str(latents), *tuning, main=ecar_data)
    assert not any(rank.returncode for rank in ended), "".join(rank.stdout + rank.stderr for rank in ended)
    for name in ("codebook-p1-v32.safetensors", "manifest.json"):
        assert (latents / name).read_bytes() == (alone / name).read_bytes()
    assert content(latents / "decoder-p1-v32") == content(alone / "decoder-p1-v32")


@pytest.mark.parametrize(("again", "status"), [(False, 1), (True, EX_TEMPFAIL)])
def test_a_rank_is_silent_where_another_one_met_an_error(latents, monkeypatch, capsys, again, status):
    def fail(*given, **more):
        raise RemoteError("rank 0 met an error and reports it", again=again)

    monkeypatch.setattr(fit, "fit_codebook", fail)
    with pytest.raises(SystemExit, match=str(status)):
        main(["fit-codebook", str(latents), *FIT])
    assert capsys.readouterr().err == ""


def test_a_tuning_that_was_stopped_ends_with_the_same_decoder(images, latents, monkeypatch, capsys):
    tuning = ["fit-codebook", str(latents), *FIT, "--hybrid", str(images), "--batch-size", "8", "--steps"]
    assert main([*tuning, "4"]) == 0
    folder = latents / "decoder-p1-v32"
    whole = content(folder)
    shutil.rmtree(folder)

    def stop_at(training, pixels, **more):
        if training.schedule.last_epoch == 2:
            raise KeyboardInterrupt
        return true_step(training, pixels, **more)

    true_step = decoder._step
    monkeypatch.setattr(training_steps, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(training_steps.time, "monotonic", lambda: 0.0)
    monkeypatch.setattr(decoder, "_step", stop_at)
    assert main([*tuning, "4"]) == 130
    monkeypatch.setattr(decoder, "_step", true_step)
    assert main([*tuning, "5"]) == 1
    assert "with steps 4, this command has 5" in capsys.readouterr().err
    assert main([*tuning, "4"]) == 0
    assert content(folder) == whole


def test_an_encoder_that_has_changed_is_refused(encoded, tmp_path):
    folder = shutil.copytree(encoded / "vae", tmp_path / "tuned")
    decoder.save_tuned(open_codec_by_spec(str(folder)), folder, {})
    assert open_codec_by_spec(str(folder)).identity.weights_sha256
    weights = load_file(folder / WEIGHTS)
    weights["encoder.conv_in.bias"] += 1.0
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(ConfigError, match=f"{TUNED_NAME} says"):
        open_codec_by_spec(str(folder))
    (folder / TUNED_NAME).write_text(json.dumps(["nothing"]))
    with pytest.raises(ConfigError, match="cannot be read"):
        open_codec_by_spec(str(folder))
    (folder / TUNED_NAME).unlink()
    assert open_codec_by_spec(str(folder)).identity != open_codec_by_spec(str(encoded / "vae")).identity


def test_another_autoencoder_and_one_without_weights_are_refused(digits, latents, images, capsys):
    assert main(["fit-codebook", str(latents), *FIT, "--hybrid", str(images), "--vae", "dct-f8"]) == 1
    assert "use the autoencoder that encoded the latents" in capsys.readouterr().err
    plain = shutil.copytree(digits / "latents", latents.parent / "plain")
    assert main(["fit-codebook", str(plain), *FIT, "--hybrid", str(images)]) == 1
    assert "dct-f8 has no weights" in capsys.readouterr().err
    assert not list(plain.glob("codebook-*"))
