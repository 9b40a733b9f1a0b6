"""The simulation of a large job: its plans are the loader's, its cache and its clock are arithmetic."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ecar_dist.cli import main as ecar_dist
from ecar_dist.data.loader import SampleLoader, Share
from ecar_dist.data.order.stream import SampleStream
from ecar_dist.plan.large import Job, few_images, large_lines, sample_bytes, simulation_lines
from ecar_dist.plan.reliability import (
    GPU_HOURS_A_FAILURE,
    RESTART_SECONDS,
    SaveTimes,
    best_interval,
    goodput,
    save_times,
    seconds_between_failures,
)
from ecar_dist.plan.simulation import Cluster, NodeTraffic, blocks, simulate_epoch

SAVES = SaveTimes(between=100.0, stall=1.0, write=2.0, restore=3.0)
NEVER = 1e30  # seconds between failures


class Recorded:
    """A source that only records what the loader plans."""

    can_flip = False

    def __init__(self):
        self.plans = []

    def read(self, locations, flip):
        return torch.zeros(len(locations), 1, dtype=torch.float16), torch.zeros(len(locations), dtype=torch.int64)

    def plan(self, soon, future):
        self.plans.append(set(soon))

    def traffic(self):
        return {}

    def close(self):
        pass


def make_stream(sources=((8,) * 64,), batch=16, **options):
    return SampleStream(sources, seed=3, global_batch_size=batch, weights=[1.0] * len(sources), **options)


@pytest.mark.parametrize("sources", [((8,) * 64,), ((8,) * 64, (8,) * 64)])
def test_the_plans_are_those_of_real_loaders(sources):
    """Two nodes of two ranks, for one epoch: block by block, the shards that the loaders of a node ask for."""
    stream, batch = make_stream(sources, lanes=4, window_shards=2), 16
    walked = list(blocks(stream, batch, 4))
    assert len(walked) > 4
    assert walked[-1][1] == stream.count
    asked = {}
    for rank in range(4):
        recorded = [Recorded() for _ in sources]
        share = Share(batch, 4, rank, 4, node_ranks=(rank // 2 * 2, rank // 2 * 2 + 1))
        with SampleLoader(recorded, stream, share, seed=0) as loader:
            for _ in itertools.islice(loader, stream.count // 16):
                pass
        asked[rank] = [source.plans for source in recorded]
    for block, (begin, _, soon) in enumerate(walked):
        whole = begin + max(stream.window, soon - begin)  # the simulation does not look ahead into the next epoch
        if whole > walked[-1][1]:
            break
        for node in range(2):
            theirs = stream.upcoming(begin, soon, [2 * node, 2 * node + 1], 4)
            for source, shards in enumerate(theirs):
                ours = set().union(*(asked[rank][source][block] for rank in (2 * node, 2 * node + 1)))
                assert ours == set(shards)
    assert block >= 4


def simulated(stream=None, *, nodes=2, network=1e6, cache=None, failures=NEVER, step=1.0, seed=0):
    stream = stream or make_stream()
    sizes = [np.full(len(order.counts), 1000) for order in stream.orders]
    return simulate_epoch(stream, sizes, 16, Cluster(nodes, 2, network, cache, failures), step, SAVES, seed=seed)


def test_each_shard_is_fetched_once_where_nodes_share_none():
    epoch = simulated()
    assert epoch.needed == 64_000
    assert 1.0 <= epoch.fetched / epoch.needed < 1.3  # 16 lanes of 4 shards: neighbours share a shard
    assert epoch.steps == 32
    assert epoch.training == 32.0


def test_a_slow_network_is_waited_for_and_a_fast_one_is_not():
    slow, fast = simulated(network=10.0), simulated(network=1e12)
    assert slow.data_stall + slow.training + slow.save_stall >= slow.fetched / 2 / 10.0 * 0.99
    assert slow.data_stall > slow.training
    assert fast.data_stall < 1e-6
    assert fast.goodput > 0.98 > 0.1 > slow.goodput


def test_saves_stall_once_in_an_interval():
    epoch = simulated(step=50.0, network=1e12)
    assert (epoch.saves, epoch.save_stall) == (16, 16.0)  # 1,600 s of training


def test_failures_lose_work_and_repeat_for_a_seed():
    epoch = simulated(step=50.0, network=1e12, failures=400.0)
    assert epoch.failures >= 2
    least = SAVES.write + RESTART_SECONDS + SAVES.restore
    assert epoch.failures * least <= epoch.lost <= epoch.failures * (least + SAVES.between)
    assert simulated(step=50.0, network=1e12, failures=400.0) == epoch
    assert simulated(step=50.0, network=1e12, failures=400.0, seed=1) != epoch


def test_a_cache_drops_what_is_used_last():
    traffic = NodeTraffic([np.full(4, 10)], budget=20)
    traffic.request([[0, 1, 2]], [{0: 0, 1: 1, 2: 2}])
    assert list(traffic.queue) == [(0, 0), (0, 1)]  # shard 2 would evict one that is needed earlier
    traffic.transfer(15)
    assert (list(traffic.cached), traffic.queue) == ([(0, 0)], {(0, 1): 5.0})
    assert traffic.complete([[0, 1]]) == 5.0
    traffic.request([[1, 3]], [{1: 0, 3: 1}])
    assert traffic.complete([[3]]) == 10.0
    traffic.request([[3]], [{3: 0, 1: 1}])
    assert set(traffic.cached) == {(0, 3), (0, 1)}
    assert traffic.fetched == 30


def test_a_small_cache_is_filled_again():
    stream = make_stream(((8,) * 256,))
    whole, tight = simulated(stream), simulated(stream, cache=40_000)
    assert tight.fetched >= whole.fetched


def test_goodput_and_the_best_interval():
    failures = seconds_between_failures(1000, 50_000.0)
    assert failures == 180_000
    lost = (50 + 2 + RESTART_SECONDS + 3) / 180_000
    assert goodput(SAVES, failures) == pytest.approx(1 - 0.01 - lost)
    assert goodput(SAVES, 1.0) == 0
    best = best_interval(SAVES, failures)
    assert best == pytest.approx(600.0)
    near = [goodput(SaveTimes(best * factor, 1.0, 2.0, 3.0), failures) for factor in (0.8, 1.0, 1.25)]
    assert near[1] == max(near)


def test_what_a_plan_says_of_a_large_job(make_config):
    config = make_config(batch={"global_batch_size": 4096, "micro_batch_size": 32})
    lines = large_lines(Job(config, 128, "H100", step_seconds=0.25))
    data, restore, failures, energy = lines
    rate = 4096 / 0.25 * sample_bytes(config) / 1e9
    assert f"{rate:.3g} GB/s in total, {rate / 16:.3g} GB/s for each of 16 nodes" in data
    checkpoint = 911.6e6 * 16 / 1e9
    assert f"restore: {checkpoint / 16:.3g} GB per node" in restore
    assert f"one in {GPU_HOURS_A_FAILURE / 128:.3g} h on 128 GPUs" in failures
    hours = math.ceil(1_000_000 / 4096) * 0.25 / 3600
    assert f"{hours * 128 * 1275 / 1e6:.3g} MWh" in energy
    saves = save_times(config, 128, 0.25, 8, 2e9)
    assert saves.write == pytest.approx(checkpoint / 16 / 2, rel=1e-3)
    waits = save_times(make_config(checkpoint={"overlap": False}), 128, 0.25, 8, 2e9)
    assert waits.stall == pytest.approx(saves.stall + saves.write)


def test_few_images_of_a_rank_are_a_warning(make_config):
    config = make_config(batch={"global_batch_size": 2048, "micro_batch_size": 2})
    assert few_images(config, 512) == []
    assert "1024 ranks 2 images" in few_images(config, 1024)[0]


def test_a_simulation_by_the_number_of_samples(make_config):
    config = make_config(batch={"global_batch_size": 4096, "micro_batch_size": 32})
    first, fetched, stalls, time = simulation_lines(Job(config, 64, "H100", 0.25, samples=10_000_000))
    assert "2,441 shards, 2,441 steps of 0.25 s on 8 nodes x 8 ranks" in first
    assert float(fetched.split(", ")[1].split()[0]) < 1.1
    assert " saves" in stalls
    assert "goodput" in time


def test_the_command_line(capsys):
    path = str(Path(__file__).parents[2] / "configs/imagenet256_xl.yaml")
    given = ["plan", path, "--world-size", "64", "--simulate"]
    assert ecar_dist(given) == 1
    assert "--device" in capsys.readouterr().err
    assert ecar_dist([*given, "--device", "H100"]) == 1
    assert "--samples" in capsys.readouterr().err
    options = ["--device", "H100", "--samples", "1000000", "--failure-hours", "1", "--storage", "1", "--cache-gib", "9"]
    assert ecar_dist([*given, *options]) == 0
    said = capsys.readouterr().out
    assert "one in 0.0156 h on 64 GPUs" in said
    assert "a cache of 9 GiB, one failure in 0.0156 h" in said
    assert ecar_dist(["check", path, "batch.micro_batch_size=2"]) == 0
    assert "R = 1024: 2048 = 2 x 1 x 1024, 2 per rank" in capsys.readouterr().out
