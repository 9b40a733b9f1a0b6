import json
import os
import subprocess
import sys

import pytest
import torch

from ecar_dist.config.knobs_model import VaeSection
from ecar_dist.errors import ConfigError, DataError
from ecar_dist.vae import pretrained
from ecar_dist.vae.build import open_codec, open_codec_by_spec
from ecar_dist.vae.codec import EncoderIdentity, check_same_encoder, normalise
from ecar_dist.vae.pretrained import KlCodec, new_autoencoder, save_autoencoder
from tests.vae.small_dc import save_small_dc


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


@pytest.fixture(scope="module")
def dc_folder(tmp_path_factory):
    return save_small_dc(tmp_path_factory.mktemp("vae") / "dc", levels=3)


def test_dc_is_deterministic_and_equals_diffusers(dc_folder):
    from diffusers import AutoencoderDC

    codec, model = open_codec_by_spec(str(dc_folder)), AutoencoderDC.from_pretrained(dc_folder)
    identity = codec.identity
    assert (identity.kind, identity.latent_channels, identity.moments_channels) == ("dc", 8, 8)
    assert (identity.downsample, identity.scaling_factor, identity.shift_factor) == (4, 0.41, 0.0)
    assert identity.downsample == model.spatial_compression_ratio
    assert identity.deterministic
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    moments = codec.encode(images)
    assert moments.shape == (2, 8, 8, 8)
    latents = normalise(identity, moments, torch.randn(2, 8, 8, 8))
    with torch.no_grad():
        raw = model.encode(images).latent
        torch.testing.assert_close(moments, raw)
        torch.testing.assert_close(latents, raw * 0.41)
        torch.testing.assert_close(codec.decode(latents), model.decode(raw).sample.clamp(-1, 1), rtol=1e-3, atol=1e-4)
    other = EncoderIdentity.from_dict({**identity.to_dict(), "scaling_factor": 0.5})
    with pytest.raises(DataError, match=r"has scaling_factor=0\.5"):
        check_same_encoder(identity, other, "latents")


def test_the_config_names_its_kind(folder, dc_folder):
    assert open_codec(VaeSection(kind="dc", path=str(dc_folder), downsample=4)).identity.kind == "dc"
    with pytest.raises(ConfigError, match=r"AutoencoderDC.* vae.kind=kl .*AutoencoderKL; set vae.kind=dc"):
        open_codec(VaeSection(kind="kl", path=str(dc_folder), downsample=4))
    with pytest.raises(ConfigError, match=r"AutoencoderKL.* vae.kind=dc .*AutoencoderDC; set vae.kind=kl"):
        open_codec(VaeSection(kind="dc", path=str(folder), downsample=4))


def test_a_hub_names_config_decides_on_the_class(dc_folder, monkeypatch):
    class_of = pretrained._autoencoder_class

    def hub(name):
        """A fake hub: `owner/model` is the local folder."""
        loader = class_of(name)

        class Hub:
            load_config = staticmethod(lambda path: loader.load_config(str(dc_folder)))
            from_pretrained = staticmethod(lambda path, **rest: loader.from_pretrained(dc_folder, **rest))

        return Hub

    monkeypatch.setattr(pretrained, "_autoencoder_class", hub)
    identity = open_codec_by_spec("owner/model").identity
    assert (identity.kind, identity.name) == ("dc", "owner/model")
    check_same_encoder(identity, open_codec(VaeSection(kind="dc", path=str(dc_folder), downsample=4)).identity, "x")


def test_sixteen_channels_at_sixteenth_size(tmp_path):
    """KL-16: five levels, moments [32, H/16, W/16]."""
    model = new_autoencoder((8, 8, 8, 8, 8), 16, layers_per_block=1)
    save_autoencoder(model, tmp_path / "kl16", scaling_factor=0.2325, shift_factor=0.0)
    codec = open_codec_by_spec(str(tmp_path / "kl16"))
    assert (codec.identity.downsample, codec.identity.moments_channels) == (16, 32)
    moments = codec.encode(torch.rand(1, 3, 64, 32) * 2 - 1)
    assert moments.shape == (1, 32, 4, 2)
    assert codec.decode(torch.zeros(1, 16, 4, 2)).shape == (1, 3, 64, 32)


@pytest.mark.parametrize("kind", ["folder", "dc_folder"])
def test_bf16_is_close_and_fp16_is_refused(kind, request):
    generator = torch.Generator().manual_seed(0)
    path, images = str(request.getfixturevalue(kind)), torch.rand(1, 3, 32, 32, generator=generator) * 2 - 1
    exact, rough = (open_codec_by_spec(path, dtype=dtype).encode(images) for dtype in (torch.float32, torch.bfloat16))
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    # the median: with random weights, single divisors of DC's linear attention come close to zero
    assert (rough - exact).abs().median() < 0.05 * exact.abs().median()  # measured 0.01
    with pytest.raises(ConfigError, match="fp16"):
        open_codec_by_spec(path, dtype=torch.float16)


def test_logvar_is_clamped(folder):
    model = new_autoencoder((8, 16, 16), 4, layers_per_block=1)
    torch.nn.init.constant_(model.quant_conv.bias, 1000.0)
    moments = KlCodec(model, "x", torch.device("cpu"), torch.float32).encode(torch.zeros(1, 3, 16, 16))
    assert moments[:, :4].min() > 900
    assert (moments[:, 4:] == 20).all()


def test_the_section_of_the_config(folder):
    assert open_codec(VaeSection(kind="kl", path=str(folder), downsample=4)).identity.kind == "kl"
    assert open_codec(VaeSection(kind="dct", downsample=8)).identity.name == "dct-f8"
    with pytest.raises(ConfigError, match=r"vae.downsample=8.* 4; set vae.downsample=4"):
        open_codec(VaeSection(kind="kl", path=str(folder), downsample=8))
    with pytest.raises(ConfigError, match=r"vae.downsample in \[8, 32\], got 4"):
        open_codec(VaeSection(kind="dct", downsample=4))


def test_another_folder_gives_one_line_with_the_fix(folder, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    weightless = tmp_path / "weightless"
    weightless.mkdir()
    (weightless / "config.json").write_bytes((folder / "config.json").read_bytes())
    cases = {tmp_path / "none": "does not exist", tmp_path: "no readable config.json", other: "contains UNet2DModel"}
    for path, message in {**cases, weightless: "cannot load"}.items():
        with pytest.raises(ConfigError, match=rf"{message}.*ecar-data train-vae") as caught:
            open_codec_by_spec(str(path))
        assert "\n" not in str(caught.value)


def test_a_hub_name_that_gives_nothing_is_one_line(monkeypatch):
    class Offline:
        @staticmethod
        def load_config(name):
            raise OSError(f"{name} does not appear to have a file named config.json.\nmore text")

    monkeypatch.setattr(pretrained, "_autoencoder_class", lambda _: Offline)
    with pytest.raises(ConfigError, match=r"'owner/model'.*config.json;") as caught:
        open_codec_by_spec("owner/model")
    assert "\n" not in str(caught.value)


def test_an_unreachable_hub_is_the_reason_and_not_a_missing_file(monkeypatch):
    """diffusers reports that the repository has no such file. Nothing else is printed, in a separate process."""

    class LocalEntryNotFoundError(OSError):
        pass

    class Offline:
        @staticmethod
        def load_config(name):
            try:
                raise LocalEntryNotFoundError("not in the cache") from OSError("Name or service not known")
            except LocalEntryNotFoundError:
                raise OSError(f"{name} does not appear to have a file named config.json.")  # noqa: B904

    monkeypatch.setattr(pretrained, "_autoencoder_class", lambda _: Offline)
    with pytest.raises(ConfigError, match=r"\(Name or service not known\)"):
        open_codec_by_spec("runs/vae")


def test_messages_of_the_hub_are_not_printed():
    code = (
        "from ecar_dist.errors import ConfigError\nfrom ecar_dist.vae.build import open_codec_by_spec\n"
        "try: open_codec_by_spec('owner/model')\nexcept ConfigError as error: print(error)\n"
        "from huggingface_hub.utils.logging import get_logger\nget_logger('huggingface_hub.any').warning('Retrying')"
    )
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=offline)
    assert result.stderr == ""
    assert "cannot reach the hub (" in result.stdout
    assert result.stdout.count("\n") == 1


def test_dct_does_not_import_diffusers():
    code = (
        "import sys; from ecar_dist.vae.build import *; open_codec_by_spec('dct-f8'); print('diffusers' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize("name", ["../../x.safetensors", "/etc/x", "a/../../b", "a\n", "a\0", "a\x1b[2J", 3])
def test_weights_in_several_files_lie_in_the_folder(tmp_path, name):
    model = new_autoencoder((8, 16, 16), 4, layers_per_block=1)
    model.save_pretrained(tmp_path / "vae", max_shard_size="20KB")
    assert open_codec_by_spec(str(tmp_path / "vae")).identity.downsample == 4
    (index,) = (tmp_path / "vae").glob("*.index.json")
    tree = json.loads(index.read_text())
    first = next(iter(tree["weight_map"]))
    tree["weight_map"][first] = name
    index.write_text(json.dumps(tree))
    with pytest.raises(ConfigError) as refused:
        open_codec_by_spec(str(tmp_path / "vae"))
    assert index.name in str(refused.value)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("spec", ["dct-f16", "dct", "DCT-f8", "dct8"])
def test_a_mistyped_dct_names_the_two_that_exist(spec):
    with pytest.raises(ConfigError, match=rf"--vae {spec} .*dct-f8, dct-f32"):
        open_codec_by_spec(spec)
