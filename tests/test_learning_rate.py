import pytest

from ecar_dist.config.knobs_training import OptimSection
from ecar_dist.learning_rate import learning_rate

TOTAL = 1000


def rates(**fields):
    optim = OptimSection(learning_rate=1.0, **fields)
    return {seen: learning_rate(optim, seen, TOTAL) for seen in (0, 50, 100, 550, 800, 900, 1000)}


def test_warm_up_is_linear_and_then_constant():
    assert rates(warmup_samples=100) == {0: 0.0, 50: 0.5, 100: 1.0, 550: 1.0, 800: 1.0, 900: 1.0, 1000: 1.0}


def test_cosine_ends_at_the_final_rate():
    found = rates(schedule="cosine", warmup_samples=100, final_learning_rate=0.2)
    assert found[50] == 0.5
    assert found[550] == pytest.approx(0.6)
    assert found[1000] == pytest.approx(0.2)


def test_cooldown_is_constant_then_linear():
    found = rates(schedule="cooldown", cooldown_samples=200, final_learning_rate=0.1)
    assert (found[550], found[800], found[1000]) == (1.0, 1.0, pytest.approx(0.1))
    assert found[900] == pytest.approx(0.55)


@pytest.mark.parametrize("fields", [{"schedule": "cosine"}, {"schedule": "cooldown", "cooldown_samples": 200}])
def test_a_last_batch_past_the_end_stays_at_the_final_rate(fields):
    optim = OptimSection(learning_rate=1.0, final_learning_rate=0.1, **fields)
    assert learning_rate(optim, 1060, 1000) == pytest.approx(0.1)
