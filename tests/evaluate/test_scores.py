import dataclasses

import numpy as np
import pytest
import torch

from ecar_dist.data.shards.manifest import load_image_manifest
from ecar_dist.errors import DataError
from ecar_dist.evaluate.bands import band_variances
from ecar_dist.evaluate.classifier import features_and_predictions, train_classifier
from ecar_dist.evaluate.frechet import frechet_distance
from ecar_dist.evaluate.images import read_images, reconstruct, short_name
from ecar_dist.evaluate.neighbours import _nearest, heldout_ratio, nearest_images, neighbour_ratio
from ecar_dist.evaluate.score import LabelledImages, Scorer, seeds_scores
from ecar_dist.vae.dct import DctCodec
from tests.pretend_device import DEVICE, PretendDevice

CPU = torch.device("cpu")


def test_a_metric_has_the_same_name_wherever_the_images_lie(digits):
    manifest = load_image_manifest(str(digits / "images/train"))
    assert short_name(manifest) == "digits"
    names = {short_name(dataclasses.replace(manifest, source=place)) for place in ("/data/a", "s3://bucket/b?key", "c")}
    assert names == {manifest.dataset_id[:8]}


def test_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(0)
    white = rng.standard_normal((200_000, 3))
    first, second = white * [1.0, 2.0, 3.0], rng.standard_normal((200_000, 3)) * [2.0, 2.0, 1.0] + [1.0, 0.0, 2.0]
    expected = (1 + 4) + (1 - 2) ** 2 + 0 + (3 - 1) ** 2  # means, then (std - std)^2 of commuting covariances
    assert frechet_distance(first, second) == pytest.approx(expected, rel=0.02)
    assert frechet_distance(first, first) == pytest.approx(0.0, abs=1e-6)


def test_frechet_distance_is_invariant_under_rotation():
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((500, 4)) * [1, 2, 3, 4], rng.standard_normal((500, 4)) + 1
    rotation = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    turned = frechet_distance(first @ rotation, second @ rotation)
    assert turned == pytest.approx(frechet_distance(first, second))


def bands_of(images):
    """The band variances of float images [N, C, H, W], as if they were pixels."""
    return band_variances((images.permute(0, 2, 3, 1) + 1) * 127.5, CPU)


def test_bands_add_up_and_name_the_right_octave():
    noise = torch.randn(2000, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    bands = bands_of(noise)
    assert list(bands) == ["1px", "2px", "4px", "8px"]
    assert sum(bands.values()) == pytest.approx(1.0, abs=0.02)
    assert bands["8px"] == pytest.approx(1 / 64, rel=0.1)
    flat = torch.randn(500, 1, 1, 1).expand(-1, -1, 8, 8)
    assert bands_of(flat)["8px"] == pytest.approx(float(flat[:, 0, 0, 0].var()), rel=1e-4)
    assert bands_of(flat)["1px"] == 0


@pytest.mark.parametrize(("side", "names"), [(8, "1 2 4 8"), (48, "1 2 4 8 16"), (64, "1 2 4 8 16 32 64"), (9, "1")])
def test_bands_are_the_same_tile_by_tile(side, names, monkeypatch):
    """In white noise, an octave has three quarters of the rest. Sides that are not powers of two have fewer octaves."""
    noise = torch.randn(300, 3, side, side, generator=torch.Generator().manual_seed(0))
    bands = bands_of(noise)
    assert list(bands) == [f"{name}px" for name in names.split()]
    assert sum(bands.values()) == pytest.approx(1.0, abs=0.02)
    if side > 8:
        assert bands["1px"] == pytest.approx(1.0 if side == 9 else 0.75, rel=0.03)
    for tile in (2, 64):
        monkeypatch.setattr("ecar_dist.evaluate.bands.TILE", tile)
        assert bands_of(noise) == bands


def test_losing_the_low_frequencies_shows_in_its_band():
    smooth = torch.randn(1000, 1, 4, 4, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, -1)
    images = smooth.repeat_interleave(2, -2)
    collapsed = images - 0.5 * images.mean(dim=(-1, -2), keepdim=True)
    before, after = bands_of(images), bands_of(collapsed)
    assert after["8px"] == pytest.approx(before["8px"] / 4, rel=1e-4)
    assert after["4px"] == pytest.approx(before["4px"], rel=1e-4)


@pytest.fixture(scope="module")
def real(digits):
    train, source = read_images(str(digits / "images/train"), 32, decoder="pil")
    heldout, _ = read_images(str(digits / "images/heldout"), 32, decoder="pil")
    assert source == "digits"
    return train, heldout


@pytest.fixture(scope="module")
def classifier(real):
    return train_classifier(real[0].pixels, real[0].labels, 10, CPU, epochs=10)


def test_the_classifier_learns_the_digits(real, classifier):
    _, heldout = real
    features, predictions = features_and_predictions(classifier, heldout.pixels)
    assert features.shape == (359, 64)
    assert (predictions == heldout.labels).mean() > 0.96


def test_the_same_images_train_the_same_classifier(real):
    train, heldout = real
    trained = [train_classifier(train.pixels, train.labels, 10, CPU, epochs=1) for _ in range(2)]
    assert np.array_equal(*(features_and_predictions(one, heldout.pixels)[0] for one in trained))


@pytest.mark.parametrize("name", ["samples", "train", "heldout"])
def test_one_image_has_no_covariance_and_two_have(name):
    rng = np.random.default_rng(0)
    sizes = {"samples": 2, "reconstructions": 2, "train": 2, "heldout": 2}

    def scores():
        sets = {
            one: LabelledImages(rng.integers(0, 255, (size, 32, 32, 3), np.uint8), np.arange(size))
            for one, size in sizes.items()
        }
        samples = sets.pop("samples")
        return Scorer(**sets, source="noise", device=CPU).score(samples)

    assert np.isfinite(scores()["FD-noise"])
    sizes[name] = 1
    with pytest.raises(DataError, match=f"^{name}: 1 image, .* 2 "):
        scores()


def test_scores_order_good_and_bad_samples(real, classifier, monkeypatch):
    train, heldout = real

    def trained(pixels, labels, num_classes, device):
        """The classifier of these same images. Training takes seconds: once is enough."""
        assert (pixels is train.pixels, labels is train.labels, num_classes) == (True, True, 10)
        return classifier

    monkeypatch.setattr("ecar_dist.evaluate.score.train_classifier", trained)
    rebuilt = reconstruct(DctCodec(8, CPU), train, CPU)
    wrong = LabelledImages(train.pixels, (train.labels + 1) % 10)
    scorer = Scorer(rebuilt, train, heldout, "digits", CPU)
    good, bad = scorer.score(train), scorer.score(wrong)
    assert good["FD-digits"] == good["FD-digits real-vs-real floor"]
    assert good["ratio to floor"] == 1.0
    assert good["class accuracy"] > 0.99
    assert bad["class accuracy"] < 0.01
    assert good["neighbour ratio"] == 0  # the training images are copies of themselves
    assert scorer.score(heldout)["neighbour ratio"] is None
    noise = np.random.default_rng(0).integers(0, 255, train.pixels.shape).astype(np.uint8)
    noisy = scorer.score(LabelledImages(noise, train.labels))
    assert noisy["FD-digits"] > 5 * good["FD-digits"]
    assert noisy["band variance ratio"]["32px"] < 0.5 < good["band variance ratio"]["32px"] < 1.5
    assert noisy["neighbour ratio"] == pytest.approx(1, abs=0.02)
    assert 0.7 < noisy["neighbour ratio real heldout"] < 0.95

    # Several sets: means, and the spread of the distance.
    alone = seeds_scores(scorer, [train])
    assert alone.items() > good.items()
    assert alone["FD-digits std over seeds"] is None
    assert 0 < alone["FD-digits bootstrap std"] < 0.2 * noisy["FD-digits"]
    several = seeds_scores(scorer, [train, LabelledImages(noise, train.labels), train])
    distances = [good["FD-digits"], noisy["FD-digits"], good["FD-digits"]]
    assert several["FD-digits"] == pytest.approx(np.mean(distances))
    assert several["FD-digits std over seeds"] == pytest.approx(np.std(distances, ddof=1))
    for key in ("ratio to floor", "class accuracy", "neighbour ratio"):
        assert several[key] == pytest.approx((2 * good[key] + noisy[key]) / 3)
    band = (2 * good["band variance ratio"]["32px"] + noisy["band variance ratio"]["32px"]) / 3
    assert several["band variance ratio"]["32px"] == pytest.approx(band)


def test_the_nearest_images_come_in_order():
    references = torch.tensor([[0.0, 0.0], [3.0, 0.0], [1.0, 0.0]]).reshape(3, 1, 1, 2)
    images = torch.tensor([[0.9, 0.1], [9.0, 0.0]]).reshape(2, 1, 1, 2)
    assert nearest_images(images, references, 2).tolist() == [[2, 0], [1, 2]]
    assert nearest_images(images, references, 9).shape == (2, 3)


def test_the_neighbour_ratio_separates_copies_from_new_draws():
    generator = torch.Generator().manual_seed(0)
    train, heldout, fresh = (torch.randn(count, 1, 2, 2, generator=generator) for count in (400, 100, 300))
    real = heldout_ratio(train, heldout)
    assert 0.6 < real < 0.8  # four times as many images in four dimensions: 4^(-1/4) = 0.71
    assert neighbour_ratio(fresh, train, heldout) == pytest.approx(real, abs=0.08)
    copies = torch.cat((train[:150], fresh[:150]))
    assert neighbour_ratio(copies, train, heldout) == pytest.approx(real / 2, abs=0.08)


def test_scores_do_not_depend_on_the_number_of_threads():
    """The classifier's training amplifies differences in the last bit, which come from a different order of sums."""
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (256, 32, 32, 3), np.uint8), generator.integers(0, 4, 256)
    before, features = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            classifier = train_classifier(images, labels, 4, CPU, epochs=2)
            assert torch.get_num_threads() == threads
            features.append(torch.cat([weights.flatten() for weights in classifier.parameters()]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(features[0], features[1])
    assert torch.equal(features[0], features[2])


def test_the_nearest_are_the_same_in_whatever_chunks_they_are_looked_for(monkeypatch):
    images = torch.randn(50, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    images[7] = images[40]
    pairs = [(images, images[:30]), (images, images)]
    whole = [_nearest(*pair, exclude_self=pair[0] is pair[1]) for pair in pairs]
    apart = (images.flatten(1)[:, None] - images.flatten(1)[None]).norm(dim=2).fill_diagonal_(torch.inf)
    assert torch.equal(whole[1], apart.amin(1))
    assert whole[1][7] == 0
    monkeypatch.setattr("ecar_dist.evaluate.neighbours.ROWS", 9)
    monkeypatch.setattr("ecar_dist.evaluate.neighbours.COLUMNS", 7)
    for pair, expected in zip(pairs, whole, strict=True):
        assert torch.equal(_nearest(*pair, exclude_self=pair[0] is pair[1]), expected)


# The host's part of a score: it draws the classifier's weights, and the order and shift of its images; it picks the
# images of each batch, and counts the optimizer's steps.
ON_THE_HOST = {
    "_local_scalar_dense", "add_", "arange", "detach", "empty", "index", "lift_fresh", "randint", "randperm", "slice",
    "split", "uniform_",
}  # fmt: skip


def test_scores_are_computed_on_the_device_and_are_those_of_the_host(monkeypatch):
    monkeypatch.setattr("ecar_dist.evaluate.classifier.TRAINING_THREADS", 1)
    generator = np.random.default_rng(0)
    sizes = {"train": 70, "heldout": 30, "samples": 40}
    sets = {
        name: LabelledImages(generator.integers(0, 256, (size, 48, 48, 3), np.uint8), generator.integers(0, 4, size))
        for name, size in sizes.items()
    }

    def scores(codec, device):
        rebuilt = reconstruct(codec, sets["train"], device)
        return Scorer(rebuilt, sets["train"], sets["heldout"], "noise", device).score(sets["samples"])

    with PretendDevice():
        codec = DctCodec(8, DEVICE)
    with PretendDevice() as pretended:
        on_device = scores(codec, DEVICE)
    assert on_device == scores(DctCodec(8, CPU), CPU)
    assert set(+pretended.on_host) <= ON_THE_HOST
    # Copied back to the host: reconstructed images as pixels; the fp32 features and the class of all images.
    images = 2 * sizes["train"] + sizes["heldout"] + sizes["samples"]
    assert pretended.to_host == sizes["train"] * 48 * 48 * 3 + images * (64 * 4 + 8)
