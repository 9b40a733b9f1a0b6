"""Random mutants of the core, and how many the tests kill: `python -m tests.mutants [--count 40] [--seed 0]`.

A mutant is one changed operator, condition or number. Each is written into a copy of the tree, and the tests of its
room run there until the first one fails. Survivors are listed: some change nothing, the others want a test.
"""

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 420  # for the tests of one mutant; a mutant that hangs is a dead one
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
# The core, by room, with the tests that are to notice a change in it.
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
    "ecar_dist/data/shards/layout.py": ["tests/data/shards", "tests/data/test_golden.py"],
    "ecar_dist/data/shards/manifest.py": ["tests/data/shards/test_manifest.py", "tests/data/test_golden.py"],
    "ecar_dist/data/shards/read.py": ["tests/data/shards", "tests/data/test_golden.py"],
    "ecar_dist/data/shards/tar_index.py": ["tests/data/shards/test_tar_index.py", "tests/data/test_corruptions.py"],
    "ecar_dist/runtime/engine.py": ["tests/runtime/test_engine.py", "tests/train/test_zero_matrix.py"],
    "ecar_dist/runtime/ema.py": ["tests/runtime/test_ema.py"],
    "ecar_dist/runtime/checkpoint/store.py": ["tests/runtime/checkpoint"],
    "ecar_dist/runtime/checkpoint/save.py": ["tests/runtime/checkpoint"],
    "ecar_dist/runtime/checkpoint/restore.py": ["tests/runtime/checkpoint"],
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
    """The operator between two operands that stand on one line."""
    gap = lines[left.end_lineno - 1].encode()[left.end_col_offset : right.col_offset].decode()
    if left.end_lineno == right.lineno and gap.replace("(", "").replace(")", "").strip():
        open_, close = gap.count("(") * "(", gap.count(")") * ")"
        yield left.end_lineno, left.end_col_offset, right.col_offset, f"{close} {text} {open_}"


def all_sites():
    found = {}
    for pattern, tests in CORE.items():
        for path in sorted(ROOT.glob(pattern)):
            found[path] = [(path, *site, [one for one in tests if (ROOT / one).exists()]) for site in sites(path)]
    return [site for path in sorted(found) for site in found[path]]


def killed(tree, path, line, begin, end, text, tests):
    """Whether a test fails, or cannot end, in a copy of the tree with this one change."""
    target = tree / path.relative_to(ROOT)
    lines = path.read_text().splitlines(keepends=True)
    row = lines[line - 1].encode()
    lines[line - 1] = (row[:begin] + text.encode() + row[end:]).decode()
    target.write_text("".join(lines))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slurm", *tests]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        return subprocess.run(command, cwd=tree, env=environment, timeout=SECONDS, **quiet).returncode != 0
    except subprocess.TimeoutExpired:
        return True
    finally:
        shutil.copy(path, target)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40, help="number of mutants (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice among all places (default: 0)")
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    options = parser.parse_args()

    # one choice among all places of the core, the same for the same tree and seed
    found = all_sites()
    chosen = random.Random(options.seed).sample(found, min(options.count, len(found)))
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "demo"))
        dead = 0
        for path, line, begin, end, text, tests in chosen:
            row = path.read_text().splitlines()[line - 1]
            mutant = f"{path.relative_to(ROOT)}:{line}: {row.strip()}  [{row.encode()[begin:end].decode()} -> {text}]"
            if options.list:
                print(mutant)
                continue
            died = killed(tree, path, line, begin, end, text, tests)
            dead += died
            print("killed  " if died else "SURVIVED", mutant, flush=True)
    print(f"{dead} of {len(chosen)} mutants killed, of {len(found)} places in {len({one[0] for one in found})} files")


if __name__ == "__main__":
    main()
