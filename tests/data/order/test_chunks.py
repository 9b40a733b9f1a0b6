"""The two-level order: each image once, in long pieces of the source, from many places."""

import random

import numpy as np
import pytest

from ecar_dist.data.order.chunks import ChunkOrder


def shards_of(count, per_shard, chunk, seed, chosen=None):
    """(rows, source images) of each shard, or of the chosen ones."""
    order = ChunkOrder(chunk)
    for index in range(-(-count // per_shard)) if chosen is None else chosen:
        rows = range(index * per_shard, min((index + 1) * per_shard, count))
        yield rows, *order.read_order(rows, index, count, seed)


def test_each_image_once_and_few_pieces():
    draw = random.Random(0)
    for _ in range(300):
        count, chunk = draw.randint(1, 400), draw.randint(2, 50)
        per_shard, seed = draw.randint(chunk, 120), draw.randint(-9, 9)
        images = []
        for expected, rows, found in shards_of(count, per_shard, chunk, seed):
            assert sorted(rows) == list(expected)
            pieces = 1 + np.count_nonzero(np.diff(found) != 1)
            assert pieces <= -(-len(rows) // chunk) + 2  # one is cut at each end of a shard, and one may be short
            images += found.tolist()
        assert sorted(images) == list(range(count)), (count, chunk, per_shard, seed)


def test_the_order_stays_what_it_is():
    """Sets have been written in this order."""
    found = [(found.tolist(), rows.tolist()) for _, rows, found in shards_of(10, 4, 2, 3)]
    assert found == [([8, 9, 0, 1], [1, 0, 2, 3]), ([2, 3, 4, 5], [5, 6, 7, 4]), ([6, 7], [8, 9])]
    (_, rows, found), *_ = shards_of(10**9, 4096, 64, 7, [200_000])
    assert found[[0, 1, -1]].tolist() == [885064064, 885064065, 437898879]
    assert rows[:3].tolist() == [819201963, 819203920, 819203471]


@pytest.mark.parametrize("chunk", [16, 64])
def test_a_shard_has_images_of_many_tars(chunk):
    """10^9 images in tars of 10,000, sorted by class. With 1 tar per shard, all bounds are exceeded by far."""
    shares, excess = [], []
    for _, _, found in shards_of(10**9, 4096, chunk, 0, range(0, 240_000, 12_000)):
        tars = np.bincount(np.unique(found // 10_000, return_inverse=True)[1])
        shares.append(tars.max() / 4096)
        classes = np.bincount(found // 1_000_000, minlength=1000)
        excess.append(((classes - 4.096) ** 2 / 4.096).sum() / 999)
    assert np.mean(shares) < 1.5 * chunk / 4096
    assert np.mean(excess) == pytest.approx(chunk, rel=0.1)  # 1 with one permutation of all images
