"""`train.init_from`: a run that starts from the weights of another one."""

import pytest
import torch
from safetensors.torch import save_file

from ecar_dist.cli import main
from ecar_dist.runtime.checkpoint.reader import FragmentReader
from ecar_dist.runtime.export.ema import open_ema_weights
from ecar_dist.runtime.run.directory import RunDirectory
from tests.conftest import losses, train_on_ranks, write_yaml
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
    """Whether all parameters are the same, but for that one step."""
    return one.keys() == other.keys() and all(torch.allclose(one[key], other[key], rtol=0, atol=1e-29) for key in one)


def start(source, name, ranks, *overrides, init_from="source"):
    """A run that starts from `init_from`; its losses, and its master weights after one step that moves hardly any."""
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
