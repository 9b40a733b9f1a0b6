import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from data_tools.finalize import finalize
from data_tools.images.shard import shard
from ecar_dist.config.knobs_data import DataSection
from ecar_dist.evaluate.images import background_of, read_images
from tests.data_tools.image_folders import encode_small


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Shards with one transparent picture, and latents of it on black."""
    root = tmp_path_factory.mktemp("transparent")
    (root / "in/a").mkdir(parents=True)
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(root / "in/a/0.png")
    shard(str(root / "in"), root / "images")
    encode_small(root / "images", root / "latents", background="black")
    finalize(root / "latents")
    return root


def data(**values):
    return DataSection(num_classes=1, **values)


@pytest.mark.parametrize("decoder", ["pil", "dali"])
def test_real_images_lie_on_the_background_of_the_latents(made, decoder):
    background = background_of(data(latents=str(made / "latents")))
    images, _ = read_images(str(made / "images"), 16, decoder, background)
    assert (images.pixels == 0).all()
    assert (read_images(str(made / "images"), 16, decoder)[0].pixels == 255).all()


def test_where_the_background_is_written(made, tmp_path, monkeypatch):
    assert background_of(data(latents=str(made / "latents"), background="white")) == (0, 0, 0)
    assert background_of(data(images=str(made / "images"), background="#010203")) == (1, 2, 3)
    assert background_of(data(latents=str(tmp_path / "moved"))) == (255, 255, 255)
    # sets of earlier versions say nothing: they dropped transparency
    monkeypatch.setattr("ecar_dist.evaluate.images.load_manifest", lambda _: SimpleNamespace(preprocessing={}))
    assert background_of(data(latents="old")) is None
    dropped, _ = read_images(str(made / "images"), 16, "pil", None)
    assert np.unique(dropped.pixels.reshape(-1, 3), axis=0).tolist() == [[255, 0, 0]]


def test_the_manifest_names_it(made):
    assert json.loads((made / "latents/manifest.json").read_text())["preprocessing"]["background"] == "black"
