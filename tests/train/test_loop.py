"""The loop's decisions, on stand-ins for the engine and the world."""

import json
from types import SimpleNamespace

import pytest
import torch

from ecar_dist.data.loader import MicroBatch
from ecar_dist.data.substitution import Substitution
from ecar_dist.errors import DataError, TrainingError
from ecar_dist.runtime.checkpoint_files import Progress
from ecar_dist.runtime.world import Placement, World
from ecar_dist.train.loop import crossed, data_values, draw_preview, next_batches, train_step
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


def make_run(engine, stop=False, micro_batch_size=4, directory=None):
    config = make_config(num_stages=2)
    sizes = {"global_batch_size": 4, "micro_batch_size": micro_batch_size}
    config = config.model_copy(update={"batch": config.batch.model_copy(update=sizes)})
    return SimpleNamespace(
        config=config, world=ALONE, engine=engine, stop=stop, replaced_samples=0, directory=directory
    )


def make_batch(size, substitutions=()):
    numbers = torch.zeros(size)
    return MicroBatch(numbers, numbers, numbers, numbers, substitutions)


def run_step(engine, stop=False):
    return train_step(make_run(engine, stop), [make_batch(4)], Progress(8, 2))


def test_a_step_reports_the_global_loss():
    result = run_step(PretendEngine(0.5, 2.0))
    assert (result.loss, result.stage_losses, result.grad_norm) == (0.5, (0.5, 0.5), 2.0)


class PretendLoader:
    """Gives what it is told, or waits until the consumer gives up."""

    def __init__(self, *given):
        self.given = list(given)

    def take(self, count, give_up):
        if not self.given:
            assert give_up(), "would wait for ever"
            return None
        item = self.given.pop(0)
        if isinstance(item, Exception):
            raise item
        return [item] * count


def test_a_step_begins_when_its_data_is_there_and_nobody_was_asked_to_stop():
    run, batch = make_run(None, micro_batch_size=2), make_batch(2)
    run.loader = PretendLoader(batch, DataError("shard x is damaged"), batch)
    assert next_batches(run) == [batch, batch]
    with pytest.raises(DataError, match="shard x"):
        next_batches(run)
    run.stop = True
    assert next_batches(run) is None  # its data is there: the step is not begun all the same
    assert next_batches(run) is None  # no data will come


def test_replaced_samples_are_counted_and_listed_with_the_step_that_used_them(tmp_path):
    made = [Substitution(position, 7, 70 + position, "shard x is damaged") for position in range(4)]
    run = make_run(PretendEngine(0.5, 2.0), micro_batch_size=2, directory=SimpleNamespace(logs=tmp_path))
    parts = [made[:1], made[1:3], [], [], [], made[3:]]
    batches, run.loader = [make_batch(2, tuple(part)) for part in parts], SimpleNamespace(sources=[])
    for step, replaced in enumerate([3.0, 3.0, 4.0]):
        train_step(run, batches[2 * step : 2 * step + 2], Progress(4 * step, step))
        assert data_values(run) == {"data/replaced_samples": replaced}
    lines = (tmp_path / "substituted.rank-00000.jsonl").read_text().splitlines()
    assert [Substitution(**json.loads(line)) for line in lines] == made


def test_what_was_downloaded_is_the_sum_over_the_sources():
    counts = {"requests": 3, "bytes": 2**30, "retries": 1}
    sources = [SimpleNamespace(traffic=lambda: counts), SimpleNamespace(traffic=lambda: {**counts, "requests": 0})]
    run = SimpleNamespace(replaced_samples=0, loader=SimpleNamespace(sources=sources))
    assert data_values(run) == {"data/downloaded_gib": 2.0, "data/retries": 2}
    run.loader.sources = [SimpleNamespace(traffic=dict)]
    assert data_values(run) == {}


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
