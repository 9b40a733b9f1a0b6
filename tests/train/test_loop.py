"""The loop's decisions, on stand-ins for the engine and the world."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest

from ecar_dist.config.knobs_training import BadStepsSection, CheckpointSection, EmaSection, LogSection
from ecar_dist.errors import DataError, FruitlessError, NodeError
from ecar_dist.runtime.checkpoint.manifest import Progress
from ecar_dist.runtime.optimizer import PendingStatus
from ecar_dist.runtime.peers import RemoteError
from ecar_dist.train.guard import BadStepFile, StepGuard
from ecar_dist.train.loop import Parts, RunState, Saver, crossed, needs_numbers, train
from ecar_dist.train.reader import StepReader
from ecar_dist.train.record import Recorder
from ecar_dist.train.start import read_counters
from ecar_dist.train.telemetry import Telemetry
from ecar_dist.train.time_budget import Goodput, Phases
from tests.train.pretend import (
    ALONE,
    NeverAsked,
    OrderedLoader,
    Pair,
    PretendEngine,
    PretendLoader,
    PretendStore,
    PretendWriter,
    make_batch,
    sized_config,
)


def make_run(tmp_path, *loaders, total=32, bad=(), restored=None, roll_back_after=2, stop_after=2, **sections):
    """The parts of a run of 4 samples per step, together with the store and the EMA's calls.

    `loaders` are opened in turn; `bad` are steps whose loss is NaN.
    """
    config = sized_config(**{"ema": EmaSection(), "log": LogSection(every_steps=100, tensorboard=False), **sections})
    bad_steps = BadStepsSection(roll_back_after=roll_back_after, stop_after=stop_after)
    train_section = config.train.model_copy(update={"total_samples": total, "bad_steps": bad_steps})
    config = config.model_copy(update={"train": train_section, "checkpoint": CheckpointSection(every_samples=12)})

    phases, stop, goodput, store, updates = Phases(lambda name, step: None), NeverAsked(), Goodput(), PretendStore(), []
    guard = StepGuard(bad_steps, BadStepFile(tmp_path / "bad_steps.jsonl", ALONE), ALONE)
    state = RunState(
        engine=PretendEngine(bad=bad, is_good=guard.is_good),
        ema=SimpleNamespace(update=lambda seen, batch: updates.append((seen, batch))),
        guard=guard,
        goodput=goodput,
    )
    saver = Saver(config=config, world=ALONE, state=state, store=store, phases=phases)
    assert saver.load() is None
    store.calls.clear()
    store.restored = restored

    left = list(loaders)
    reader = StepReader(
        config=config,
        world=ALONE,
        open_loader=lambda position: left.pop(0) if left else OrderedLoader(position),
        position=0,
        stop=stop,
        phases=phases,
    )
    telemetry, writer = Telemetry(config, ALONE, phases, goodput, 1.0), PretendWriter()
    recorder = Recorder(
        config=config,
        world=ALONE,
        logs=tmp_path,
        telemetry=telemetry,
        counters=lambda: read_counters(reader, store, guard),
        writer=writer,
        preview=None,
    )
    parts = Parts(
        config=config,
        world=ALONE,
        stop=stop,
        state=state,
        reader=reader,
        telemetry=telemetry,
        recorder=recorder,
        saver=saver,
    )
    return SimpleNamespace(parts=parts, store=store, updates=updates, writer=writer, engine=state.engine)


def begun(store):
    return [call for call in store.calls if call[0] == "begin"]


def saved_steps(run):
    return [call[1] for call in begun(run.store)]


@pytest.mark.parametrize(("seconds", "saved"), [(0, [3, 6, 8]), (25, [5, 8]), (45, [7, 8]), (1000, [8])])
def test_a_save_waits_until_min_seconds_have_passed(tmp_path, monkeypatch, seconds, saved):
    """A step takes 10 s here. Rank 0's clock arrives one step late, so that no step waits for it."""
    run = make_run(tmp_path, PretendLoader(*[make_batch(4)] * 8))
    monkeypatch.setattr("ecar_dist.train.loop.time", SimpleNamespace(monotonic=lambda: 10.0 * len(run.updates)))
    section = CheckpointSection(every_samples=12, min_seconds=seconds)
    config = run.parts.config.model_copy(update={"checkpoint": section})
    saver = Saver(config=config, world=ALONE, state=run.parts.state, store=run.store, phases=run.parts.telemetry.phases)
    train(dataclasses.replace(run.parts, saver=saver), Progress(0, 0))
    assert saved_steps(run) == saved


def test_only_the_first_rank_asks_its_clock(tmp_path):
    run = make_run(tmp_path, PretendLoader())
    config = run.parts.config.model_copy(update={"checkpoint": CheckpointSection(min_seconds=1000)})
    phases = run.parts.telemetry.phases
    savers = [
        Saver(config=config, world=Pair(rank), state=run.parts.state, store=run.store, phases=phases) for rank in (0, 1)
    ]
    assert [saver.is_early for saver in savers] == [True, False]


def test_saves_come_when_they_are_due_and_settle_while_training_goes_on(tmp_path):
    run = make_run(tmp_path, PretendLoader(*[make_batch(4)] * 8), ema=EmaSection(snapshot_every_samples=20))
    assert train(run.parts, Progress(0, 0)) == Progress(32, 8)
    saves = [("begin", 3, True, False), ("begin", 5, False, True), ("begin", 6, True, False), ("begin", 8, True, False)]
    assert begun(run.store) == saves
    assert run.store.calls[:3] == [saves[0], "settle", "settle"]  # at the beginnings of steps 4 and 5
    assert run.store.calls[-2:] == [saves[-1], "finish"]
    assert run.updates == [(4 * step, 4) for step in range(1, 9)]
    assert run.parts.stop.deferred
    assert run.parts.stop.too_late
    assert run.store.client_state["goodput"]["kept_seconds"] > 0


def test_data_that_fail_end_the_run_after_what_was_learnt_is_saved(tmp_path):
    run = make_run(tmp_path, PretendLoader(make_batch(4), make_batch(4), DataError("shard x is damaged")))
    with pytest.raises(DataError, match="shard x"):
        train(run.parts, Progress(0, 0))
    assert run.store.calls == [("begin", 2, True, False), "finish"]
    assert not run.parts.stop.too_late


def test_a_save_that_falls_into_a_row_of_bad_steps_waits_for_the_next_good_one(tmp_path):
    run = make_run(tmp_path, total=48, bad={2, 6})
    train(run.parts, Progress(0, 0))
    assert saved_steps(run) == [3, 7, 9, 12]
    assert run.store.client_state["bad_steps"]["skipped"] == 2
    assert run.updates == [(4 * step, 4) for step in range(1, 13)]  # including steps that moved no weight


def test_a_run_goes_back_passes_over_the_bad_steps_and_goes_on(tmp_path):
    client_state = {"bad_steps": {"skipped": 7}, "goodput": {"kept_seconds": 9.0}}
    run = make_run(
        tmp_path, total=48, bad={6, 7}, restored=SimpleNamespace(progress=Progress(12, 3), client_state=client_state)
    )
    assert train(run.parts, Progress(0, 0)) == Progress(48, 12)
    assert run.engine.steps == list(range(1, 13))
    assert run.engine.optimizer_steps == [4, 5, 6, 7]  # Adam's step count is that of the run
    assert run.store.client_state["bad_steps"] == {
        "good_norms": [2.0] * 5,
        "in_a_row": 0,
        "skipped": 7 + 4,
        "windows": [[4, 7]],
    }
    assert 9.0 < run.store.client_state["goodput"]["kept_seconds"] < 19.0
    assert run.updates == [(4 * step, 4) for step in [*range(1, 8), *range(4, 13)]]
    assert saved_steps(run) == [3, 4, 6, 9, 12]  # the save that was due when the row began comes first
    assert run.writer.rewound == [3]
    lines = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert [(line["step"], line.get("samples_seen")) for line in lines] == [(6, 20), (7, 24), (7, None)]


def test_a_step_is_settled_once_the_next_one_is_queued_unless_its_numbers_are_needed_first(tmp_path, monkeypatch):
    """The device computes step n + 1 while the host reads step n, so bad steps are detected one step later."""
    events = []
    read, call = PendingStatus.read, PretendEngine.__call__
    monkeypatch.setattr(PendingStatus, "read", lambda status: events.append("read") or read(status))
    monkeypatch.setattr(
        PretendEngine, "__call__", lambda engine, *batch: events.append(int(batch[2][0])) or call(engine, *batch)
    )
    run = make_run(tmp_path, total=24, bad={4}, log=LogSection(every_steps=5, tensorboard=False))
    train(run.parts, Progress(0, 0))
    # step 3 is saved, step 5 logged, step 6 the last
    assert events == [1, 2, "read", 3, "read", "read", 4, 5, "read", "read", 6, "read"]
    assert run.parts.state.guard.history.skipped == 1


def test_a_step_that_was_queued_before_a_roll_back_is_void(tmp_path):
    checkpoint = SimpleNamespace(progress=Progress(12, 3), client_state={})
    run = make_run(tmp_path, total=48, bad={4, 5}, restored=checkpoint)
    assert train(run.parts, Progress(0, 0)) == Progress(48, 12)
    assert run.engine.steps == [1, 2, 3, 4, 5, 6, *range(6, 13)]  # step 6 was queued when step 5 was found to be bad
    assert run.engine.optimizer_steps == [4, 5]
    assert run.store.client_state["bad_steps"]["good_norms"] == [2.0] * 7


def test_with_a_limit_of_the_norm_each_step_waits_for_the_one_before(tmp_path):
    run = make_run(tmp_path, total=20)
    run.parts.state.guard.history._section = BadStepsSection(spike_factor=3.0)
    assert needs_numbers(run.parts, Progress(4, 1))
    run.parts.state.guard.history._section = BadStepsSection()
    assert not needs_numbers(run.parts, Progress(4, 1))


def test_right_after_a_roll_back_there_is_nothing_to_save(tmp_path):
    checkpoint = SimpleNamespace(progress=Progress(8, 2), client_state={})  # that of step 3 was damaged
    after = OrderedLoader(8, end=(3, DataError("shard x is damaged")))
    run = make_run(tmp_path, OrderedLoader(0), after, total=48, bad={6, 7}, restored=checkpoint)
    with pytest.raises(DataError, match="shard x"):
        train(run.parts, Progress(0, 0))
    assert saved_steps(run) == [3]
    assert run.store.calls[-2:] == ["restore", "finish"]


def test_after_the_last_roll_back_the_run_ends_once_its_last_save_stands(tmp_path):
    run = make_run(tmp_path, bad={4}, roll_back_after=1, stop_after=0)
    with pytest.raises(FruitlessError, match="step 4: the loss is nan"):
        train(run.parts, Progress(0, 0))
    assert run.store.calls == [("begin", 3, True, False), "settle", "settle"]


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(tmp_path):
    run = make_run(tmp_path, bad={2}, roll_back_after=1)
    with pytest.raises(FruitlessError, match=r"step 2 .* no checkpoint"):
        train(run.parts, Progress(0, 0))
    windows = BadStepFile(tmp_path / "bad_steps.jsonl", ALONE).windows()
    assert windows == []  # a new start does not pass over them


@pytest.mark.parametrize(("rank", "ends"), [(0, FruitlessError), (1, RemoteError)])
def test_the_end_of_a_run_without_hope_is_said_by_one_rank(tmp_path, rank, ends):
    parts = make_run(tmp_path).parts
    store = PretendStore()
    saver = Saver(config=parts.config, world=Pair(rank), state=parts.state, store=store, phases=parts.telemetry.phases)
    store.left = 2
    with pytest.raises(ends):
        saver.give_up(FruitlessError("no hope"))
    assert store.calls == ["settle", "settle"]


@pytest.mark.parametrize("ends", [NodeError, RemoteError])
def test_ranks_that_have_drifted_save_nothing_more_and_finish_what_is_on_its_way(tmp_path, monkeypatch, ends):
    def drifted(world, engine, ema, step):
        raise ends("rank 1")

    run = make_run(tmp_path)
    monkeypatch.setattr("ecar_dist.train.loop.check_replicas", drifted)
    run.store.left = 2
    with pytest.raises(ends):
        run.parts.saver.save_due(Progress(12, 3))
    assert run.store.calls == ["settle", "settle"]


def test_copies_that_differ_after_loading_end_the_run_before_its_first_step(tmp_path, monkeypatch):
    def drifted(world, engine, ema, step):
        raise NodeError(f"step {step}")

    parts = make_run(tmp_path).parts
    monkeypatch.setattr("ecar_dist.train.loop.check_replicas", drifted)
    store = PretendStore(SimpleNamespace(progress=Progress(12, 3), client_state={}))
    saver = Saver(config=parts.config, world=ALONE, state=parts.state, store=store, phases=parts.telemetry.phases)
    with pytest.raises(NodeError, match="step 3"):
        saver.load()


def test_what_is_logged_and_said_at_the_end(tmp_path, capsys):
    run = make_run(tmp_path, total=48, bad={2}, log=LogSection(every_steps=4, tensorboard=False))
    run.store.stall_seconds, run.store.failures = 1.5, 2
    train(run.parts, Progress(0, 0))
    assert [(step, seen) for step, seen, _ in run.writer.logged] == [(4, 16), (8, 32), (12, 48)]
    values = run.writer.logged[-1][2]
    told = ("train/skipped_steps", "checkpoint/failures", "checkpoint/stall_seconds")
    assert [values[name] for name in told] == [1, 2, 1.5]
    assert values["train/loss_stage0_t2"] == 0.5  # for the times that the engine returned
    assert math.isfinite(values["train/loss"])
    out = capsys.readouterr().out.splitlines()
    assert ("verdict", out[-1], 12) in run.writer.texts


@pytest.mark.parametrize(
    ("every", "seen", "batch", "due"),
    [(0, 16, 16, False), (32, 16, 16, False), (32, 32, 16, True), (32, 48, 16, False), (10, 16, 16, True)],
)
def test_due_is_crossing_a_multiple(every, seen, batch, due):
    assert crossed(every, seen, batch) is due
