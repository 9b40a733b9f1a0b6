import pytest

from ecar_dist.errors import ConfigError
from ecar_dist.plan.duration import ASSUMED_MFU, training_seconds


def test_time_is_work_over_rate():
    macs, images = 5e11, 1000
    assert training_seconds(macs, images, 1, "H100") == pytest.approx(2 * 5e14 / (989e12 * ASSUMED_MFU))
    assert training_seconds(macs, images, 8, "a100") == pytest.approx(2 * 5e14 / (8 * 312e12 * ASSUMED_MFU))


def test_unknown_device_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"'TPU' .*A100, H100, H200") as error:
        training_seconds(1, 1, 1, "TPU")
    assert "\n" not in str(error.value)
