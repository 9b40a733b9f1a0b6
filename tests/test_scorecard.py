"""docs/reliability.md names tests and drills that exist, has every row of the catalogue once, and counts correctly."""

import ast
import re
from pathlib import Path

import pytest

from ecar_dist.drills.run import DRILLS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/reliability.md").read_text()
ROWS = {"A": 22, "B": 14, "C": 16, "D": 24, "E": 22, "F": 9, "G": 10, "H": 7, "I": 22, "J": 23}
NOT_YET, NOT_MEASURABLE = "not yet: ", "not measurable: "
TEST, DRILL = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`"), re.compile(r"drill `([\w-]+)`")


def rows(page):
    """(row, fault, what happens, proof) of every line of the tables."""
    for line in page.splitlines():
        if re.match(r"\| [A-J]\d+ \|", line):
            row, fault, happens, proof = (cell.strip() for cell in line.strip("|").split("|"))
            yield row, fault, happens, proof


def functions_in(path):
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def wrong(proof):
    """What a proof names but does not exist. A proof that names nothing is wrong, too."""
    if proof.startswith((NOT_YET, NOT_MEASURABLE)):
        named = re.findall(r"`(tests/[\w/]+\.py)`", proof)
        return [path for path in named if not (ROOT / path).exists()]
    tests, drills = TEST.findall(proof), DRILL.findall(proof)
    left = re.sub(r"[\s,]", "", DRILL.sub("", TEST.sub("", proof)))
    missing = [f"{path}::{name}" for path, name in tests if not is_test(path, name)]
    return missing + [name for name in drills if name not in DRILLS] + ([left] if left or not tests + drills else [])


def is_test(path, name):
    return (ROOT / path).exists() and name in functions_in(ROOT / path)


def test_what_the_rows_name_exists():
    missing = [f"{row}: {name}" for row, *_, proof in rows(PAGE) for name in wrong(proof)]
    assert not missing, "\n".join(missing)


def test_every_row_has_a_fault_and_what_happens_or_why_not():
    faults = [
        row
        for row, fault, happens, proof in rows(PAGE)
        if not fault or bool(happens) == proof.startswith((NOT_YET, NOT_MEASURABLE))
    ]
    assert faults == []


def test_every_row_of_the_catalogue_is_there_once():
    assert [row for row, *_ in rows(PAGE)] == [f"{group}{n}" for group in ROWS for n in range(1, ROWS[group] + 1)]


def test_the_counts_are_those_of_the_tables():
    proofs = [proof for *_, proof in rows(PAGE)]
    not_yet, not_measurable = (sum(proof.startswith(word) for proof in proofs) for word in (NOT_YET, NOT_MEASURABLE))
    survived = len(proofs) - not_yet - not_measurable
    assert (
        f"{len(proofs)} faults: {survived} survived as expected, {not_yet} not yet, {not_measurable} not measurable"
    ) in PAGE


@pytest.mark.parametrize(
    "proof",
    [
        "",
        "surely",
        "`tests/test_scorecard.py::test_that_is_not_there`",
        "`tests/test_nothing.py::test_it`",
        "drill `earthquake`",
        "drill `nan`, and more",
        "not yet: see `tests/test_nothing.py`",
    ],
)
def test_a_wrong_name_is_found(proof):
    assert wrong(proof)
    assert not wrong("drill `nan`, `tests/test_scorecard.py::test_a_wrong_name_is_found`")
