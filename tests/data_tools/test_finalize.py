import json

import numpy as np
import pytest

from data_tools.finalize import finalize
from data_tools.moments_statistics import combine, measure
from ecar_dist.data.loader import LatentLoader
from ecar_dist.data.manifest import load_manifest
from ecar_dist.errors import DataError
from ecar_dist.vae.codec import EncoderIdentity
from tests.data_tools.image_folders import encode_small, write_image_shards


@pytest.fixture
def encoded(tmp_path):
    encode_small(write_image_shards(tmp_path), tmp_path / "out")
    return tmp_path / "out"


def test_the_manifest_says_all(encoded):
    finalize(encoded)
    manifest = load_manifest(encoded)
    assert (manifest.count, manifest.num_classes, manifest.moments_shape) == (24, 3, (12, 2, 2))
    assert [entry.count for entry in manifest.shards] == [5, 5, 5, 5, 4]
    assert [entry.first_index for entry in manifest.shards] == [0, 5, 10, 15, 20]
    assert manifest.class_names == ["bird", "cat", "dog"]
    assert manifest.preprocessing["decoder"] == "pil"
    assert manifest.failures == {"count": 0, "file": None}
    with LatentLoader(encoded, seed=0, global_batch_size=24, micro_batch_size=24) as loader:
        moments = next(loader).moments.numpy().astype(np.float64)
    assert np.allclose(manifest.statistics["raw_mean"], moments.mean((0, 2, 3)))
    assert np.allclose(manifest.statistics["raw_std"], moments.std((0, 2, 3)))
    scale = manifest.encoder["scaling_factor"]
    assert np.allclose(manifest.statistics["normalised_std"], moments.std((0, 2, 3)) * scale)


def test_a_folder_without_plan(tmp_path):
    with pytest.raises(DataError, match=r"plan\.json does not exist; make the shards with `ecar-data encode"):
        finalize(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("first_index", 6), ("count", 4), ("name", "000002.tar")])
def test_a_marker_that_is_not_the_plans(encoded, field, value):
    marker = json.loads((encoded / "000001.json").read_text())
    marker["entry"][field] = value
    (encoded / "000001.json").write_text(json.dumps(marker))
    with pytest.raises(DataError, match=r"000001\.json says .*the plan says .*--task 1 --tasks 5"):
        finalize(encoded)
    assert not (encoded / "manifest.json").exists()


def test_a_marker_of_another_plan_counts_as_missing(encoded):
    marker = json.loads((encoded / "000001.json").read_text())
    (encoded / "000001.json").write_text(json.dumps({**marker, "plan_id": "other"}))
    with pytest.raises(DataError, match=r"lacks 1 of 5 shards \(000001\)"):
        finalize(encoded)


def test_statistics_of_a_posterior():
    generator = np.random.default_rng(0)
    identity = EncoderIdentity("kl", "n", "w", "c", 2, 8, scaling_factor=0.5, shift_factor=1.0, deterministic=False)
    mean = generator.normal(3.0, 2.0, (400, 2, 4, 4))
    logvar = np.full((400, 2, 4, 4), 2 * np.log(0.1))
    moments = np.concatenate((mean, logvar), 1).astype(np.float16)
    whole = combine([measure(moments[:150], identity), measure(moments[150:], identity)], identity)
    assert np.allclose(whole["raw_mean"], 3.0, atol=0.1)
    assert np.allclose(whole["raw_std"], 2.0, atol=0.05)
    assert np.allclose(whole["normalised_mean"], 1.0, atol=0.05)
    assert np.allclose(whole["normalised_std"], np.sqrt(4.0 + 0.01) * 0.5, atol=0.03)
    assert whole["posterior_sharpness"] == pytest.approx(0.05, rel=0.05)


def test_a_damaged_marker_counts_as_missing(encoded):
    (encoded / "000003.json").write_text("{")
    with pytest.raises(DataError, match=r"lacks 1 of 5 shards \(000003\)"):
        finalize(encoded)
