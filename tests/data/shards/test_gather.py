import mmap
import warnings

import numpy as np
import pytest
import torch

from ecar_dist.data.shards.gather import gather_rows, gather_values


def addresses_of(arrays):
    return np.array([array.ctypes.data for array in arrays], dtype=np.int64)


@pytest.mark.parametrize("width", [1, 2, 7, 4096])
def test_rows_of_several_read_only_maps_in_any_order(tmp_path, width):
    content = np.random.default_rng(0).integers(0, 1 << 16, (3, 5, width), dtype=np.uint16)
    arrays = []
    for number, part in enumerate(content):
        (tmp_path / str(number)).write_bytes(part.tobytes())
        with open(tmp_path / str(number), "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        arrays.append(np.frombuffer(mapped, np.float16).reshape(5, width))

    picked = [(2, 4), (0, 0), (1, 3), (2, 4), (0, 4)]
    out = torch.zeros(len(picked), width, dtype=torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns about arrays that cannot be written
        gather_rows(addresses_of([arrays[part][row] for part, row in picked]), out)
    # As bits, because some of them are NaN.
    np.testing.assert_array_equal(out.numpy().view(np.uint16), [content[part, row] for part, row in picked])


def test_values_and_a_single_address():
    first = np.arange(10, dtype=np.int64)
    second = np.arange(100, 110, dtype=np.int64)
    places = addresses_of([second[3:], first[9:], second[:1]])
    assert gather_values(places, np.dtype(np.int64)).tolist() == [103, 9, 100]
    assert gather_values(places[:1], np.dtype(np.int64)).tolist() == [103]
    out = torch.zeros(1, 4, dtype=torch.int64)
    gather_rows(places[:1], out)
    assert out.tolist() == [[103, 104, 105, 106]]
