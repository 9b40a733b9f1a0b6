"""What a bad step is and what follows it, on scripted losses and norms; and the file that records it."""

import contextlib
import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecar_dist.config.knobs_training import BadStepsSection
from ecar_dist.runtime.world import Placement, World
from ecar_dist.storage.untrusted import UntrustedError
from ecar_dist.train.guard import (
    Action,
    BadStepFile,
    BadSteps,
    StepGuard,
    bad_step_record,
    is_good,
    parse_window,
    roll_back_record,
)
from ecar_dist.train.telemetry import StepResult

GO_ON, SKIP, ROLL_BACK, STOP = Action.GO_ON, Action.SKIP, Action.ROLL_BACK, Action.STOP
NAN, INF = math.nan, math.inf
SECTION = BadStepsSection(spike_factor=4.0, window=8, roll_back_after=3, stop_after=2)
ALONE = World(Placement(), torch.device("cpu"))


@pytest.mark.parametrize(
    ("loss", "grad_norm", "limit", "good"),
    [
        (0.5, 1.0, INF, True),
        (0.0, 0.0, 0.0, True),
        (-0.5, 2.0, 2.0, True),  # at the limit
        (0.5, 2.0000001, 2.0, False),
        (NAN, 1.0, INF, False),
        (INF, 1.0, INF, False),
        (-INF, 1.0, INF, False),
        (0.5, NAN, INF, False),
        (0.5, INF, INF, False),  # not finite, whatever the limit
        (NAN, NAN, INF, False),
    ],
)
def test_a_good_step_is_finite_and_within_the_limit_on_host_and_device(loss, grad_norm, limit, good):
    assert is_good(loss, grad_norm, limit) is good
    on_device = is_good(torch.tensor(loss), torch.tensor(grad_norm, dtype=torch.float64), limit)
    assert on_device.dtype == torch.bool
    assert on_device.shape == ()
    assert bool(on_device) is good


def windows_in(lines):
    """The windows of all roll-backs in lines of bad_steps.jsonl; a line cut off by a kill was never acted on."""
    windows = []
    for line in lines:
        with contextlib.suppress(UntrustedError):
            windows.append(parse_window(line.encode()))
    return [window for window in windows if window is not None]


def feed(bad, steps):
    """Judge (loss, norm) of consecutive steps from 1 on, as an engine would apply them. Returns what follows each."""
    return [step_of(bad, number, *numbers) for number, numbers in enumerate(steps, start=1)]


def step_of(bad, number, loss, norm):
    if bad.passes_over(number):
        bad.pass_over()
        return None
    return bad.judge(number, norm, is_good(loss, norm, bad.grad_norm_limit))


GOOD = (0.5, 1.0)


def test_good_steps_are_fine_and_bad_ones_are_skipped():
    bad = BadSteps(SECTION)
    steps = [GOOD, (NAN, 1.0), GOOD, (0.5, INF), (INF, NAN), GOOD]
    assert feed(bad, steps) == [GO_ON, SKIP, GO_ON, SKIP, SKIP, GO_ON]
    assert bad.skipped == 3


def test_a_step_that_the_engine_refused_is_bad_whatever_its_numbers_say():
    bad = BadSteps(SECTION)
    assert bad.judge(1, 1.0, applied=False) == SKIP
    assert bad.state_dict()["good_norms"] == []


def test_there_is_no_limit_until_half_a_window_of_good_norms_is_known():
    bad = BadSteps(SECTION)
    assert feed(bad, [(0.5, 1.0), (0.5, 50.0), (0.5, 3.0)]) == [GO_ON] * 3
    assert bad.grad_norm_limit == INF
    assert bad.judge(4, 2.0, applied=True) == GO_ON
    assert bad.grad_norm_limit == 4.0 * 2.5  # of the median of 1, 2, 3, 50
    assert step_of(bad, 5, 0.5, 10.1) == SKIP
    reason = bad.reason(0.5, 10.1)
    assert [value in reason for value in ("10.1 is above 10 = 4 x", "last 4 good steps")] == [True, True]
    assert step_of(bad, 6, 0.5, 10.0) == GO_ON


def test_bad_norms_do_not_move_the_limit_and_old_ones_leave_it():
    bad = BadSteps(SECTION)
    feed(bad, [(0.5, 1.0)] * 8)
    assert step_of(bad, 9, 0.5, 40.0) == SKIP
    assert bad.grad_norm_limit == 4.0
    for number in range(10, 18):
        assert step_of(bad, number, 0.5, 2.0) == GO_ON
    assert bad.grad_norm_limit == 8.0


def test_without_a_spike_factor_only_what_is_not_finite_is_bad():
    bad = BadSteps(BadStepsSection(window=8))
    assert feed(bad, [(0.5, 1.0)] * 8 + [(0.5, 1e30)]) == [GO_ON] * 9
    assert bad.grad_norm_limit == INF
    assert bad.reason(NAN, 1.0) == "the loss is nan"
    assert bad.reason(0.5, INF) == "the gradient norm is inf"


def test_three_in_a_row_roll_back_and_two_do_not():
    bad = BadSteps(SECTION)
    steps = [GOOD] * 5 + [(NAN, 1.0)] * 2 + [GOOD] + [(NAN, 1.0)] * 3
    assert feed(bad, steps) == [GO_ON] * 5 + [SKIP] * 2 + [GO_ON] + [SKIP] * 2 + [ROLL_BACK]
    assert bad.window_to_pass == (9 - 3, 11)  # first bad step 9, last 11


def roll_back(bad, checkpoint_state, lines, step):
    """As the loop does it: write the window to the file, then restore the checkpoint with its state."""
    lines.append(roll_back_record(step, bad.window_to_pass))
    return BadSteps(SECTION, json.loads(json.dumps(checkpoint_state)), windows_in(lines))


def test_after_a_roll_back_the_steps_around_the_bad_ones_are_passed_over():
    bad, lines = BadSteps(SECTION), []
    feed(bad, [GOOD] * 4)
    state = bad.state_dict()  # the checkpoint of step 4
    for number in (5, 6, 7):
        step_of(bad, number, *GOOD)
    assert [step_of(bad, number, NAN, 1.0) for number in (8, 9, 10)] == [SKIP, SKIP, ROLL_BACK]
    bad = roll_back(bad, state, lines, 10)
    assert [number for number in range(1, 20) if bad.passes_over(number)] == [5, 6, 7, 8, 9, 10]
    assert [step_of(bad, number, *GOOD) for number in range(5, 12)] == [None] * 6 + [GO_ON]
    assert bad.skipped == 6


def test_a_run_that_was_rolled_back_often_enough_stops():
    bad, lines, actions = BadSteps(SECTION), [], []
    state = bad.state_dict()
    for number in range(1, 100):
        actions.append(step_of(bad, number, NAN, 1.0))
        if actions[-1] == ROLL_BACK:
            bad = roll_back(bad, state, lines, number)
        if actions[-1] == STOP:
            break
    assert actions == [SKIP, SKIP, ROLL_BACK] * 2 + [SKIP, SKIP, STOP]
    assert windows_in(lines) == [(1, 3), (1, 6)]
    never = BadSteps(BadStepsSection(roll_back_after=1, stop_after=0))
    assert never.judge(1, 1.0, applied=False) == STOP


def test_a_row_of_bad_steps_does_not_reach_across_steps_that_were_passed_over():
    """A checkpoint from within a row of bad steps: its state counts two, then comes the window, then more bad steps."""
    bad = BadSteps(SECTION)
    feed(bad, [GOOD, (NAN, 1.0), (NAN, 1.0)])
    resumed = BadSteps(SECTION, bad.state_dict(), [(1, 4)])
    assert [step_of(resumed, number, NAN, 1.0) for number in (4, 5, 6, 7)] == [None, SKIP, SKIP, ROLL_BACK]


def test_windows_of_the_checkpoint_and_of_the_file_are_one():
    bad = BadSteps(SECTION, {"windows": [[5, 9]]}, [(5, 9), (20, 25)])
    assert bad.windows == [(5, 9), (20, 25)]
    assert BadSteps(SECTION, bad.state_dict()).windows == bad.windows


numbers = st.sampled_from([GOOD, GOOD, GOOD, (0.4, 1.5), (0.5, 9.0), (0.5, 30.0), (NAN, 1.0), (0.5, INF)])


@settings(max_examples=150, deadline=None)
@given(steps=st.lists(numbers, max_size=60), cuts=st.sets(st.integers(1, 60)), window=st.integers(8, 12))
def test_any_sequence_cut_anywhere_is_judged_like_the_uncut_one(steps, cuts, window):
    """A cut is a checkpoint and a resume: the state goes through JSON, the windows of roll-backs through the file."""
    section = BadStepsSection(spike_factor=4.0, window=window, roll_back_after=2, stop_after=3)

    def run(cuts):
        bad, lines, said = BadSteps(section), [], []
        for number, numbers in enumerate(steps, start=1):
            said.append((step_of(bad, number, *numbers), bad.grad_norm_limit, bad.skipped))
            if said[-1][0] == ROLL_BACK:  # to a checkpoint of this very step: the window then covers no later step
                lines.append(roll_back_record(number, bad.window_to_pass))
                bad = BadSteps(section, bad.state_dict(), windows_in(lines))
            if number in cuts:
                bad = BadSteps(section, json.loads(json.dumps(bad.state_dict())), windows_in(lines))
        return said

    assert run(cuts) == run(set())


@settings(max_examples=150, deadline=None)
@given(steps=st.lists(numbers, min_size=1, max_size=80))
def test_whatever_comes_a_bad_step_is_never_learnt_from_and_the_end_is_near(steps):
    bad, section = BadSteps(SECTION), SECTION
    row, roll_backs = 0, 0
    for number, (loss, norm) in enumerate(steps, start=1):
        before, action = bad.state_dict()["good_norms"], step_of(bad, number, loss, norm)
        finite = math.isfinite(loss) and math.isfinite(norm)
        row = 0 if action == GO_ON else row + 1
        assert action != GO_ON or finite
        assert (bad.state_dict()["good_norms"] == before) or action == GO_ON
        assert (action in (ROLL_BACK, STOP)) == (row >= section.roll_back_after)
        assert (action == STOP) == (row >= section.roll_back_after and roll_backs >= section.stop_after)
        if action == ROLL_BACK:
            roll_backs, row = roll_backs + 1, 0
            bad = BadSteps(section, {**bad.state_dict(), "in_a_row": 0}, [*bad.windows, bad.window_to_pass])


def test_the_record_of_a_bad_step_is_json_with_the_samples_of_every_rank():
    line = bad_step_record(7, 96, NAN, 3.5, "the loss is nan", [[4, 9], [2, 2]])
    assert line.endswith("\n")
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 7,
        "samples_seen": 96,
        "loss": "nan",
        "grad_norm": 3.5,
        "reason": "the loss is nan",
        "sample_ids": [[4, 9], [2, 2]],
    }


def test_the_file_gives_the_windows_back_but_not_of_a_line_cut_by_a_kill():
    lines = [bad_step_record(7, 96, NAN, 3.5, "r", [[1]]), roll_back_record(9, (4, 9)), roll_back_record(20, (15, 20))]
    assert windows_in("".join(lines).splitlines()) == [(4, 9), (15, 20)]
    assert windows_in("".join(lines)[:-3].splitlines()) == [(4, 9)]
    assert windows_in([]) == []


def test_steps_and_windows_are_on_record(tmp_path):
    path = tmp_path / "bad_steps.jsonl"
    file = BadStepFile(path, ALONE)
    assert file.windows() == []
    file.note_step(7, 96, NAN, 2.0, "the loss is nan", [5, 6])
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
        assert len(found) >= (1 if whole[place] != ord("\n") else 0), place  # otherwise two lines have become one
        if place >= state:
            assert (found == windows) == (said == ""), place
    path.write_bytes(whole)
    assert file.windows() == windows


def test_what_is_not_a_window_is_not_passed_over(tmp_path, capsys):
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


def test_what_is_not_a_file_is_set_aside_and_training_goes_on(tmp_path, capsys):
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
    assert str(path) in capsys.readouterr().err


def make_guard(tmp_path, **section):
    guard = StepGuard(BadStepsSection(**section), BadStepFile(tmp_path / "bad_steps.jsonl", ALONE), ALONE)
    guard.load_state_dict(None)
    return guard


def settle(guard, step, loss=NAN, norm=1.0):
    applied = bool(guard.is_good(torch.tensor(loss), torch.tensor(norm)))
    batches = [SimpleNamespace(sample_ids=torch.tensor([step, 7])), SimpleNamespace(sample_ids=torch.tensor([9]))]
    return guard.settle(step, 4 * (step - 1), batches, StepResult(loss, (loss,), norm, 1e-3, applied))


def test_bad_steps_are_written_down_with_their_samples_and_lead_to_a_window(tmp_path, capsys):
    guard = make_guard(tmp_path, roll_back_after=2)
    assert [settle(guard, 5, 0.5), settle(guard, 6), settle(guard, 7)] == [GO_ON, SKIP, ROLL_BACK]
    guard.roll_back(7, 3, {"good_norms": [1.5], "skipped": 8})
    assert [guard.history.passes_over(step) for step in (3, 4, 7, 8)] == [False, True, True, False]
    assert guard.state_dict() == {"good_norms": [1.5], "in_a_row": 0, "skipped": 8, "windows": [[4, 7]]}
    lines = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert [(line["step"], line.get("samples_seen")) for line in lines] == [(6, 20), (7, 24), (7, None)]
    assert lines[0]["sample_ids"] == [[6, 7, 9]]
    said = capsys.readouterr().out.splitlines()
    assert ["nan (skipped)" in said[0], "nan (roll back)" in said[1], "step 3; steps 4 to 7" in said[2]] == [True] * 3


def test_the_guard_goes_on_from_the_checkpoint_and_the_file(tmp_path):
    guard = make_guard(tmp_path, spike_factor=4.0, window=8)
    guard.load_state_dict({"good_norms": [2.0] * 8, "windows": [[1, 2]]})
    good = [bool(guard.is_good(torch.tensor(0.5), torch.tensor(norm))) for norm in (8.0, 8.1)]
    assert good == [True, False]
    BadStepFile(tmp_path / "bad_steps.jsonl", ALONE).note_roll_back(9, (4, 9))
    guard.load_state_dict(guard.state_dict())
    assert guard.history.windows == [(1, 2), (4, 9)]


def test_a_run_that_was_rolled_back_too_often_names_step_reason_and_count(tmp_path):
    guard = make_guard(tmp_path, roll_back_after=1, stop_after=0)
    assert settle(guard, 6) is STOP
    said = str(guard.stop_error(6, StepResult(NAN, (NAN,), 1.0, 1e-3, applied=False)))
    assert said.startswith("step 6: the loss is nan")
    assert "rolled back 0 times" in said
