import numpy as np
import pytest
import torch

from ecar_dist.rng import Draw, Purpose, draw_all, normal, philox4x32, uniform
from tests.kernels import Kernels

# Known-answer vectors of the reference implementation (Random123, kat_vectors, philox4x32 with 10 rounds).
KNOWN = [
    ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_matches_the_published_vectors(counter, key, expected):
    words = philox4x32([torch.tensor([word]) for word in counter], key)
    assert [int(word) for word in words] == expected


def test_a_draw_depends_on_its_position_alone():
    together = normal(7, torch.arange(10), Purpose.NOISE, (3, 5))
    for position in (0, 3, 9):
        alone = normal(7, torch.tensor([position]), Purpose.NOISE, (3, 5))
        assert torch.equal(alone[0], together[position])


def test_draws_made_together_are_those_made_alone_in_a_tenth_of_the_operations():
    """Draws of any size, uniform and normal ones in any order, at positions beyond 32 bits."""
    positions = torch.tensor([0, 5, 2**32 + 7, 2**40])
    draws = [
        Draw(Purpose.TIME, (), is_normal=False),
        *(Draw(Purpose.NOISE, (3, 2**k), k) for k in range(5)),
        Draw(Purpose.MASK_ORDER, (7,), is_normal=False),
        Draw(Purpose.POSTERIOR, (1,)),
        Draw(Purpose.POSTERIOR, (6,), 1),
        Draw(Purpose.TIME, (), 2, is_normal=False),
    ]
    draw_all(11, positions, draws)  # makes the counters, which are cached
    with Kernels() as together:
        found = draw_all(11, positions, draws)
    with Kernels() as alone:
        expected = [
            (normal if draw.is_normal else uniform)(11, positions, draw.purpose, draw.shape, stream=draw.stream)
            for draw in draws
        ]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert together.count < 300
    assert alone.count > 9 * together.count


def test_seed_purpose_stream_and_high_positions_all_matter():
    base = normal(7, torch.tensor([5]), Purpose.NOISE, (64,))
    others = [
        normal(8, torch.tensor([5]), Purpose.NOISE, (64,)),
        normal(7 + 2**32, torch.tensor([5]), Purpose.NOISE, (64,)),
        normal(7, torch.tensor([5 + 2**32]), Purpose.NOISE, (64,)),
        normal(7, torch.tensor([5]), Purpose.CONTEXT, (64,)),
        normal(7, torch.tensor([5]), Purpose.NOISE, (64,), stream=1),
    ]
    for other in others:
        assert (base != other).float().mean() > 0.99


def test_moments_and_independence():
    draws = normal(1, torch.arange(4000), Purpose.NOISE, (50,)).double()
    assert abs(draws.mean()) < 0.01
    assert abs(draws.var() - 1) < 0.01
    assert abs((draws**4).mean() - 3) < 0.06
    correlation = np.corrcoef(draws[:, :8].numpy().T) - np.eye(8)
    assert np.abs(correlation).max() < 0.06
    u = uniform(1, torch.arange(200_000), Purpose.TIME)
    assert 0 < u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    assert abs(u.double().mean() - 0.5) < 3e-3
