"""What the ranks of a run compare once they have opened the data and the autoencoder."""

import dataclasses

import pytest

from ecar_dist.config.read import config_from_dict
from ecar_dist.train.preflight import data_facts
from ecar_dist.train.sources import check_data, identity_facts, open_stream, run_identity


@pytest.fixture
def opened(tree):
    config = config_from_dict(tree)
    data = check_data(config)
    return config, data, open_stream(config, data)


def facts(config, data, stream):
    return identity_facts(run_identity(config, data, stream, None), data.encoder)


def changed(ours, theirs):
    return {key for key in ours | theirs if ours.get(key) != theirs.get(key)}


@pytest.mark.parametrize(
    ("field", "value", "keys"),
    [
        ("weights_sha256", "0" * 64, {"encoder.weights_sha256"}),
        ("scaling_factor", 0.5, {"encoder.scaling_factor"}),
        ("shift_factor", 0.5, {"encoder.shift_factor"}),
        ("name", "/elsewhere/vae", set()),
    ],
)
def test_an_autoencoder_is_known_by_all_but_its_name(opened, field, value, keys):
    config, data, stream = opened
    other = dataclasses.replace(data, encoder=dataclasses.replace(data.encoder, **{field: value}))
    assert changed(facts(config, data, stream), facts(config, other, stream)) == keys


def test_another_background_of_images_is_another_run_and_white_is_as_before(opened):
    _, data, stream = opened
    tree = {"run": {"name": "a"}, "vae": {"kind": "dct"}, "train": {"total_samples": 512}}
    found = {}
    for place in ("images", "latents"):
        for colour in ("white", "#000000"):
            section = {place: "x", "num_classes": 10, "background": colour}
            config = config_from_dict({**tree, "data": section})
            found[place, colour] = run_identity(config, data, stream, None)["data"]
    assert found["images", "#000000"]["data.background"] == "#000000"
    assert "data.background" not in found["images", "white"]
    assert found["latents", "white"] == found["latents", "#000000"] == found["images", "white"]


def test_the_version_of_the_order_is_compared(opened, monkeypatch):
    config, data, stream = opened
    ours = facts(config, data, stream)
    monkeypatch.setattr(stream, "describe", lambda: {"name": "lanes-v0"})
    assert "data_order.name" in changed(ours, facts(config, data, stream))


def test_each_set_of_a_mixture_has_its_key(tree, digits):
    latents = tree["data"].pop("latents")
    tree["data"]["mixture"] = [{"latents": latents, "weight": 1}, {"latents": latents, "weight": 2}]
    config = config_from_dict(tree)
    data = check_data(config)
    ids = data.dataset_ids
    assert data_facts(config, data) == {f"dataset_id of data.mixture[{n}].latents": ids[n] for n in range(2)}
