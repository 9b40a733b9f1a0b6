"""The contents of a report, with simulated phases and ranks."""

import dataclasses
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from ecar_dist.runtime.world import Placement, World
from ecar_dist.train.telemetry import Counters, ForwardClock, LossByTime, Report, StepResult, Telemetry, progress_line
from ecar_dist.train.time_budget import Goodput, Phases
from tests.train.test_objective import make_config

RESULT = StepResult(0.5, (0.6, 0.4), 2.0, 1e-4)
FLOPS = 1e6
TOKENS = 4 * 4 + 8 * 8


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class PretendWorld(World):
    """One of several ranks; `sum` adds the values of the others, at a barrier of threads."""

    def __init__(self, rank, size, shared):
        super().__init__(Placement(rank=rank, size=size), torch.device("cpu"))
        self.shared, self.sums = shared, 0

    def sum(self, values):
        self.sums += 1
        self.shared["values"][self.rank] = values.clone()
        self.shared["barrier"].wait(60)
        values.copy_(torch.stack(self.shared["values"]).sum(0))
        self.shared["barrier"].wait(60)
        return values


class PretendForward:
    def __init__(self, *seconds):
        self.seconds = list(seconds)

    def take(self):
        return self.seconds.pop(0)


def make_telemetry(world=None, clock=None, goodput=None):
    config = make_config(num_stages=2)
    phases = Phases(lambda name, step: None, clock or Clock())
    world = world or World(Placement(), torch.device("cpu"))
    return Telemetry(config, world, phases, goodput or Goodput(), FLOPS), phases


def spend(phases, clock, **seconds):
    for name, amount in seconds.items():
        phases.enter(name, 1)
        clock.now += amount


def interval(telemetry, phases, clock, steps=2, applied=True, **seconds):
    """Some steps of 8 samples, each of 10 s: the given seconds for each phase, the rest for computing."""
    for _ in range(steps):
        rest = 10.0 - sum(seconds.values())
        spend(phases, clock, **seconds, forward=0.3 * rest, backward=0.6 * rest, optimizer=0.1 * rest)
        telemetry.end_step(8, applied)


def test_the_first_report_has_no_rates_and_the_second_has_those_of_its_interval():
    clock = Clock()
    telemetry, phases = make_telemetry(clock=clock)
    spend(phases, clock, start=60.0, load=40.0)
    interval(telemetry, phases, clock)
    first = telemetry.report(RESULT, 16, Counters())
    assert not {tag for tag in first.values if tag.startswith("perf/") and "per_second" in tag}
    assert first.values["time/start"] == 60 / 120
    interval(telemetry, phases, clock, steps=3)
    values = telemetry.report(RESULT, 40, Counters()).values
    assert values["perf/samples_per_second"] == pytest.approx(24 / 30)
    assert values["perf/tokens_per_second"] == pytest.approx(24 / 30 * TOKENS)
    assert values["perf/step_seconds"] == pytest.approx(10.0)
    assert values["train/tokens"] == 40 * TOKENS
    assert (values["time/start"], values["time/load"]) == (0.0, 0.0)
    assert values["time/forward"] == pytest.approx(0.3)
    assert sum(share for tag, share in values.items() if tag.startswith("time/")) == pytest.approx(1.0)
    assert "perf/mfu" not in values  # no peak is known for a CPU


def test_the_contract_of_tags():
    telemetry, phases = make_telemetry(clock=(clock := Clock()))
    interval(telemetry, phases, clock)
    counters = Counters(stall_seconds=0.5, checkpoint_failures=1, skipped_steps=3)
    values = telemetry.report(RESULT, 16, counters).values
    assert {"train/loss": 0.5, "train/loss_stage0": 0.6, "train/loss_stage1": 0.4}.items() <= values.items()
    assert {"train/grad_norm": 2.0, "train/lr": 1e-4, "train/skipped_steps": 3.0}.items() <= values.items()
    assert {"checkpoint/stall_seconds": 0.5, "checkpoint/failures": 1.0}.items() <= values.items()
    assert values["checkpoint/stall_fraction"] == pytest.approx(0.5 / 20)
    assert values["mem/peak_gib"] > 0.01
    assert all(isinstance(value, float) for value in values.values())


def test_after_a_roll_back_the_rate_is_that_of_the_work_done():
    telemetry, phases = make_telemetry(clock=(clock := Clock()))
    interval(telemetry, phases, clock)
    telemetry.report(RESULT, 800, Counters())
    interval(telemetry, phases, clock)
    assert telemetry.report(RESULT, 400, Counters()).values["perf/samples_per_second"] == pytest.approx(16 / 20)


def test_steps_that_were_all_passed_over_give_no_step_time():
    telemetry, phases = make_telemetry(clock=(clock := Clock()))
    interval(telemetry, phases, clock)
    telemetry.report(RESULT, 16, Counters())
    spend(phases, clock, data=5.0)
    values = telemetry.report(RESULT, 32, Counters()).values
    assert values["perf/samples_per_second"] == 0.0
    assert "perf/step_seconds" not in values


def on_ranks(size, run):
    """Run run(world) in one thread per rank. Returns their results."""
    shared = {"values": [None] * size, "barrier": threading.Barrier(size)}
    results = [None] * size

    def work(rank):
        results[rank] = run(PretendWorld(rank, size, shared))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_one_all_reduce_gives_all_ranks_the_loss_by_time_the_slow_rank_and_the_longest_wait():
    def run(world):
        telemetry, phases = make_telemetry(world, clock := Clock())
        telemetry.forward_clock = PretendForward(*[7.0 if world.rank == 2 else 5.0] * 4)
        reports = []
        for number in range(1, 5):
            # bin 1 of stage 0 gets one loss per rank; rank 1's is not finite
            loss = float("nan") if world.rank == 1 else float(world.rank)
            telemetry.losses.add(torch.tensor([[loss, 1.0]]), torch.tensor([[0.3, 0.9]]))
            interval(telemetry, phases, clock)
            waited = (3.0 if world.rank == 1 else 0.2) * number
            reports.append(telemetry.report(RESULT, 16 * number, Counters(data_wait_seconds=waited)))
        assert world.sums == 4
        return reports

    ranks = on_ranks(4, run)
    last = [reports[-1] for reports in ranks]
    for report in last:
        assert report.values["train/loss_stage0_t1"] == pytest.approx((0 + 2 + 3) / 3)
        assert report.values["train/loss_stage1_t3"] == 1.0
        assert "train/loss_stage0_t0" not in report.values
        assert report.values["perf/data_wait_fraction"] == pytest.approx(3.0 / 20)
        assert report.values["perf/slowest_rank"] == 1.0  # 8 s of its own against 7.2 and 5.2
        assert report.values["perf/slowest_ratio"] == pytest.approx(8.0 / 5.2)
        assert report.values["mem/peak_gib"] == last[0].values["mem/peak_gib"]
    assert "perf/slowest_rank" not in ranks[0][1].values
    assert ranks[0][3].news == "rank 1 is 1.5x slower than the median rank (data)"


def test_the_verdict_is_said_when_it_has_changed_for_two_intervals():
    telemetry, phases = make_telemetry(clock=(clock := Clock()))
    interval(telemetry, phases, clock)
    news, waited = [telemetry.report(RESULT, 0, Counters()).news], 0.0
    for wait in (0.0, 0.0, 0.0, 4.0, 0.0, 4.0, 5.0, 5.0, 0.0, 0.0):
        interval(telemetry, phases, clock, steps=1)
        waited += wait
        news.append(telemetry.report(RESULT, 0, Counters(data_wait_seconds=waited)).news)
    data = "data-bound: 50% of the time waits for data"
    compute = "compute-bound"
    assert news == [None, None, compute, None, None, None, None, data, None, None, compute]


def test_the_closing_line_sums_up_what_came_after_the_first_report(monkeypatch):
    monkeypatch.setattr("ecar_dist.train.time_budget.time", SimpleNamespace(time=lambda: 1000.0))
    goodput = Goodput(1000.0 - 230.0)
    goodput.load_state_dict({"kept_seconds": 5.0})
    telemetry, phases = make_telemetry(clock=(clock := Clock()), goodput=goodput)
    spend(phases, clock, start=1000.0)
    interval(telemetry, phases, clock)
    assert telemetry.closing_line() is None
    telemetry.report(RESULT, 16, Counters())
    assert telemetry.closing_line() is None
    interval(telemetry, phases, clock, steps=8)
    telemetry.report(RESULT, 80, Counters(data_wait_seconds=4.0))
    spend(phases, clock, checkpoint=10.0)  # the last one, after the last report
    interval(telemetry, phases, clock, steps=1)
    assert telemetry.closing_line() == (
        "overall: 1 samples/s, data wait 4.0%, checkpoint stall 10.0%, goodput 50.0%; "
        "checkpoint-bound: 10% of the time waits for checkpoints"
    )


def test_mfu_is_of_the_peak_of_the_data_sheet():
    telemetry, phases = make_telemetry(clock=(clock := Clock()))
    telemetry._peak, telemetry._flops_per_sample = 100.0, 50.0
    for samples in (16, 40):
        interval(telemetry, phases, clock, steps=3)
        values = telemetry.report(RESULT, samples, Counters()).values
    assert values["perf/mfu"] == pytest.approx(values["perf/samples_per_second"] / 2)
    assert "of the data sheet's peak" in telemetry.closing_line()


def test_the_progress_line_has_what_is_known_and_news_last():
    early = Report({"perf/data_wait_fraction": 0.5}, None)
    assert progress_line(3, 9, 24, 72, RESULT, early) == (
        "step 3/9  loss 0.5000 (0.6000 0.4000)  grad 2.000  lr 1.00e-04"
    )
    report = Report({"perf/data_wait_fraction": 0.5, "perf/samples_per_second": 12.0}, "data-bound: ...")
    assert progress_line(3, 9, 24, 72, RESULT, report).endswith(
        "  12 samples/s  data wait 50%  left 4s  data-bound: ..."
    )


def test_a_huge_number_does_not_fill_the_progress_line():
    huge = dataclasses.replace(RESULT, loss=2e30, stage_losses=(1.0, 3e30), grad_norm=1e38)
    line = progress_line(3, 9, 24, 72, huge, Report({"perf/data_wait_fraction": 0.5}, None))
    assert line == "step 3/9  loss 2e+30 (1.0000 3e+30)  grad 1e+38  lr 1.00e-04"


def test_the_forward_clock_counts_the_time_inside_and_starts_again_when_taken(monkeypatch):
    readings = iter([10.0, 12.0, 20.0, 24.0])  # at entry and at exit, twice
    monkeypatch.setattr("ecar_dist.train.telemetry.time.perf_counter", lambda: next(readings))
    clock = ForwardClock(torch.device("cpu"))
    for _ in range(2):
        with clock:
            pass
    assert clock.take() == 6.0
    assert clock.take() == 0.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_is_the_device_that_is_measured():
    device = torch.device("cuda")
    matrix = torch.randn(4096, 4096, device=device)
    clock = ForwardClock(device)
    (matrix @ matrix).sum().item()
    began = time.perf_counter()
    with clock:
        for _ in range(50):
            matrix @ matrix
    launched = time.perf_counter() - began
    torch.cuda.synchronize()
    waited = time.perf_counter() - began
    seconds = clock.take()
    assert launched < 0.5 * seconds  # the host had finished long before
    assert 0.5 * waited < seconds <= 1.05 * waited
    assert clock.take() == 0.0


def test_each_loss_lands_in_the_bin_of_its_stage_and_time():
    losses = torch.tensor([[1.0, 10.0], [3.0, 20.0], [5.0, 40.0]])
    times = torch.tensor([[0.0, 0.99], [0.2499, 0.5], [0.25, 0.5]])
    by_time = LossByTime(2, 4, torch.device("cpu"))
    by_time.add(losses, times)
    assert by_time.means(by_time.take().tolist()) == {
        "train/loss_stage0_t0": 2.0,
        "train/loss_stage0_t1": 5.0,
        "train/loss_stage1_t3": 10.0,
        "train/loss_stage1_t2": 30.0,
    }


def test_sums_over_micro_batches_and_ranks_give_the_mean_over_all_samples():
    generator = torch.Generator().manual_seed(0)
    losses, times = (torch.rand(40, 3, generator=generator) for _ in range(2))
    whole, parts = LossByTime(3, 5, torch.device("cpu")), [LossByTime(3, 5, torch.device("cpu")) for _ in range(2)]
    whole.add(losses, times)
    for n, size in enumerate((7, 13, 20)):
        at = slice(sum((7, 13, 20)[:n]), sum((7, 13, 20)[:n]) + size)
        parts[n % 2].add(losses[at], times[at])
    table = sum(part.take() for part in parts)
    assert whole.means(table.tolist()) == pytest.approx(whole.means(whole.take().tolist()), rel=1e-12)
    for k in range(3):
        inside = (times[:, k] >= 0.4) & (times[:, k] < 0.6)
        expected = losses[inside, k].double().mean()
        assert whole.means(table.tolist())[f"train/loss_stage{k}_t2"] == pytest.approx(float(expected), rel=1e-9)


def test_what_was_taken_is_gone_and_what_is_not_finite_never_comes():
    by_time = LossByTime(1, 1, torch.device("cpu"))
    by_time.add(torch.tensor([[float("nan")], [2.0], [float("inf")]]), torch.tensor([[0.1], [0.2], [1.0]]))
    by_time.add(torch.tensor([[7.0]]), torch.tensor([[float("nan")]]))  # the loss over many times
    assert by_time.means(by_time.take().tolist()) == {"train/loss_stage0_t0": 2.0}
    assert by_time.means(by_time.take().tolist()) == {}
