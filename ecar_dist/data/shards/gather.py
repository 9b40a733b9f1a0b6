"""Copy the values at many memory addresses into one array, with a single call.

The rows of a batch are in the maps of many shards. Making a slice or a pointer in Python for each row takes about as
long as the copy itself. `torch.index_select` and numpy's indexing copy all rows in compiled code, but out of one array.
So that array covers all memory from the first address to the last: it has a row at each element, and the rows overlap.

    memory     ..| map of shard 7 |........| map of shard 2 |..
    rows             ^ row 0 begins here, row 1 one element later, ...
    index        (address - address of row 0) / bytes of an element

Only the rows of the index are read, so it does not matter what is between the maps. The caller must keep the memory at
the addresses mapped. The addresses must be whole elements apart.
"""

from __future__ import annotations

import numpy as np
import torch


def gather_rows(addresses: np.ndarray, out: torch.Tensor) -> None:
    """Copy a row from each address, int64 [n], into `out`, contiguous [n, width]. Releases the interpreter lock."""
    memory, index = _span(addresses, out.shape[1], out.numpy().dtype)
    rows = torch.from_numpy(memory).as_strided((memory.size - out.shape[1] + 1, out.shape[1]), (1, 1))
    torch.index_select(rows, 0, torch.from_numpy(index), out=out)


def gather_values(addresses: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The value at each address: int64 [n] -> `dtype` [n]."""
    memory, index = _span(addresses, 1, dtype)
    return memory[index]


def _span(addresses: np.ndarray, width: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """All elements from the first address to the end of the row at the last, and the index of each address in them."""
    first = int(addresses.min())
    index = (addresses - first) // dtype.itemsize
    return np.asarray(_Memory(first, int(index.max()) + width, dtype)), index


class _Memory:
    """`count` elements at an address, in the protocol by which numpy wraps foreign memory in arrays without a copy."""

    def __init__(self, address: int, count: int, dtype: np.dtype) -> None:
        # Not marked as read-only, because torch warns about such arrays. Nothing here writes to it.
        self.__array_interface__ = {
            "version": 3,
            "data": (address, False),
            "shape": (count,),
            "typestr": dtype.str,
        }
