"""A bounded roll call of all ranks, and what follows from their answers: go on, do without some nodes, or stop.

The answers go through the store where the ranks have met, by no collective, so a rank that never answers is named after
a while. Nodes are judged, not ranks: where one rank fails and at least as many nodes are fine, its node is unfit; what
fails on most nodes is no node's fault. A job script finds the unfit nodes in $ECAR_JOB_LOGS/bad-nodes and keeps them
out of the next attempt.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ecar_dist.errors import ConfigError, EcarError, NodeError
from ecar_dist.runtime.peers import RemoteError
from ecar_dist.runtime.placement import job_logs
from ecar_dist.storage.untrusted import Record, UntrustedError, parse_record

if TYPE_CHECKING:
    from ecar_dist.runtime.world import World

_MOST_LISTED = 8  # nodes with their problems, in one line
_SAME_VERSION = "install the same version of ecar_dist on all nodes"


@dataclass(frozen=True)
class Answer:
    """What one rank says. JSON values only."""

    rank: int
    node: str
    problem: str = ""  # why it cannot go on; empty: it can
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """Rank 0's, for all ranks."""

    nodes: tuple[str, ...] = ()  # of every rank, empty where it did not answer
    bad_nodes: tuple[str, ...] = ()
    problem: str = ""  # what rank 0 says for all; empty: go on, unless `culprit` says it
    again: bool = False  # the same command may run, without the bad nodes
    culprit: int | None = None  # the rank whose own error it is, where every node fails


class _AnswerRecord(Record):
    """`Answer` as another rank has sent it."""

    rank: int
    node: str
    problem: str
    facts: dict[str, Any]


class _VerdictRecord(Record):
    """`Verdict` as rank 0 has sent it."""

    nodes: tuple[str, ...]
    bad_nodes: tuple[str, ...]
    problem: str
    again: bool
    culprit: int | None


Judge = Callable[[Sequence[Answer | None]], Verdict]


def judge_nodes(answers: Sequence[Answer | None], *, seconds: float, came: Sequence[str] = ()) -> Verdict:
    """By rank; None where there was no answer within `seconds`. `came` names the nodes of ranks known from before.

    So that no fault of all nodes empties a cluster, no node is called unfit where most of them are.
    """
    missing = [rank for rank, answer in enumerate(answers) if answer is None]
    nodes = tuple(answer.node if answer else (came[rank] if came else "") for rank, answer in enumerate(answers))
    problems: dict[str, str] = {}  # of each unfit node, its first
    for node, answer in zip(nodes, answers, strict=True):
        if node and (answer is None or answer.problem):
            problems.setdefault(node, answer.problem if answer else f"no answer within {seconds:g} s")
    if missing and not came:
        return Verdict(nodes, tuple(problems), _who_is_missing(missing, nodes, seconds), again=True)
    if not problems:
        return Verdict(nodes)
    if len(problems) > len(set(nodes)) / 2:  # the data's fault, or the config's, or the network's at the first node
        if not missing:
            first = next(answer for answer in answers if answer and answer.problem)
            return Verdict(nodes, problem=f"node {first.node}: {first.problem}", culprit=first.rank)
        failed = f"{len(problems)} of {len(set(nodes))} nodes failed the preflight"
        return Verdict(nodes, problem=f"{failed} ({_list(problems)})", again=True)
    plural = "s" if len(problems) > 1 else ""
    then = "the job goes on without" if job_logs() else "run the same command again without"
    ending = f"{then} {'them' if plural else 'it'}"
    said = f"node{plural} {', '.join(problems)} failed the preflight: {_list(problems)}; {ending}"
    return Verdict(nodes, tuple(problems), said, again=True)


def hold_roll_call(
    world: World,
    name: str,
    answer: Answer,
    judge: Judge,
    *,
    seconds: float,
    error: Exception | None = None,
) -> Verdict:
    """All ranks say their `answer` and hear the verdict; rank 0 waits `seconds` for the others.

    Raises on all ranks where it is no good: on rank 0 what it says for all of them, on the culprit its own `error`, on
    the others RemoteError.
    """
    text = world.roll_call(name, _to_text(answer), seconds, lambda texts: _to_text(_judged(texts, judge)))
    try:
        verdict = Verdict(**dict(parse_record(text.encode(), _VerdictRecord)))
    except UntrustedError as unreadable:
        raise ConfigError(f"rank 0's verdict cannot be read ({unreadable}); {_SAME_VERSION}") from None
    enforce(world, verdict, error)
    return verdict


def enforce(world: World, verdict: Verdict, error: Exception | None = None) -> None:
    """Raises on all ranks, which know the same verdict, where they cannot go on: as `hold_roll_call`."""
    if verdict.culprit == world.rank:
        raise error or ConfigError(verdict.problem)  # what only the others' answers show is no error of its own
    if verdict.culprit is not None:
        raise RemoteError(f"rank {verdict.culprit} met an error and reports it")
    if verdict.problem:
        if not world.is_first:
            raise RemoteError("rank 0 says what is wrong", again=verdict.again)
        _note_bad_nodes(verdict.bad_nodes)
        raise (NodeError if verdict.again else ConfigError)(verdict.problem)


def describe(error: Exception) -> str:
    """An error as a part of a sentence."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    text = (str(error) or type(error).__name__).splitlines()[0]
    return text if isinstance(error, (EcarError, OSError)) else f"{type(error).__name__}: {text}"


def rank_list(ranks: Sequence[int]) -> str:
    """`2, 3, 8-15`: neighbours together."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][-1] + 1:
            spans[-1][1:] = [rank]
        else:
            spans.append([rank])
    return ", ".join(f"{a[0]}-{a[-1]}" if a[-1] > a[0] + 1 else ", ".join(map(str, a)) for a in spans)


def ranks_on_nodes(ranks: Sequence[int], nodes: Sequence[str]) -> str:
    """`ranks 0, 1 on n1; rank 8 on n2`; `nodes` is by rank, empty where a rank's is not known."""
    by_node: dict[str, list[int]] = {}
    for rank in ranks:
        by_node.setdefault(nodes[rank], []).append(rank)
    parts = [
        f"rank{'s' if len(mine) > 1 else ''} {rank_list(mine)}{f' on {node}' if node else ''}"
        for node, mine in by_node.items()
    ]
    return "; ".join([*parts[:_MOST_LISTED], *(["..."] if len(parts) > _MOST_LISTED else [])])


def _to_text(said: Answer | Verdict) -> str:
    """As JSON; a file name that is not UTF-8 may have brought lone surrogates, which no reader would accept."""
    return json.dumps(asdict(said), ensure_ascii=False).encode("utf-8", "replace").decode()


def _judged(texts: Sequence[str | None], judge: Judge) -> Verdict:
    answers: list[Answer | None] = []
    for rank, text in enumerate(texts):
        try:
            answers.append(None if text is None else Answer(**dict(parse_record(text.encode(), _AnswerRecord))))
        except UntrustedError as unreadable:
            return Verdict(problem=f"the answer of rank {rank} cannot be read ({unreadable}); {_SAME_VERSION}")
    return judge(answers)


def _who_is_missing(missing: Sequence[int], nodes: Sequence[str], seconds: float) -> str:
    by_node: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        if node:
            by_node.setdefault(node, []).append(rank)
    came = "; ".join(f"{rank_list(ranks)} on {node}" for node, ranks in by_node.items())
    return (
        f"rank{'s' if len(missing) > 1 else ''} {rank_list(missing)} did not come within {seconds:g} s (came: {came})"
    )


def _list(problems: Mapping[str, str]) -> str:
    if len(problems) == 1:
        return next(iter(problems.values()))
    listed = [f"{node}: {problem}" for node, problem in problems.items()]
    return "; ".join([*listed[:_MOST_LISTED], *(["..."] if len(listed) > _MOST_LISTED else [])])


def _note_bad_nodes(nodes: Sequence[str]) -> None:
    """For the job script. That it cannot be written costs a node's exclusion, not the line that names it."""
    if nodes and (folder := job_logs()):
        with contextlib.suppress(OSError):
            (folder / "bad-nodes").write_text("".join(f"{node}\n" for node in nodes))
