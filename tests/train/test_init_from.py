"""`train.init_from`: a run that starts from the weights of another run."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from data_tools.codebook.fit import fit_codebook
from data_tools.finalize import finalize
from ecar_dist.cli import main
from ecar_dist.data.codebook import codebook_of, write_codebook
from ecar_dist.data.shards.manifest import load_manifest
from ecar_dist.runtime.checkpoint.reader import FragmentReader
from ecar_dist.runtime.export.ema import open_ema_weights
from ecar_dist.runtime.run.directory import RunDirectory
from tests.conftest import losses, read_metrics, train_on_ranks, write_yaml
from tests.data_tools.image_folders import encode_small
from tests.train.test_start import train_alone

STILL = ("optim.learning_rate=1e-30", "train.total_samples=16")  # one step that moves weights by 1e-30 at most


@pytest.fixture(scope="module")
def source(make_tree, tmp_path_factory):
    """(config, weights) of a run of two steps; the config is for runs that start from it."""
    folder = tmp_path_factory.mktemp("source")
    tree = make_tree(folder)
    tree["optim"]["learning_rate"] = 1e-2
    config = write_yaml(tree, folder)
    train_alone(config, "run.name=source", "train.total_samples=32")
    return config, dict(open_ema_weights(folder / "runs/source").items())


def same(one, other):
    """Whether all parameters are the same, except for that one step."""
    return one.keys() == other.keys() and all(torch.allclose(one[key], other[key], rtol=0, atol=1e-29) for key in one)


def start(source, name, ranks, *overrides, init_from="source"):
    """A run that starts from `init_from`; its losses, and its master weights after one step that hardly moves them."""
    config, _ = source
    runs = config.parent / "runs"
    metrics = train_on_ranks(
        ranks, config, f"run.name={name}", f"train.init_from={runs / init_from}", *STILL, *overrides
    )
    reader = FragmentReader(runs / name / "checkpoints/step-00000001")
    return losses(metrics), {key: reader.full("master", key) for key in reader.shapes}


def test_all_zero_stages_and_numbers_of_ranks_start_from_the_same_weights(source):
    _, weights = source
    found = []
    for stage, ranks in ((0, 1), (1, 2), (2, 1), (3, 2)):
        loss, masters = start(source, f"zero{stage}", ranks, f"deepspeed.zero_stage={stage}")
        assert same(masters, weights)
        found += loss
    assert found == pytest.approx([found[0]] * len(found), abs=1e-6)


def test_new_rows_are_those_of_a_fresh_model_on_any_rank(source):
    fewer = "flow.num_stages=1"
    _, alone = start(source, "one", 1, "deepspeed.zero_stage=0", fewer)
    _, pair = start(source, "two", 2, "deepspeed.zero_stage=3", fewer)
    assert same(alone, pair)
    assert torch.allclose(
        alone["flow.stage_embedding.weight"], source[1]["flow.stage_embedding.weight"][2:], rtol=0, atol=1e-29
    )


def test_an_export_and_a_file_give_the_same_as_the_run(source):
    config, weights = source
    runs = config.parent / "runs"
    assert main(["checkpoint", "export", str(runs / "source"), "--out", str(runs / "export")]) == 0
    save_file(weights, runs / "weights.safetensors")
    for name in ("export", "weights.safetensors"):
        _, masters = start(source, f"of-{name}", 1, init_from=name)
        assert same(masters, weights)


def test_a_run_with_a_checkpoint_resumes_and_says_so(source):
    config, _ = source
    runs = config.parent / "runs"
    first, _ = train_alone(config, "run.name=again", f"train.init_from={runs / 'source'}", *STILL)
    assert any("initial weights" in line and "step-00000002" in line for line in first)
    said, _ = train_alone(config, "run.name=again", "train.init_from=gone", "train.total_samples=32")
    assert any("train.init_from=gone is not used" in line for line in said)
    begun, resumed = RunDirectory(runs / "again").attempts()
    assert begun["initial_weights"]["step"] == 2
    assert begun["initial_weights"]["path"] == str((runs / "source").absolute())
    assert len(begun["initial_weights"]["xxh3_128"]) == 32
    assert resumed["resumed_from_step"] == 1
    assert "initial_weights" not in resumed


def test_hybrid_goes_on_at_twice_the_resolution(digits, make_tree, tmp_path):
    """DC-AR's training from low to high resolution. The codebook comes with the weights; the new latents need none."""
    low, high = shutil.copytree(digits / "latents", tmp_path / "low"), tmp_path / "high"
    fit_codebook(low, size=32, patch_size=1, iterations=1, max_samples=100)
    encode_small(digits / "images/heldout", high, image_size=64, samples_per_shard=512, batch_size=64)
    finalize(high)
    tree = make_tree(tmp_path) | {"flow": {"num_stages": 1}, "ema": {"half_life_samples": [32]}}
    tree["model"] |= {"kind": "hybrid", "codebook_size": 32}
    tree["optim"]["learning_rate"] = 1e-2
    tree["data"]["latents"] = str(low)
    config, runs = write_yaml(tree, tmp_path), tmp_path / "runs"
    train_alone(config, "run.name=source", "train.total_samples=128")
    larger = ("data.latent_size=8", f"data.latents={high}")
    said, _ = train_alone(config, "run.name=high", f"train.init_from={runs / 'source'}", *larger, *STILL)

    # A new position is a quarter of the way from one of the 4 x 4 positions to the next; outside them it is clamped.
    source, reader = open_ema_weights(runs / "source"), FragmentReader(runs / "high/checkpoints/step-00000001")
    for name in ("trunk.positions.weight", "trunk.output_positions.weight"):
        assert any(line.split()[:2] == ["resized", name] and "4x4 -> 8x8" in line for line in said)
        old, new = source[name].view(4, 4, -1), reader.full("master", name).view(8, 8, -1)
        torch.testing.assert_close(new[0, 0], old[0, 0])
        torch.testing.assert_close(new[7, 2], 0.75 * old[3, 1] + 0.25 * old[3, 0])
    fitted = codebook_of([str(low)], [load_manifest(low)], 32, 1)
    assert torch.equal(reader.full("master", "codebook.codes"), fitted.codes)

    # A run from scratch, with the same codes, is behind after four steps.
    write_codebook(high, load_manifest(high), fitted, 1)
    train_alone(config, "run.name=scratch", "train.total_samples=64", *larger)
    (first,) = losses(read_metrics(config, "run.name=high"))
    assert first < min(losses(read_metrics(config, "run.name=scratch")))
