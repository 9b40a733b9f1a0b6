"""A clock that jumps or differs between nodes decides nothing: waits use a monotonic clock, and order is by step."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
WALL_CLOCK = {"time.time", "time.time_ns", "datetime.datetime.now", "datetime.now", "datetime.datetime.utcnow"}
# Each of these only tells people when something happened, or compares a file with itself.
ALLOWED = {
    "ecar_dist/cluster/run_record.py": {"st_mtime"},  # `status`: when something was written down
    "ecar_dist/cluster/status.py": {"time.time", "st_mtime"},  # `status`: ages
    "ecar_dist/data/shards/proof.py": {"st_mtime_ns"},  # the same, for a mapped shard
    "ecar_dist/data/shards/cache.py": {"st_mtime_ns"},  # whether a file is still the one that was verified
    "ecar_dist/drills/table.py": {"datetime.datetime.now"},  # the date of a result
    "ecar_dist/runtime/run/event_file.py": {"time.time"},  # TensorBoard's own axis of wall time
    "ecar_dist/runtime/run/directory.py": {"datetime.datetime.now"},  # when an attempt began and ended, for its record
    "ecar_dist/runtime/start/rendezvous.py": {"time.time"},  # the clock that the preflight compares between nodes
    "ecar_dist/runtime/watchdog/watchdog.py": {"st_mtime"},  # which reports are old enough to be removed
    "ecar_dist/runtime/world.py": {"time.time"},  # the same, for a single rank
    "ecar_dist/train/time_budget.py": {"time.time"},  # a share of the time since the first attempt
    "data_tools/encode/status.py": {"time.time", "st_mtime"},  # rates, for people
}


def clocks(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if node.attr in ("st_mtime", "st_mtime_ns", "st_ctime"):
                yield node.attr
            elif ast.unparse(node) in WALL_CLOCK:
                yield ast.unparse(node)


def test_nothing_is_decided_by_the_wall_clock():
    found = {}
    for room in ("ecar_dist", "data_tools"):
        for path in sorted((ROOT / room).rglob("*.py")):
            if used := set(clocks(ast.parse(path.read_text()))):
                found[str(path.relative_to(ROOT))] = used
    assert found == ALLOWED
