"""metrics.jsonl and TensorBoard of one run directory, across restarts and full disks."""

import contextlib
import errno
import json
import os
import subprocess
import sys

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ecar_dist.runtime.run.event_file as event_file
from ecar_dist.runtime.run.directory import RunDirectory
from ecar_dist.runtime.run.metrics import HELD_BYTES, MetricsWriter, lineage_table, log_scores
from tests.runtime.run.test_event_file import tags, wait_for
from tests.train.test_objective import make_config


@pytest.fixture
def directory(tmp_path):
    return start(RunDirectory(tmp_path / "run"))


def start(directory):
    """The same calls as in train/start.py before it makes the writer."""
    directory.open_for_training()
    directory.begin_attempt(world_size=2, zero_stage=1, device="cpu", newest_step=None)
    directory.write_config(make_config(num_stages=2))
    return directory


def lines(directory):
    return [json.loads(line, parse_constant=pytest.fail) for line in directory.metrics.read_text().splitlines()]


def board(directory):
    events = EventAccumulator(str(directory.tensorboard))
    events.Reload()
    return events


def text(events, tag):
    return [event.tensor_proto.string_val[0].decode() for event in events.Tensors(f"{tag}/text_summary")]


def write(directory, steps, start_step=0, tensorboard=True):
    with contextlib.closing(MetricsWriter(directory, start_step, tensorboard)) as writer:
        for step in steps:
            writer.log(step, 16 * step, {"train/loss": 1.0 / step})


def test_both_files_have_the_same_tags_and_values(directory):
    write(directory, range(1, 5))
    events = board(directory)
    assert lines(directory) == [{"step": n, "samples_seen": 16 * n, "train/loss": 1.0 / n} for n in range(1, 5)]
    assert [(p.step, p.value) for p in events.Scalars("train/loss")] == [
        (n, pytest.approx(1.0 / n)) for n in range(1, 5)
    ]
    assert [p.value for p in events.Scalars("train/samples_seen")] == [16, 32, 48, 64]


def test_nothing_is_lost_to_imports_in_a_fresh_process(directory):
    code = (
        "import sys; from ecar_dist.runtime.run.metrics import MetricsWriter, RunDirectory;"
        "writer = MetricsWriter(RunDirectory(sys.argv[1]), 0, tensorboard=True);"
        "writer.log(1, 16, {'train/loss': 1.0}); writer.close()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(directory.path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert [p.step for p in board(directory).Scalars("train/loss")] == [1]


def test_a_resume_drops_the_lines_of_steps_that_are_repeated(directory):
    write(directory, range(1, 9), tensorboard=False)
    with directory.metrics.open("a") as file:
        file.write('{"step": 9, "samp')  # cut by a kill
    write(directory, range(6, 8), start_step=5, tensorboard=False)
    assert [line["step"] for line in lines(directory)] == [1, 2, 3, 4, 5, 6, 7]


def test_a_damaged_line_is_reported_and_costs_no_other(directory, capsys):
    write(directory, range(1, 9), tensorboard=False)
    whole = directory.metrics.read_bytes().splitlines(keepends=True)
    damaged = (
        b"\xff" + whole[1],
        whole[2].replace(b"step", b"sdep", 1),
        b"\0" * 99 + b"\n",
        b"[" * 10**5 + b"\n",
        b"3\n",
    )
    directory.metrics.write_bytes(b"".join([whole[0], *damaged, *whole[3:]]))
    write(directory, range(6, 8), start_step=5, tensorboard=False)
    assert [line["step"] for line in lines(directory)] == [1, 4, 5, 6, 7]
    said = capsys.readouterr().err
    assert str(directory.metrics) in said
    assert f"{len(damaged)} damaged lines" in said


def test_what_is_not_a_log_is_set_aside_and_a_new_one_begins(directory, capsys):
    path = directory.metrics
    makers = [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path.name)]
    makers.append(lambda path: (path.touch(), os.truncate(path, 40 << 30)))
    for number, make in enumerate(makers, 1):
        path.unlink(missing_ok=True)
        make(path)
        write(directory, range(6, 8), start_step=5, tensorboard=False)
        assert [line["step"] for line in lines(directory)] == [6, 7]
        assert f"it is now metrics.jsonl.damaged-{number}" in capsys.readouterr().err


def test_a_roll_back_drops_what_came_after_the_checkpoint(directory):
    with contextlib.closing(MetricsWriter(directory, 0, tensorboard=True)) as writer:
        for step in range(1, 9):
            writer.log(step, 16 * step, {"train/loss": 1.0})
        writer.rewind(3)
        for step in range(6, 10):  # steps 4 and 5 are skipped
            writer.log(step, 16 * step, {"train/loss": 2.0})
    expected = [(1, 1.0), (2, 1.0), (3, 1.0), *((step, 2.0) for step in range(6, 10))]
    assert [(line["step"], line["train/loss"]) for line in lines(directory)] == expected
    assert [(p.step, p.value) for p in board(directory).Scalars("train/loss")] == expected


def test_tensorboard_shows_the_lineage_and_the_config(directory):
    directory.note_attempt(resumed_from_step=0, precision="fp32")
    write(directory, [1])
    events = board(directory)
    (table,), (config,) = text(events, "lineage"), text(events, "config")
    assert table.splitlines()[0].startswith("| started | world_size | zero_stage |")
    assert "| 2 | 1 | fp32 | cpu | 0 |" in table.splitlines()[2]
    assert config.startswith("```yaml\n")
    shown = yaml.safe_load(config.removeprefix("```yaml\n").removesuffix("```\n"))
    assert (shown["run"]["name"], shown["flow"]["token_draws"]) == ("test", 4)


def test_no_secret_of_a_url_is_shown(directory):
    directory.config.write_text("data:\n  latents: s3://key:verysecret@host/bucket?X-Amz-Signature=abcdef\n")
    write(directory, [1])
    (config,) = text(board(directory), "config")
    assert config.startswith("```yaml\ndata:\n")
    assert "s3://host/bucket" in config
    assert "verysecret" not in config
    assert "abcdef" not in config


def test_each_attempt_is_a_row_of_the_lineage():
    attempts = [
        {"started": "a", "world_size": 2, "ended": "b", "reason": "one | two", "torch": "x"},
        {"started": "c", "world_size": 4, "resumed_from_step": 12},
    ]
    assert lineage_table(attempts).splitlines()[2:] == [
        "| a | 2 |  |  |  |  | b | one \\| two |",
        "| c | 4 |  |  |  | 12 |  |  |",
    ]


def test_a_value_that_is_not_finite_is_null(directory):
    with contextlib.closing(MetricsWriter(directory, 0, tensorboard=False)) as writer:
        writer.log(1, 16, {"train/loss": float("nan"), "train/grad_norm": float("inf"), "train/lr": 1.0})
    assert lines(directory) == [
        {"step": 1, "samples_seen": 16, "train/loss": None, "train/grad_norm": None, "train/lr": 1.0}
    ]


class FullDisk:
    """A file that accepts `room` more bytes, and then none until there is room again."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = self.file.write(data[: self.room])
        self.room -= taken
        return taken

    def close(self):
        self.file.close()


def test_lines_wait_for_a_full_disk_and_none_is_torn(directory, capfd):
    writer = MetricsWriter(directory, 0, tensorboard=False)
    disk = writer._lines._file = FullDisk(writer._lines._file, room=100)
    for step in range(1, 11):
        writer.log(step, 16 * step, {"train/loss": 1.0})
    said = capfd.readouterr().err
    assert directory.metrics.stat().st_size == 100
    assert said.count("\n") == 1
    assert os.strerror(errno.ENOSPC) in said
    disk.room = 10**6
    writer.log(11, 176, {"train/loss": 1.0})
    assert [line["step"] for line in lines(directory)] == list(range(1, 12))
    disk.room = 0
    for step in range(12, 15):
        writer.log(step, 16 * step, {"x" * (HELD_BYTES // 2): 1.0})
    assert len(writer._lines._held) < 2 * HELD_BYTES  # what waits is bounded
    disk.room = 10**9
    writer.close()
    assert [line["step"] for line in lines(directory)] == list(range(1, 14))


def test_scores_are_written_next_to_the_curves(directory):
    write(directory, [1, 2])
    log_scores(directory, 2, {"FD": 3.5, "samples": 128, "name": "x"})
    assert [(p.step, p.value) for p in board(directory).Scalars("eval/FD")] == [(2, 3.5)]
    assert "eval/samples" not in board(directory).Tags()["scalars"]


@pytest.mark.parametrize("small_disk", ["256k"], indirect=True)
def test_a_real_disk_that_fills_up_and_is_cleared_again(small_disk, monkeypatch, capfd):
    monkeypatch.setattr(event_file, "RETRY_SECONDS", 0.0)
    directory = start(RunDirectory(small_disk / "run"))
    with contextlib.closing(MetricsWriter(directory, 0, tensorboard=True)) as writer:
        writer.log(1, 16, {"train/loss": 1.0})
        wait_for(lambda: tags(directory.tensorboard))
        ballast = small_disk / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(512))
        for step in range(2, 101):
            writer.log(step, 16 * step, {f"train/value{n}": float(n) for n in range(8)})
        wait_for(lambda: writer._board.dropped)
        ballast.unlink()
        writer.log(101, 1616, {"train/loss": 2.0})
    said = capfd.readouterr().err.splitlines()
    assert len([line for line in said if str(directory.metrics) in line]) == 1
    assert len([line for line in said if "TensorBoard" in line]) == 1
    assert [line["step"] for line in lines(directory)] == list(range(1, 102))
    assert lines(directory)[-1]["log/dropped_events"] > 0
    assert [p.step for p in board(directory).Scalars("train/loss")] == [1, 101]
