"""`ecar-dist quantize`: calibrate, transform and round, write, and compare with the original model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ecar_dist.command_line import columns, say
from ecar_dist.compress.calibration import Calibration, calibrate, read_calibration, save_calibration
from ecar_dist.compress.mixed import Judge, check_mean_bits, choose, print_choice
from ecar_dist.compress.model import KEPT, Recipe, quantized_model
from ecar_dist.compress.report import (
    Drawn,
    compare_samples,
    device_name,
    draw_samples,
    memory_bytes,
    report_lines,
    seconds_per_batch,
)
from ecar_dist.compress.sensitivity import Meter, Sweep, items_of, measure_items
from ecar_dist.compress.source import Precision, belongs_to, check_out, facts_of, open_source
from ecar_dist.compress.write import new_folder, write_quantized
from ecar_dist.quantize.allocation import Unit
from ecar_dist.quantize.layers import quantizable, tied_units
from ecar_dist.runtime.export.files import QUANTIZATION
from ecar_dist.runtime.placement import Placement
from ecar_dist.runtime.world import World
from ecar_dist.sample.load import TrainedModel
from ecar_dist.storage.atomic import write_json

MIB = 2**20


@dataclass(frozen=True)
class Wish:
    """What the command line asks for.

    weights: bits everywhere; mean_bits: mean bits per weight instead, with different bits in each unit (MixDQ).
    images: how many are drawn to calibrate, and again to compare.
    calibration: a file of maxima, read if it exists, otherwise written.
    sensitivity: folder of the units' sensitivities, which has its own calibration.
    dtype: of the layers that are not quantised.
    """

    model: Path
    out: Path = Path("quantised")
    step: int | None = None
    ema: str | None = None
    weights: int = 8
    mean_bits: float | None = None
    images: int = 16
    batch_size: int = 16
    seed: int = 0
    dtype: Precision | None = None
    calibration: Path | None = None
    sensitivity: Path | None = None
    recipe: Recipe = field(default_factory=Recipe)

    def sweep(self, folder: Path) -> Sweep:
        """The measurement of sensitivities in a folder."""
        return Sweep(folder, self.images, self.batch_size, self.seed, self.recipe)


def quantize(wish: Wish, world: World) -> None:
    """Write a quantised export to `wish.out`, from rank 0; print its report. All ranks calibrate.

    Raises CheckpointError or ConfigError on every rank.
    """
    # Cheap checks first, and the model on every rank.
    if wish.mean_bits is not None:
        check_mean_bits(wish.mean_bits)
    world.on_first_rank(lambda: check_out(wish.out))
    trained = world.together(lambda: open_source(wish.model, world.device, step=wish.step, ema=wish.ema))
    if wish.mean_bits is not None:
        _quantize_to_mean(wish, wish.mean_bits, trained, world)
        return
    calibration = calibration_of(wish, trained, world)
    units = tied_units(quantizable(trained.model))
    kept = units_with_outliers(units, calibration)
    bits = {unit: KEPT if unit in kept else wish.weights for unit in units}
    world.on_first_rank(lambda: finish(wish, trained, calibration, bits, {}))


def _quantize_to_mean(wish: Wish, wanted: float, trained: TrainedModel, world: World) -> None:
    """MixDQ: all ranks measure the missing sensitivities; then comes the integer programme."""
    sweep = wish.sweep(wish.sensitivity or wish.out.with_name(f"{wish.out.name}.sensitivity"))
    calibration = sweep.open(trained, world)
    mine = items_of(trained)[world.rank :: world.size]
    world.together(lambda: measure_items(sweep, trained, calibration, mine))

    def allocate_and_finish() -> None:
        units, groups = sweep.read(trained)
        for unit in units_with_outliers(units, calibration):
            units[unit] = Unit(units[unit].weights, {KEPT: 0.0})
        meter = Meter(trained, wish.images, wish.batch_size, wish.seed + 1)
        bits, report = choose(units, groups, wanted, Judge(meter, calibration, wish.recipe))
        print_choice(bits, report)
        finish(wish, trained, calibration, bits, {"allocation": report})

    world.on_first_rank(allocate_and_finish)


def measure_task(wish: Wish, folder: Path, task: int, tasks: int, world: World) -> None:
    """One task of an array: every `tasks`-th item, beginning with `task`. Raises CheckpointError or ConfigError."""
    trained = open_source(wish.model, world.device, step=wish.step, ema=wish.ema)
    sweep = wish.sweep(folder)
    calibration = sweep.open(trained, world)
    items = items_of(trained)
    done = measure_items(sweep, trained, calibration, items[task::tasks])
    there = sum(sweep.path(*item).exists() for item in items)
    say(f"task {task} of {tasks}: {done} measured; {there} of {len(items)} items are in {folder}")


def calibration_of(wish: Wish, trained: TrainedModel, world: World) -> Calibration:
    """Read from the file if it exists; otherwise made by all ranks, and written."""
    path = wish.calibration
    of = belongs_to(trained)
    if path is not None and world.broadcast(path.exists()):
        return world.together(lambda: read_calibration(path, of, trained.device))
    found = calibrate(trained, world, images=wish.images, batch_size=wish.batch_size, seed=wish.seed)
    if path is not None:
        world.on_first_rank(lambda: save_calibration(path, found, of))
    return found


def finish(
    wish: Wish, trained: TrainedModel, calibration: Calibration, bits: dict[str, int], more: dict[str, Any]
) -> None:
    """Quantise with the given bits of each unit, write, compare and print. more: further parts of the report."""
    model = quantized_model(trained.model, bits, calibration, wish.recipe)
    config, facts = facts_of(wish.model, step=wish.step, ema=wish.ema, dtype=wish.dtype)

    # Samples from different noise than the calibration's, from the original and from the quantised model.
    labels = [number % trained.config.data.num_classes for number in range(wish.images)]
    seed = wish.seed + 1
    reference = draw_samples(trained, labels, seed, wish.batch_size)
    after = dataclasses.replace(trained, model=model)
    report = {
        "images": wish.images,
        "recipe": dataclasses.asdict(wish.recipe),
        "bits": bits,
        "mean_bits": mean_bits_of(trained, bits),
        "device": device_name(trained.device),
        "torch": torch.__version__,
        "batch": min(wish.batch_size, wish.images),
        **measure(wish, trained, after, reference, labels),
        "incoherence": incoherence_of(wish, calibration, after),
        "outlier tokens": calibration.outlier_tokens(),
        **more,
    }
    about = {name: report[name] for name in ("mean_bits", "recipe", "images", "paired")}
    with new_folder(wish.out) as folder:
        written = write_quantized(folder, config, facts, model, about)
        parameters = sum(value.numel() for value in trained.model.state_dict().values())
        before = parameters * (2 if facts["dtype"] == "bf16" else 4)
        report["before"]["file MiB"], report["after"]["file MiB"] = before / MIB, written / MIB
        write_json(folder / QUANTIZATION, report)
    print_report(report)
    say(str(wish.out))


def units_with_outliers(names: Iterable[str], calibration: Calibration) -> set[str]:
    """The projections to queries, keys and values of outlier tokens, which stay as they are (MixDQ: BOS-aware)."""
    found = {key.partition("|")[0] for key in calibration.outlier_tokens()}
    return {unit for unit in names if unit.endswith("qkv") and (unit in found or f"{unit[:-3]}k" in found)}


def mean_bits_of(trained: TrainedModel, bits: dict[str, int]) -> float:
    """Bits per weight over the layers that can be quantised."""
    layers = quantizable(trained.model)
    sizes = {unit: sum(layers[name].weight.numel() for name in names) for unit, names in tied_units(layers).items()}
    return sum(sizes[unit] * bits[unit] for unit in sizes) / sum(sizes.values())


def measure(
    wish: Wish, trained: TrainedModel, after: TrainedModel, reference: Drawn, labels: list[int]
) -> dict[str, Any]:
    """Memory, speed and paired numbers, before and after."""
    batch = labels[: wish.batch_size]
    both = {
        name: {
            "memory MiB": memory_bytes(each.model) / MIB,
            "ms a batch": 1e3 * seconds_per_batch(each, batch),
        }
        for name, each in (("before", trained), ("after", after))
    }
    return {**both, "paired": compare_samples(reference, draw_samples(after, labels, wish.seed + 1, wish.batch_size))}


def incoherence_of(wish: Wish, calibration: Calibration, after: TrainedModel) -> dict[str, list[float]]:
    """Largest of the channels' maxima divided by their mean, before and after the transforms, by stage and network."""
    alone = World(Placement(), after.device)
    seen = calibrate(after, alone, images=min(wish.images, wish.batch_size), batch_size=wish.batch_size, seed=wish.seed)
    now = seen.mean_incoherence()
    return {place: [value, now[place]] for place, value in calibration.mean_incoherence().items() if place in now}


def print_report(report: dict[str, Any]) -> None:
    """Print it to the screen."""
    say(f"W{report['mean_bits']:.3g}A8 (bits per weight of the quantised layers), {report['device']}, eager")
    for line in report_lines(report):
        say(line)
    rows = [["max over mean of the channels", "before", "after"]]
    rows += [[place, *(f"{value:.1f}" for value in pair)] for place, pair in report["incoherence"].items()]
    for line in columns(rows):
        say(line)
    if 4 in report["bits"].values():
        say("4-bit weights are unpacked to int8 for each product: they save memory, and are not accelerated")
    outliers = report["outlier tokens"]
    if not outliers:
        say("no token is an outlier in every image, so no keys and values are kept in high precision")
    for key, tokens in outliers.items():
        say(f"outlier tokens {tokens} in every image in {key.replace('|', ' at ')}: its keys and values are kept")
