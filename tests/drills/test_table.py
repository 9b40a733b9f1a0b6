"""The results of drills as text, Markdown and JSON."""

import json

import pytest

from ecar_dist.drills.evidence import Finding
from ecar_dist.drills.table import Row, circumstances, markdown, passed, summary, text_lines, tree

GOOD = Finding("it ends", "exit 0", True)
BAD = Finding("the losses equal the quiet run's, to 1e-06 relative", "largest difference | 0.5 at step 3", False)


def test_a_row_is_as_expected_where_all_findings_are_and_there_is_one():
    assert Row.of("nan", "", [GOOD, GOOD], 1.0).outcome == "as expected"
    assert Row.of("nan", "", [GOOD, BAD], 1.0).outcome == "NOT AS EXPECTED"
    assert Row.of("nan", "", [], 1.0).outcome == "NOT AS EXPECTED", "a drill that looked at nothing"


@pytest.mark.parametrize(
    ("outcome", "ok"), [("as expected", True), ("skipped", True), ("not run", False), ("NOT AS EXPECTED", False)]
)
def test_a_drill_that_did_not_run_is_not_a_success(outcome, ok):
    rows = [Row.of("kill-rank", "", [GOOD], 1.0), Row("nan", "", (), 0.0, outcome, "because")]
    assert passed(rows) is ok
    assert f"1 {outcome}" in summary(rows) or outcome == "as expected"


def test_the_table_has_columns_and_marks_what_was_not_expected():
    lines = text_lines([Row.of("kill-rank", "SIGKILL of a rank in a step", [GOOD, BAD], 12.4)])
    column = lines[0].index("seen")
    first = next(line for line in lines if line.startswith("kill-rank"))
    assert first[column:].startswith("exit 0")
    assert first.endswith("12    NOT AS EXPECTED")
    assert any(line[column:].startswith("!! largest difference") for line in lines)
    assert max(map(len, lines)) <= 165


def test_markdown_and_json_hold_the_facts_and_every_finding():
    rows = [Row.of("kill-rank", "SIGKILL", [GOOD, BAD], 12.4), Row("nan", "NaN", (), 0.0, "not run", "no ranks")]
    facts = circumstances("ecar-dist drill all config.yaml", "2 on cpu, fp32")
    text = markdown(rows, facts)
    assert "- command: ecar-dist drill all config.yaml" in text
    assert "torch 2." in text
    first, second = text.splitlines()[-3:-1]
    assert first == "| kill-rank | SIGKILL | it ends | exit 0 | 12 | NOT AS EXPECTED |"
    assert second.startswith("|  |  | the losses equal")
    assert second.replace("\\|", "").count("|") == 7
    assert "| !! largest difference \\| 0.5 at step 3 |" in second
    assert "| nan | NaN |  | no ranks | 0 | not run |" in text
    stored = json.loads(json.dumps(tree(rows, facts)))
    assert stored["passed"] is False
    assert stored["drills"][0]["findings"][1]["seen"] == BAD.seen
