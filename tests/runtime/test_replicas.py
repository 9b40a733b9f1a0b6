"""The hash of replicated tensors, and the odd ranks; train/test_unlike_ranks.py flips bits on real ranks."""

import pytest
import torch

from ecar_dist.runtime import replicas
from ecar_dist.runtime.replicas import fingerprint, judge_replicas

CPU = torch.device("cpu")
NODES = ("n1", "n1", "n2", "n2", "n3", "n3")


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 40), (), (101,))]


def hash_of(*values):
    return int(fingerprint(values, CPU))


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 32), (torch.bfloat16, 16)])
def test_every_single_flipped_bit_is_seen(dtype, bits, monkeypatch):
    monkeypatch.setattr(replicas, "_CHUNK", 32)
    good, word = hash_of(*tensors(dtype)), {32: torch.int32, 16: torch.int16}[bits]
    seen = set()
    for index, one in enumerate(tensors(dtype)):
        for at in range(one.numel()):
            for bit in (0, 7, bits - 2, bits - 1):
                flipped = tensors(dtype)
                mask = torch.tensor(1 << bit).to(word) if bit < bits - 1 else torch.iinfo(word).min
                flipped[index].view(word).view(-1)[at] ^= mask
                seen.add(hash_of(*flipped))
    assert good not in seen
    assert len(seen) == 4 * sum(one.numel() for one in tensors())


def test_the_order_of_elements_and_of_tensors_counts():
    a, b, _ = tensors()
    swapped = a.clone()
    swapped[0, 0], swapped[2, 3] = a[2, 3], a[0, 0]
    assert len({hash_of(a, b), hash_of(b, a), hash_of(swapped, b), hash_of(a.roll(1), b)}) == 4


def test_it_is_of_the_bits_alone():
    a, *_ = tensors()
    wide = torch.zeros(3, 80)
    wide[:, ::2] = a
    assert hash_of(wide[:, ::2]) == hash_of(a)  # whatever its memory layout
    assert hash_of() == hash_of(torch.empty(0))
    assert hash_of(torch.tensor([0.0])) != hash_of(torch.tensor([-0.0]))
    assert hash_of(torch.tensor([float("nan")])) == hash_of(torch.tensor([float("nan")]))


def test_large_tensors_are_hashed_in_parts_that_do_not_show(monkeypatch):
    values = torch.arange(1000.0)
    monkeypatch.setattr(replicas, "_CHUNK", 64)
    parts = hash_of(values)
    swapped = values.view(-1).clone()
    swapped[:64], swapped[64:128] = values[64:128], values[:64]
    assert hash_of(swapped) != parts


@pytest.mark.parametrize(
    ("hashes", "named", "unfit"),
    [
        ("aaaaaa", None, ()),
        ("aaabaa", "rank 3 on n2 holds", ("n2",)),
        ("baaaab", "rank 0 on n1; rank 5 on n3 hold", ()),  # two of three nodes: none is unfit
        ("aaaabb", "ranks 4, 5 on n3 hold", ("n3",)),
        ("aaabbb", "ranks 0, 1 on n1; ranks 2, 3 on n2; ranks 4, 5 on n3 hold", ()),  # unknown which ranks are right
        ("aaabbc", "ranks 0, 1 on n1; ranks 2, 3 on n2; ranks 4, 5 on n3 hold", ()),
    ],
)
def test_most_ranks_are_right(hashes, named, unfit):
    verdict = judge_replicas([ord(letter) for letter in hashes], NODES, 7)
    assert verdict.bad_nodes == unfit
    assert verdict.again == (named is not None)
    if named:
        assert verdict.problem.startswith(named)
        assert "step 7" in verdict.problem
    else:
        assert verdict.problem == ""


def test_the_only_node_is_named_and_not_kept_out():
    verdict = judge_replicas([1, 1, 2], ("n1",) * 3, 7)
    assert (verdict.bad_nodes, verdict.again) == ((), True)
    assert "rank 2 on n1" in verdict.problem
