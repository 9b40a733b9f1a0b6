"""Numbers of nodes over which a global batch divides evenly."""

import pytest

from ecar_dist.cluster.resources import usable_counts, usable_nodes
from ecar_dist.config.read import config_from_dict
from ecar_dist.errors import ConfigError


@pytest.fixture
def config(tree):
    """48 samples in micro-batches of 4: 12 of them."""
    tree["batch"] = {"global_batch_size": 48, "micro_batch_size": 4}
    return config_from_dict(tree)


@pytest.mark.parametrize(
    ("nodes", "ranks", "usable"),
    [(1, 1, 1), (4, 1, 4), (5, 1, 4), (9, 1, 6), (4, 2, 3), (5, 2, 3), (2, 4, 1), (1, 12, 1)],
)
def test_the_most_nodes_that_the_batch_divides_on(config, nodes, ranks, usable):
    assert usable_nodes(config, nodes, ranks) == usable


def test_no_number_of_nodes_makes_up_for_ranks_that_do_not_divide(config):
    with pytest.raises(ConfigError, match=r"1 to 3 nodes of 8 ranks.*=48 .* 4 x 8 = 32; .*=32 or 64"):
        usable_nodes(config, 3, 8)


def test_all_counts_of_a_range(config):
    assert usable_counts(config, 2, 7, 1) == [2, 3, 4, 6]
    with pytest.raises(ConfigError, match=r"5 nodes of 1 ranks.* 4 x 5 = 20; .*=40 or 60"):
        usable_counts(config, 5, 5, 1)
