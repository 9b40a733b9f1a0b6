import json

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
    assert second == {"step": 9, "pass_over": [4, 9]}
    assert BadStepFile(path, ALONE).windows() == [(4, 9)]


def test_a_line_cut_by_a_kill_costs_no_other(tmp_path):
    path = tmp_path / "bad_steps.jsonl"
    path.write_text('{"step": 3, "pass_over": [1, 3]}\n{"step": 9, "pass_o')
    file = BadStepFile(path, ALONE)
    file.note_roll_back(12, (7, 12))
    assert file.windows() == [(1, 3), (7, 12)]
