"""The result of drills as text, JSON and Markdown."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import itertools
import os
import platform
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ecar_dist.command_line import columns
from ecar_dist.drills.evidence import Finding

Outcome = Literal["as expected", "NOT AS EXPECTED", "not run", "skipped"]
HEADINGS = ("drill", "fault", "expected", "seen", "s", "outcome")
WIDTHS = (16, 24, 46, 46, 4, 15)
FAILED = "!! "
LONGEST = 240  # characters of a finding in a table; the JSON file has all of them


@dataclass(frozen=True)
class Row:
    """One drill. `findings` is empty if it did not run; `reason` then says why."""

    name: str
    fault: str
    findings: tuple[Finding, ...]
    seconds: float
    outcome: Outcome
    reason: str = ""

    @staticmethod
    def of(name: str, fault: str, findings: Sequence[Finding], seconds: float) -> Row:
        """The row of a drill that ran: as expected if it has findings and all of them are."""
        ok = bool(findings) and all(finding.ok for finding in findings)
        return Row(name, fault, tuple(findings), seconds, "as expected" if ok else "NOT AS EXPECTED")

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Expected and seen of each finding, shortened for a table."""
        marked = [(finding.expected, ("" if finding.ok else FAILED) + finding.seen) for finding in self.findings]
        return [(expected, textwrap.shorten(seen, LONGEST)) for expected, seen in marked or [("", self.reason)]]


def text_lines(rows: Sequence[Row]) -> list[str]:
    """A table in columns. A cell that is too long for its column continues in the lines below."""
    lines: list[Sequence[str]] = [HEADINGS, ["-" * width for width in WIDTHS]]
    for row in rows:
        for number, (expected, seen) in enumerate(row.pairs):
            first = (row.name, row.fault) if number == 0 else ("", "")
            last = (f"{row.seconds:.0f}", row.outcome) if number == 0 else ("", "")
            cells = [
                textwrap.wrap(text, width) for text, width in zip((*first, expected, seen, *last), WIDTHS, strict=True)
            ]
            lines += itertools.zip_longest(*cells, fillvalue="")
        lines.append([""] * len(HEADINGS))
    return columns(lines, left=range(len(HEADINGS)))


def summary(rows: Sequence[Row]) -> str:
    counts = {outcome: sum(row.outcome == outcome for row in rows) for outcome in Outcome.__args__}  # type: ignore[attr-defined]
    return ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)


def passed(rows: Sequence[Row]) -> bool:
    return all(row.outcome in ("as expected", "skipped") for row in rows)


def markdown(rows: Sequence[Row], facts: dict[str, str]) -> str:
    """The complete document: how it was made, then the table."""
    table = [f"| {' | '.join(HEADINGS)} |", "|" + "---|" * len(HEADINGS)]
    for row in rows:
        for number, (expected, seen) in enumerate(row.pairs):
            first = (row.name, row.fault) if number == 0 else ("", "")
            last = (f"{row.seconds:.0f}", row.outcome) if number == 0 else ("", "")
            table.append(f"| {' | '.join((*first, _escaped(expected), _escaped(seen), *last))} |")
    head = [f"- {name}: {value}" for name, value in facts.items()]
    how = (
        "Each drill trains a small copy of a run on real ranks, injects a fault, and compares it with a quiet one. "
        "Everything here was measured by the command below, which wrote this file."
    )
    return "\n".join(["# Fault drills", "", how, "", *head, f"- result: {summary(rows)}", "", *table, ""])


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def tree(rows: Sequence[Row], facts: dict[str, str]) -> dict[str, Any]:
    """The results as JSON values."""
    return {**facts, "passed": passed(rows), "drills": [dataclasses.asdict(row) for row in rows]}


def circumstances(command: str, ranks: str) -> dict[str, str]:
    """What a reader needs to judge the result: date, command, versions, machine."""
    packages = ("ecar-dist", "torch", "deepspeed")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command,
        "ranks": ranks,
        "versions": f"{versions}, Python {platform.python_version()}",
        "machine": f"{os.cpu_count()} cores ({platform.machine()}), {platform.system()}",
    }
