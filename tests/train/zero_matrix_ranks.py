"""What each rank of test_zero_matrix.py runs: the same steps under many engine settings, in one process."""

import contextlib
import gc
import json
import math
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ecar_dist.config.read import load_config
from ecar_dist.config.run import RunConfig
from ecar_dist.data.loader import MicroBatch
from ecar_dist.kinds.presets import PRESETS, Preset
from ecar_dist.runtime.checkpoint.manifest import Progress
from ecar_dist.runtime.compiler import repeated_blocks
from ecar_dist.runtime.deepspeed_config import REDUCE_BUCKET
from ecar_dist.runtime.ema import ShardedEma, tracked_decays
from ecar_dist.runtime.engine import Engine
from ecar_dist.runtime.optimizer import ADAM_MOMENTS, StepStatus
from ecar_dist.runtime.replicas import check_replicas, fingerprint
from ecar_dist.runtime.start.rendezvous import start_world, stop_world
from ecar_dist.runtime.world import World
from ecar_dist.sample.load import load_weights
from ecar_dist.sample.preview import StripPreview
from ecar_dist.train import start
from ecar_dist.train.flags import Flags
from ecar_dist.train.guard import is_good
from ecar_dist.train.sources import check_data, normaliser, open_loader, open_stream
from ecar_dist.train.start import build_engine
from ecar_dist.train.step import train_step
from ecar_dist.train.telemetry import Telemetry
from ecar_dist.train.time_budget import Goodput, Phases
from tests.train.zero_matrix import BATCH, COMPILED, REFERENCE, SETTINGS, STEPS

Averages = dict[str, torch.Tensor]
Micro = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def read_batches(config: RunConfig, world: World) -> list[list[Micro]]:
    """The micro-batches of all steps, read once for all settings."""
    data = check_data(config)
    loader = open_loader(config, world, data, open_stream(config, data), 0)
    steps = [loader.take(config.grad_accum_steps(world.size)) for _ in range(STEPS)]
    loader.close()
    return [[(micro.values, micro.labels, micro.positions) for micro in step] for step in steps]


class HostReads(TorchDispatchMode):
    """Counts the numbers that the host reads from a tensor."""

    count = 0
    until_status = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def run_micro_batches(
    engine: Engine, batches: list[Micro], *, factor: float = 1.0, reported: float = 1.0, reads: HostReads | None = None
) -> StepStatus:
    """One step. Its gradients are multiplied by `factor`, and the loss that is judged by `reported`."""
    sums = torch.zeros(1, dtype=torch.float64)
    status = None
    for micro in batches:
        loss, *_ = engine(*micro)
        sums += loss.detach() * reported / (len(batches) * engine.world.size)
        if micro is batches[-1]:
            engine.world.sum(sums)
        engine.backward(loss * factor)
        status = engine.step(sums)
    assert status is not None
    if reads is not None:
        reads.until_status = reads.count
    return status.read()


def whole(engine: Engine, partitions: list[torch.Tensor]) -> torch.Tensor:
    """All weights concatenated, float64, from every rank's partitions, in one collective."""
    ends = dict(
        zip(engine.shapes, accumulate(torch.Size(shape).numel() for shape in engine.shapes.values()), strict=True)
    )
    full = torch.zeros(max(ends.values()), dtype=torch.float64)
    for fragment in engine.fragments:
        begin = ends[fragment.name] - torch.Size(engine.shapes[fragment.name]).numel() + fragment.start
        full[begin : begin + fragment.numel] = fragment.of(partitions).detach().double()
    return full if engine.replicated else engine.world.sum(full)


def train(engine: Engine, config: RunConfig, steps: list[list[Micro]]) -> tuple[list[float], ShardedEma, Averages]:
    """Run all steps. Along with the sharded averages, keep unsharded averages of the full weights."""
    ema, losses = ShardedEma(engine.partitions, config.ema), []
    unsharded = dict.fromkeys(ema.by_kind, whole(engine, engine.partitions))
    for index, batches in enumerate(steps):
        status = run_micro_batches(engine, batches)
        assert status.applied
        losses.append(status.sums[0])
        seen = (index + 1) * BATCH
        ema.update(seen, BATCH)
        weights = whole(engine, engine.partitions)
        for kind, decay in tracked_decays(config.ema).items():
            unsharded[kind] = unsharded[kind].lerp(weights, 1.0 - float(decay(seen, BATCH)))
    return losses, ema, unsharded


def state(engine: Engine) -> list[torch.Tensor]:
    """Everything that a refused step must not change: master weights, moments, and what the forward pass reads."""
    moments = [flat for name in ADAM_MOMENTS for flat in engine.moments(name)]
    shares = [getattr(parameter, "ds_tensor", parameter) for parameter in engine._parameters.values()]
    return [tensor.detach().clone() for tensor in (*engine.partitions, *moments, *shares)]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def refusals(engine: Engine, batches: list[Micro], limit: list[float]) -> dict[str, bool]:
    """Four kinds of refused step: whether the state is unchanged and the next step is as if none had been refused.

    `limit` contains the largest norm of a good step."""
    before, found = state(engine), {}

    def refuse(kind: str, **how: float) -> StepStatus:
        status = run_micro_batches(engine, batches, **how)
        found[f"{kind}: refused"] = not status.applied
        found[f"{kind}: nothing moved"] = equal(before, state(engine))
        found[f"{kind}: the counter went on"] = adam_steps(engine) == {STEPS + 1 + len(found) // 3}
        return status

    nan = refuse("gradients of rank 1 are NaN", factor=math.nan if engine.world.rank == 1 else 1.0)
    status = refuse("loss is NaN", reported=math.nan)
    limit[0] = status.grad_norm / 2
    refuse("norm above the limit")
    limit[0] = math.inf
    refuse("norm beyond what a stage in fp32 can square", factor=1e30)
    after = step_from(engine, before, batches, restore=False)
    found["the next step is as if none had been refused"] = equal(
        after, step_from(engine, before, batches, restore=True)
    )
    found["the norm of a NaN loss is not finite"] = not math.isfinite(nan.grad_norm)
    return found


def step_from(engine: Engine, before: list[torch.Tensor], batches: list[Micro], *, restore: bool) -> list[torch.Tensor]:
    """The state after one good step from `before`; `restore` puts it back first, unnecessary after a refused step."""
    if restore:
        put_back(engine, before)
    engine.set_optimizer_step(STEPS)
    status = run_micro_batches(engine, batches)
    after = state(engine)
    assert status.applied
    assert not equal(before, after)
    return after


def put_back(engine: Engine, before: list[torch.Tensor]) -> None:
    flats = [*engine.partitions, *(flat for name in ADAM_MOMENTS for flat in engine.moments(name))]
    with torch.no_grad():
        for flat, old in zip(flats, before[: len(flats)], strict=True):
            flat.copy_(old)
    engine.publish_master_weights()


def adam_steps(engine: Engine) -> set[int]:
    return {int(engine._adam.state_of(partition)["step"]) for partition in engine.partitions}


def replicas(engine: Engine, ema: ShardedEma) -> dict[str, int]:
    """The number of elements replicated on all ranks, and of different hashes of them: 1 if no rank drifted."""
    check_replicas(engine.world, engine, ema, STEPS)  # raises if they differ
    copies = engine.replicas()
    hashes = engine.world.of_each(fingerprint(copies, engine.world.device).view(1))
    return {"elements": sum(copy.numel() for copy in copies), "hashes": len({row[0] for row in hashes})}


def storages() -> dict[int, torch.UntypedStorage]:
    """The storages of the tensors created since `gc.freeze` that Python can reach, by address."""
    gc.collect()
    found = {}
    for tensor in gc.get_objects():
        if isinstance(tensor, torch.Tensor):
            with contextlib.suppress(RuntimeError):  # a tensor of the compiler, which has no memory
                storage = tensor.untyped_storage()
                found[storage.data_ptr()] = storage
    return found


def state_bytes(engine: Engine, batches: list[Micro], others: set[int]) -> int:
    """Bytes of weights, gradients and optimizer state after the last backward pass of a step, without buckets."""
    for index, micro in enumerate(batches):
        loss, *_ = engine(*micro)
        engine.backward(loss)
        if index + 1 < len(batches):
            engine.step(torch.zeros(1))
    del loss, _

    # The smaller of two counts, because a finished collective may hold its tensors a little longer. The second count
    # does not come from another pass: that would end the step, and with it the gradients.
    counts = []
    for _ in range(2):
        engine.world.sum(torch.zeros(1))
        held = [storage for address, storage in storages().items() if address not in others]
        counts.append(sum(storage.nbytes() for storage in held if storage.nbytes() < REDUCE_BUCKET))
    return min(counts)


class Wire(TorchDispatchMode):
    """Counts the bytes that this rank hands to collectives."""

    sent = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            # All-gathers have their inputs after their outputs; the others only have the tensors that they change.
            given = args[1] if "gather" in str(func) else args[0]
            self.sent += sum(one.nbytes for one in tree_leaves(given) if isinstance(one, torch.Tensor))
        return func(*args, **(kwargs or {}))


def preview(engine: Engine, ema: ShardedEma, config: RunConfig, batches: list[Micro]) -> dict[str, Any]:
    """Whether the trained model draws with the EMA as a separate model does, and then trains on unchanged."""
    preview, before = StripPreview(config, None, engine.world.device), state(engine)
    after = step_from(engine, before, batches, restore=True)
    put_back(engine, before)

    # The model draws, on all ranks.
    copies, average = ([flat.detach().clone() for flat in flats] for flats in (engine.replicas(), ema.partitions))
    with Wire() as wire, engine.weights_of(ema.partitions) as model:
        to_ema = wire.sent
        stages = preview.draw(model)
        while_drawn = wire.sent - to_ema

    # A separate model, in fp32.
    parts = whole(engine, ema.partitions).float().split([math.prod(shape) for shape in engine.shapes.values()])
    weights = {name: part.view(shape) for (name, shape), part in zip(engine.shapes.items(), parts, strict=True)}
    expected = preview.draw(load_weights(config, weights, engine.world.device))
    return {
        "drawn alike": equal(stages, expected),
        "difference": max(float((a - b).abs().max()) for a, b in zip(stages, expected, strict=True)),
        "back again": equal([*before, *copies, *average], [*state(engine), *engine.replicas(), *ema.partitions]),
        "goes on alike": equal(after, step_from(engine, before, batches, restore=False)),
        "bytes for the EMA": to_ema,
        "bytes while drawn": while_drawn,
    }


class Collectives(TorchDispatchMode):
    """Lists what this rank calls: operation, type, and number of values."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[tuple[str, str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            values = [one for one in tree_leaves(args[0]) if isinstance(one, torch.Tensor)]
            dtype = str(values[0].dtype).removeprefix("torch.")
            self.called.append((func._opname, dtype, sum(one.numel() for one in values)))
        return func(*args, **(kwargs or {}))


def collectives(engine: Engine, config: RunConfig, batches: list[Micro]) -> list[tuple[str, str, int]]:
    """The collectives of one training step, until its numbers are read."""
    phases = Phases(lambda name, step: None)
    telemetry = Telemetry(config, engine.world, phases, Goodput(), 1.0)
    micros = [MicroBatch(*micro, torch.arange(len(micro[0]))) for micro in batches]
    with Collectives() as seen:
        train_step(
            micros,
            Progress(0, 0),
            lambda: Flags(0.0, 0.0, 0.0),
            config=config,
            world=engine.world,
            engine=engine,
            telemetry=telemetry,
        ).read(config)
    return seen.called


def host_reads(engine: Engine, batches: list[Micro]) -> int:
    """The host reads of one step, until its status is read."""
    with HostReads() as reads:
        run_micro_batches(engine, batches, reads=reads)
    return reads.until_status


def run_setting(name: str, config: RunConfig, world: World, steps: list[list[Micro]]) -> tuple[dict, Averages]:
    """The report of this rank, and its final weights and averages."""
    counters.clear()
    gc.collect()
    gc.freeze()  # `storages` then sees only what this setting creates, and does not search all modules
    limit = [math.inf]
    normalise, precision = normaliser(check_data(config), None), config.deepspeed.precision
    engine = build_engine(config, normalise, world, precision, lambda loss, norm: is_good(loss, norm, limit[0]))
    if config.grad_accum_steps(world.size) == 1:  # the two micro-batches of a step are one
        steps = [[tuple(torch.cat(parts) for parts in zip(*batches, strict=True))] for batches in steps]
    losses, ema, unsharded = train(engine, config, steps)
    results = {kind: whole(engine, flats) for kind, flats in ema.by_kind.items()}
    weights = whole(engine, engine.partitions)
    report = {
        "losses": losses,
        "sharded EMA against unsharded": max(float((results[kind] - unsharded[kind]).abs().max()) for kind in results),
        "adam steps": sorted(adam_steps(engine)),
        "elements": sum(fragment.numel for fragment in engine.fragments),
        "replicas": replicas(engine, ema),
        "compiled": all(
            hasattr(block.forward, "_torchdynamo_orig_callable") for block in repeated_blocks(engine._model)
        ),
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
        "refusals": refusals(engine, steps[0], limit),
        "preview": preview(engine, ema, config, steps[0]),
        "collectives": collectives(engine, config, steps[0]) if name not in COMPILED else [],
        "host reads": host_reads(engine, steps[0]) if name not in COMPILED else 0,
    }
    del ema, unsharded
    others = {tensor.untyped_storage().data_ptr() for tensor in (weights, *results.values())}
    report["state bytes"] = state_bytes(engine, steps[0], others)
    return report, {"weights": weights, **results}


def run_matrix() -> None:
    """Read the config named by the first argument, write the report to the second."""
    config_path, report_path = sys.argv[1:]
    start.BACKEND = "aot_eager"
    start.check_compiler = lambda device: None
    PRESETS["T"] = Preset(1, 64, 2, 1, 64, 2)  # a step spends its time here on many small operations
    world = start_world()
    steps = read_batches(load_config(config_path, []), world)
    reports, results = {}, {}
    for name, overrides in SETTINGS.items():
        report, results[name] = run_setting(name, load_config(config_path, overrides), world, steps)
        for kind, reference in results[REFERENCE].items():
            report[kind] = float((results[name][kind] - reference).norm() / reference.norm())  # relative L2 distance
        reports[name] = world.gather(report)
    if world.is_first:
        Path(report_path).write_text(json.dumps(reports, indent=1))
    stop_world()
