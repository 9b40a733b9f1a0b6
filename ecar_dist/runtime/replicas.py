"""Tensors that all ranks hold a copy of: a cheap hash of them, and the ranks whose copy differs.

The copies start equal and take the same steps, so they stay bitwise equal. A flipped bit or a wrong sum on one rank
makes them drift apart, and no collective notices. ZeRO's shares are on one rank only, so they cannot be compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ecar_dist.runtime.ema import ShardedEma
from ecar_dist.runtime.engine import Engine
from ecar_dist.runtime.placement import job_logs
from ecar_dist.runtime.start.agreement import odd_ranks
from ecar_dist.runtime.start.roll_call import Decision, enforce, ranks_on_nodes
from ecar_dist.runtime.world import World

_CAUSE = "memory or a processor there is faulty"
_CHUNK = 1 << 22  # elements in one pass; each needs two int64 of memory
_FACTOR = 0x5851F42D4C957F2D  # odd, from Knuth's MMIX generator
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by element size in bytes


def fingerprint(tensors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """A hash of the bits of all tensors, in order: an int64 [] on `device`. The host does not wait for the device.

    It is the sum, modulo 2^64, of the elements as integers, each times its own odd number. So it detects every change
    of a single element, and misses any other change with a probability of about 2^-64. One pass, at memory speed.
    """
    total = torch.zeros((), dtype=torch.int64, device=device)
    flats = [tensor.detach().reshape(-1) for tensor in tensors]
    length = min(_CHUNK, max((flat.numel() for flat in flats), default=0))
    weights = (2 * torch.arange(length, device=device) + 1) * _FACTOR  # odd, int64

    # The factor makes the order of the chunks count.
    for flat in flats:
        for chunk in flat.view(_WORDS[flat.element_size()]).split(_CHUNK):
            total = total * _FACTOR + (chunk.to(device, torch.int64) * weights[: len(chunk)]).sum()
    return total


def check_replicas(world: World, engine: Engine, ema: ShardedEma, step: int) -> None:
    """Check that the ranks' copies are bitwise equal after `step`. Collective: one small sum over ranks.

    Raises NodeError on rank 0, which names the ranks that differ, and RemoteError on the others: the same command can
    be run again without the nodes of the named ranks. A single rank has nothing to compare.
    """
    if world.size == 1:
        return

    # Without ZeRO, every rank also has all of the EMA.
    emas = [flat for flats in ema.by_kind.values() for flat in flats] if engine.replicated else []
    rows = world.of_each(fingerprint([*engine.replicas(), *emas], world.device).view(1))
    enforce(world, judge_replicas([row[0] for row in rows], world.nodes, step))


def judge_replicas(hashes: Sequence[int], nodes: Sequence[str], step: int) -> Decision:
    """Which ranks differ from the others. `hashes` and `nodes` are by rank. Pure.

    The majority is right. Without a majority it is unknown which ranks are right, so all are named. As in `decide`, no
    node counts as unfit if most of them would, so that a common fault does not empty a cluster.
    """
    if len(set(hashes)) == 1:
        return Decision(tuple(nodes))

    # No majority.
    odd = odd_ranks(hashes)
    if not odd:
        who = ranks_on_nodes(range(len(hashes)), nodes)
        problem = (
            f"{who} hold different weights at step {step}, and there is no majority; {_CAUSE}; run the same command "
            f"again, on other nodes"
        )
        return Decision(tuple(nodes), problem=problem, again=True)

    # The nodes of the odd ranks are left out, if enough others remain.
    theirs = tuple(dict.fromkeys(nodes[rank] for rank in odd))
    unfit = theirs if 2 * len(theirs) <= len(set(nodes)) else ()
    then = "the job continues without" if unfit and job_logs() else "run the same command again without"
    verb = "holds" if len(odd) == 1 else "hold"
    pronoun = "it" if len(theirs) == 1 else "them"
    problem = (
        f"{ranks_on_nodes(odd, nodes)} {verb} different weights from the other ranks at step {step}; {_CAUSE}; {then} "
        f"{pronoun}"
    )
    return Decision(tuple(nodes), unfit, problem, again=True)
