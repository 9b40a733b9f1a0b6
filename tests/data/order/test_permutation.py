import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ecar_dist.data.order.permutation import bits_for, hash_keys, permute


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 600), more=st.integers(0, 300), seed=st.integers(-(2**63), 2**64 - 1), block=st.integers(1, 99)
)
def test_any_size_in_any_network_that_holds_it(size, more, seed, block):
    values, bits = np.arange(size), bits_for(size + more)
    keys = hash_keys(seed, np.full(size, 7))
    images = permute(values, size, keys, bits)
    assert np.array_equal(np.sort(images), values)
    in_blocks = [permute(part, size, keys[: part.size], bits) for part in np.split(values, range(block, size, block))]
    assert np.array_equal(np.concatenate(in_blocks), images)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(2, 300), seed=st.integers(0, 2**63 - 1))
def test_values_of_two_sizes_and_keys_share_a_call(size, seed):
    bits = bits_for(size)
    sizes = np.repeat([size - 1, size], [size - 1, size])
    values = np.concatenate([np.arange(size - 1), np.arange(size)])
    keys = hash_keys(seed, sizes)
    images = permute(values, sizes, keys, bits)
    for one_size in (size - 1, size):
        chosen = sizes == one_size
        assert np.array_equal(np.sort(images[chosen]), np.arange(one_size))
        assert np.array_equal(permute(values[chosen], one_size, keys[chosen], bits), images[chosen])


def test_keys_differ_by_every_field_and_by_place():
    purpose, fields = 0x70757270, np.arange(1000)
    keys = [
        hash_keys(seed, use, *rest)
        for seed in (0, 1)
        for use in (purpose, purpose + 1)
        for rest in ((fields,), (fields, 5), (5, fields))
    ]
    assert len(set(np.concatenate(keys).tolist())) == 12_000 - 4, "only (5, 5) comes twice"


def test_no_values():
    assert permute(np.arange(0), 5, hash_keys(0, np.arange(0)), 3).tolist() == []
