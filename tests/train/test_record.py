"""What a start refuses, and what is recorded."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from ecar_dist.config.read import load_config
from ecar_dist.data.order.substitution import Substitution
from ecar_dist.errors import CheckpointError, FruitlessError
from ecar_dist.runtime.checkpoint.manifest import Progress
from ecar_dist.runtime.run.directory import RunDirectory
from ecar_dist.runtime.signals import StoppedEarlyError
from ecar_dist.runtime.world import Placement, World
from ecar_dist.train.record import Recorder, end_attempt, open_attempt, unreachable_half_lives
from ecar_dist.train.telemetry import Counters, Report, StepResult
from ecar_dist.train.time_budget import Phases
from tests.train.pretend import PretendWriter, make_batch, sized_config

ALONE = World(Placement(), torch.device("cpu"))


def opened(path, *overrides):
    """A new attempt at the run of a config, by a process that has died since."""
    config = load_config(path, overrides)
    directory = RunDirectory(config.run_directory)
    open_attempt(directory, config, ALONE)
    directory._lock.close()
    return directory


def test_a_run_that_has_trained_does_not_begin_anew_because_its_checkpoints_were_looked_for_elsewhere(
    write_config, tmp_path
):
    config = write_config()
    directory = opened(config)
    opened(config, f"checkpoint.dir={tmp_path}/elsewhere")  # nothing was trained yet
    opened(config)
    directory.metrics.write_text('{"step": 1}\n')
    with pytest.raises(CheckpointError, match=r"elsewhere/tiny .*/runs/tiny/checkpoints; set checkpoint\.dir"):
        opened(config, f"checkpoint.dir={tmp_path}/elsewhere")
    opened(config)
    assert len(directory.attempts()) == 4


def test_a_relative_folder_of_checkpoints_is_another_one_elsewhere(write_config, tmp_path, monkeypatch):
    config, relative = write_config(), "checkpoint.dir=kept"
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    opened(config, relative).metrics.write_text('{"step": 1}\n')
    monkeypatch.chdir(tmp_path / "there")
    with pytest.raises(CheckpointError, match=r"/there/kept/tiny .*/here/kept/tiny; set"):
        opened(config, relative)
    monkeypatch.chdir(tmp_path / "here")
    opened(config, relative)


GONE = RuntimeError("[/src/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4711")


def test_a_run_does_not_go_back_to_older_checkpoints_in_another_place(write_config, tmp_path):
    config, there = write_config(), f"checkpoint.dir={tmp_path}/there"
    first = opened(config)
    first.metrics.write_text('{"step": 1}\n')
    for step, folder in ((5, first.checkpoints), (9, tmp_path / "there/tiny")):
        (folder / f"step-{step:08d}").mkdir(parents=True)
        (folder / f"step-{step:08d}/COMMITTED").write_text("")
    opened(config, there)
    with pytest.raises(CheckpointError, match=r"step 5\b.* step 9\b.*/there/tiny"):
        opened(config)


def test_a_run_that_lost_its_record_is_named_by_its_own_checkpoints_alone(write_config, tmp_path, monkeypatch):
    config = write_config()
    first, elsewhere = opened(config), tmp_path / "there/tiny"
    for folder in (first.checkpoints, elsewhere):
        (folder / "step-00000005").mkdir(parents=True)
        (folder / "step-00000005/COMMITTED").write_text("")
    monkeypatch.setattr(
        "ecar_dist.runtime.checkpoint.folder.LocalStorage.manifest", lambda *_: SimpleNamespace(run="0ld")
    )
    names = [first.run_id]
    for override in ((), (f"checkpoint.dir={tmp_path}/there",)):
        for name in ("lineage.json", ".lineage.json.copy"):
            (first.path / name).write_text("[")
        names.append(opened(config, *override).run_id)
    assert names[1] == "0ld"
    assert len(set(names)) == 3


@pytest.mark.parametrize(("half_lives", "said"), [((100,), []), ((100, 5000), ["5000: capped at 960 by the end"])])
def test_a_half_life_that_the_run_is_too_short_for_is_said(write_config, half_lives, said):
    config = load_config(write_config(), ["train.total_samples=9600", f"ema.half_life_samples={list(half_lives)}"])
    lines = unreachable_half_lives(config)
    assert len(lines) == len(said)
    assert all(words in line for words, line in zip(said, lines, strict=True))


@pytest.mark.parametrize(
    ("asked", "error", "reason"),
    [
        (False, None, "done"),
        (True, None, "signal"),
        (True, StoppedEarlyError("SIGTERM"), "signal"),
        (False, ValueError("the disk is full"), "failed: the disk is full"),
        (True, ValueError("the disk is full"), "failed: the disk is full"),
        (False, GONE, "failed: another rank was lost"),
        (True, GONE, "signal"),
        (False, FruitlessError("step 9 is bad"), "gave up: step 9 is bad"),
    ],
)
def test_how_an_attempt_ended_is_on_record(write_config, asked, error, reason):
    directory = opened(write_config())
    end_attempt(directory, asked, type(error), error, None)
    (attempt,) = directory.attempts()
    assert attempt["reason"] == reason
    file = directory.lineage.stat().st_ino
    end_attempt(RunDirectory(directory.path), False, None, None, None)  # on a rank that began none
    assert directory.attempts() == [attempt]
    assert directory.lineage.stat().st_ino == file  # not even rewritten: rank 0 may be writing it


def test_a_full_disk_at_the_end_hides_nothing(write_config, monkeypatch):
    directory = SimpleNamespace(end_attempt=lambda reason: (_ for _ in ()).throw(OSError("full")))
    end_attempt(directory, False, None, None, None)


RESULT = StepResult(0.5, (0.5, 0.5), 2.0, 1e-3)


def make_recorder(tmp_path, writer=None, preview=None, news=None, **counted):
    config = sized_config()
    config = config.model_copy(update={"train": config.train.model_copy(update={"total_samples": 32})})
    phases = Phases(lambda name, step: None)
    telemetry = SimpleNamespace(phases=phases, report=lambda *_: Report({}, news), closing_line=lambda: "overall: fast")
    return Recorder(
        config=config,
        world=ALONE,
        logs=tmp_path,
        telemetry=telemetry,
        counters=lambda: Counters(**counted),
        writer=writer,
        preview=preview,
    )


def test_replaced_samples_are_counted_and_listed(tmp_path):
    made = [Substitution(position, 7, 70 + position, "shard x is damaged") for position in range(4)]
    writer = PretendWriter()
    recorder = make_recorder(tmp_path, writer)
    recorder.log(Progress(4, 1), RESULT)
    assert "data/replaced_samples" not in writer.logged[-1][2]
    for parts, of_all_ranks in (((made[:1], made[1:3]), 5), (([], []), 0), (([], made[3:]), 1)):
        recorder.note_replaced([make_batch(2, tuple(part)) for part in parts], of_all_ranks)
    recorder.log(Progress(16, 4), RESULT)
    assert writer.logged[-1][2]["data/replaced_samples"] == 6.0
    lines = (tmp_path / "substituted.rank-00000.jsonl").read_text().splitlines()
    assert [Substitution(**json.loads(line)) for line in lines] == made


def test_news_are_said_and_the_last_step_is_counted_from_here(tmp_path, capsys):
    writer = PretendWriter()
    recorder = make_recorder(tmp_path, writer, news="data-bound: 30%", downloads={"data/retries": 2.0})
    recorder.log(Progress(16, 9), RESULT)  # 9 steps, some of a smaller batch; 16 samples to go
    assert writer.texts == [("verdict", "data-bound: 30%", 9)]
    assert writer.logged == [(9, 16, {"data/retries": 2.0})]
    line = capsys.readouterr().out.strip()
    assert line.startswith("step 9/13  ")
    assert line.endswith("data-bound: 30%")


def test_a_rank_without_a_writer_says_nothing(tmp_path, capsys):
    recorder = make_recorder(tmp_path)
    recorder.log(Progress(16, 9), RESULT)
    recorder.rewind(3)
    recorder.close(Progress(16, 9))
    assert capsys.readouterr().out == ""


def test_the_preview_is_of_the_ema(tmp_path):
    drawn, pictures = [], []
    writer = SimpleNamespace(image=lambda *picture: pictures.append(picture))
    preview = SimpleNamespace(
        draw=lambda model: drawn.append(model) or ["stages"], picture=lambda stages: f"picture of {stages[0]}"
    )
    engine = SimpleNamespace(weights_of=lambda partitions: nullcontext(partitions), splits_weights=False)
    recorder = make_recorder(tmp_path, writer, preview=preview)
    recorder.draw_preview(Progress(16, 4), engine, SimpleNamespace(partitions=[4.0, 5.0]))
    assert drawn == [[4.0, 5.0]]
    assert pictures == [("samples/stages", "picture of stages", 4)]

    # On another rank, which draws only if the weights are sharded.
    recorder._world, recorder._writer = World(Placement(1, 2), torch.device("cpu")), None
    for engine.splits_weights in (False, True):
        recorder.draw_preview(Progress(16, 4), engine, SimpleNamespace(partitions=[6.0]))
    assert drawn[1:] == [[6.0]]
    assert len(pictures) == 1
