import torch

from ecar_dist.runtime.ema import ShardedEma, ema_decay


def test_half_of_a_weight_is_left_after_a_half_life():
    decay = ema_decay(half_life_samples=1000, rampup=0.1, samples_seen=10**9, batch=10)
    assert abs(decay**100 - 0.5) < 1e-12


def test_the_half_life_ramps_up_with_samples_seen():
    early = ema_decay(half_life_samples=10**6, rampup=0.1, samples_seen=100, batch=10)
    assert abs(early - 0.5) < 1e-12  # half-life 10 samples = one batch
    assert early < ema_decay(10**6, 0.1, 1000, 10) < ema_decay(10**6, 0.1, 10**8, 10)


def test_batch_size_does_not_matter_in_the_long_run():
    small = ema_decay(10**4, 1.0, 10**6, 16) ** 4
    assert abs(small - ema_decay(10**4, 1.0, 10**6, 64)) < 1e-12


def test_the_average_is_fp32_and_follows_its_formula():
    masters = [torch.zeros(5), torch.ones(3)]
    ema = ShardedEma(masters, half_life_samples=100, rampup=1.0)
    expected = [master.clone().double() for master in masters]
    for step in range(1, 20):
        for master in masters:
            master.add_(0.1 * step)
        ema.update(step * 16, 16)
        decay = 0.5 ** (16 / min(100, step * 16))
        expected = [decay * old + (1 - decay) * new.double() for old, new in zip(expected, masters, strict=True)]
    for ours, reference in zip(ema.partitions, expected, strict=True):
        assert ours.dtype == torch.float32
        assert torch.allclose(ours.double(), reference, atol=1e-6)
