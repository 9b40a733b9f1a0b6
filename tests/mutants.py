"""Random mutants of the core, and how many the tests kill: `python -m tests.mutants [--count 40] [--seed 0]`.

A mutant is one changed operator, condition or number. Each is written into a copy of the tree, and the tests of its
room run there until the first one fails. Survivors are listed: some change nothing, the others need a test.
"""

import argparse
import ast
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 420  # for the tests of one mutant; a mutant that hangs counts as killed
HANGS = f"a timeout of {SECONDS} s"
SWAPPED = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.Mod: "*",
    ast.And: "or",
    ast.Or: "and",
}
SHARD = ["tests/data/shards/test_read.py", "tests/data/shards/test_damage.py", "tests/data/test_corruptions.py"]
CHECKPOINT = [f"tests/runtime/checkpoint/test_{part}.py" for part in ("store", "overlap", "names", "retention", "room")]
# The core, by room, with the tests that should notice a change in it.
CORE = {
    "ecar_dist/flow/*.py": ["tests/flow", "tests/train/test_objective.py", "tests/sample"],
    "ecar_dist/rng.py": ["tests/test_rng.py", "tests/flow"],
    "ecar_dist/models/*.py": ["tests/models", "tests/train/test_objective.py", "tests/sample"],
    "ecar_dist/kinds/*.py": ["tests/kinds", "tests/plan"],
    "ecar_dist/sample/staged.py": ["tests/sample"],
    "ecar_dist/sample/guided.py": ["tests/sample"],
    "ecar_dist/learning_rate.py": ["tests/test_learning_rate.py"],
    "ecar_dist/train/objective.py": ["tests/train/test_objective.py", "tests/train/test_kinds.py"],
    "ecar_dist/train/loop.py": ["tests/train/test_loop.py", "tests/train/test_roll_back.py"],
    "ecar_dist/train/step.py": ["tests/train/test_step.py", "tests/train/test_loop.py"],
    "ecar_dist/train/reader.py": ["tests/train/test_reader.py", "tests/train/test_loop.py"],
    "ecar_dist/train/start.py": ["tests/train/test_start.py", "tests/train/test_agreement.py"],
    "ecar_dist/train/guard.py": ["tests/train/test_guard.py", "tests/train/test_roll_back.py"],
    "ecar_dist/data/order/*.py": ["tests/data/order", "tests/data/test_loader.py"],
    "ecar_dist/data/loader.py": ["tests/data/test_loader.py", "tests/train/test_reader.py"],
    "ecar_dist/data/shards/layout.py": [*SHARD, "tests/data/test_golden.py"],
    "ecar_dist/data/shards/manifest.py": ["tests/data/shards/test_manifest.py", "tests/data/test_golden.py"],
    "ecar_dist/data/shards/read.py": [*SHARD, "tests/data/test_golden.py"],
    "ecar_dist/data/shards/tar_index.py": ["tests/data/shards/test_tar_index.py", "tests/data/test_corruptions.py"],
    "ecar_dist/runtime/engine.py": ["tests/runtime/test_engine.py", "tests/train/test_zero_matrix.py"],
    "ecar_dist/runtime/optimizer.py": ["tests/runtime/test_engine.py", "tests/train/test_zero_matrix.py"],
    "ecar_dist/runtime/ema.py": ["tests/runtime/test_ema.py"],
    "ecar_dist/runtime/checkpoint/store.py": CHECKPOINT,
    "ecar_dist/runtime/checkpoint/save.py": CHECKPOINT,
    "ecar_dist/runtime/checkpoint/restore.py": CHECKPOINT,
}


def sites(path):
    """(line, column, end column, new text) of every place in one file that can be mutated."""
    source = path.read_text()
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in SWAPPED:
            yield from between(lines, node.left, node.comparators[0], SWAPPED[type(node.ops[0])])
        elif isinstance(node, ast.BinOp) and type(node.op) in SWAPPED:
            yield from between(lines, node.left, node.right, SWAPPED[type(node.op)])
        elif isinstance(node, ast.BoolOp):
            yield from between(lines, node.values[0], node.values[1], SWAPPED[type(node.op)])
        elif isinstance(node, ast.Constant) and type(node.value) in (bool, int, float) and on_one_line(node):
            value = not node.value if isinstance(node.value, bool) else node.value + 1
            yield node.lineno, node.col_offset, node.end_col_offset, str(value)
        elif isinstance(node, ast.If | ast.IfExp) and on_one_line(node.test):
            test = node.test
            text = lines[test.lineno - 1].encode()[test.col_offset : test.end_col_offset].decode()
            yield test.lineno, test.col_offset, test.end_col_offset, f"(not ({text}))"


def on_one_line(node):
    return node.lineno == node.end_lineno


def between(lines, left, right, text):
    """The operator between two operands that are on one line."""
    gap = lines[left.end_lineno - 1].encode()[left.end_col_offset : right.col_offset].decode()
    if left.end_lineno == right.lineno and gap.replace("(", "").replace(")", "").strip():
        open_, close = gap.count("(") * "(", gap.count(")") * ")"
        yield left.end_lineno, left.end_col_offset, right.col_offset, f"{close} {text} {open_}"


def all_sites():
    found = {}
    for pattern, tests in CORE.items():
        for path in sorted(ROOT.glob(pattern)):
            found[path] = [(path, *site, tests) for site in sites(path)]
    return [site for path in sorted(found) for site in found[path]]


def change(tree, path, line, begin, end, text):
    """Write one file into the copy of the tree with this one change."""
    lines = path.read_text().splitlines(keepends=True)
    row = lines[line - 1].encode()
    lines[line - 1] = (row[:begin] + text.encode() + row[end:]).decode()
    (tree / path.relative_to(ROOT)).write_text("".join(lines))


def first_failure(tree, tests):
    """The first test that fails in a copy of the tree, None if all pass, HANGS if they do not end."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "-p", "no:cacheprovider", "-m", "not slurm", *tests]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    with tempfile.TemporaryFile("w+") as output:  # not a pipe: it would stay open as long as a server of a test runs
        streams = {"stdout": output, "stderr": subprocess.STDOUT}
        try:
            status = subprocess.run(command, cwd=tree, env=environment, timeout=SECONDS, **streams).returncode
        except subprocess.TimeoutExpired:
            return HANGS
        output.seek(0)
        named = re.search(r"^(?:FAILED|ERROR) (tests/[^[\s]+(?:\[.*?\](?= - |$))?)", output.read(), re.MULTILINE)
    return None if status == 0 else named[1] if named else tests[0]


def killer(tree, mutant):
    """The test that notices a mutant; None if it survives."""
    path, *site, tests = mutant
    change(tree, path, *site)
    try:
        return first_failure(tree, tests)
    finally:
        shutil.copy(path, tree / path.relative_to(ROOT))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40, help="number of mutants (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice among all places (default: 0)")
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    options = parser.parse_args()

    # one choice among all places of the core, the same for the same tree and seed
    found = all_sites()
    chosen = random.Random(options.seed).sample(found, min(options.count, len(found)))
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "demo"))
        killers = []
        for mutant in chosen:
            path, line, begin, end, text, _ = mutant
            row = path.read_text().splitlines()[line - 1]
            shown = f"{path.relative_to(ROOT)}:{line}: {row.strip()}  [{row.encode()[begin:end].decode()} -> {text}]"
            if options.list:
                print(shown)
                continue
            failed = killer(tree, mutant)
            killers += [failed] if failed else []
            print(f"killed   {shown}  by {failed}" if failed else f"SURVIVED {shown}", flush=True)

        # a test that also fails without a mutant has not noticed one
        noticing = sorted({failed for failed in killers if failed != HANGS})
        if noticing and (failed := first_failure(tree, noticing)):
            raise SystemExit(f"{failed} fails without a mutant too: make it pass, then count again")
    files = len({path for path, *_ in found})
    print(f"{len(killers)} of {len(chosen)} mutants killed, of {len(found)} places in {files} files")


if __name__ == "__main__":
    main()
