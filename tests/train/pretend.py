"""Stand-ins for the parts that the training loop works with, for the tests of its parts."""

import json
import math

import torch

from ecar_dist.data.loader import MicroBatch
from ecar_dist.runtime.optimizer import PendingStatus
from ecar_dist.runtime.world import Placement, World
from ecar_dist.train.guard import is_good
from tests.train.test_objective import make_config

ALONE = World(Placement(), torch.device("cpu"))


class Pair(World):
    """Two ranks. The other one contributes `other` to each sum, and the same value as this one to a gather."""

    def __init__(self, rank=0, other=0.0):
        super().__init__(Placement(rank, 2), torch.device("cpu"))
        self.other = other

    def sum(self, values):
        return values.add_(torch.as_tensor(self.other, dtype=values.dtype))

    def gather(self, value):
        return [value, value]


def sized_config(micro_batch_size=4, **sections):
    """Two stages, 4 samples per step."""
    config = make_config(num_stages=2)
    sizes = {"global_batch_size": 4, "micro_batch_size": micro_batch_size}
    return config.model_copy(update={"batch": config.batch.model_copy(update=sizes), **sections})


def make_batch(size, substitutions=(), position=0):
    numbers = torch.zeros(size)
    return MicroBatch(numbers, numbers, torch.full((size,), position), numbers, substitutions)


class PretendEngine:
    """The given loss in each of two stages, NaN in the steps `bad`, and the given gradient norm.

    The position of a sample is the number of its step.
    """

    def __init__(self, loss=0.5, grad_norm=2.0, bad=(), is_good=is_good):
        self.loss, self.grad_norm, self.bad, self.is_good = loss, grad_norm, bad, is_good
        self.rate, self.steps, self.optimizer_steps = None, [], []

    def __call__(self, values, labels, positions):
        self.steps.append(int(positions[0]))
        loss = math.nan if self.steps[-1] in self.bad else self.loss
        return torch.tensor(loss), torch.full((len(labels), 2), loss), torch.full((len(labels), 2), 0.5)

    def backward(self, loss):
        pass

    def step(self, sums):
        norm = torch.tensor(self.grad_norm, dtype=torch.float64)
        good = self.is_good(sums.sum(), norm)
        return PendingStatus(torch.cat([sums, torch.stack([norm, torch.as_tensor(good).double()])]))

    def set_learning_rate(self, rate):
        self.rate = rate

    def set_optimizer_step(self, step):
        self.optimizer_steps.append(step)


class PretendStore:
    """Records its calls; each save needs two calls of `settle`."""

    def __init__(self, restored=None):
        self.restored, self.calls, self.left = restored, [], 0
        self.stall_seconds, self.failures = 0.0, 0

    @property
    def in_flight(self):
        return self.left > 0

    ready = in_flight

    def begin(self, progress, engine, ema, client_state, *, checkpoint, ema_snapshot):
        self.calls.append(("begin", progress.step, checkpoint, ema_snapshot))
        self.client_state = json.loads(json.dumps(client_state))
        self.left = 2

    def settle(self):
        self.calls.append("settle")
        self.left -= 1

    def finish(self):
        self.calls.append("finish")
        self.left = 0

    def restore(self, engine, ema):
        self.calls.append("restore")
        return self.restored


class PretendLoader:
    """Returns or raises the given items in order, then waits until the consumer gives up."""

    def __init__(self, *given):
        self.given, self.sources, self.wait_seconds, self.closed = list(given), [], 2.5, False

    def take(self, count, give_up):
        if not self.given:
            assert give_up(), "would wait for ever"
            return None
        item = self.given.pop(0)
        if isinstance(item, Exception):
            raise item
        return [item] * count

    def close(self):
        self.closed = True


class OrderedLoader(PretendLoader):
    """Batches whose positions are the numbers of their steps; `end` (step, error) raises in place of a batch."""

    def __init__(self, position, end=None):
        super().__init__()
        self.step, self.end = position // 4, end

    def take(self, count, give_up):
        self.step += 1
        if self.end and self.step == self.end[0]:
            raise self.end[1]
        return [make_batch(4, position=self.step)] * count


class NeverAsked:
    deferred = too_late = False

    def defer(self):
        self.deferred = True

    def mark_complete(self):
        self.too_late = True

    def __bool__(self):
        return False


class PretendWriter:
    def __init__(self):
        self.logged, self.texts, self.rewound = [], [], []

    def log(self, step, samples_seen, values):
        self.logged.append((step, samples_seen, values))

    def text(self, tag, text, step):
        self.texts.append((tag, text, step))

    def rewind(self, step):
        self.rewound.append(step)
