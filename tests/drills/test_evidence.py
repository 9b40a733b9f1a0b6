"""Comparisons that must not pass by chance."""

import json
import math

import pytest

from ecar_dist.drills.evidence import (
    ended_well,
    ended_within,
    every_step_once,
    losses,
    no_orphans,
    one_line_with,
    rank_statuses,
    read_metrics,
    same_losses,
    whole_checkpoints,
)
from ecar_dist.drills.processes import Ended

QUIET = {1: 0.5, 2: 0.25, 3: 0.125}


@pytest.mark.parametrize(
    ("found", "ok", "seen"),
    [
        (QUIET, True, "largest difference 0.0e+00"),
        ({**QUIET, 4: 9.0}, True, "largest difference 0.0e+00"),
        ({**QUIET, 3: 0.125 * (1 + 5e-7)}, True, "5.0e-07 at step 3"),
        ({**QUIET, 2: 0.25 * (1 + 2e-6)}, False, "2.0e-06 at step 2"),
        ({**QUIET, 2: math.nan}, False, "inf at step 2"),
        ({1: 0.5, 3: 0.125}, False, "1 steps have none, the first is step 2"),
        ({}, False, "3 steps have none"),
    ],
)
def test_losses_are_equal_only_where_all_are(found, ok, seen):
    finding = same_losses(found, QUIET, 1e-6)
    assert finding.ok is ok
    assert seen in finding.seen


def test_a_quiet_run_of_nan_or_of_nothing_proves_nothing():
    assert not same_losses({1: math.nan}, {1: math.nan}, 1e-6).ok
    assert not same_losses(QUIET, {}, 1e-6).ok


def test_a_loss_that_is_not_finite_equals_none():
    found = losses([{"step": 1, "train/loss": 0.5}, {"step": 2, "train/loss": None}])
    assert math.isnan(found[2])
    assert not same_losses(found, {1: 0.5, 2: 0.25}, 1e-6).ok
    assert same_losses(found, {1: 0.5}, 1e-6, "those of a friend").expected.endswith(
        "equal those of a friend, to 1e-06 relative"
    )


@pytest.mark.parametrize(
    ("steps", "seen"),
    [
        ([1, 2, 3], "steps 1 to 3"),
        ([1, 3], "2 lines, step 2 absent"),
        ([1, 2, 2, 3], "4 lines, step 2 more than once"),
        ([1, 3, 2], "3 lines"),
        ([], "0 lines, step 1 absent"),
    ],
)
def test_every_step_is_there_once_and_in_order(steps, seen):
    finding = every_step_once([{"step": step} for step in steps], 3)
    assert (finding.seen, finding.ok) == (seen, steps == [1, 2, 3])


def test_a_metrics_file_cut_by_a_kill_is_read_up_to_there(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text(json.dumps({"step": 1}) + '\n{"step": 2, "tr')
    assert read_metrics(path) == [{"step": 1}]


def test_ends():
    assert ended_well(Ended(0, "", 1.0)).ok
    failed = ended_well(Ended(1, "ecar-dist: no room\n", 1.0))
    assert (failed.ok, failed.seen) == (False, "exit 1: ecar-dist: no room")
    assert ended_within(Ended(1, "", 4.9), 5).ok
    assert not ended_within(Ended(1, "", 5.1), 5).ok
    assert not ended_within(Ended(0, "", 1.0), 5).ok, "a job that did not notice"
    assert not ended_within(Ended(None, "", 1.0), 5).ok
    assert no_orphans(Ended(1, "", 1.0)).ok
    assert not no_orphans(Ended(1, "", 1.0, ("12 (sleep)",))).ok
    assert not no_orphans(Ended(None, "", 1.0)).ok


def test_all_ranks_that_report_a_status_report_this_one():
    report = "  rank      : {} (local_rank: 0)\n  exitcode  : {} (pid: 1)\n"
    assert rank_statuses(Ended(1, report.format(0, 75) + report.format(1, 75), 1.0), 75).ok
    assert not rank_statuses(Ended(1, report.format(0, 75) + report.format(1, -15), 1.0), 75).ok
    assert not rank_statuses(Ended(1, "", 1.0), 75).ok
    assert rank_statuses(Ended(1, report.format(0, 1) + report.format(1, -15), 1.0), 1, -15).ok
    assert not rank_statuses(Ended(1, report.format(0, -15) + report.format(1, -15), 1.0), 1, -15).ok


def test_one_line_is_neither_none_nor_two():
    line = "ecar-dist: rank 1 (host a) is gone\n"
    assert one_line_with(Ended(1, line, 1.0), "", "rank 1 ").seen == "rank 1 (host a) is gone"
    assert not one_line_with(Ended(1, "rank 1 is gone\n", 1.0), "", "rank 1 ").ok
    assert not one_line_with(Ended(1, line + line, 1.0), "", "rank 1 ").ok
    assert not one_line_with(Ended(1, line, 1.0), "", "rank 2 ").ok


def test_a_folder_without_checkpoints_or_with_unfinished_ones_is_not_whole(tmp_path):
    assert not whole_checkpoints(tmp_path, []).ok
    (tmp_path / "step-00000001").mkdir()
    assert "checkpoint.json" in whole_checkpoints(tmp_path, [tmp_path / "step-00000001"]).seen
