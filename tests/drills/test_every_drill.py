"""Every drill in its shortest form: real ranks, forked from one server, on one small set, with one quiet run.

The checks of the drills must be those that docs/drills.md shows, so that page cannot become stale.
"""

import re
import shutil
from pathlib import Path

import pytest

from ecar_dist.config.read import config_from_dict
from ecar_dist.drills import ground as ground_module
from ecar_dist.drills import processes, storage_faults
from ecar_dist.drills.ground import Ground
from ecar_dist.drills.run import DRILLS, _row
from ecar_dist.drills.small_disk import NoSmallDiskError
from tests.drills import forked

PAGE = (Path(__file__).parents[2] / "docs/drills.md").read_text()
HURT_BY_OTHERS = ("slow-rank",)  # on a busy machine another rank may be the slow one: retried once
NUMBER = re.compile(r"\d+(\.\d+)?(e-?\d+)?")


def no_small_disk(folder, size):
    """The ranks are forked in this process's mount namespace: they cannot be moved to another one."""
    raise NoSmallDiskError("ranks are forked")


@pytest.fixture(scope="module")
def ground(make_tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drills")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ground_module, "Job", forked.ForkedJob)
        patch.setattr(processes, "marked", forked.marked)
        patch.setattr(storage_faults, "SmallDisk", no_small_disk)
        tree = make_tree(folder)
        tree["batch"]["micro_batch_size"] = 8  # one per rank and step
        yield Ground(config_from_dict(tree), folder / "drills", 2)
    shutil.rmtree(folder)


def rows_of(page):
    """By drill: what it expects, in order; and its outcome."""
    expected, outcomes, name = {}, {}, ""
    for line in page.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 6 and cells[0] not in ("drill", "---"):
            name = cells[0] or name
            expected.setdefault(name, []).append(cells[2])
            outcomes[name] = outcomes.get(name) or cells[5]
    return expected, outcomes


@pytest.mark.parametrize("name", DRILLS)
def test_a_drill_survives_and_looks_at_what_its_page_shows(name, ground):
    row = _row(name, ground, False, False)
    if name in HURT_BY_OTHERS and row.outcome != "as expected":
        row = _row(name, ground, False, False)
    assert row.outcome == "as expected", [finding for finding in row.findings if not finding.ok] or row.reason
    looked_at = [finding.expected for finding in row.findings if "failpoint" not in finding.seen]
    shown = rows_of(PAGE)[0][name]
    assert [NUMBER.sub("N", one) for one in looked_at] == [NUMBER.sub("N", one) for one in shown]


def test_the_page_shows_every_drill_and_each_as_expected():
    expected, outcomes = rows_of(PAGE)
    assert list(expected) == list(DRILLS)
    assert set(outcomes.values()) == {"as expected"}
    assert re.search(rf"^- result: {len(DRILLS)} as expected\b", PAGE, re.MULTILINE)
