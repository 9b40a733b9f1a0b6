"""The loop's decisions, on stand-ins for the engine and the world."""

from types import SimpleNamespace

import pytest
import torch

from ecar_dist.errors import TrainingError
from ecar_dist.runtime.checkpoint import Progress
from ecar_dist.runtime.world import Placement, World
from ecar_dist.train.loop import crossed, draw_preview, train_step
from tests.train.test_objective import make_config

ALONE = World(Placement(), torch.device("cpu"))


class PretendEngine:
    """One micro-batch with the given loss of each of two stages, and the given gradient norm."""

    def __init__(self, loss, grad_norm):
        self.loss, self.grad_norm, self.stepped, self.rate = loss, grad_norm, False, None

    def __call__(self, moments, labels, positions):
        return torch.tensor(self.loss), torch.full((len(labels), 2), self.loss)

    def backward(self, loss):
        pass

    def step(self):
        self.stepped = True

    def set_learning_rate(self, rate):
        self.rate = rate


def run_step(engine, stop=False):
    config = make_config(num_stages=2)
    config = config.model_copy(
        update={"batch": config.batch.model_copy(update={"global_batch_size": 4, "micro_batch_size": 4})}
    )
    batch = SimpleNamespace(values=torch.zeros(4), labels=torch.zeros(4), positions=torch.zeros(4))
    loader = SimpleNamespace(substitutions=list)
    run = SimpleNamespace(config=config, world=ALONE, engine=engine, stop=stop, loader=loader, replaced_samples=0)
    return train_step(run, iter([batch]), Progress(8, 2))


def test_a_step_reports_the_global_loss_and_the_stop():
    result = run_step(PretendEngine(0.5, 2.0), stop=True)
    assert (result.loss, result.stage_losses, result.grad_norm, result.stop) == (0.5, (0.5, 0.5), 2.0, True)
    assert run_step(PretendEngine(0.5, 2.0)).stop is False


def test_a_loss_that_is_not_finite_never_reaches_the_weights():
    engine = PretendEngine(float("nan"), 1.0)
    with pytest.raises(TrainingError, match="the loss of step 3 "):
        run_step(engine)
    assert not engine.stepped


def test_a_gradient_that_is_not_finite_ends_the_run():
    with pytest.raises(TrainingError, match="the gradient norm of step 3 "):
        run_step(PretendEngine(1.0, float("inf")))


def test_the_preview_is_of_the_average():
    seen = []
    engine = SimpleNamespace(partitions=["master"], gather=lambda partitions: seen.append(partitions) or iter(()))
    average = SimpleNamespace(partitions=["ema"])
    draw_preview(SimpleNamespace(engine=engine, ema=average, world=ALONE, writer=None, preview=None), Progress(16, 1))
    assert seen == [["ema"]]


@pytest.mark.parametrize(
    ("every", "seen", "batch", "due"),
    [(0, 16, 16, False), (32, 16, 16, False), (32, 32, 16, True), (32, 48, 16, False), (10, 16, 16, True)],
)
def test_due_is_crossing_a_multiple(every, seen, batch, due):
    assert crossed(every, seen, batch) is due
