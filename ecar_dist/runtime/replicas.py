"""Numbers that several ranks hold in copy: a cheap hash of them, and which rank's copy is another one.

Copies start alike and take the same steps, so they stay alike to the bit; a flipped bit or a wrong sum on one rank
makes them drift apart, and no collective notices. What only one rank holds (ZeRO's shares) has no copy to compare with.
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

_CAUSE = "memory or a processor there is bad"
_CHUNK = 1 << 22  # elements at once: two times as many int64 of memory
_FACTOR = 0x5851F42D4C957F2D  # odd, of Knuth's MMIX generator
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


def fingerprint(tensors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """A hash of the bits of all tensors, in order: one int64 on `device`. Nothing waits for the device.

    The elements as whole numbers, each times an odd number of its own, added up modulo 2^64: so no change of one
    element alone goes unseen, and any other with a chance of about 2^-64. One pass at the speed of memory.
    """
    total = torch.zeros((), dtype=torch.int64, device=device)
    flats = [tensor.detach().reshape(-1) for tensor in tensors]
    length = min(_CHUNK, max((flat.numel() for flat in flats), default=0))
    weights = (2 * torch.arange(length, device=device) + 1) * _FACTOR  # odd, int64
    for flat in flats:
        for chunk in flat.view(_WORDS[flat.element_size()]).split(_CHUNK):
            total = total * _FACTOR + (chunk.to(device, torch.int64) * weights[: len(chunk)]).sum()
    return total


def check_replicas(world: World, engine: Engine, ema: ShardedEma, step: int) -> None:
    """What all ranks hold in copy after `step` is alike, to the bit. Collective; one small sum over ranks.

    Raises NodeError on rank 0, naming the ranks whose numbers are other ones, and RemoteError on the others: the same
    command may run again without their nodes. Nothing to compare where a rank is alone.
    """
    if world.size == 1:
        return
    emas = [flat for flats in ema.by_kind.values() for flat in flats] if engine.replicated else []
    rows = world.of_each(fingerprint([*engine.replicas(), *emas], world.device).view(1))
    enforce(world, judge_replicas([row[0] for row in rows], world.nodes, step))


def judge_replicas(hashes: Sequence[int], nodes: Sequence[str], step: int) -> Decision:
    """By rank, like `nodes`. Most ranks are right; where no majority agrees, nobody knows who is, and all are named.

    As in `decide`, so that no fault of all nodes empties a cluster, no node is unfit where most of them are.
    """
    if len(set(hashes)) == 1:
        return Decision(tuple(nodes))
    odd = odd_ranks(hashes)
    if not odd:
        who = ranks_on_nodes(range(len(hashes)), nodes)
        said = f"{who} hold different weights at step {step}, and no majority tells whose are right; {_CAUSE}"
        return Decision(tuple(nodes), problem=f"{said}; run the same command again, on other nodes", again=True)
    theirs = tuple(dict.fromkeys(nodes[rank] for rank in odd))
    unfit = theirs if 2 * len(theirs) <= len(set(nodes)) else ()
    then = "the job goes on without" if unfit and job_logs() else "run the same command again without"
    verb = "holds" if len(odd) == 1 else "hold"
    said = f"{ranks_on_nodes(odd, nodes)} {verb} other weights than the other ranks at step {step}; {_CAUSE}"
    return Decision(tuple(nodes), unfit, f"{said}; {then} {'it' if len(theirs) == 1 else 'them'}", again=True)
