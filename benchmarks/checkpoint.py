"""The cost of a save: the time that training waits, over the time of a bare copy into host memory.

`python benchmarks/checkpoint.py` takes two to three minutes; `--full` has more rounds. The last line is JSON.
See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rounds

from ecar_dist.config.knobs_training import CheckpointSection
from ecar_dist.config.read import config_from_dict
from ecar_dist.config.run import RunConfig
from ecar_dist.runtime.checkpoint.manifest import Progress
from ecar_dist.runtime.checkpoint.save import state_by_kind
from ecar_dist.runtime.checkpoint.store import CheckpointStore
from ecar_dist.runtime.ema import ShardedEma
from ecar_dist.runtime.engine import Engine
from ecar_dist.runtime.start.rendezvous import start_world, stop_world
from ecar_dist.runtime.world import World
from ecar_dist.train.start import build_engine

BATCH, CHANNELS, SIDE, CLASSES = 4, 4, 4, 10
COPY, PLAIN, OVERLAP, SYNCHRONOUS = "bare copy", "no saves", "saves beside training", "saves in between"
IDENTITY: dict[str, dict[str, Any]] = {"model": {}, "data": {}}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    with tempfile.TemporaryDirectory(prefix="ecar-benchmark-", dir=options.work) as folder:
        world = start_world()
        result = Measurement(Path(folder), world, options.preset, options.steps).take(12 if options.full else 5)
        stop_world()
    result["hardware"] = options.hardware or rounds.hardware()
    result["device"] = world.device.type
    _report(result)
    rounds.publish(result, options.save)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="more rounds")
    parser.add_argument("--preset", default="S", help="row of kinds/presets.py")
    parser.add_argument("--steps", type=int, default=8, help="steps of each contender in a round, with one save")
    parser.add_argument("--work", help="folder for the checkpoints (default: the temporary one)")
    parser.add_argument("--save", type=Path, help="also write the result to this JSON file")
    parser.add_argument("--hardware", help="what to call the machine (default: its cores and processor)")
    return parser.parse_args(arguments)


class Measurement:
    """The real engine and checkpoint stores on one rank, trained on noise."""

    def __init__(self, folder: Path, world: World, preset: str, steps: int) -> None:
        self._world = world
        self._steps = steps  # of one contender in a round
        self._step = 0
        config = _config(folder, preset)
        self._engine = build_engine(config, lambda values, _: values, world, config.precision_on(world.device.type))
        self._ema = ShardedEma(self._engine.partitions, config.ema)
        self._stores = {
            name: CheckpointStore(_with_overlap(config, name == OVERLAP), world, IDENTITY)
            for name in (OVERLAP, SYNCHRONOUS)
        }

        # Buffers for the bare copy, and those of the stores: allocated before the first round.
        self._buffers = [torch.empty_like(tensor, device="cpu").zero_() for tensor in self._state()]
        for store in self._stores.values():
            store.restore(self._engine, self._ema)

    def take(self, count: int) -> dict[str, Any]:
        """Measure `count` rounds, after one that is discarded: it touches memory for the first time."""
        contenders: dict[str, Callable[[], dict[str, float]]] = {
            COPY: self._copy,
            PLAIN: lambda: self._train(None),
            OVERLAP: lambda: self._train(self._stores[OVERLAP]),
            SYNCHRONOUS: lambda: self._train(self._stores[SYNCHRONOUS]),
        }
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
        for number in range(count + 1):
            print(f"round {number} of {count}", flush=True)
            for name, measure in contenders.items():
                found = measure()
                if number:
                    measured[name].append(found)
        for store in self._stores.values():
            store.close()
        return self._summary(measured)

    def _summary(self, measured: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
        def ratios(above: str, what: str, below: str, of: str) -> float:
            pairs = zip(measured[above], measured[below], strict=True)
            return statistics.median(one[what] / other[of] for one, other in pairs)

        step = statistics.median(found["seconds"] for found in measured[PLAIN]) / self._steps
        stall = statistics.median(found["stall"] for found in measured[OVERLAP])
        every = CheckpointSection().every_samples
        return {
            "checkpoint_mib": self._stores[OVERLAP].needed_bytes(self._engine) / 2**20,
            "step_seconds": step,
            "copy_seconds": statistics.median(found["seconds"] for found in measured[COPY]),
            "stall_seconds": {
                name: statistics.median(found["stall"] for found in measured[name]) for name in self._stores
            },
            "stall_over_copy": {name: ratios(name, "stall", COPY, "seconds") for name in self._stores},
            "time_of_steps_with_a_save_over_without": {
                name: ratios(name, "seconds", PLAIN, "seconds") for name in self._stores
            },
            "stall_share_at_default_interval": stall / (every / BATCH * step + stall),
            "shortest_interval_for_one_percent_seconds": stall * 99,
            "rounds": len(measured[COPY]),
        }

    def _state(self) -> list[torch.Tensor]:
        state = state_by_kind(self._engine, self._ema)
        return [tensor.detach().view(-1) for partitions in state.values() for tensor in partitions]

    def _copy(self) -> dict[str, float]:
        began = time.perf_counter()
        for buffer, tensor in zip(self._buffers, self._state(), strict=True):
            buffer.copy_(tensor)
        return {"seconds": time.perf_counter() - began}

    def _train(self, store: CheckpointStore | None) -> dict[str, float]:
        """Train some steps as the training loop does. With a store, a save begins after the first."""
        os.sync()  # the previous contender's files must not slow this one down
        stall_before = store.stall_seconds if store else 0.0
        began = time.perf_counter()
        for number in range(self._steps):
            if store and store.ready:
                store.settle()
            _train_step(self._engine, self._ema, self._world, self._step)
            self._step += 1
            if store and number == 0:
                store.begin(Progress(self._step * BATCH, self._step), self._engine, self._ema, {})
        seconds = time.perf_counter() - began
        stall = store.stall_seconds - stall_before if store else 0.0

        # The save must end within these steps, or its stall is incomplete.
        if store:
            if store.in_flight:
                print(f"a save took longer than {self._steps} steps: increase --steps", file=sys.stderr)
            store.finish()
        return {"seconds": seconds, "stall": stall}


def _train_step(engine: Engine, ema: ShardedEma, world: World, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    values = torch.randn(BATCH, CHANNELS, SIDE, SIDE, generator=generator).to(world.device)
    labels = torch.arange(BATCH, device=world.device) % CLASSES
    positions = torch.arange(BATCH, device=world.device) + step * BATCH
    engine.set_learning_rate(1e-4)
    loss = engine(values, labels, positions)[0]
    engine.backward(loss)
    engine.step(loss.detach().view(1))
    ema.update((step + 1) * BATCH, BATCH)


def _config(folder: Path, preset: str) -> RunConfig:
    return config_from_dict(
        {
            "run": {"name": "benchmark", "dir": str(folder)},
            "model": {"preset": preset, "patch_size": 1},
            "vae": {"kind": "dct", "downsample": 8},
            "data": {"latents": "none", "num_classes": CLASSES, "latent_channels": CHANNELS, "latent_size": SIDE},
            "batch": {"global_batch_size": BATCH, "micro_batch_size": BATCH},
            "train": {"total_samples": 1_000_000},
        }
    )


def _with_overlap(config: RunConfig, overlap: bool) -> RunConfig:
    """The same run in its own folder: two stores must not share one."""
    folder = str(config.run_directory / ("beside" if overlap else "between"))
    section = config.checkpoint.model_copy(update={"overlap": overlap, "dir": folder})
    return config.model_copy(update={"checkpoint": section})


def _report(result: dict[str, Any]) -> None:
    print(
        f"\na checkpoint of {result['checkpoint_mib']:.0f} MiB, steps of {result['step_seconds']:.3f} s, "
        f"a bare copy in {result['copy_seconds']:.3f} s"
    )
    for name, stall in result["stall_seconds"].items():
        print(
            f"{name:24} stall training {stall:.3f} s per save = {result['stall_over_copy'][name]:.2f} x the copy; the "
            f"steps around it take {result['time_of_steps_with_a_save_over_without'][name]:.3f} x as long"
        )
    share = result["stall_share_at_default_interval"]
    stall_over_copy = result["stall_over_copy"][OVERLAP]
    for what, found, bound in (
        ("stall of a save beside training over the bare copy", stall_over_copy, 1.5),
        ("its share of training at the default interval", share, 0.01),
    ):
        print(f"{'met   ' if found <= bound else 'MISSED'}  {what}: {found:.3g}; wanted <= {bound:g}")
    print(f"saves every {result['shortest_interval_for_one_percent_seconds']:.0f} s would take one percent")


if __name__ == "__main__":
    main()
