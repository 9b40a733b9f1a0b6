from collections.abc import Callable

import pytest

from ecar_dist.config.read import config_from_dict
from ecar_dist.config.run import RunConfig


@pytest.fixture
def make_config() -> Callable[..., RunConfig]:
    """A 256-pixel configuration of a preset; keyword arguments replace whole sections."""

    def make(preset: str = "XL", **sections: dict) -> RunConfig:
        tree = {
            "run": {"name": "test"},
            "model": {"preset": preset},
            "vae": {"kind": "dct"},
            "data": {"latents": "nowhere", "num_classes": 1000},
            "train": {"total_samples": 1_000_000},
        }
        return config_from_dict(tree | sections)

    return make
