"""The complete start of a run that resumes."""

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ecar_dist.runtime.checkpoint.files import read_manifest
from ecar_dist.runtime.run.directory import RunDirectory
from tests.conftest import read_metrics
from tests.fork_server import Forked


def train_alone(config, *overrides, **environment):
    """One process without a launcher; its standard output and its standard error, in lines."""
    forked = Forked(["train", str(config), *overrides], environment)
    forked.process.join(200)
    done = forked.end()
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines(), done.stderr


def kept_seconds(run, step):
    return read_manifest(run / f"checkpoints/step-{step:08d}").client_state["goodput"]["kept_seconds"]


def test_a_run_goes_on_with_what_it_knew_and_says_what_is_new(write_config, tree, tmp_path):
    tree["log"]["tensorboard"], run = True, tmp_path / "runs/tiny"
    config = write_config()
    faults = "train.loss:step=2:nan,train.step:step=3:delay=2"
    _, error = train_alone(config, "train.total_samples=64", ECAR_FAILPOINT=faults)
    assert f"ECAR_FAILPOINT={faults}" in error
    changes = ("train.total_samples=128", "batch.global_batch_size=32", "optim.learning_rate=5e-4")
    said, error = train_alone(config, *changes)
    assert "ECAR_FAILPOINT" not in error
    assert [line for line in said if line.startswith("config on resume: ")] == [
        "config on resume: batch.global_batch_size 16 -> 32 (changes optimisation)",
        "config on resume: optim.learning_rate 0.001 -> 0.0005 (changes optimisation)",
        "config on resume: train.total_samples 64 -> 128 (safe)",
    ]
    assert any("6 steps; resuming at step 4 (64 samples)" in line for line in said)
    metrics = read_metrics(config)
    assert [(line["step"], line["samples_seen"]) for line in metrics] == [
        (1, 16),
        (2, 32),
        (3, 48),
        (4, 64),
        (5, 96),
        (6, 128),
    ]
    assert metrics[-1]["train/skipped_steps"] == 1  # from the previous attempt
    assert kept_seconds(run, 6) > kept_seconds(run, 4) > 2  # seconds
    assert 0 < metrics[-1]["perf/goodput"] < 1
    before, now = RunDirectory(run).attempts()
    assert (before["reason"], before["newest_step"], before["resumed_from_step"]) == ("done", None, None)
    assert (now["reason"], now["newest_step"], now["resumed_from_step"]) == ("done", 4, 4)
    assert (now["precision"], now["dataset_ids"]) == ("fp32", before["dataset_ids"])
    assert RunDirectory(run).load_config().optim.learning_rate == 5e-4
    events = EventAccumulator(str(run / "tb"))
    events.Reload()
    assert [point.step for point in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
