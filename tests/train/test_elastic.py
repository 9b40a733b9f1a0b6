"""One run on 1, 2, 4 and 3 ranks in turn, with different ZeRO stages: losses and samples of the undisturbed run."""

import itertools
import json
from collections import Counter

import pytest
import torch

from ecar_dist.config.read import load_config
from ecar_dist.runtime.world import Placement, World
from ecar_dist.train.sources import check_data, open_loader, open_stream
from tests.conftest import losses, read_metrics, train_on_ranks, write_yaml
from tests.train.recorded_ranks import record_steps
from tests.train.struck_ranks import REQUEUE, Struck, stop_at

FP32_TOLERANCE = 1e-6
BATCH, STEPS = 24, 8
PARTS = ((1, 3), (2, 1), (4, 0), (3, 0))  # ranks and ZeRO stage; each but the last is preempted in its second step
MICRO_BATCH = {1: 8, 2: 6, 3: 4, 4: 6}  # by ranks


@pytest.fixture(scope="module")
def parted(make_tree, tmp_path_factory):
    """The config; the output of each launch; what every rank recorded about every step."""
    folder = tmp_path_factory.mktemp("elastic")
    tree = make_tree(folder) | {"train": {"total_samples": BATCH * STEPS}, "checkpoint": {"every_samples": BATCH * 100}}
    tree["batch"] = {"global_batch_size": BATCH, "micro_batch_size": MICRO_BATCH[2]}
    config, records, said = write_yaml(tree, folder), folder / "records", []
    records.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECORDS", str(records))
        for part, (ranks, stage) in enumerate(PARTS):
            how = {"ranks": ranks, "before": record_steps}
            overrides = (f"deepspeed.zero_stage={stage}", f"batch.micro_batch_size={MICRO_BATCH[ranks]}")
            if part < len(PARTS) - 1:
                ended = stop_at(config, f"train.step:step={2 * part + 2}", *overrides, **how)
                assert set(ended.statuses) == {REQUEUE}, ended.text
            else:
                with Struck(config, *overrides, **how) as job:
                    ended = job.end()
                assert set(ended.statuses) == {0}, ended.text
            said.append(ended.text)
    lines = [json.loads(line) for path in records.iterdir() for line in path.read_text().splitlines()]
    return config, said, lines


def test_losses_are_those_of_the_undisturbed_run(parted):
    config, _, _ = parted
    whole = train_on_ranks(2, config, "run.name=whole")
    metrics = read_metrics(config)
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert losses(metrics) == pytest.approx(losses(whole), abs=FP32_TOLERANCE)
    norms = [[line["train/grad_norm"] for line in run] for run in (metrics, whole)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_each_conversion_is_said_in_one_line(parted):
    _, said, _ = parted
    assert "written by" not in said[0]
    for part, ((ranks, stage), (more, other)) in enumerate(itertools.pairwise(PARTS)):
        plural = "s" if ranks > 1 else ""
        line = f"written by {ranks} rank{plural} with ZeRO-{stage}, read by {more} ranks with ZeRO-{other}"
        assert said[part + 1].count(line) == 1


def test_every_sample_is_trained_on_once_and_in_its_own_step(parted):
    """Compares what the ranks really fed to the model with the order in which one rank reads the samples."""
    config, _, lines = parted
    alone = load_config(config)
    data = check_data(alone)
    loader = open_loader(alone, World(Placement(), torch.device("cpu")), data, open_stream(alone, data), 0)
    order = [n for micro in loader.take(BATCH * STEPS // MICRO_BATCH[2]) for n in micro.sample_ids.tolist()]
    loader.close()
    seen = Counter(position for line in lines for position in line["positions"])
    assert seen == Counter(range(BATCH * STEPS))
    assert len(set(order)) == len(order)
    for line in lines:
        assert {position // BATCH for position in line["positions"]} == {line["step"] - 1}
        assert line["sample_ids"] == [order[position] for position in line["positions"]]
    ranks = Counter(line["step"] for line in lines)
    assert [ranks[step] for step in range(1, STEPS + 1)] == [count for count, _ in PARTS for _ in range(2)]
