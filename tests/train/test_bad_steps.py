"""The policy of bad steps on scripted losses and norms: no engine, no rank."""

import contextlib
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecar_dist.config.run import BadStepsSection
from ecar_dist.storage.untrusted import UntrustedError
from ecar_dist.train.bad_steps import BadSteps, Verdict, bad_step_record, roll_back_record, window_in

FINE, SKIPPED, ROLL_BACK, STOP = Verdict.FINE, Verdict.SKIPPED, Verdict.ROLL_BACK, Verdict.STOP
NAN, INF = math.nan, math.inf
SECTION = BadStepsSection(spike_factor=4.0, window=8, roll_back_after=3, stop_after=2)


def windows_in(lines):
    """The windows of all roll-backs in lines of bad_steps.jsonl; a line that was cut by a kill was never acted on."""
    windows = []
    for line in lines:
        with contextlib.suppress(UntrustedError):
            windows.append(window_in(line.encode()))
    return [window for window in windows if window is not None]


def feed(bad, steps):
    """Judge (loss, norm) of consecutive steps from 1 on, as an engine would apply them; returns the verdicts."""
    return [step_of(bad, number, *numbers) for number, numbers in enumerate(steps, start=1)]


def step_of(bad, number, loss, norm):
    if bad.passes_over(number):
        bad.pass_over()
        return None
    applied = math.isfinite(loss) and math.isfinite(norm) and norm <= bad.grad_norm_limit
    return bad.judge(number, loss, norm, applied)


GOOD = (0.5, 1.0)


def test_good_steps_are_fine_and_bad_ones_are_skipped():
    bad = BadSteps(SECTION)
    steps = [GOOD, (NAN, 1.0), GOOD, (0.5, INF), (INF, NAN), GOOD]
    assert feed(bad, steps) == [FINE, SKIPPED, FINE, SKIPPED, SKIPPED, FINE]
    assert bad.skipped == 3


def test_a_step_that_the_engine_refused_is_bad_whatever_its_numbers_say():
    bad = BadSteps(SECTION)
    assert bad.judge(1, 0.5, 1.0, applied=False) == SKIPPED
    assert bad.notes()["good_norms"] == []


def test_there_is_no_limit_until_half_a_window_of_good_norms_is_known():
    bad = BadSteps(SECTION)
    assert feed(bad, [(0.5, 1.0), (0.5, 50.0), (0.5, 3.0)]) == [FINE] * 3
    assert bad.grad_norm_limit == INF
    assert bad.judge(4, 0.5, 2.0, True) == FINE
    assert bad.grad_norm_limit == 4.0 * 2.5  # of the median of 1, 2, 3, 50
    feed(BadSteps(SECTION), [(0.5, 1.0)] * 3 + [(0.5, NAN)])
    assert bad.fault(0.5, 10.0) is None
    assert bad.fault(0.5, 10.1) == ("the gradient norm 10.1 is above 10 = 4 x the median of the last 4 good steps")


def test_bad_norms_do_not_move_the_limit_and_old_ones_leave_it():
    bad = BadSteps(SECTION)
    feed(bad, [(0.5, 1.0)] * 8)
    assert step_of(bad, 9, 0.5, 40.0) == SKIPPED
    assert bad.grad_norm_limit == 4.0
    for number in range(10, 18):
        assert step_of(bad, number, 0.5, 2.0) == FINE
    assert bad.grad_norm_limit == 8.0


def test_without_a_spike_factor_only_what_is_not_finite_is_bad():
    bad = BadSteps(BadStepsSection(window=8))
    assert feed(bad, [(0.5, 1.0)] * 8 + [(0.5, 1e30)]) == [FINE] * 9
    assert bad.grad_norm_limit == INF
    assert bad.fault(NAN, 1.0) == "the loss is nan"
    assert bad.fault(0.5, INF) == "the gradient norm is inf"


def test_three_in_a_row_roll_back_and_two_do_not():
    bad = BadSteps(SECTION)
    steps = [GOOD] * 5 + [(NAN, 1.0)] * 2 + [GOOD] + [(NAN, 1.0)] * 3
    assert feed(bad, steps) == [FINE] * 5 + [SKIPPED] * 2 + [FINE] + [SKIPPED] * 2 + [ROLL_BACK]
    assert bad.window_to_pass == (9 - 3, 11)  # first bad step 9, last 11


def roll_back(bad, checkpoint_notes, lines, step):
    """As the loop does it: the window into the file, then the checkpoint with its notes."""
    lines.append(roll_back_record(step, bad.window_to_pass))
    return BadSteps(SECTION, json.loads(json.dumps(checkpoint_notes)), windows_in(lines))


def test_after_a_roll_back_the_steps_around_the_bad_ones_are_passed_over():
    bad, lines = BadSteps(SECTION), []
    feed(bad, [GOOD] * 4)
    notes = bad.notes()  # the checkpoint of step 4
    for number in (5, 6, 7):
        step_of(bad, number, *GOOD)
    assert [step_of(bad, number, NAN, 1.0) for number in (8, 9, 10)] == [SKIPPED, SKIPPED, ROLL_BACK]
    bad = roll_back(bad, notes, lines, 10)
    assert [number for number in range(1, 20) if bad.passes_over(number)] == [5, 6, 7, 8, 9, 10]
    assert [step_of(bad, number, *GOOD) for number in range(5, 12)] == [None] * 6 + [FINE]
    assert bad.skipped == 6


def test_a_run_that_was_rolled_back_often_enough_stops():
    bad, lines, verdicts = BadSteps(SECTION), [], []
    notes = bad.notes()
    for number in range(1, 100):
        verdicts.append(step_of(bad, number, NAN, 1.0))
        if verdicts[-1] == ROLL_BACK:
            bad = roll_back(bad, notes, lines, number)
        if verdicts[-1] == STOP:
            break
    assert verdicts == [SKIPPED, SKIPPED, ROLL_BACK] * 2 + [SKIPPED, SKIPPED, STOP]
    assert windows_in(lines) == [(1, 3), (1, 6)]
    never = BadSteps(BadStepsSection(roll_back_after=1, stop_after=0))
    assert never.judge(1, NAN, 1.0, False) == STOP


def test_a_row_of_bad_steps_does_not_reach_across_steps_that_were_passed_over():
    """A checkpoint from within a bad row: its notes count two of them, then comes the window, then another."""
    bad = BadSteps(SECTION)
    feed(bad, [GOOD, (NAN, 1.0), (NAN, 1.0)])
    resumed = BadSteps(SECTION, bad.notes(), [(1, 4)])
    assert [step_of(resumed, number, NAN, 1.0) for number in (4, 5, 6, 7)] == [None, SKIPPED, SKIPPED, ROLL_BACK]


def test_windows_of_the_notes_and_of_the_file_are_one():
    bad = BadSteps(SECTION, {"windows": [[5, 9]]}, [(5, 9), (20, 25)])
    assert bad.windows == [(5, 9), (20, 25)]
    assert BadSteps(SECTION, bad.notes()).windows == bad.windows


numbers = st.sampled_from([GOOD, GOOD, GOOD, (0.4, 1.5), (0.5, 9.0), (0.5, 30.0), (NAN, 1.0), (0.5, INF)])


@settings(max_examples=150, deadline=None)
@given(steps=st.lists(numbers, max_size=60), cuts=st.sets(st.integers(1, 60)), window=st.integers(8, 12))
def test_any_sequence_cut_anywhere_is_judged_like_the_uncut_one(steps, cuts, window):
    """A cut is a checkpoint and a resume: the notes go through JSON, the windows of roll-backs through the file."""
    section = BadStepsSection(spike_factor=4.0, window=window, roll_back_after=2, stop_after=3)

    def run(cuts):
        bad, lines, said = BadSteps(section), [], []
        for number, numbers in enumerate(steps, start=1):
            said.append((step_of(bad, number, *numbers), bad.grad_norm_limit, bad.skipped))
            if said[-1][0] == ROLL_BACK:  # to a checkpoint of this very step: the window then covers nothing to come
                lines.append(roll_back_record(number, bad.window_to_pass))
                bad = BadSteps(section, bad.notes(), windows_in(lines))
            if number in cuts:
                bad = BadSteps(section, json.loads(json.dumps(bad.notes())), windows_in(lines))
        return said

    assert run(cuts) == run(set())


@settings(max_examples=150, deadline=None)
@given(steps=st.lists(numbers, min_size=1, max_size=80))
def test_whatever_comes_a_bad_step_is_never_learnt_from_and_the_end_is_near(steps):
    bad, section = BadSteps(SECTION), SECTION
    row, roll_backs = 0, 0
    for number, (loss, norm) in enumerate(steps, start=1):
        before, verdict = bad.notes()["good_norms"], step_of(bad, number, loss, norm)
        finite = math.isfinite(loss) and math.isfinite(norm)
        row = 0 if verdict == FINE else row + 1
        assert verdict != FINE or finite
        assert (bad.notes()["good_norms"] == before) or verdict == FINE
        assert (verdict in (ROLL_BACK, STOP)) == (row >= section.roll_back_after)
        assert (verdict == STOP) == (row >= section.roll_back_after and roll_backs >= section.stop_after)
        if verdict == ROLL_BACK:
            roll_backs, row = roll_backs + 1, 0
            bad = BadSteps(section, {**bad.notes(), "in_a_row": 0}, [*bad.windows, bad.window_to_pass])


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


def test_the_file_gives_the_windows_back_and_a_line_cut_by_a_kill_is_none():
    lines = [bad_step_record(7, 96, NAN, 3.5, "r", [[1]]), roll_back_record(9, (4, 9)), roll_back_record(20, (15, 20))]
    assert windows_in("".join(lines).splitlines()) == [(4, 9), (15, 20)]
    assert windows_in("".join(lines)[:-3].splitlines()) == [(4, 9)]
    assert windows_in([]) == []
