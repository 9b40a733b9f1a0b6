import numpy as np
import torch

from ecar_dist.data.sources import _MAX_FREE_BLOCKS, RecycledArrays


def address(array):
    return array.__array_interface__["data"][0]


def test_memory_comes_back_only_when_the_last_holder_is_gone():
    arrays = RecycledArrays(np.dtype(np.float16))
    first = arrays.empty((4, 3))
    place, tensor = address(first), torch.from_numpy(first)
    part = tensor[1:]
    del first, tensor
    assert address(arrays.empty((4, 3))) != place
    del part
    again = arrays.empty((2, 3))
    assert address(again) == place
    assert again.shape == (2, 3)


def test_a_numpy_slice_holds_the_memory_too():
    arrays = RecycledArrays(np.dtype(np.float16))
    first = arrays.empty((4, 3))
    place, part = address(first), first[2:, 1:]
    del first
    assert address(arrays.empty((4, 3))) != place
    del part
    assert address(arrays.empty((4, 3))) == place


def test_a_block_that_is_too_small_is_not_used():
    arrays = RecycledArrays(np.dtype(np.float16))
    del (small := [arrays.empty((2,))])[0]
    assert not small
    large = arrays.empty((1000, 8))
    large[:] = 1
    assert large.shape == (1000, 8)
    assert large.dtype == np.float16


def test_only_some_blocks_are_kept():
    arrays = RecycledArrays(np.dtype(np.float16))
    for _ in range(2):
        lent = [arrays.empty((4,)) for _ in range(3 * _MAX_FREE_BLOCKS)]
        assert len({address(array) for array in lent}) == 3 * _MAX_FREE_BLOCKS
        del lent
    assert len(arrays._free) == _MAX_FREE_BLOCKS
