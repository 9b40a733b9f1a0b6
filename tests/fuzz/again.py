"""Run one case again: `python -m tests.fuzz.again CASE [FOLDER]`, with the case as a failure prints it.

Shows the output of the command and what is wrong with it. With FOLDER, which must not exist, the files are kept there.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.fuzz.case import Case, Runner, problems


def main(words: list[str]) -> int:
    case, runner = Case.parse(words[0]), Runner()
    folder = Path(words[1]) if len(words) > 1 else None
    if folder:
        folder.mkdir(parents=True)
    try:
        outcome = runner.run(case, folder)
    finally:
        runner.close()
    print(" ".join(case.words), *case.mutations, sep="\n  ")
    print(f"status {outcome.status}, {outcome.seconds:.2f} s\n--- stdout\n{outcome.stdout[-3000:]}")
    print(f"--- stderr\n{outcome.stderr[-6000:]}\n---")
    found = list(problems(case, outcome))
    for cause, seen in found:
        print(f"WRONG {cause}: {seen}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
