"""The benchmark of the framework tax, at its smallest: what it counts, and what its turns contain."""

import json
import sys
from pathlib import Path

import torch

from ecar_dist.runtime.ema import ShardedEma
from tests.conftest import free_port
from tests.fork_server import run_ranks

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import step
from operators import OperatorCount

SMALL = ["--preset", "T", "--latent-size", "8", "--micro-batch", "2", "--steps", "2", "--zero-stage", "0"]


def test_kernels_and_bytes_are_those_of_operators_that_touch_memory():
    a, b = torch.ones(4, 8), torch.ones(8)
    with OperatorCount() as count:
        a.add_(b.expand(4, 8))  # a is read and written; b has 8 elements, however often they are read
        a.view(32).detach()
        torch.empty(100)
        torch._foreach_mul_([a, b], 2.0)
    assert (count.kernels, count.bytes) == (2, 4 * (32 + 8 + 32) + 2 * 4 * (32 + 8))
    assert not count.reads


def test_every_way_to_read_a_number_counts_once_and_says_where():
    x, y = torch.ones(3), torch.ones((), requires_grad=True)
    optimizer = torch.optim.AdamW([y])
    with OperatorCount() as count:
        x.tolist()
        x[0].item()
        float(x.sum())
        assert x.isfinite().all()
        x.nonzero()
        (2 * y).backward()
        optimizer.step()  # reads its step counter, which a GPU would have on the host
        torch.cpu.synchronize()
    assert sum(count.reads.values()) == 5
    assert {place.rpartition(":")[0] for place in count.reads} == {"tests/benchmarks/test_step.py"}
    assert count.synchronisations == 1
    assert count.summary()["host_reads"] == 5


class Clock:
    """Stands in for `time` in step.py: an EMA update sleeps for 1 s, and a bare step computes for 0.5 s."""

    clock = cpu = 0.0

    def perf_counter(self):
        return self.clock

    def process_time(self):
        return self.cpu


def slow_down_the_average():
    time = step.time = Clock()
    update, bare_step = ShardedEma.update, step.Bare.step

    def slow_update(*arguments):
        time.clock += 1.0
        update(*arguments)

    def slow_bare_step(*arguments):
        time.clock += 0.5
        time.cpu += 0.5
        return bare_step(*arguments)

    ShardedEma.update, step.Bare.step = slow_update, slow_bare_step


def run_step():
    step.main(sys.argv[1:])


def test_both_learn_the_same_and_a_slow_average_is_part_of_the_tax(tmp_path):
    """What the run does after its optimizer step counts in its own turn, not in that of the bare model."""
    words = [*SMALL, "--json", str(tmp_path / "step.json"), "--hardware", "this"]
    (done,) = run_ranks(1, free_port(), *words, before=slow_down_the_average, main=run_step)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "step.json").read_text()) == result
    (case,) = result["cases"]
    assert case["largest_relative_difference_of_losses"] < 1e-6
    assert (case["eager"]["seconds"], case["eager"]["bare_seconds"]) == (1.0, 0.5)
    assert (case["eager"]["tax"]["median"], case["eager"]["tax_in_cpu_time"]["median"]) == (2.0, 0.0)
    assert case["counts"]["ours"]["kernels"] > case["counts"]["bare"]["kernels"] > 1000
    assert case["counts"]["bare"]["host_reads"] == 0
    assert "MISSED" in done.stdout
