"""benchmarks/mup.py compares trainings that differ only in muP, the width and the rate."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import mup


def test_at_the_base_width_mup_changes_nothing_and_elsewhere_it_does():
    images, labels = mup.digits()

    def loss(width, with_it):
        return mup.final_loss(mup.run_config(with_it, width, 2e-3, seed=0), images, labels, steps=3)

    assert loss(mup.WIDTHS[0], True) == loss(mup.WIDTHS[0], False)
    assert loss(mup.WIDTHS[1], True) != loss(mup.WIDTHS[1], False)
