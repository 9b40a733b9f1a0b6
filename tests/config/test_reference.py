"""docs/config.md matches the definitions of the knobs."""

import re
from pathlib import Path

import pytest

from ecar_dist.config.read import load_config
from ecar_dist.config.reference import page
from ecar_dist.config.run import RunConfig

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def rows():
    """The cells of each knob's row, by key."""
    lines = [line for line in page().splitlines() if line.startswith("| `")]
    table = [[cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")] for line in lines]
    return {row[0].split("`")[1]: row for row in table}


def test_the_committed_page_is_current():
    assert (DOCS / "config.md").read_text() == page(), "run `make docs`"


def test_every_knob_has_a_row_of_seven_cells(rows):
    keys = [knob.key for knob in RunConfig.knobs()]
    assert [key for key in keys if key not in rows] == []
    assert {len(row) for row in rows.values()} == {7}


@pytest.mark.parametrize(
    ("key", "default", "kind", "unit", "allowed", "on_resume"),
    [
        ("optim.learning_rate", "`0.0001`", "float", "per step", "> 0", "optimisation"),
        ("train.total_samples", "required", "int", "samples", ">= 1", "optimisation"),
        ("model.label_dropout", "`0.1`", "float", "fraction", ">= 0 and < 1", "optimisation"),
        ("model.ar_depth", "`null`", "int or null", "blocks", ">= 1", "model"),
        (
            "ema.half_life_samples",
            "`[1_000_000]`",
            "list of int",
            "samples",
            "one or more numbers >= 1",
            "optimisation",
        ),
        ("sample.solver", "`midpoint`", "str", "", "`euler`, `midpoint`, `heun`, `mean`", "safe"),
        ("sample.steps_per_stage", "`[8]`", "list of int", "steps", "one number >= 1, or K of them", "safe"),
        ("deepspeed.zero_stage", "`2`", "int", "", "`0`, `1`, `2`, `3`", "safe"),
        ("data.mixture[].weight", "required", "float", "weight", "> 0", "data order"),
    ],
)
def test_a_row_holds_what_the_definition_says(rows, key, default, kind, unit, allowed, on_resume):
    _, *cells, meaning, resume = rows[key]
    assert cells == [default, kind, unit, allowed]
    assert meaning
    assert resume == on_resume


def test_knobs_that_may_differ_between_nodes_are_marked(rows):
    marked = {key for key, row in rows.items() if row[0].endswith("\\*")}
    assert marked == {knob.key for knob in RunConfig.knobs() if knob.per_node}


def test_the_example_of_the_page_is_a_valid_config(tmp_path):
    example = re.search(r"```yaml\n(.*?)```", page(), re.DOTALL)
    override = re.search(r"mine.yaml (\S+) '(.*)'", page())
    (tmp_path / "mine.yaml").write_text(example[1])
    config = load_config(tmp_path / "mine.yaml", override.groups())
    assert config.optim.learning_rate == 2e-4
    assert config.ema.half_life_samples == (100_000, 1_000_000)
