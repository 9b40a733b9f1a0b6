"""`hybrid` on latents of an AutoencoderDC that downsamples images by 32, as in DC-AR: encode, train, draw."""

import math

import numpy as np
import torch
from PIL import Image

from data_tools.codebook.fit import fit_codebook
from data_tools.finalize import finalize
from ecar_dist.cli import main
from ecar_dist.data.shards.manifest import load_manifest
from ecar_dist.models.layers import patchify
from ecar_dist.sample.load import open_trained
from ecar_dist.vae.codec import normalised_mean
from tests.conftest import losses, read_metrics, write_yaml
from tests.data_tools.image_folders import encode_small, write_image_shards
from tests.train.test_start import train_alone
from tests.vae.small_dc import save_small_dc


def test_hybrid_is_trained_and_drawn_at_a_32nd_of_the_images_size(make_tree, tmp_path):
    autoencoder, latents = save_small_dc(tmp_path / "dc", levels=6), tmp_path / "latents"
    encode_small(write_image_shards(tmp_path), latents, vae=str(autoencoder), image_size=64, samples_per_shard=24)
    finalize(latents)
    fit_codebook(latents, size=16, patch_size=1, iterations=2)
    manifest = load_manifest(latents)
    assert manifest.moments_shape == (8, 2, 2)
    assert (manifest.encoder["downsample"], manifest.encoder["deterministic"]) == (32, True)

    # Two steps.
    tree = make_tree(tmp_path) | {"flow": {"num_stages": 1}}
    tree["model"] |= {"kind": "hybrid", "codebook_size": 16}
    tree["vae"] = {"kind": "dc", "path": str(autoencoder), "downsample": 32}
    tree["data"] = {"latents": str(latents), "num_classes": 3, "latent_channels": 8, "latent_size": 2}
    tree["sample"] = {"code_steps": 2, "steps_per_stage": 2}
    config = write_yaml(tree, tmp_path)
    train_alone(config, "train.total_samples=32")
    assert [math.isfinite(loss) for loss in losses(read_metrics(config))] == [True, True]

    # A code and a residual add up to the latent, and images have the size of the autoencoder's.
    trained = open_trained(tmp_path / "runs/tiny", torch.device("cpu"))
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    tokens = patchify(normalised_mean(trained.codec.identity, trained.codec.encode(images)), 1)
    _, vectors, residuals = trained.model.split(tokens)
    torch.testing.assert_close(trained.model.join(vectors, residuals), tokens)
    assert main(["sample", str(tmp_path / "runs/tiny"), "--count", "2", "--out", str(tmp_path / "drawn")]) == 0
    drawn = [np.asarray(Image.open(path)) for path in (tmp_path / "drawn/images").iterdir()]
    assert [image.shape for image in drawn] == [(64, 64, 3)] * 2
