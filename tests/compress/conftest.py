"""A run that was never trained, and its export: small enough that quantising takes a second."""

import pytest

from ecar_dist.cli import main
from tests.sample.made_models import make_model_run


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return make_model_run(tmp_path_factory.mktemp("quantised"), sample={"solver": "euler", "steps_per_stage": 2})


@pytest.fixture(scope="session")
def quantized(run, tmp_path_factory):
    """A function that quantises the run with options and returns the folder. Same options, same folder."""
    made = {}

    def quantize(*options):
        if options not in made:
            out = tmp_path_factory.mktemp("out") / "quantised"
            assert main(["quantize", str(run), str(out), "--images", "2", "--batch-size", "2", *options]) == 0
            made[options] = out
        return made[options]

    return quantize
