import dataclasses
import os
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data_tools.cli import main as ecar_data
from ecar_dist.config.read import config_from_dict
from ecar_dist.data.loader import SampleLoader
from ecar_dist.data.shards.manifest import load_manifest, write_manifest
from ecar_dist.data.sources import DaliLatentSource, LatentSource
from ecar_dist.errors import ConfigError, DataError
from ecar_dist.train import sources
from ecar_dist.train.sources import check_codec, check_data, open_stream
from ecar_dist.vae.build import open_codec
from tests.conftest import free_port, losses, train_on_ranks
from tests.fork_server import run_forked, run_ranks


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
    with pytest.raises(ConfigError, match="latents and images"):
        config_from_dict(tree)
    del tree["data"]["latents"], tree["data"]["images"]
    with pytest.raises(ConfigError, match=r"data\b.*latents"):
        config_from_dict(tree)


def test_an_empty_name_is_no_source(tree, digits):
    mixture(tree, digits / "latents")
    tree["data"]["latents"] = ""
    assert [source.latents for source in config_from_dict(tree).data.latent_sources] == [str(digits / "latents")]


def test_latents_cannot_be_mirrored_while_they_are_read(tree):
    tree["data"]["flip_images"] = True
    with pytest.raises(ConfigError, match=r"data\.flip_images=True mirrors images.*--flip store"):
        config_from_dict(tree)


def test_the_order_is_that_of_the_config(tree, digits):
    tree["data"] |= {"lanes": 2, "window_shards": 1, "mixture_by": "step"}  # with one set it is not a mixture
    config = config_from_dict(tree)
    described = open_stream(config, check_data(config)).describe()
    facts = {"name": "lanes-feistel-v2", "seed": 0, "lanes": 2, "window_shards": 1}
    assert described == {**facts, "batch": config.batch.global_batch_size}
    mixture(tree, digits / "latents", digits / "latents")
    config = config_from_dict(tree)
    described = open_stream(config, check_data(config)).describe()
    assert (described["name"], described["weights"], described["global_batch_size"]) == ("buckets-v1", [3, 2], 16)


@pytest.mark.parametrize(("backend", "kind"), [("gather", LatentSource), ("dali", DaliLatentSource)])
def test_the_backend_is_that_of_the_config(tree, digits, backend, kind):
    tree["data"]["backend"] = backend
    mixture(tree, digits / "latents", digits / "latents")
    with open_rank(tree) as loader:
        assert [type(source) for source in loader.sources] == [kind, kind]


def open_rank(tree, rank=1, world_size=2, start=0):
    config = config_from_dict(tree)
    world = SimpleNamespace(rank=rank, size=world_size, node_ranks=(0, 1), device=torch.device("cpu"))
    data = check_data(config)
    return sources.open_loader(config, world, data, open_stream(config, data), start)


def test_a_rank_looks_up_its_own_shards(tree, monkeypatch, tmp_path):
    """For a large set, of which neither of two ranks reads all shards in an epoch."""
    monkeypatch.setattr(sources, "MAX_LOOKED_UP", 2)
    shutil.copytree(tree["data"]["latents"], tmp_path / "latents")
    tree["data"] |= {"latents": str(tmp_path / "latents"), "lanes": 2}
    config = config_from_dict(tree)
    data = check_data(config)
    own = [set(open_stream(config, data).upcoming(0, data.count, [rank], 2)[0]) for rank in range(2)]
    lost = min(own[0] - own[1])
    (tmp_path / "latents" / data.manifests[0].shards[lost].name).unlink()
    open_rank(tree, 1).close()
    with pytest.raises(DataError, match=data.manifests[0].shards[lost].name):
        open_rank(tree, 0)
    monkeypatch.undo()
    with pytest.raises(DataError, match=data.manifests[0].shards[lost].name):
        check_data(config)
    check_data(config, (lost + 1) % 2, 2)


def test_a_rank_reads_its_part_from_where_the_run_stands(tree):
    tree["batch"] = {"global_batch_size": 16, "micro_batch_size": 4}
    with open_rank(tree, start=40) as loader:
        positions = [next(loader).positions.tolist() for _ in range(3)]
        assert positions == [[48, 49, 50, 51], [52, 53, 54, 55], [64, 65, 66, 67]]  # the second half of each batch
        assert len(next(loader).values) == 4


@pytest.mark.parametrize(
    ("given", "allowed"),
    [
        ({}, 0.0),
        ({"max_bad": 0.2}, 0.0),
        ({"on_bad": "substitute"}, 1e-5),
        ({"on_bad": "substitute", "max_bad": 0.2}, 0.2),
        ({"on_bad": "substitute", "images": True}, 1e-3),
        ({"images": True, "prefetch": 9}, 0.0),
    ],
)
def test_what_the_loader_is_told(tree, digits, monkeypatch, given, allowed):
    told = {}
    monkeypatch.setattr(sources, "SampleLoader", lambda *places, **options: told.update(options, share=places[2]))
    if given.pop("images", False):
        images(tree, digits)
    tree["data"] |= given
    open_rank(tree)
    assert told["max_bad"] == allowed
    assert told["prefetch"] == given.get("prefetch", 2)
    assert told["seed"] == tree["run"].get("seed", 0)
    assert (told["share"].rank, told["share"].world_size, told["share"].node_ranks) == (1, 2, (0, 1))


@pytest.mark.parametrize(("flip", "backend"), [(False, "gather"), (True, "gather"), (True, "dali")])
def test_images_are_read_as_the_config_says(tree, digits, flip, backend):
    images(tree, digits, flip_images=flip, backend=backend)
    with open_rank(tree) as loader:
        assert loader.sources[0].can_flip == flip
        assert loader.sources[0]._decoder.name == {"gather": "pil", "dali": "dali-cpu"}[backend]
        assert next(loader).values.shape[1:] == (32, 32, 3)


def test_a_loader_may_map_as_many_shards_as_the_system_lets_it(tree):
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(before, 512), most))
    try:
        open_rank(tree).close()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == most
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, most))


@pytest.mark.parametrize(("given", "budget"), [({}, None), ({"dir": "/somewhere", "gib": 0.5, "threads": 3}, 2**29)])
def test_the_cache_is_that_of_the_config(tree, given, budget):
    tree["data"]["cache"] = given
    options = sources.cache_options(config_from_dict(tree).data)
    assert (options.budget_bytes, options.threads) == (budget, given.get("threads", 8))
    assert options.root == (Path(given["dir"]) if given else None)


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


def test_a_set_that_is_not_whole_is_refused_before_anything_is_allocated(tree, digits, tmp_path):
    tree["data"]["latents"] = str(shutil.copytree(digits / "latents", tmp_path / "cut"))
    (tmp_path / "cut/000001.tar").unlink()
    with pytest.raises(DataError, match=r"000001\.tar"):
        check_data(config_from_dict(tree))


def test_latents_that_are_no_squares_are_refused(tree, digits, tmp_path):
    tree["data"]["latents"] = str(tmp_path)
    write_manifest(tmp_path, dataclasses.replace(load_manifest(digits / "latents"), moments_shape=(12, 4, 2)))
    with pytest.raises(DataError, match=r" 4 x 2\b"):
        check_data(config_from_dict(tree))


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
    """The run encodes pixels itself; DALI or PIL decode them; order and noise are keyed as usual."""
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


def test_another_order_is_refused_on_resume_by_name(write_config):
    config = write_config()
    train_on_ranks(1, config, "train.total_samples=32")
    done = run_forked("train", str(config), "data.window_shards=1")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("ecar-dist:")]
    assert line.index("data_order.window_shards=4") < line.index(
        "data_order.window_shards=1"
    )  # as the order was made, then this run's


def test_images_lie_on_the_background_that_the_config_says(tree, digits):
    images(tree, digits, background="#010203")
    config = config_from_dict(tree)
    (source,) = sources._open_sources(config, torch.device("cpu"), check_data(config), [[]])
    assert source._decoder._background == (1, 2, 3)
    source.close()


@pytest.mark.parametrize("resize", ["cubic", "adm"])
def test_images_are_resized_as_the_config_says(tree, digits, resize):
    images(tree, digits, resize=resize)
    config = config_from_dict(tree)
    (source,) = sources._open_sources(config, torch.device("cpu"), check_data(config), [[]])
    assert source._decoder.resize == resize
    source.close()


def break_reader():
    """Make rank 1 fail to read its third step."""
    take, calls = SampleLoader.take, []

    def broken(self, *values):
        calls.append(1)
        if len(calls) == 3:
            raise DataError("shard x is damaged; restore it")
        return take(self, *values)

    if os.environ["RANK"] == "1":
        SampleLoader.take = broken


def test_data_that_fails_on_one_rank_ends_all_of_them_in_one_line(write_config):
    """Only rank 1's reader fails: no rank waits for it, and no rank sees a broken connection."""
    ended = run_ranks(2, free_port(), "train", str(write_config()), before=break_reader)
    assert [one.returncode for one in ended] == [1, 1]
    out, error = ("".join(one.stdout for one in ended), "".join(one.stderr for one in ended))
    lines = [line for line in error.splitlines() if line.startswith("ecar-dist:")]
    assert lines == ["ecar-dist: shard x is damaged; restore it"], error
    assert "step 2/6" in out
    assert "step 3/6" not in out
    assert "closed" not in error.lower()
