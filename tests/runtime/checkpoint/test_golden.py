"""A checkpoint and an export of the first release (796c57a), committed as files: every later one must read them."""

import shutil
from pathlib import Path

import pytest
import torch

from ecar_dist.cli import main
from ecar_dist.config.read import load_config
from ecar_dist.runtime.checkpoint.files import read_manifest
from ecar_dist.runtime.checkpoint.manifest import Progress
from ecar_dist.runtime.checkpoint.reader import FragmentReader
from ecar_dist.runtime.ema import ShardedEma
from ecar_dist.runtime.export.ema import open_ema_weights
from ecar_dist.runtime.export.files import ExportReader
from tests.runtime.checkpoint.worlds import Ranks, State, store_of

GOLDEN = Path(__file__).parent / "golden"
NAME = "step-00000004"
SHAPES = {"ar.weight": (4, 6), "ar.bias": (10,), "flow.scale": ()}


@pytest.fixture
def run(tmp_path):
    shutil.copytree(GOLDEN / "run", tmp_path / "golden")
    return tmp_path / "golden"


@pytest.mark.parametrize(
    ("verb", "said"),
    [
        ("list", f"checkpoints/{NAME}  64 samples  0.0 MiB  2 files"),
        ("verify", f"checkpoints/{NAME}  intact"),
        ("inspect", "step 4, 64 samples, written by 2 ranks with ZeRO-2; 2 files"),
    ],
)
def test_list_verify_and_inspect(run, capsys, verb, said):
    assert main(["checkpoint", verb, str(run)]) == 0
    assert said in capsys.readouterr().out


def test_diff(run, capsys):
    assert main(["checkpoint", "diff", str(run), str(run / "checkpoints" / NAME)]) == 0
    assert "equal: 3 tensors of ema, ema1, exp_avg, exp_avg_sq, master, every value" in capsys.readouterr().out


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_run_resumes_from_it(run, ranks):
    manifest = read_manifest(run / "checkpoints" / NAME)
    config = load_config(run / "config.yaml", [f"run.dir={run.parent}"])

    def restore(world):
        state = State(world.rank, world.size, 999, shapes=SHAPES)
        ema = ShardedEma(state.partitions, config.ema)
        with store_of(config, world, manifest.identity, run_id=manifest.run) as store:
            return store.restore(state, ema), state, ema

    for rank, (restored, state, ema) in enumerate(Ranks(ranks)(restore)):
        expected = State(rank, ranks, 1, shapes=SHAPES)
        assert restored.progress == Progress(64, 4)
        assert restored.client_state["bad_steps"]["windows"] == []
        for fragment in expected.fragments:
            for kind in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(fragment.of(state.moments(kind)), fragment.of(expected.moments(kind)))
            assert torch.equal(fragment.of(state.partitions), fragment.of(expected.partitions))
            assert torch.equal(fragment.of(ema.by_kind["ema"]), fragment.of(expected.partitions))
            assert torch.equal(fragment.of(ema.by_kind["ema1"]), fragment.of(expected.partitions) * 2)


def test_its_ema_weights_are_read(run):
    average = open_ema_weights(run)
    reader = FragmentReader(run / "checkpoints" / NAME)
    assert average.facts == {"kind": "ema", "half_life_samples": 1000, "rampup": 0.1}
    assert {name: tuple(value.shape) for name, value in average.items()} == SHAPES
    assert all(torch.equal(value, reader.full("master", name)) for name, value in average.items())


def test_the_export_is_read():
    weights, average = ExportReader(GOLDEN / "export"), open_ema_weights(GOLDEN / "run")
    assert (weights.facts.progress.samples_seen, weights.facts.progress.step) == (64, 4)
    assert weights.keys() == SHAPES.keys()
    assert all(torch.equal(value, average[name]) for name, value in weights.items())
