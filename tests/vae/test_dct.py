import numpy as np
import pytest
import torch
from scipy.fft import dctn
from sklearn.datasets import load_sample_images

from ecar_dist.vae.codec import normalise
from ecar_dist.vae.dct import KEPT_SIDE, DctCodec
from ecar_dist.vae.table import CODECS

SHAPES = [(8, 2, 12), (32, 3, 27)]


def photographs():
    crops = np.stack([image[:416, :640] for image in load_sample_images().images])
    return torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 127.5 - 1  # [2, 3, 416, 640]


@pytest.mark.parametrize(("block", "kept", "channels"), SHAPES)
def test_coefficients_are_those_of_scipy(block, kept, channels):
    codec, images = DctCodec(block, torch.device("cpu")), photographs()
    moments = codec.encode(images)
    assert moments.shape == (2, channels, 416 // block, 640 // block)
    patch = images[1, 2, block : 2 * block, 3 * block : 4 * block].double().numpy()
    expected = dctn(patch, norm="ortho")[:kept, :kept].ravel()
    found = moments[1, 2 * kept * kept :, 1, 3].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [8, 32])
def test_decoding_inverts_what_was_kept_and_clamps(block):
    codec = DctCodec(block, torch.device("cpu"))
    moments = codec.encode(0.4 * photographs())
    restored = codec.decode(normalise(codec.identity, moments, torch.zeros_like(moments)))
    assert restored.shape == (2, 3, 416, 640)
    torch.testing.assert_close(codec.encode(restored), moments, rtol=1e-4, atol=1e-3)
    bright = codec.decode(torch.full((1, codec.identity.latent_channels, 1, 1), 9.0))
    assert bright.abs().max() == 1


@pytest.mark.parametrize("block", [8, 32])
def test_scale_gives_photographs_roughly_unit_dc(block):
    codec = DctCodec(block, torch.device("cpu"))
    moments = codec.encode(photographs())
    latents = normalise(codec.identity, moments, torch.zeros_like(moments))
    direct = latents[:, :: codec.identity.latent_channels // 3]
    assert 0.6 < direct.square().mean().sqrt() < 1.6


def test_the_table_offers_the_block_sides_that_there_are():
    assert CODECS["dct"].downsamples == tuple(KEPT_SIDE)
