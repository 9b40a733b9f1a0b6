import pytest

from data_tools.cli import main as ecar_data
from ecar_dist.config_file import config_from_dict
from ecar_dist.data.manifest import load_manifest
from ecar_dist.errors import ConfigError, DataError
from ecar_dist.train.sources import check_codec, check_data, open_stream
from ecar_dist.vae.build import open_codec
from tests.conftest import losses, train_on_ranks


@pytest.fixture(scope="module")
def more_latents(digits, tmp_path_factory):
    """The held-out digits, encoded like `digits/latents`."""
    folder = tmp_path_factory.mktemp("more") / "latents"
    encode = ["encode", str(digits / "images/heldout"), str(folder), "--vae", "dct-f8", "--image-size", "32"]
    assert ecar_data([*encode, "--samples-per-shard", "100"]) == 0
    assert ecar_data(["finalize", str(folder)]) == 0
    return folder


def mixture(tree, *folders):
    del tree["data"]["latents"]
    tree["data"]["mixture"] = [{"latents": str(folder), "weight": 3 - place} for place, folder in enumerate(folders)]


def images(tree, digits, **data):
    del tree["data"]["latents"]
    tree["data"] |= {"images": str(digits / "images/train"), **data}


def test_data_has_one_source(tree, digits):
    tree["data"]["images"] = str(digits / "images/train")
    with pytest.raises(ConfigError, match="data has latents and images; give one of latents, mixture and images"):
        config_from_dict(tree)
    del tree["data"]["latents"], tree["data"]["images"]
    with pytest.raises(ConfigError, match="data has no source"):
        config_from_dict(tree)


@pytest.mark.parametrize(("key", "value"), [("num_classes", 9), ("latent_channels", 4), ("latent_size", 8)])
def test_latents_that_do_not_fit_the_config_are_refused(tree, key, value):
    tree["data"][key] = value
    with pytest.raises(DataError, match=rf"data\.{key}={value}, but the samples in .* have \d+; set data\.{key}="):
        check_data(config_from_dict(tree))


def test_images_are_checked_against_config_and_autoencoder(tree, digits):
    images(tree, digits, num_classes=9)
    with pytest.raises(DataError, match=r"data\.num_classes=9, but the samples in .* have 10"):
        check_data(config_from_dict(tree))
    images(tree | {"data": tree["data"] | {"latents": ""}}, digits)
    tree["data"] |= {"num_classes": 10, "latent_channels": 3}
    config = config_from_dict(tree)
    with pytest.raises(ConfigError, match=r"data\.latent_channels=3, but dct-f8 has 12"):
        check_codec(config, check_data(config), open_codec(config.vae))


def test_sets_of_different_encoders_do_not_mix(tree, digits, tmp_path):
    other = tmp_path / "other"
    assert (
        ecar_data(["encode", str(digits / "images/heldout"), str(other), "--vae", "dct-f32", "--image-size", "32"]) == 0
    )
    assert ecar_data(["finalize", str(other)]) == 0
    mixture(tree, digits / "latents", other)
    with pytest.raises(DataError, match="other: autoencoder dct-f32 has "):
        check_data(config_from_dict(tree))


def test_the_stream_of_a_mixture_is_described(tree, digits, more_latents):
    mixture(tree, digits / "latents", more_latents)
    config = config_from_dict(tree)
    data = check_data(config)
    assert data.count == load_manifest(digits / "latents").count + load_manifest(more_latents).count == 1797
    described = open_stream(config, data).describe()
    assert described["weights"] == [3, 2]
    assert len(described["sources"]) == 2


def test_training_on_a_mixture_does_not_depend_on_ranks_and_resumes(tree, write_config, digits, more_latents):
    mixture(tree, digits / "latents", more_latents)
    config = write_config()
    whole = train_on_ranks(1, config, "run.name=whole")
    train_on_ranks(2, config, "run.name=halves", "train.total_samples=48")
    resumed = train_on_ranks(1, config, "run.name=halves")
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6)


def test_training_straight_from_images_does_not_depend_on_ranks_and_resumes(tree, write_config, digits):
    """The run encodes pixels itself; DALI or PIL decode them; order and noise are keyed as ever."""
    images(tree, digits, flip_images=True)
    config = write_config()
    whole = train_on_ranks(1, config, "run.name=whole")
    train_on_ranks(2, config, "run.name=halves", "train.total_samples=48")
    resumed = train_on_ranks(1, config, "run.name=halves", "batch.micro_batch_size=16")
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6)
    through_dali = train_on_ranks(1, config, "run.name=dali", "data.backend=dali")
    assert losses(through_dali) == pytest.approx(losses(whole), rel=0.02)  # DALI resizes a little differently
    assert losses(through_dali) != losses(whole)


def test_the_dali_backend_gives_the_same_losses(write_config):
    config = write_config()
    gathered = train_on_ranks(1, config, "run.name=gather", "train.total_samples=48")
    through_dali = train_on_ranks(1, config, "run.name=dali", "train.total_samples=48", "data.backend=dali")
    assert losses(through_dali) == losses(gathered)


def test_another_order_is_refused_on_resume_by_name(tree, write_config, digits, tmp_path, capsys):
    from ecar_dist.cli import main

    config = write_config()
    train_on_ranks(1, config, "train.total_samples=32")
    assert main(["train", str(config), "data.window_shards=1"]) == 1
    assert "data_order.window_shards" in capsys.readouterr().err
