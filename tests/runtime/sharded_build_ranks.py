"""What each rank of test_sharded_build.py runs."""

import contextlib
import json
import sys
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ecar_dist.config.read import load_config
from ecar_dist.config.run import RunConfig
from ecar_dist.kinds.table import kind_of
from ecar_dist.runtime.sharded_build import sharded_build
from ecar_dist.runtime.start.rendezvous import start_world, stop_world
from ecar_dist.runtime.world import World
from ecar_dist.train import start
from ecar_dist.train.sources import check_data, normaliser
from tests.runtime.sharded_build import SETTINGS
from tests.train.zero_matrix_ranks import Micro, read_batches, run_micro_batches

MEASURED = (torch.float32, torch.bfloat16)


class LiveBytes(TorchDispatchMode):
    """The peak number of bytes in floating-point tensors that are created in this context."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.dtype in MEASURED:
                storage = tensor.untyped_storage()
                self._alive[StorageWeakRef(storage)] = storage.nbytes()

        # Freed storages are left out of the sum only where that could matter, because the search for them is slow.
        if sum(self._alive.values()) > self.peak:
            self._alive = {storage: size for storage, size in self._alive.items() if not storage.expired()}
            self.peak = max(self.peak, sum(self._alive.values()))
        return out


def compare_builds(config: RunConfig, world: World) -> dict[str, object]:
    """The peak of a sharded build over that of a full build, and whether each share is its part of the full model."""
    precision, kind = config.deepspeed.precision, kind_of(config)
    torch.manual_seed(config.run.seed)
    with LiveBytes() as whole_bytes:
        whole = kind.build_model(config)
    torch.manual_seed(config.run.seed)
    with LiveBytes() as sharded_bytes, sharded_build(config, world, precision):
        sharded = torch.nn.ModuleList([kind.build_model(config)])[0]  # registered, as the objective does

    equal = []
    for (name, ours), (same_name, full) in zip(sharded.named_parameters(), whole.named_parameters(), strict=True):
        share = ours.ds_tensor
        expected = full.detach().to(share.dtype).flatten()[share.numel() * world.rank :][: share.numel()]
        equal.append(name == same_name and torch.equal(share[: len(expected)], expected))
    return {"peak": sharded_bytes.peak / whole_bytes.peak, "equal": all(equal), "parameters": len(equal)}


def losses(config: RunConfig, world: World, steps: list[list[Micro]]) -> list[float]:
    engine = start.build_engine(config, normaliser(check_data(config), None), world, config.deepspeed.precision)
    return [run_micro_batches(engine, batches).sums[0] for batches in steps]


def build_on_ranks() -> None:
    """Read the config named by the first argument, and write the report to the second."""
    config_path, report_path = sys.argv[1:]
    world = start_world()
    reports = {name: compare_builds(load_config(config_path, changes), world) for name, changes in SETTINGS.items()}

    # The same run, built in shards and in full.
    config = load_config(config_path, [])
    steps = read_batches(config, world)[:3]
    ours = losses(config, world, steps)
    start.sharded_build = lambda *_: contextlib.nullcontext()
    reports["losses"] = {"sharded": ours, "whole": losses(config, world, steps)}
    gathered = world.gather(reports)
    if world.is_first:
        Path(report_path).write_text(json.dumps(gathered))
    stop_world()
