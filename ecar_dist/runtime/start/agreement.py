"""Check that all ranks have the same config, data and code. Ranks that differ are named before anything is created.

Ranks that were started with a different config file, data set or version of the code would train to the end without an
error, because every collective still matches. So everything that must be the same is compared as text, fact by fact.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import ecar_dist
from ecar_dist.config.run import RunConfig
from ecar_dist.runtime.run.drift import shared_settings
from ecar_dist.runtime.start.roll_call import Answer, Answers, Decision, decide, hold_roll_call, ranks_on_nodes
from ecar_dist.runtime.world import World
from ecar_dist.storage.untrusted import printable

T = TypeVar("T")
Facts = Mapping[str, str]

SECONDS = 60.0  # to wait for a rank's facts, which are quick to collect
_MOST_FACTS = 8  # that differ, in one line
_LONGEST = 120  # characters of a value
_LONGEST_PROBLEM = 1000  # characters


def agree_on_settings(world: World, config: RunConfig | None, problem: str = "") -> None:
    """Check that all ranks have the same config, except what is local to a node, and the same source code. Collective.

    `config` is None on a rank that could not load it because of `problem`. Raises like `agree_on`.
    """
    facts = {"the version of ecar_dist": source_version(), **(shared_settings(config) if config else {})}
    agree_on(world, "settings", facts, "start every rank with the same code, config file and overrides", problem)


def agree_on(world: World, name: str, facts: Facts, fix: str, problem: str = "") -> None:
    """Check that all ranks have the same `facts`. Collective; `name` is different in every call.

    Raises ConfigError on rank 0, with the facts that differ, their values and their ranks, and RemoteError on the
    others. If a rank has a `problem`, only that is printed. If a rank does not answer, `decide` decides what is raised.
    """
    answer = Answer(world.rank, world.nodes[world.rank], problem, facts)
    rule = partial(decide_on_facts, seconds=SECONDS, nodes=world.nodes, fix=fix)
    hold_roll_call(world, name, answer, rule, seconds=SECONDS)


def decide_on_facts(answers: Answers, *, seconds: float, nodes: Sequence[str], fix: str) -> Decision:
    """`nodes` is by rank; `fix` says what to do if facts differ."""
    present = [answer for answer in answers if answer is not None]
    if len(present) < len(answers):
        return decide(answers, seconds=seconds, nodes_by_rank=nodes)
    failed = [answer for answer in present if answer.problem]
    if failed:
        who = ranks_on_nodes([answer.rank for answer in failed], nodes)
        return Decision(problem=f"{who}, unlike rank 0: {printable(failed[0].problem, _LONGEST_PROBLEM)}")
    different = differences([answer.facts for answer in present], nodes)
    return Decision(problem=f"{different}; {fix}" if different else "")


def differences(facts: Sequence[Facts], nodes: Sequence[str]) -> str:
    """What differs between ranks, as part of a sentence; empty if nothing does. `facts` and `nodes` are by rank."""
    keys = list(dict.fromkeys(key for one in facts for key in one))
    different = [key for key in keys if len({one.get(key) for one in facts}) > 1]
    if not different:
        return ""

    # the facts, and the ranks that differ from the majority
    lines = [_difference(key, [one.get(key, "missing") for one in facts], nodes) for key in different[:_MOST_FACTS]]
    if len(different) > _MOST_FACTS:
        lines.append(f"and {len(different) - _MOST_FACTS} more")
    odd = odd_ranks([tuple(one.get(key) for key in different) for one in facts])
    verb = "differs" if len(odd) == 1 else "differ"
    opening = f"{ranks_on_nodes(odd, nodes)} {verb} from the others" if odd else "the ranks differ"
    return f"{opening}: {'; '.join(lines)}"


def odd_ranks(values: Sequence[object]) -> list[int]:
    """The ranks that do not have the value of the majority; empty if all agree, or if no value has a majority."""
    (_, most), *others = _by_value(values)
    return sorted(rank for _, ranks in others for rank in ranks) if 2 * len(most) > len(values) else []


def source_version() -> str:
    """The package's version, and a hash of all its modules as they are installed here."""
    root = Path(ecar_dist.__file__).parent
    digest = hashlib.sha256()
    # files that cannot be imported are not code: an editor's lock (`.#loop.py`, a dangling link) or its backup copies
    for path in sorted(path for path in root.rglob("*.py") if path.stem.isidentifier() and path.is_file()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return f"{ecar_dist.__version__} (source {digest.hexdigest()[:12]})"


def _difference(key: str, values: Sequence[str], nodes: Sequence[str]) -> str:
    """`key=A on rank 1 on n2, B elsewhere`; each value with its ranks if none has the majority."""
    (common, most), *others = _by_value(values)
    has_majority = 2 * len(most) > len(values)
    named = others if has_majority else [(common, most), *others]
    parts = [f"{printable(value, _LONGEST)} on {ranks_on_nodes(ranks, nodes)}" for value, ranks in named]
    if has_majority:
        parts.append(f"{printable(common, _LONGEST)} elsewhere")
    return f"{key}={', '.join(parts)}"


def _by_value(values: Sequence[T]) -> list[tuple[T, list[int]]]:
    """The ranks of each value, the most common value first."""
    ranks: dict[T, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return sorted(ranks.items(), key=lambda item: -len(item[1]))
