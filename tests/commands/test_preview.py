"""`ecar-dist preview`: draws from checkpoints what training would have drawn."""

import shutil
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ecar_dist.cli import main
from tests.conftest import free_port
from tests.fork_server import run_ranks
from tests.sample.made_models import make_model_run

STEPS = (2, 4, 6)


def pictures(run):
    return {path.name: path.read_bytes() for path in run.glob("samples/*")}


@pytest.mark.parametrize(("ranks", "precision"), [(1, "fp32"), (2, "bf16")])
def test_the_preview_of_a_checkpoint_is_that_of_the_training_to_the_bit(write_config, tree, tmp_path, ranks, precision):
    tree["deepspeed"]["precision"] = precision
    tree["log"]["tensorboard"], run = True, tmp_path / "runs/tiny"
    tree["sample"] = {"every_samples": 32, "steps_per_stage": 1, "solver": "euler"}
    ended = run_ranks(ranks, free_port(), "train", str(write_config()))
    assert [rank.returncode for rank in ended] == [0] * ranks
    drawn = pictures(run)
    assert sorted(drawn) == [f"step-{step:08d}.png" for step in STEPS]
    assert len(set(drawn.values())) == len(STEPS)

    # Remove all but the first one, which is left unchanged.
    board = strips(run / "tb")
    for step in STEPS[1:]:
        (run / f"samples/step-{step:08d}.png").unlink()
    assert main(["preview", str(run), "--watch", "1"]) == 0
    assert pictures(run) == drawn
    assert strips(run / "tb/previews") == board[1:]


def strips(folder):
    """(step, PNG) of the strips that TensorBoard shows."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(image.step, image.encoded_image_string) for image in events.Images("samples/stages")]


def test_it_waits_for_the_run_and_its_last_checkpoint_and_passes_over_a_damaged_one(tmp_path, monkeypatch, capsys):
    made, run = make_model_run(tmp_path / "made", train={"total_samples": 12 * 16}), tmp_path / "run"
    first, last = "checkpoints/step-00000006", "checkpoints/step-00000012"

    def go_on(seconds):
        if not run.exists():
            shutil.copytree(made, run, ignore=shutil.ignore_patterns("step-00000012"))
            state = next((run / first).glob("state-*"))
            state.write_bytes(bytes(state.stat().st_size))
        else:
            assert pictures(run) == {}
            shutil.copytree(made / last, run / last)

    monkeypatch.setattr(time, "sleep", go_on)
    assert main(["preview", str(run), "--watch", "60"]) == 1
    assert list(pictures(run)) == ["step-00000012.png"]
    assert capsys.readouterr().err.count(first) == 1
