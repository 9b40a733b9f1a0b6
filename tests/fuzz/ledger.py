"""Failures by cause: the first one ends a test, or, in the long form, each cause is listed once at the end."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from tests.fuzz.case import Case, Runner, problems

COLLECTING = bool(os.environ.get("FUZZ_COLLECT"))


class Ledger:
    def __init__(self, runner: Runner) -> None:
        self._runner, self._seen = runner, Counter[str]()
        self._first: dict[str, tuple[str, Case]] = {}
        self.cases = 0

    def try_case(self, case: Case) -> None:
        """Run a case. Raises AssertionError if it breaks the property, unless failures are collected."""
        self.cases += 1
        found = list(problems(case, self._runner.run(case)))
        for cause, seen in found:
            self._seen[cause] += 1
            known = self._first.get(cause)
            if known is None or len(case.dump()) < len(known[1].dump()):  # the shortest is the easiest to read
                self._first[cause] = (seen, case)
        if found and not COLLECTING:
            cause, seen = found[0]
            raise AssertionError(f"{cause}: {seen}\n{again(case)}")

    def close(self) -> None:
        """Raises AssertionError that lists what was collected. The list is also added to the file FUZZ_COLLECT."""
        if not self._first or not COLLECTING:
            return
        lines = [
            f"{count} x {cause}\n    {self._first[cause][0]!r}\n    {again(self._first[cause][1])}"
            for cause, count in self._seen.most_common()
        ]
        report = "\n".join(lines)
        with Path(os.environ["FUZZ_COLLECT"]).open("a", errors="backslashreplace") as file:
            file.write(report + "\n")
        raise AssertionError(f"{len(lines)} causes among {self.cases} cases\n{report}")


def again(case: Case) -> str:
    """The command that runs one case again and shows its output."""
    import shlex

    return f"python -m tests.fuzz.again {shlex.quote(case.dump())}"
