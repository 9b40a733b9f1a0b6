"""Bad steps on real ranks: NaNs on one rank only, a roll-back of both, and a kill right after it."""

import json

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import free_port, read_metrics
from tests.fork_server import run_ranks

NANS = ",".join(f"train.loss:rank=1:step={step}:nan" for step in (4, 8, 9, 10))
KILL = "train.step:rank=1:step=11:kill"


def train(config, name, failpoint=""):
    """The worst exit status, and the output of both ranks."""
    more = {rank: {"ECAR_FAILPOINT": failpoint} for rank in range(2)}
    ended = run_ranks(2, free_port(), "train", str(config), f"run.name={name}", more=more)
    return max(abs(one.returncode) for one in ended), "".join(one.stdout + one.stderr for one in ended)


def records(run):
    return [json.loads(line) for line in (run / "bad_steps.jsonl").read_text().splitlines()]


def test_a_run_that_was_rolled_back_goes_on_the_same_whether_or_not_it_was_killed_after(write_config, tree, tmp_path):
    tree["train"]["total_samples"] = 16 * 16
    tree["checkpoint"]["every_samples"] = 16 * 3
    tree["log"]["tensorboard"] = True
    config = write_config()
    status, said = train(config, "straight", NANS)
    assert status == 0, said
    for step, action in ((4, "skipped"), (10, "roll back")):
        (line,) = [line for line in said.splitlines() if line.startswith(f"step {step} moved no weight")]
        assert "nan" in line
        assert f"({action})" in line
    metrics = read_metrics(config, "run.name=straight")
    # back to step 6; the window begins three steps before the first of the three bad ones
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6, *range(11, 17)]
    assert metrics[3]["train/loss"] is None
    assert metrics[-1]["train/skipped_steps"] == 1 + 4

    found = records(tmp_path / "runs/straight")
    assert [record["step"] for record in found] == [4, 8, 9, 10, 10]
    assert [len(ids) for ids in found[0]["sample_ids"]] == [8, 8]
    assert found[-1]["pass_over"] == [5, 10]

    assert train(config, "killed", f"{NANS},{KILL}")[0] != 0
    assert train(config, "killed")[0] == 0  # no NaN any more: only the window keeps the run from those samples
    again = read_metrics(config, "run.name=killed")
    for tag in ("step", "train/loss", "train/grad_norm", "train/skipped_steps"):
        assert [line[tag] for line in again] == [line[tag] for line in metrics]
    assert 0 < again[-1]["perf/goodput"] < metrics[-1]["perf/goodput"]
    for name in ("straight", "killed"):
        events = EventAccumulator(str(tmp_path / "runs" / name / "tb"))
        events.Reload()
        assert [point.step for point in events.Scalars("train/loss")] == [line["step"] for line in metrics]
