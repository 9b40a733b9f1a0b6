"""What is kept as checkpoints are committed one by one, as in the store."""

from hypothesis import given, settings
from hypothesis import strategies as st

from ecar_dist.runtime.checkpoint.store import names_to_keep


def history(steps, keep, every):
    """All that is left after saves at `steps`, with a removal after each."""
    left = []
    for samples in steps:
        left.insert(0, (f"step-{samples:08d}", samples))
        names = names_to_keep(left, keep, every)
        left = [item for item in left if item[0] in names]
    return [samples for _, samples in left]


def test_the_newest_stay():
    assert history(range(10, 100, 10), keep=2, every=0) == [90, 80]


def test_the_first_at_or_after_each_multiple_is_kept():
    assert history([30, 60, 90, 100, 130, 190, 220, 260], keep=2, every=100) == [260, 220, 100]
    assert history([30, 60, 95, 105, 300, 310, 320, 330], keep=2, every=100) == [330, 320, 300, 105]


def test_a_step_over_several_multiples_is_kept_once():
    assert history([10, 350, 360, 370, 380], keep=2, every=100) == [380, 370, 350]


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(2, 4), st.integers(0, 120))
def test_removal_after_each_save_keeps_the_same_as_one_removal_at_the_end(gaps, keep, every):
    steps = [sum(gaps[: index + 1]) for index in range(len(gaps))]
    everything = [(f"step-{samples:08d}", samples) for samples in reversed(steps)]
    expected = names_to_keep(everything, keep, every)
    assert {f"step-{samples:08d}" for samples in history(steps, keep, every)} == expected
