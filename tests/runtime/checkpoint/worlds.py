"""Ranks as threads, and a stand-in Engine with made-up numbers: real saves and loads with any number of ranks."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from ecar_dist.config.read import config_from_dict
from ecar_dist.runtime.checkpoint.folder import LocalStorage
from ecar_dist.runtime.checkpoint.manifest import Progress
from ecar_dist.runtime.checkpoint.storage import newest_whole
from ecar_dist.runtime.checkpoint.store import CheckpointStore
from ecar_dist.runtime.ema import ShardedEma
from ecar_dist.runtime.engine import Fragment
from ecar_dist.runtime.optimizer import ADAM_MOMENTS
from ecar_dist.runtime.world import Placement, World

SHAPES = {"a": (4, 6), "b": (10,), "c": (3,)}
IDENTITY = {"model": {"flow.num_stages": 3}, "data": {"run.seed": 0}}
BATCH = 16


class State:
    """Rank `rank` of `size` holds an equal cut of all parameters; with `replicated` all of them, as under ZeRO 0.

    With `shares` it holds an equal cut of every parameter, as under ZeRO 3.
    """

    def __init__(self, rank, size, seed, shapes=SHAPES, replicated=False, zero_stage=2, shares=False):
        self.replicated, self.shapes = replicated, shapes
        self.zero_stage = 0 if replicated else 3 if shares else zero_stage
        rank, size = (0, 1) if replicated else (rank, size)
        generator = torch.Generator().manual_seed(seed)
        total = sum(torch.Size(shape).numel() for shape in shapes.values())
        self.full = {kind: torch.randn(total, generator=generator) for kind in ("master", *ADAM_MOMENTS)}
        self.full["exp_avg_sq"].abs_()

        # This rank's elements of each parameter, and their positions in the flat values of all parameters.
        self.fragments, places, offset, held = [], [], 0, 0
        for name, shape in shapes.items():
            numel = torch.Size(shape).numel()
            share = -(-(numel if shares else total) // size)
            begin = 0 if shares else offset
            low, high = max(0, rank * share - begin), min(numel, (rank + 1) * share - begin)
            if low < high:
                self.fragments.append(Fragment(name, low, high - low, 0, held))
                places += range(offset + low, offset + high)
                held += high - low
            offset += numel
        mine = {kind: values[places] for kind, values in self.full.items()}
        self.partitions = [mine["master"]]
        self._moments = {kind: [mine[kind]] for kind in ADAM_MOMENTS}
        self.optimizer_step, self.published = None, None

    def moments(self, name):
        return self._moments[name]

    def set_optimizer_step(self, step):
        self.optimizer_step = step

    def publish_master_weights(self):
        self.published = self.partitions[0].clone()

    def numbers(self, ema=None):
        """Everything that a checkpoint contains of this rank."""
        kinds = {"master": self.partitions, **self._moments, **(ema.by_kind if ema else {})}
        return {
            (kind, one.name, one.start): one.of(flat).clone() for kind, flat in kinds.items() for one in self.fragments
        }


class Ranks:
    """`size` ranks, each in a thread, with collectives that wait for all of them. `nodes`: ranks per node."""

    def __init__(self, size, per_node=None):
        self.size, self.per_node = size, per_node or size
        self._barrier = threading.Barrier(size, timeout=60)
        self._box = [None] * size

    def __call__(self, action):
        """`action(world)` on every rank; the results in rank order, or the error of the first rank that has one."""
        worlds = [ThreadWorld(self, rank) for rank in range(self.size)]
        with ThreadPoolExecutor(self.size) as pool:
            return [future.result() for future in [pool.submit(action, world) for world in worlds]]

    def exchange(self, rank, value):
        self._box[rank] = value
        self._barrier.wait()
        values = list(self._box)
        self._barrier.wait()
        return values


class ThreadWorld(World):
    def __init__(self, ranks, rank):
        local = rank % ranks.per_node
        super().__init__(Placement(rank, ranks.size, local, ranks.per_node), torch.device("cpu"))
        self._ranks = ranks

    def sum(self, values):
        return torch.stack(self._ranks.exchange(self.rank, values)).sum(0)

    def gather(self, value):
        return self._ranks.exchange(self.rank, value)

    def gather_to_first(self, value):
        values = self._ranks.exchange(self.rank, value)
        return values if self.is_first else None

    def broadcast(self, value):
        return self._ranks.exchange(self.rank, value)[0]

    def barrier(self):
        self._ranks.exchange(self.rank, None)


def make_config(folder, ema=None, **checkpoint):
    """A run in `folder`/tiny."""
    return config_from_dict(
        {
            "run": {"name": "tiny", "dir": str(folder)},
            "model": {"preset": "T", "patch_size": 1},
            "vae": {"kind": "dct", "downsample": 8},
            "data": {"latents": "x", "num_classes": 10, "latent_size": 4, "cache": {"dir": str(folder / "cache")}},
            "train": {"total_samples": 1000},
            "ema": ema or {"half_life_samples": 100},
            "checkpoint": checkpoint,
        }
    )


@contextmanager
def store_of(config, world, identity=IDENTITY, **options):
    store = CheckpointStore(config, world, identity, **options)
    try:
        yield store
    finally:
        store.close()


def save(config, size=1, seed=1, step=4, identity=IDENTITY, restore=False, **options):
    """One checkpoint by `size` ranks, finished."""
    made = {name: options.pop(name) for name in ("replicated", "zero_stage", "shapes", "shares") if name in options}

    def run(world):
        state = State(world.rank, world.size, seed, **made)
        ema = ShardedEma(state.partitions, config.ema)
        with store_of(config, world, identity, **options) as store:
            if restore:
                store.restore(State(world.rank, world.size, 999, **made), ema)
            store.begin(Progress(step * BATCH, step), state, ema, {"seed": seed})
            store.finish()
            return store

    return Ranks(size)(run)[0]


def load(config, size=1, identity=IDENTITY, ranks=None, **options):
    """(Restored, State, ShardedEma) of every rank."""
    made = {name: options.pop(name) for name in ("replicated", "zero_stage", "shapes", "shares") if name in options}

    def run(world):
        state = State(world.rank, world.size, seed=999, **made)
        ema = ShardedEma(state.partitions, config.ema)
        with store_of(config, world, identity, **options) as store:
            return store.restore(state, ema), state, ema

    return (ranks or Ranks(size))(run)


def checkpoints(folder):
    """Names in the run's folder of checkpoints."""
    return sorted(path.name for path in (folder / "tiny/checkpoints").iterdir())


def newest(folder):
    """The newest intact checkpoint in a folder, as a reader outside training finds it."""
    return newest_whole(LocalStorage(folder))
