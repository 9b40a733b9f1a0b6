"""How much damage the rounding of each single unit does: a folder with one small file per unit and number of bits.

MixDQ (Zhao et al., arXiv 2405.17873) decouples the metrics, because one number hides what a layer breaks:

- content, the layers of the AR network and the projection of its maps: 1 - SSIM of images from the same noise;
- quality, the layers of the velocity network: noise over signal power of the velocity, at the calls of the sampler with
  the original weights, so that errors of the AR network are excluded.

An item is a pure function of the model, the settings and its name. So tasks of an array may share the folder, in any
order and more than once, and a run that was stopped can continue.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ecar_dist.command_line import counted, say
from ecar_dist.compress.calibration import Calibration, calibrate, read_calibration, save_calibration
from ecar_dist.compress.model import KEPT, Recipe, quantized_unit
from ecar_dist.compress.report import Drawn, draw_samples
from ecar_dist.compress.source import belongs_to
from ecar_dist.compress.watch import WatchedModel
from ecar_dist.errors import CheckpointError, reason_of
from ecar_dist.evaluate.paired import ssim
from ecar_dist.quantize.allocation import Unit
from ecar_dist.quantize.layers import exchange_all, quantizable, tied_units
from ecar_dist.quantize.quantizer import noise_ratio
from ecar_dist.runtime.world import World
from ecar_dist.sample.generate import generate
from ecar_dist.sample.load import TrainedModel
from ecar_dist.sample.sampling_plan import SamplingPlan
from ecar_dist.storage.atomic import write_json
from ecar_dist.storage.untrusted import AnyRecord, Record, UntrustedError, printable, read_record

MEASURED_BITS = (4, 8)
CALIBRATION, ORIGIN = "calibration.safetensors", "origin.json"
Group = Literal["content", "quality"]


class Item(Record):
    """The damage of one unit at a number of bits; `weights` is the number of its weights."""

    unit: str
    bits: int
    group: Group
    weights: int
    damage: float


class Origin(Record):
    """What a folder of items belongs to."""

    settings: dict[str, str]


@dataclass(frozen=True)
class Sweep:
    """A folder of items, and how they are measured. seed: of the calibration; the samples use the next one."""

    folder: Path
    images: int = 16
    batch_size: int = 16
    seed: int = 0
    recipe: Recipe = dataclasses.field(default_factory=Recipe)

    def open(self, trained: TrainedModel, world: World) -> Calibration:
        """Create the folder, or check that it belongs to this model and these settings. Returns the calibration.

        Raises CheckpointError.
        """
        settings = belongs_to(trained) | {
            "settings": f"images={self.images}, seed={self.seed}, recipe={dataclasses.asdict(self.recipe)}"
        }
        world.on_first_rank(lambda: self._claim(settings))
        path = self.folder / CALIBRATION
        if not world.broadcast(path.exists()):
            found = calibrate(trained, world, images=self.images, batch_size=self.batch_size, seed=self.seed)
            world.on_first_rank(lambda: save_calibration(path, found, settings))
            return found
        return world.together(lambda: read_calibration(path, settings, trained.device))

    def _claim(self, settings: dict[str, str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / ORIGIN
        if not path.exists():
            write_json(path, {"settings": settings})
        for key, value in _read(path, Origin).settings.items():
            if settings.get(key) != value:
                raise CheckpointError(
                    f"{self.folder} has sensitivities for {key} {printable(value, 100)}, this call has "
                    f"{printable(str(settings.get(key)), 100)}; remove it, or give another folder"
                )

    def path(self, unit: str, bits: int) -> Path:
        """The file of an item."""
        return self.folder / f"{unit}-w{bits}.json"

    def read(self, trained: TrainedModel) -> tuple[dict[str, Unit], dict[str, Group]]:
        """The units with their damages, and their groups. Raises CheckpointError if an item is missing or damaged."""
        units, groups = {}, {}
        missing = [item for item in items_of(trained) if not self.path(*item).exists()]
        if missing:
            raise CheckpointError(
                f"{self.folder} lacks {counted(len(missing), 'item')}, the first is {self.path(*missing[0]).name}; run "
                "the missing tasks again"
            )
        for unit in tied_units(quantizable(trained.model)):
            items = [_read(self.path(unit, bits), Item) for bits in MEASURED_BITS]
            units[unit] = Unit(items[0].weights, {**{item.bits: item.damage for item in items}, KEPT: 0.0})
            groups[unit] = items[0].group
        return units, groups


def _read(path: Path, model: type[AnyRecord]) -> AnyRecord:
    try:
        return read_record(path, model)
    except (OSError, UntrustedError) as error:
        raise CheckpointError(f"{path} {reason_of(error)}; remove it, and measure it again") from None


def items_of(trained: TrainedModel) -> list[tuple[str, int]]:
    """Every unit at every number of bits."""
    return [(unit, bits) for unit in tied_units(quantizable(trained.model)) for bits in MEASURED_BITS]


class Meter:
    """Measures what the rounding of layers changes, relative to samples and velocities of the original weights."""

    def __init__(self, trained: TrainedModel, images: int, batch_size: int, seed: int) -> None:
        self.trained = trained
        self.labels = [number % trained.config.data.num_classes for number in range(images)]
        self._batch_size, self._seed = batch_size, seed
        self.reference = self.draw()
        self._calls = self._velocity_calls()

    def draw(self) -> Drawn:
        """Samples of the model as it is now."""
        return draw_samples(self.trained, self.labels, self._seed, self._batch_size)

    def content_damage(self) -> float:
        """1 - SSIM of the images."""
        return 1.0 - ssim(self.reference.pixels, self.draw().pixels)

    @torch.no_grad()
    def quality_damage(self) -> float:
        """Noise over signal power of the velocity."""
        plan = SamplingPlan.from_config(self.trained.config, self.trained.device)
        now = []
        for arguments, _ in self._calls:
            with torch.autocast(self.trained.device.type, torch.bfloat16, enabled=plan.bf16):
                now.append(self.trained.model.velocity(*arguments).float().flatten())  # type: ignore[operator]
        return noise_ratio(torch.cat([output.flatten() for _, output in self._calls]), torch.cat(now))

    def damage(self, group: Group) -> float:
        return self.content_damage() if group == "content" else self.quality_damage()

    def _velocity_calls(self) -> list[tuple[tuple[Any, ...], torch.Tensor]]:
        """Arguments and results of the velocity calls of the first batch."""
        plan = SamplingPlan.from_config(self.trained.config, self.trained.device)
        watched = WatchedModel(self.trained.model, plan.null_label, keeps_calls=True)
        first = torch.tensor(self.labels[: self._batch_size], device=self.trained.device)
        generate(watched, plan, first, torch.arange(len(first), device=first.device), self._seed)
        return watched.calls


def measure_items(
    sweep: Sweep, trained: TrainedModel, calibration: Calibration, items: Sequence[tuple[str, int]]
) -> int:
    """Measure those items whose files are missing or damaged; returns their number."""
    wanted = [item for item in items if not _is_there(sweep.path(*item))]
    if not wanted:
        return 0
    layers = quantizable(trained.model)
    units = tied_units(layers)
    meter = Meter(trained, sweep.images, sweep.batch_size, sweep.seed + 1)
    for number, (unit, bits) in enumerate(wanted, 1):
        # Round one unit, measure, and restore it.
        group: Group = "quality" if calibration.is_in_flow(units[unit][0]) else "content"
        rounded = quantized_unit(trained.model, units[unit], bits, calibration, sweep.recipe)
        before = exchange_all(trained.model, rounded)
        try:
            damage = meter.damage(group)
        finally:
            exchange_all(trained.model, before)

        weights = sum(layers[name].weight.numel() for name in units[unit])
        item = Item(unit=unit, bits=bits, group=group, weights=weights, damage=damage)
        write_json(sweep.path(unit, bits), item.model_dump())
        say(f"{number}/{len(wanted)}  {unit} W{bits}: {group} damage {damage:.3g}")
    return len(wanted)


def _is_there(path: Path) -> bool:
    try:
        read_record(path, Item)
    except (OSError, UntrustedError):
        return False
    return True
