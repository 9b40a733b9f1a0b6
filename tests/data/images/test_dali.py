import io

import numpy as np
import torch

from ecar_dist.data.images.dali import NpyDecoder


def encode(arrays):
    files = [io.BytesIO() for _ in arrays]
    for file, array in zip(files, arrays, strict=True):
        np.save(file, array)
    return [np.frombuffer(file.getvalue(), dtype=np.uint8) for file in files]


def test_a_decoded_batch_stays_while_the_next_ones_are_decoded():
    decoder = NpyDecoder(4, torch.device("cpu"))
    batches = np.random.default_rng(0).normal(size=(5, 4, 3, 2, 2)).astype(np.float16)
    decoded = [decoder.decode(encode(batch[: 4 - place % 2])) for place, batch in enumerate(batches)]
    for place, (batch, found) in enumerate(zip(batches, decoded, strict=True)):
        np.testing.assert_array_equal(found.numpy(), batch[: 4 - place % 2])
