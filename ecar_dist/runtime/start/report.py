"""What a preflight found: as a tree of JSON values, and in a few lines for the log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ecar_dist.command_line import counted
from ecar_dist.runtime.start.roll_call import Answer

SAME_EVERYWHERE = ("ecar_dist", "torch", "deepspeed")  # versions that may not differ between ranks
MOST_SKEW = 10.0  # seconds between two nodes' clocks; more than that is worth a warning
_MOST_NAMES = 8


def different_versions(answers: Sequence[Answer]) -> str:
    """Why ranks of different versions may not train together; empty if all have the same."""
    different = differences(answers, SAME_EVERYWHERE)
    return f"{'; '.join(different)}; install the same version on all nodes" if different else ""


def report(answers: Sequence[Answer], bandwidth: float | None, nbytes: int, seconds: float) -> dict[str, Any]:
    """All known facts, for preflight.json. `bandwidth` is that of an all-reduce of `nbytes`, in bytes per second."""
    return {
        "ranks": [asdict(answer) for answer in answers],
        "all_reduce": bandwidth and {"bytes": nbytes, "bus_bytes_per_second": bandwidth},
        "clock_skew_seconds": skew(answers),
        "seconds": seconds,
    }


def report_lines(found: Mapping[str, Any]) -> list[str]:
    """The lines of a successful preflight, then its warnings."""
    # the nodes and what they have
    answers = [Answer(**rank) for rank in found["ranks"]]
    nodes = list(dict.fromkeys(answer.node for answer in answers))
    per_node = sorted(set(Counter(answer.node for answer in answers).values()))
    ranks = f"{per_node[0]} to {per_node[-1]} ranks" if len(per_node) > 1 else counted(per_node[0], "rank")
    device, *others = _equipment(answers[0]).items()
    what = ", ".join([device[1], *(f"{name} {value}" for name, value in others if value)])

    # the slowest of them, and the fullest disks
    slowest = max(answers, key=lambda answer: answer.facts["read"]["seconds"])
    read = slowest.facts["read"]
    slowest_read = f"slowest read {read['bytes'] / 2**20:.1f} MiB of {read['where']} in {read['seconds']:.2f} s"
    lines = [
        f"preflight: {counted(len(nodes), 'node')} ({_names(nodes)}) x {ranks}; {what}",
        f"preflight: {slowest_read}{_on(slowest, nodes)}; {_least_free(answers, nodes)}",
    ]

    # what they do together
    if reduce := found["all_reduce"]:
        lines.append(
            f"preflight: all-reduce of {reduce['bytes'] >> 20} MiB over {len(answers)} ranks at "
            f"{reduce['bus_bytes_per_second'] / 1e9:.2f} GB/s (bus bandwidth); clocks within "
            f"{found['clock_skew_seconds']:.2f} s"
        )
    lines[-1] += f"; preflight took {found['seconds']:.1f} s"
    return lines + [f"warning: {line}" for line in warnings(answers)]


def warnings(answers: Sequence[Answer]) -> list[str]:
    """What is unusual but does not prevent the run from starting."""
    found = differences(answers, [name for name in _equipment(answers[0]) if name not in SAME_EVERYWHERE])
    if (apart := skew(answers)) > MOST_SKEW:
        early, late = (edge(answers, key=lambda answer: answer.facts["clock"]) for edge in (min, max))
        found.append(
            f"the clock of node {late.node} is {apart:.0f} s ahead of that of node {early.node}; object stores refuse "
            f"requests with a wrong time, and logs cannot be compared: synchronize the clocks with NTP"
        )
    return found


def skew(answers: Sequence[Answer]) -> float:
    """Seconds between the clocks that are farthest apart, each read once the ranks had met."""
    clocks = [float(answer.facts["clock"]) for answer in answers]
    return max(clocks) - min(clocks)


def differences(answers: Sequence[Answer], names: Iterable[str]) -> list[str]:
    """A line for each piece of equipment that is not the same on all nodes: each value with its nodes."""
    lines = []
    for name in names:
        nodes: dict[str, list[str]] = {}
        for node, value in dict.fromkeys((answer.node, str(_equipment(answer)[name])) for answer in answers):
            nodes.setdefault(value, []).append(node)
        if len(nodes) > 1:
            common_first = sorted(nodes.items(), key=lambda item: -len(item[1]))
            lines.append(f"different {name}: " + ", ".join(f"{value} on {_names(who)}" for value, who in common_first))
    return lines


def _equipment(answer: Answer) -> dict[str, Any]:
    return {"device": answer.facts["device"], "driver": answer.facts["driver"], **answer.facts["versions"]}


def _names(nodes: Sequence[str]) -> str:
    return ", ".join(nodes[:_MOST_NAMES]) + (", ..." if len(nodes) > _MOST_NAMES else "")


def _least_free(answers: Sequence[Answer], nodes: Sequence[str]) -> str:
    parts = []
    for name in answers[0].facts["free"]:
        least = min(answers, key=lambda answer: answer.facts["free"][name])
        parts.append(f"{least.facts['free'][name] / 2**30:.1f} GiB {name}{_on(least, nodes)}")
    return f"least free space {', '.join(parts)}"


def _on(answer: Answer, nodes: Sequence[str]) -> str:
    return f" ({answer.node})" if len(nodes) > 1 else ""
