import numpy as np
import pytest
import torch

from ecar_dist.errors import ConfigError
from ecar_dist.vae.build import open_codec_by_spec
from ecar_dist.vae.codec import normalise
from ecar_dist.vae.identity import IdentityCodec
from ecar_dist.vae.pixels import from_pixels, to_pixels
from ecar_dist.vae.table import CODECS


def test_every_byte_survives_the_fp16_of_the_shards():
    codec = IdentityCodec(torch.device("cpu"))
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    moments = codec.encode(from_pixels(pixels)).half()
    assert moments.shape == (1, 3, 16, 16)
    latents = normalise(codec.identity, moments, torch.zeros(1, 3, 16, 16))
    assert latents.abs().max() == codec.identity.scaling_factor
    np.testing.assert_array_equal(to_pixels(codec.decode(latents)), pixels)


def test_samples_beyond_the_range_are_clamped():
    assert IdentityCodec(torch.device("cpu")).decode(torch.full((1, 3, 2, 2), -9.0)).eq(-1).all()


def test_it_is_opened_by_its_short_name_alone():
    assert CODECS["identity"].downsamples == (1,)
    assert open_codec_by_spec("identity-f1").identity.downsample == 1
    with pytest.raises(ConfigError, match="identity-f8 is not known; give dct-f8, dct-f32, identity-f1"):
        open_codec_by_spec("identity-f8")
