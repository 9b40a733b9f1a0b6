import subprocess
import sys

import pytest
import torch

from ecar_dist.config import VaeSection
from ecar_dist.errors import ConfigError
from ecar_dist.vae import kl
from ecar_dist.vae.build import open_codec, open_codec_by_spec
from ecar_dist.vae.codec import normalise
from ecar_dist.vae.kl import KlCodec, new_autoencoder, save_autoencoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vae") / "small"
    save_autoencoder(new_autoencoder((8, 16, 16), 4, layers_per_block=1), path, scaling_factor=0.7, shift_factor=0.1)
    return path


def test_identity_comes_from_the_folder(folder):
    identity = open_codec_by_spec(str(folder)).identity
    assert (identity.kind, identity.latent_channels, identity.downsample) == ("kl", 4, 4)
    assert (identity.scaling_factor, identity.shift_factor, identity.deterministic) == (0.7, 0.1, False)
    in_bf16 = open_codec_by_spec(str(folder), dtype=torch.bfloat16).identity
    assert in_bf16 == identity


def test_moments_and_decoding_are_those_of_diffusers(folder):
    from diffusers import AutoencoderKL

    model, codec = AutoencoderKL.from_pretrained(folder), open_codec_by_spec(str(folder))
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    moments = codec.encode(images)
    assert moments.shape == (2, 8, 8, 8)
    with torch.no_grad():
        posterior = model.encode(images).latent_dist
        torch.testing.assert_close(moments[:, :4], posterior.mean)
        torch.testing.assert_close((0.5 * moments[:, 4:]).exp(), posterior.std)
        latents = normalise(codec.identity, moments, torch.zeros(2, 4, 8, 8))
        torch.testing.assert_close(latents, (posterior.mean - 0.1) * 0.7)
        expected = model.decode(posterior.mean).sample.clamp(-1, 1)
        torch.testing.assert_close(codec.decode(latents), expected, rtol=1e-3, atol=1e-4)


def test_bf16_is_close_and_fp16_is_refused(folder):
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    exact, rough = (
        open_codec_by_spec(str(folder), dtype=dtype).encode(images) for dtype in (torch.float32, torch.bfloat16)
    )
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.1, atol=0.1)
    with pytest.raises(ConfigError, match="fp16 overflows"):
        open_codec_by_spec(str(folder), dtype=torch.float16)


def test_logvar_is_clamped(folder):
    model = new_autoencoder((8, 16, 16), 4, layers_per_block=1)
    torch.nn.init.constant_(model.quant_conv.bias, 1000.0)
    moments = KlCodec(model, "x", torch.device("cpu"), torch.float32).encode(torch.zeros(1, 3, 16, 16))
    assert moments[:, :4].min() > 900
    assert (moments[:, 4:] == 20).all()


def test_the_section_of_the_config(folder):
    assert open_codec(VaeSection(kind="kl", path=str(folder), downsample=4)).identity.kind == "kl"
    assert open_codec(VaeSection(kind="dct", downsample=8)).identity.name == "dct-f8"
    with pytest.raises(ConfigError, match=r"vae.downsample=8, but .* shrinks by 4; set vae.downsample=4"):
        open_codec(VaeSection(kind="kl", path=str(folder), downsample=8))
    with pytest.raises(ConfigError, match=r"vae.downsample in \[8, 32\], got 4"):
        open_codec(VaeSection(kind="dct", downsample=4))


def test_what_is_no_autoencoder_is_one_line_with_the_fix(folder, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    weightless = tmp_path / "weightless"
    weightless.mkdir()
    (weightless / "config.json").write_bytes((folder / "config.json").read_bytes())
    cases = {tmp_path / "none": "does not exist", tmp_path: "no readable config.json", other: "holds UNet2DModel"}
    for path, message in {**cases, weightless: "cannot load"}.items():
        with pytest.raises(ConfigError, match=rf"{message}.*ecar-data train-vae") as caught:
            open_codec_by_spec(str(path))
        assert "\n" not in str(caught.value)


def test_a_hub_name_that_gives_nothing_is_one_line(monkeypatch):
    class Offline:
        @staticmethod
        def from_pretrained(name, **_):
            raise OSError(f"{name} does not appear to have a file named config.json.\nmore text")

    monkeypatch.setattr(kl, "_autoencoder_class", lambda: Offline)
    with pytest.raises(ConfigError, match=r"cannot load autoencoder 'owner/model' .*config.json") as caught:
        open_codec_by_spec("owner/model")
    assert "\n" not in str(caught.value)


def test_dct_does_not_import_diffusers():
    code = (
        "import sys; from ecar_dist.vae.build import *; open_codec_by_spec('dct-f8'); print('diffusers' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
