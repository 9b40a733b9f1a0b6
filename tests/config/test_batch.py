"""global_batch_size = micro_batch_size x grad_accum_steps x world_size."""

import itertools

import pytest

from ecar_dist.config.batch import divides, grad_accum_steps
from ecar_dist.errors import ConfigError


def test_the_three_numbers_multiply_out_or_are_refused():
    for total, micro, world in itertools.product(range(1, 49), range(1, 9), range(1, 7)):
        if divides(total, micro, world):
            assert micro * grad_accum_steps(total, micro, world) * world == total
        else:
            with pytest.raises(ConfigError, match=rf"={total} .* {micro} x {world} = {micro * world};"):
                grad_accum_steps(total, micro, world)


@pytest.mark.parametrize(("total", "fits"), [(100, "=96 or 128"), (31, "=32"), (33, "=32 or 64")])
def test_the_nearest_batch_sizes_that_fit_are_named(total, fits):
    with pytest.raises(ConfigError) as caught:
        grad_accum_steps(total, 16, 2)
    assert str(caught.value).endswith(fits)
