import json
import os

import torch

from ecar_dist.runtime.world import Placement, World
from ecar_dist.train.bad_step_file import BadStepFile

ALONE = World(Placement(), torch.device("cpu"))


def test_steps_and_windows_are_on_record(tmp_path):
    path = tmp_path / "bad_steps.jsonl"
    file = BadStepFile(path, ALONE)
    assert file.windows() == []
    file.note_step(7, 96, float("nan"), 2.0, "the loss is nan", [5, 6])
    file.note_roll_back(9, (4, 9))
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert (first["step"], first["sample_ids"]) == (7, [[5, 6]])
    assert (second["step"], second["pass_over"]) == (9, [4, 9])
    assert BadStepFile(path, ALONE).windows() == [(4, 9)]


def test_a_line_cut_by_a_kill_costs_no_other(tmp_path):
    path = tmp_path / "bad_steps.jsonl"
    path.write_text('{"step": 3, "pass_over": [1, 3]}\n{"step": 9, "pass_o')
    file = BadStepFile(path, ALONE)
    file.note_roll_back(12, (7, 12))
    assert file.windows() == [(1, 3), (7, 12)]


def test_no_flipped_bit_changes_what_is_passed_over_without_a_word(tmp_path, capsys):
    path = tmp_path / "bad_steps.jsonl"
    file, windows = BadStepFile(path, ALONE), [(4, 9), (15, 20)]
    file.note_step(7, 96, float("nan"), 2.0, "the loss is nan", [5, 6])
    for first, last in windows:
        file.note_roll_back(last, (first, last))
    whole = path.read_bytes()
    state = whole.index(b"\n") + 1  # from here on each bit counts
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        found, said = file.windows(), capsys.readouterr().err
        assert set(found) <= set(windows), place
        assert len(found) >= (1 if whole[place] != ord("\n") else 0), place  # else two lines have become one
        if place >= state:
            assert (found == windows) == (said == ""), place
    path.write_bytes(whole)
    assert file.windows() == windows


def test_what_is_no_window_is_not_passed_over(tmp_path, capsys):
    path = tmp_path / "bad_steps.jsonl"
    lines = (
        '{"step": 9, "pass_over": [0, 9]}',
        '{"step": 9, "pass_over": [1, 10]}',
        '{"step": 9, "pass_over": [9, 1]}',
    )
    lines += ('{"step": 9, "pass_over": ["1", 9]}', '{"step": 9, "pass_over": [1, 2, 9]}', "[]", "\xff", "[" * 10**5)
    path.write_text("\n".join([*lines, '{"step": 9, "pass_over": [8, 9]}', '{"step": 9']), encoding="latin-1")
    assert BadStepFile(path, ALONE).windows() == [(8, 9)]
    assert f"{path} has {len(lines)} damaged lines" in capsys.readouterr().err


def test_what_is_no_file_is_put_aside_and_training_goes_on(tmp_path, capsys):
    path = tmp_path / "bad_steps.jsonl"
    places = (os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path.name))
    for number, make in enumerate(places, 1):
        make(path)
        file = BadStepFile(path, ALONE)
        assert file.windows() == []
        assert f"it is now bad_steps.jsonl.damaged-{number}" in capsys.readouterr().err
        file.note_roll_back(12, (7, 12))
        assert file.windows() == [(7, 12)]
        path.unlink()
    path.mkdir()
    file.note_step(7, 96, 1.0, 2.0, "spike", [5])
    assert "does not take a line" in capsys.readouterr().err
