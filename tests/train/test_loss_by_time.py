import pytest
import torch

from ecar_dist.train.loss_by_time import LossByTime


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
    by_time.add(torch.tensor([[7.0]]), torch.tensor([[float("nan")]]))  # the loss of many times
    assert by_time.means(by_time.take().tolist()) == {"train/loss_stage0_t0": 2.0}
    assert by_time.means(by_time.take().tolist()) == {}
