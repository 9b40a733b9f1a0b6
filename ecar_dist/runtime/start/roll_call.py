"""A roll call of all ranks with a time limit, and the decision that follows: continue, exclude some nodes, or stop.

The answers go through the store of the rendezvous instead of a collective, so a rank that never answers is named after
the time limit. Nodes are at fault, not ranks: if one rank fails and at least as many nodes are fine, its node is unfit.
What fails on most nodes is not a node's fault. A job script finds the unfit nodes in $ECAR_JOB_LOGS/bad-nodes and
excludes them from the next attempt.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ecar_dist.errors import ConfigError, EcarError, NodeError
from ecar_dist.runtime.peers import RemoteError
from ecar_dist.runtime.placement import job_logs
from ecar_dist.runtime.world import World
from ecar_dist.storage.untrusted import STRICT, UntrustedError, parse_dataclass

_MOST_LISTED = 8  # nodes with their problems, in one line
_SAME_VERSION = "install the same version of ecar_dist on all nodes"


@dataclass(frozen=True)
class Answer:
    """What one rank reports. JSON values only."""

    rank: int
    node: str
    problem: str = ""  # why it cannot continue; empty: it can
    facts: Mapping[str, Any] = field(default_factory=dict)
    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Decision:
    """Rank 0's decision for all ranks."""

    nodes: tuple[str, ...] = ()  # of every rank, empty if it did not answer
    bad_nodes: tuple[str, ...] = ()
    problem: str = ""  # what rank 0 prints for all; empty: continue, unless there is a culprit
    again: bool = False  # the same command may run again, without the bad nodes
    culprit: int | None = None  # the rank that raises its own error, if every node fails
    __pydantic_config__ = STRICT


Answers = Sequence[Answer | None]  # by rank; None: no answer in time
Rule = Callable[[Answers], Decision]


def decide(
    answers: Answers,
    *,
    seconds: float,
    nodes_by_rank: Sequence[str] = (),
    mismatch: Callable[[Sequence[Answer]], str] = lambda answers: "",
) -> Decision:
    """Which nodes are unfit, or what else prevents the run from starting.

    seconds: the time that the ranks had to answer.
    nodes_by_rank: if known in advance; they locate the ranks that do not answer. Otherwise empty.
    mismatch: what differs between ranks although each of them is fine; empty if nothing does.

    A node is unfit only if at least as many nodes are fine, so a fault on all nodes does not exclude a whole cluster.
    """
    missing = [rank for rank, answer in enumerate(answers) if answer is None]
    nodes = tuple(
        answer.node if answer else (nodes_by_rank[rank] if nodes_by_rank else "") for rank, answer in enumerate(answers)
    )
    problems: dict[str, str] = {}  # the first problem of each node that has one
    for node, answer in zip(nodes, answers, strict=True):
        if node and (answer is None or answer.problem):
            problems.setdefault(node, answer.problem if answer else f"no answer within {seconds:g} s")

    # ranks that are missing, on unknown nodes
    if missing and not nodes_by_rank:
        return Decision(nodes, tuple(problems), _who_is_missing(missing, nodes, seconds), again=True)

    present = [answer for answer in answers if answer is not None]
    if not problems:
        return Decision(nodes, problem=mismatch(present))

    # most nodes failed: the data, the config, or the network of the first node is at fault
    count = len(set(nodes))
    if len(problems) > count / 2:
        if not missing:
            first = next(answer for answer in present if answer.problem)
            return Decision(nodes, problem=f"node {first.node}: {first.problem}", culprit=first.rank)
        failed = f"{len(problems)} of {count} nodes failed the preflight ({_list(problems)})"
        return Decision(nodes, problem=failed, again=True)

    # some nodes failed
    plural = "s" if len(problems) > 1 else ""
    then = "the job continues without" if job_logs() else "run the same command again without"
    problem = f"node{plural} {', '.join(problems)} failed the preflight: {_list(problems)}; {then} "
    return Decision(nodes, tuple(problems), problem + ("them" if plural else "it"), again=True)


def hold_roll_call(
    world: World, name: str, answer: Answer, rule: Rule, *, seconds: float, error: Exception | None = None
) -> Decision:
    """All ranks send their `answer` and receive what rank 0 decides by the `rule`. Collective.

    Rank 0 waits `seconds` for the others.

    Raises on all ranks if they cannot continue: on rank 0 what it prints for all of them, on the culprit its own
    `error`, on the others RemoteError.
    """
    text = world.roll_call(name, _to_text(answer), seconds, lambda texts: _to_text(_decide(texts, rule)))
    try:
        decision = parse_dataclass(text.encode(), Decision)
    except UntrustedError as unreadable:
        raise ConfigError(f"rank 0's decision cannot be read ({unreadable}); {_SAME_VERSION}") from None
    enforce(world, decision, error)
    return decision


def enforce(world: World, decision: Decision, error: Exception | None = None) -> None:
    """Raises like `hold_roll_call`, on all ranks, if they cannot continue. All ranks pass the same decision."""
    if decision.culprit == world.rank:
        raise error or ConfigError(decision.problem)  # without its own error, only the answers of others show it
    if decision.culprit is not None:
        raise RemoteError(f"rank {decision.culprit} met an error and reports it")
    if decision.problem:
        if not world.is_first:
            raise RemoteError("rank 0 reports what is wrong", again=decision.again)
        _note_bad_nodes(decision.bad_nodes)
        raise (NodeError if decision.again else ConfigError)(decision.problem)


def describe(error: Exception) -> str:
    """An error as part of a sentence."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    text = (str(error) or type(error).__name__).splitlines()[0]
    return text if isinstance(error, (EcarError, OSError)) else f"{type(error).__name__}: {text}"


def rank_list(ranks: Sequence[int]) -> str:
    """`2, 3, 8-15`: consecutive ranks are joined."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][-1] + 1:
            spans[-1][1:] = [rank]
        else:
            spans.append([rank])
    return ", ".join(f"{a[0]}-{a[-1]}" if a[-1] > a[0] + 1 else ", ".join(map(str, a)) for a in spans)


def ranks_on_nodes(ranks: Sequence[int], nodes: Sequence[str]) -> str:
    """`ranks 0, 1 on n1; rank 8 on n2`; `nodes` is by rank, with an empty string for an unknown node."""
    parts = [
        f"rank{'s' if len(mine) > 1 else ''} {rank_list(mine)}{f' on {node}' if node else ''}"
        for node, mine in _by_node(ranks, nodes).items()
    ]
    return "; ".join([*parts[:_MOST_LISTED], *(["..."] if len(parts) > _MOST_LISTED else [])])


def _by_node(ranks: Sequence[int], nodes: Sequence[str]) -> dict[str, list[int]]:
    by_node: dict[str, list[int]] = {}
    for rank in ranks:
        by_node.setdefault(nodes[rank], []).append(rank)
    return by_node


def _to_text(said: Answer | Decision) -> str:
    """As JSON. A file name that is not UTF-8 may contain lone surrogates, which no reader would accept."""
    return json.dumps(asdict(said), ensure_ascii=False).encode("utf-8", "replace").decode()


def _decide(texts: Sequence[str | None], rule: Rule) -> Decision:
    answers: list[Answer | None] = []
    for rank, text in enumerate(texts):
        try:
            answers.append(None if text is None else parse_dataclass(text.encode(), Answer))
        except UntrustedError as unreadable:
            return Decision(problem=f"the answer of rank {rank} cannot be read ({unreadable}); {_SAME_VERSION}")
    return rule(answers)


def _who_is_missing(missing: Sequence[int], nodes: Sequence[str], seconds: float) -> str:
    present = [rank for rank, node in enumerate(nodes) if node]
    came = "; ".join(f"{rank_list(ranks)} on {node}" for node, ranks in _by_node(present, nodes).items())
    plural = "s" if len(missing) > 1 else ""
    return f"rank{plural} {rank_list(missing)} did not join within {seconds:g} s (joined: {came})"


def _list(problems: Mapping[str, str]) -> str:
    if len(problems) == 1:
        return next(iter(problems.values()))
    listed = [f"{node}: {problem}" for node, problem in problems.items()]
    return "; ".join([*listed[:_MOST_LISTED], *(["..."] if len(listed) > _MOST_LISTED else [])])


def _note_bad_nodes(nodes: Sequence[str]) -> None:
    """Write the bad nodes for the job script. If that fails, they are not excluded, but a message still names them."""
    if nodes and (folder := job_logs()):
        with contextlib.suppress(OSError):
            (folder / "bad-nodes").write_text("".join(f"{node}\n" for node in nodes))
