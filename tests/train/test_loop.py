"""The loop's decisions, on stand-ins for the engine and the world."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch

from ecar_dist.config.run import BadStepsSection, CheckpointSection, EmaSection, LogSection, OptimSection
from ecar_dist.data.loader import MicroBatch
from ecar_dist.data.order.substitution import Substitution
from ecar_dist.errors import DataError, FruitlessError, NodeError
from ecar_dist.runtime.checkpoint.files import Progress
from ecar_dist.runtime.peers import RemoteError
from ecar_dist.runtime.world import Placement, World
from ecar_dist.train.bad_step_file import BadStepFile
from ecar_dist.train.bad_steps import BadSteps, Verdict
from ecar_dist.train.loop import (
    crossed,
    data_values,
    draw_preview,
    give_up,
    log,
    next_batches,
    roll_back,
    save,
    settle_step,
    train,
    train_step,
)
from ecar_dist.train.phases import Phases
from ecar_dist.train.telemetry import Report, StepResult, Telemetry
from tests.train.test_objective import make_config

ALONE = World(Placement(), torch.device("cpu"))


class PretendEngine:
    """One micro-batch with the given loss of each of two stages, and the given gradient norm."""

    def __init__(self, loss, grad_norm):
        self.loss, self.grad_norm, self.refused, self.rate = loss, grad_norm, False, None
        self.grad_norm_limit = math.inf

    def __call__(self, moments, labels, positions):
        return torch.tensor(self.loss), torch.full((len(labels), 2), self.loss), torch.full((len(labels), 2), 0.5)

    def backward(self, loss):
        pass

    def refuse_step(self):
        self.refused = True

    def step(self):
        return not self.refused and self.grad_norm <= self.grad_norm_limit  # false for a NaN

    def set_learning_rate(self, rate):
        self.rate = rate


class PretendStore:
    """Remembers what was asked of it; each save needs two calls of `settle`."""

    def __init__(self, restored=None):
        self.restored, self.calls, self._left = restored, [], 0
        self.stall_seconds, self.failures = 0.0, 0

    @property
    def in_flight(self):
        return self._left > 0

    ready = in_flight

    def begin(self, progress, engine, ema, notes, *, checkpoint, averages):
        self.calls.append(("begin", progress.step, checkpoint, averages))
        self.notes = json.loads(json.dumps(notes))
        self._left = 2

    def settle(self):
        self.calls.append("settle")
        self._left -= 1

    def finish(self):
        self.calls.append("finish")
        self._left = 0

    def restore(self, engine, ema):
        self.calls.append("restore")
        return self.restored


def make_run(engine, stop=False, micro_batch_size=4, directory=None):
    config = make_config(num_stages=2)
    sizes = {"global_batch_size": 4, "micro_batch_size": micro_batch_size}
    config = config.model_copy(update={"batch": config.batch.model_copy(update=sizes)})
    beats = []
    phases = Phases(lambda name, step: beats.append((name, step)))
    return SimpleNamespace(
        config=config,
        world=ALONE,
        engine=engine,
        stop=stop,
        replaced_samples=0,
        directory=directory,
        phases=phases,
        beats=beats,
        telemetry=Telemetry(config, ALONE, phases, 1.0),
        bad_steps=BadSteps(config.train.bad_steps),
        store=PretendStore(),
        data_failed=False,
        data_error=None,
    )


def make_batch(size, substitutions=()):
    numbers = torch.zeros(size)
    return MicroBatch(numbers, numbers, numbers, numbers, substitutions)


def run_step(engine, stop=False):
    return train_step(make_run(engine, stop), [make_batch(4)], Progress(8, 2))


def test_a_step_reports_the_global_loss():
    result = run_step(PretendEngine(0.5, 2.0))
    assert (result.loss, result.stage_losses, result.grad_norm, result.applied) == (0.5, (0.5, 0.5), 2.0, True)


def test_the_phases_of_a_step_are_entered_in_order():
    run = make_run(PretendEngine(0.5, 2.0), micro_batch_size=2)
    run.loader = PretendLoader(make_batch(2))
    train_step(run, next_batches(run, 3), Progress(8, 2))
    once = [("forward", 3), ("backward", 3), ("optimizer", 3)]
    assert run.beats[1:] == [("data", 3), ("forward", 3), *once, *once]


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
    assert next_batches(run, 1) == [batch, batch]
    assert next_batches(run, 1) is None
    assert run.data_failed
    assert str(run.data_error) == "shard x is damaged"
    run.data_error, run.stop = None, True
    assert next_batches(run, 1) is None  # its data is there: the step is not begun all the same
    assert next_batches(run, 1) is None  # no data will come


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
    assert run_step(engine).applied is False
    assert engine.refused


@pytest.mark.parametrize(("norm", "applied"), [(2.0, True), (math.nan, False)])
def test_the_engine_says_whether_weights_moved(norm, applied):
    assert run_step(PretendEngine(1.0, norm)).applied is applied


def test_the_limit_of_the_gradient_norm_is_that_of_the_good_steps():
    run = make_run(PretendEngine(1.0, 9.0))
    run.bad_steps = BadSteps(BadStepsSection(spike_factor=4.0, window=8), {"good_norms": [2.0] * 8})
    assert train_step(run, [make_batch(4)], Progress(8, 2)).applied is False
    assert run.engine.grad_norm_limit == 8.0


class PretendLoaderAt(PretendLoader):
    def __init__(self, position):
        super().__init__()
        self.position, self.closed, self.wait_seconds = position, False, 2.5

    def close(self):
        self.closed = True


def make_bad_run(tmp_path, restored, **section):
    run = make_run(PretendEngine(math.nan, 1.0))
    section = BadStepsSection(**section)
    train_section = run.config.train.model_copy(update={"bad_steps": section})
    run.config = run.config.model_copy(update={"train": train_section})
    run.bad_steps, run.bad_step_file = BadSteps(section), BadStepFile(tmp_path / "bad_steps.jsonl", ALONE)
    run.loader, run.open_loader, run.ema, run.rewound = PretendLoaderAt(0), PretendLoaderAt, None, []
    run.writer = SimpleNamespace(rewind=run.rewound.append)
    run.store = PretendStore(restored)
    return run


def bad_step(run, step):
    batches, begun = [make_batch(4)], Progress(4 * (step - 1), step - 1)
    return settle_step(run, batches, begun, train_step(run, batches, begun))


def test_bad_steps_in_a_row_are_written_down_and_lead_back_to_the_checkpoint(tmp_path):
    notes = {"bad_steps": {"good_norms": [1.5], "skipped": 7}, "goodput": {"kept_seconds": 9.0}}
    run = make_bad_run(tmp_path, SimpleNamespace(progress=Progress(12, 3), notes=notes), roll_back_after=2)
    assert [bad_step(run, 6), bad_step(run, 7)] == [Verdict.SKIPPED, Verdict.ROLL_BACK]
    first = run.loader
    assert roll_back(run, 7) == Progress(12, 3)
    assert [run.bad_steps.passes_over(step) for step in (3, 4, 7, 8)] == [False, True, True, False]
    assert (run.bad_steps.skipped, run.bad_steps.notes()["good_norms"]) == (7, [1.5])
    assert run.telemetry.goodput.notes() == {"kept_seconds": 9.0}
    assert (first.closed, run.loader.position, run.loader.wait_seconds) == (True, 12, 2.5)
    assert run.rewound == [3]
    lines = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert [(line["step"], line.get("samples_seen")) for line in lines] == [(6, 20), (7, 24), (7, None)]
    assert lines[0]["sample_ids"] == [[0, 0, 0, 0]]


def test_after_the_last_roll_back_the_run_ends_once_its_last_save_stands(tmp_path):
    run = make_bad_run(tmp_path, None, roll_back_after=1, stop_after=0)
    run.store.begin(Progress(16, 4), None, None, {}, checkpoint=True, averages=False)
    with pytest.raises(FruitlessError, match="step 6: the loss is nan, and the run was rolled back 0 times"):
        bad_step(run, 6)
    assert run.store.calls[1:] == ["settle", "settle"]


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(tmp_path):
    run = make_bad_run(tmp_path, None, roll_back_after=1)
    assert bad_step(run, 6) is Verdict.ROLL_BACK
    with pytest.raises(FruitlessError, match="no checkpoint was made yet"):
        roll_back(run, 6)
    assert run.bad_step_file.windows() == []  # a new start does not pass over them


def test_the_preview_is_of_the_average():
    seen = []
    engine = SimpleNamespace(partitions=["master"], gather=lambda partitions: seen.append(partitions) or iter(()))
    average = SimpleNamespace(partitions=["ema"])
    phases = Phases(lambda name, step: None)
    run = SimpleNamespace(engine=engine, ema=average, world=ALONE, writer=None, preview=None, phases=phases)
    draw_preview(run, Progress(16, 1))
    assert seen == [["ema"]]


class NeverAsked:
    deferred = too_late = False

    def defer(self):
        self.deferred = True

    def mark_complete(self):
        self.too_late = True

    def __bool__(self):
        return False


def make_whole_run(*given, total=32):
    """A run of 4 samples a step, whose loader gives a batch for each True and an error for each other item."""
    run = make_run(PretendEngine(0.5, 2.0), stop=NeverAsked())
    sections = {
        "train": run.config.train.model_copy(update={"total_samples": total}),
        "checkpoint": CheckpointSection(every_samples=12),
        "ema": EmaSection(snapshot_every_samples=20),
        "sample": run.config.sample.model_copy(update={"every_samples": 4}),  # for a board, which there is not
        "log": LogSection(every_steps=100, tensorboard=False),
    }
    run.config = run.config.model_copy(update=sections)
    run.averaged = []
    run.ema = SimpleNamespace(update=lambda seen, batch: run.averaged.append((seen, batch)))
    run.writer, run.preview = None, None
    run.loader = PretendLoader(*(make_batch(4) if item is True else item for item in given))
    return run


def test_saves_come_when_they_are_due_and_settle_while_training_goes_on():
    run = make_whole_run(*[True] * 8)
    assert train(run, Progress()) == Progress(32, 8)
    saves = [("begin", 3, True, False), ("begin", 5, False, True), ("begin", 6, True, False), ("begin", 8, True, False)]
    assert [call for call in run.store.calls if call[0] == "begin"] == saves
    assert run.store.calls[:3] == [saves[0], "settle", "settle"]  # at the beginnings of steps 4 and 5
    assert run.store.calls[-2:] == [saves[-1], "finish"]
    assert run.averaged == [(4 * step, 4) for step in range(1, 9)]
    assert run.stop.deferred
    assert run.stop.too_late
    assert run.store.notes["goodput"]["kept_seconds"] > 0


def test_data_that_fail_end_the_run_after_what_was_learnt_is_saved():
    run = make_whole_run(True, True, DataError("shard x is damaged"))
    with pytest.raises(DataError, match="shard x is damaged"):
        train(run, Progress())
    assert run.store.calls == [("begin", 2, True, False), "finish"]
    assert not run.stop.too_late


class OrderedLoader:
    """Batches that say of which step they are; `end` takes the place of that step's."""

    def __init__(self, position, end=None):
        self.step, self.end, self.wait_seconds, self.sources = position // 4, end, 0.0, []

    def take(self, count, give_up):
        self.step += 1
        if self.end and self.step == self.end[0]:
            raise self.end[1]
        return [dataclasses.replace(make_batch(4), positions=torch.full((4,), self.step))] * count

    def close(self):
        pass


class ScriptedEngine(PretendEngine):
    """Its loss is NaN in the steps of `bad`."""

    def __init__(self, bad):
        super().__init__(0.5, 2.0)
        self.bad, self.steps, self.optimizer_steps = bad, [], []

    def __call__(self, values, labels, positions):
        self.steps.append(int(positions[0]))
        self.refused, self.loss = False, math.nan if self.steps[-1] in self.bad else 0.5
        return super().__call__(values, labels, positions)

    def set_optimizer_step(self, step):
        self.optimizer_steps.append(step)


def make_scripted_run(tmp_path, bad, restored=None, end=None):
    """12 steps of 4 samples, a checkpoint every 3, back to it after two bad steps in a row."""
    run = make_whole_run(total=48)
    section = BadStepsSection(roll_back_after=2)
    run.config = run.config.model_copy(
        update={
            "train": run.config.train.model_copy(update={"bad_steps": section}),
            "ema": EmaSection(),
        }
    )
    run.engine, run.loader, run.store = ScriptedEngine(bad), OrderedLoader(0), PretendStore(restored)
    run.bad_steps, run.bad_step_file = BadSteps(section), BadStepFile(tmp_path / "bad_steps.jsonl", ALONE)
    run.open_loader = lambda position: OrderedLoader(position, end)
    return run


def saved_steps(run):
    return [call[1] for call in run.store.calls if call[0] == "begin"]


def test_a_save_that_falls_into_a_row_of_bad_steps_waits_for_the_next_good_one(tmp_path):
    run = make_scripted_run(tmp_path, bad={2, 6})
    train(run, Progress())
    assert saved_steps(run) == [3, 7, 9, 12]
    assert run.store.notes["bad_steps"]["skipped"] == 2
    assert run.averaged == [(4 * step, 4) for step in range(1, 13)]  # steps that moved nothing included


def test_a_run_goes_back_passes_over_the_bad_steps_and_goes_on(tmp_path):
    run = make_scripted_run(tmp_path, {6, 7}, SimpleNamespace(progress=Progress(12, 3), notes={}))
    assert train(run, Progress()) == Progress(48, 12)
    assert run.engine.steps == list(range(1, 13))
    assert run.engine.optimizer_steps == [4, 5, 6, 7]  # Adam counts the steps of the run
    assert run.store.notes["bad_steps"] == {
        "good_norms": [2.0] * 5,
        "in_a_row": 0,
        "skipped": 4,
        "windows": [[4, 7]],
    }
    assert run.averaged == [(4 * step, 4) for step in [1, 2, 3, 4, 5, 6, *range(4, 13)]]
    assert saved_steps(run) == [3, 4, 6, 9, 12]  # the one that was due when the row began comes first


def test_right_after_a_roll_back_there_is_nothing_to_save(tmp_path):
    checkpoint = SimpleNamespace(progress=Progress(8, 2), notes={})  # the one of step 3 was damaged
    run = make_scripted_run(tmp_path, {6, 7}, checkpoint, end=(3, DataError("shard x is damaged")))
    with pytest.raises(DataError, match="shard x"):
        train(run, Progress())
    assert saved_steps(run) == [3]
    assert run.store.calls[-2:] == ["restore", "finish"]


@pytest.mark.parametrize("ends", [NodeError, RemoteError])
def test_ranks_that_have_drifted_save_nothing_more_and_finish_what_is_on_its_way(monkeypatch, ends):
    def drifted(world, engine, ema, step):
        raise ends("rank 1")

    monkeypatch.setattr("ecar_dist.train.loop.check_replicas", drifted)
    run = make_run(None)
    run.ema, run.store._left = None, 2
    with pytest.raises(ends):
        save(run, Progress(8, 2))
    assert run.store.calls == ["settle", "settle"]


class Pair(World):
    """Two ranks: what the other one brings to the next sum is `other`; to a gather it brings the same."""

    def __init__(self, rank=0, other=0.0):
        super().__init__(Placement(rank, 2), torch.device("cpu"))
        self.other = other

    def sum(self, values):
        return values.add_(torch.as_tensor(self.other, dtype=values.dtype))

    def gather(self, value):
        return [value, value]


@pytest.mark.parametrize(
    ("own", "other", "settles", "failed", "begins"),
    [
        (False, [0.0, 0.0, 1.0], False, False, True),  # stop asked, data failed, part of the checkpoint written
        (True, [0.0, 0.0, 0.0], False, False, True),
        (True, [0.0, 0.0, 1.0], True, False, True),
        (True, [1.0, 0.0, 1.0], True, False, False),
        (True, [0.0, 1.0, 1.0], True, True, False),
    ],
)
def test_two_ranks_begin_end_and_settle_together(own, other, settles, failed, begins):
    run, batch = make_run(None, micro_batch_size=2), make_batch(2)
    run.world, run.loader, run.store._left = Pair(other=other), PretendLoader(batch), 2 * own
    assert (next_batches(run, 1) is not None, run.data_failed) == (begins, failed)
    assert run.store.calls == ["settle"] * settles


@pytest.mark.parametrize(
    ("other", "applied"), [([2.0, 2.0, 0.0], True), ([math.nan, 0.0, 0.0], False), ([0.0, math.inf, 0.0], False)]
)
def test_the_loss_is_that_of_all_ranks_and_all_refuse_what_one_cannot_learn_from(other, applied):
    run = make_run(PretendEngine(0.5, 2.0), micro_batch_size=2)
    run.world = Pair(other=other)
    result = train_step(run, [make_batch(2)], Progress(8, 2))
    assert result.applied is applied
    if applied:
        assert result.loss == (2 * 0.5 + 2.0) / 4


def test_the_end_of_a_run_without_hope_is_said_by_one_rank():
    run = make_run(PretendEngine(0.5, 2.0))
    for rank, kind in enumerate((FruitlessError, RemoteError)):
        run.world = Pair(rank)
        with pytest.raises(kind):
            give_up(run, "no hope")


def test_the_learning_rate_is_that_of_the_samples_at_the_end_of_the_step():
    run = make_run(PretendEngine(0.5, 2.0))
    optim = OptimSection(learning_rate=0.5, warmup_samples=100)
    train_section = run.config.train.model_copy(update={"total_samples": 1000})
    run.config = run.config.model_copy(update={"optim": optim, "train": train_section})
    assert train_step(run, [make_batch(4)], Progress(8, 2)).learning_rate == run.engine.rate == 0.5 * 12 / 100


class PretendWriter:
    def __init__(self):
        self.logged, self.texts = [], []

    def log(self, step, samples_seen, values):
        self.logged.append((step, samples_seen, values))

    def text(self, tag, text, step):
        self.texts.append((tag, text, step))


def test_what_is_logged_and_said_at_the_end(tmp_path, capsys):
    run = make_scripted_run(tmp_path, bad={2})
    run.config = run.config.model_copy(update={"log": LogSection(every_steps=4, tensorboard=False)})
    run.writer, run.replaced_samples, run.store.stall_seconds, run.store.failures = PretendWriter(), 3, 1.5, 2
    train(run, Progress())
    assert [(step, seen) for step, seen, _ in run.writer.logged] == [(4, 16), (8, 32), (12, 48)]
    values = run.writer.logged[-1][2]
    told = ("train/skipped_steps", "checkpoint/failures", "checkpoint/stall_seconds", "data/replaced_samples")
    assert [values[name] for name in told] == [1, 2, 1.5, 3]
    assert values["train/loss_stage0_t2"] == 0.5  # of the times that the engine gave
    out = capsys.readouterr().out.splitlines()
    assert out[-1].startswith("overall: ")
    assert ("verdict", out[-1], 12) in run.writer.texts


def test_news_are_said_and_the_last_step_is_counted_from_here(capsys):
    run = make_whole_run()
    run.loader = OrderedLoader(0)
    run.telemetry, run.writer = SimpleNamespace(report=lambda *_: Report({}, "data-bound: 30%")), PretendWriter()
    log(run, Progress(16, 9), StepResult(0.5, (0.5, 0.5), 2.0, 1e-3))  # 9 steps, some of a smaller batch; 16 to go
    assert run.writer.texts == [("verdict", "data-bound: 30%", 9)]
    line = capsys.readouterr().out.strip()
    assert line.startswith("step 9/13  ")
    assert line.endswith("data-bound: 30%")


@pytest.mark.parametrize(
    ("every", "seen", "batch", "due"),
    [(0, 16, 16, False), (32, 16, 16, False), (32, 32, 16, True), (32, 48, 16, False), (10, 16, 16, True)],
)
def test_due_is_crossing_a_multiple(every, seen, batch, due):
    assert crossed(every, seen, batch) is due
