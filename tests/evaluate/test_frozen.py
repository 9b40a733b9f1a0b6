"""Scores in the features of frozen networks: the real EfficientNet-Lite0, and fake networks with known features."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from ecar_dist.errors import ConfigError
from ecar_dist.evaluate.frechet import Gaussian, frechet_distance
from ecar_dist.evaluate.frozen import bootstrap_std, frozen_scores, precision_recall, read_reference
from ecar_dist.evaluate.networks import NETWORKS, FeatureNetwork

CPU = torch.device("cpu")


def first_pixels() -> FeatureNetwork:
    """Its features are the first four pixels."""
    return FeatureNetwork("pixels", "FD-pixels", 12, lambda x: x[:, :, 0, :4].flatten(1), CPU)


def noise(count: int, seed: int, low: int = 0, high: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (count, 8, 8, 3), dtype=np.uint8)


def test_the_network_that_ships_in_a_package_tells_pictures_apart():
    """Its own weights load, and a blurred field is closer to its copy than to noise."""
    network = NETWORKS["effnet-lite0"](None, CPU)
    ramp = np.broadcast_to(np.linspace(0, 255, 32, dtype=np.uint8)[None, None, :, None], (1, 32, 32, 3))
    images = np.concatenate([ramp, np.clip(ramp + np.uint8(3), 0, 255), noise(1, 0).repeat(4, 1).repeat(4, 2)])
    features = network(images)
    assert features.shape == (3, network.width)
    assert np.linalg.norm(features[0] - features[1]) < 0.5 * np.linalg.norm(features[0] - features[2])
    np.testing.assert_allclose(network(images[1:2]), features[1:2], rtol=1e-3, atol=1e-4)  # whatever its batch


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_that_are_none_are_refused(name, tmp_path):
    with pytest.raises(ConfigError):
        NETWORKS[name](tmp_path / "none.pth", CPU)


class StandInForInception:
    """Loads its file as torch-fidelity does: any pickle, with any names."""

    def __init__(self, name, features, path):
        state = torch.load(path, weights_only=False)
        torch.nn.Module().load_state_dict(state)


@pytest.fixture
def torch_fidelity(monkeypatch):
    library = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    library.FeatureExtractorInceptionV3 = StandInForInception
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, library.__name__, library)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_pickle_is_not_executed(name, tmp_path, torch_fidelity):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save(Trap(), tmp_path / "trap.pth")
    with pytest.raises(ConfigError):
        NETWORKS[name](tmp_path / "trap.pth", CPU)
    assert not (tmp_path / "sprung").exists()


def test_weights_of_another_network_are_refused(tmp_path, torch_fidelity):
    torch.save({"other.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"other\.pth"):
        NETWORKS["inception"](tmp_path / "other.pth", CPU)


def test_precision_and_recall_of_sets_with_known_overlap():
    generator = np.random.default_rng(0)
    left = generator.standard_normal((600, 4))
    right = left[:300] + 100.0
    both = np.concatenate([left[:300], right])
    assert precision_recall(left, left) == (1.0, 1.0)
    assert precision_recall(left, left + 1000.0) == (0.0, 0.0)
    precision, recall = precision_recall(left, both)  # half of the generated set is real; it covers the real set
    assert precision == pytest.approx(0.5, abs=0.01)
    assert recall > 0.8
    precision, recall = precision_recall(both, left)
    assert precision > 0.8
    assert recall == pytest.approx(0.5, abs=0.1)


def test_scores_state_their_spread_and_their_floor():
    sets = {"train": noise(400, 1), "heldout": noise(400, 2), "reconstructions": noise(400, 3)}
    alike = [noise(400, 4), noise(400, 5), noise(400, 6)]
    scores = frozen_scores(first_pixels(), drawn=[first_pixels()(each) for each in alike], **sets)
    assert scores["FD-pixels"] == pytest.approx(scores["FD-pixels real-vs-real floor"], rel=0.5)
    assert 0 < scores["FD-pixels std over seeds"] < scores["FD-pixels"]
    assert 0 < scores["FD-pixels bootstrap std"] < scores["FD-pixels"]
    assert min(scores["precision pixels"], scores["recall pixels"]) > 0.85

    darker = frozen_scores(first_pixels(), drawn=[first_pixels()(noise(400, 4, high=128))], **sets)
    assert darker["FD-pixels"] > 20 * scores["FD-pixels"]
    assert darker["FD-pixels std over seeds"] is None
    assert darker["recall pixels"] < scores["recall pixels"]


def test_a_reference_takes_the_place_of_the_held_out_images(tmp_path):
    """Like ADM's: mu and sigma of the features."""
    sets = {"train": noise(400, 1), "heldout": noise(400, 2), "reconstructions": noise(400, 3)}
    features = first_pixels()(sets["heldout"])
    np.savez(tmp_path / "reference.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False), other=np.ones(3))
    reference = read_reference(tmp_path / "reference.npz", first_pixels())
    without = frozen_scores(first_pixels(), drawn=[first_pixels()(noise(400, 4))], **sets)
    with_it = frozen_scores(
        first_pixels(), drawn=[first_pixels()(noise(400, 4))], **{**sets, "heldout": noise(400, 9)}, reference=reference
    )
    assert with_it["FD-pixels"] == pytest.approx(without["FD-pixels"], rel=1e-6)


def test_a_file_that_is_no_reference_is_refused(tmp_path):
    network = first_pixels()
    np.savez(tmp_path / "wide.npz", mu=np.zeros(5), sigma=np.eye(5))
    np.savez(tmp_path / "other.npz", images=np.zeros(5))
    (tmp_path / "text.npz").write_text("not one")
    for name in ("wide", "other", "text", "absent"):
        with pytest.raises(ConfigError):
            read_reference(tmp_path / f"{name}.npz", network)


def test_the_bootstrap_measures_the_spread_of_sampling():
    """Compared with the spread of the distances of independent sets."""
    target = Gaussian(np.zeros(4), np.eye(4))
    generator = np.random.default_rng(1)
    shift = np.array([2.0, 0, 0, 0])
    sets = [generator.standard_normal((300, 4)) + shift for _ in range(40)]
    spread = np.std([frechet_distance(features, target) for features in sets])
    estimates = [bootstrap_std(features, target) for features in sets]
    assert np.mean(estimates) == pytest.approx(spread, rel=0.35)
