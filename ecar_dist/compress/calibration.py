"""What the layers see while the model draws: maxima of channels, by stage, flow time and guidance half, and of tokens.

No data are read: the inputs of the layers come from the sampler itself. Ranks draw different images, and their maxima
are reduced, so the result does not depend on the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from ecar_dist.compress.watch import WatchedModel, inputs_seen
from ecar_dist.errors import CheckpointError, reason_of
from ecar_dist.quantize.layers import quantizable
from ecar_dist.quantize.linear import QuantizedLinear
from ecar_dist.quantize.transform import incoherence
from ecar_dist.runtime.checkpoint.files import open_tensors
from ecar_dist.runtime.checkpoint.tensor_file import TensorEntry, write_tensor_file
from ecar_dist.runtime.world import World
from ecar_dist.sample.generate import generate
from ecar_dist.sample.load import TrainedModel
from ecar_dist.sample.sampling_plan import SamplingPlan
from ecar_dist.storage.atomic import temporary_beside
from ecar_dist.storage.untrusted import MAX_JSON_BYTES, UntrustedError, printable

OUTLIER = 10.0  # a token is one if its maximum exceeds this many times the median token's, in every image
CHANNELS, TOKENS = "channels", "tokens"


@dataclass
class Calibration:
    """Maxima by key: `layer|place|half` (`cond`, `null`, or `all` if unknown), and `layer|place|16 tokens`.

    channels: max|X_j| over tokens and images, float32 [in].
    tokens: max|x_t| divided by the median of its image; the smallest over images and calls, float32 [T].
    """

    channels: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, torch.Tensor] = field(default_factory=dict)

    def see(self, name: str, place: str, x: torch.Tensor, null: torch.Tensor | None) -> None:
        """Record an input x [B, ..., in] of a layer. null: bool [B], the rows with the null label."""
        sizes = x.float().abs()

        # Channels, for both halves of a guided batch.
        halves = {"all": sizes}
        if null is not None and len(null) == len(x):
            halves = {"cond": sizes[~null], "null": sizes[null]}
        for half, rows in halves.items():
            if rows.numel():
                _keep(self.channels, f"{name}|{place}|{half}", rows.flatten(0, -2).amax(0), torch.maximum)

        # Tokens, if there are several.
        if x.dim() == 3 and x.shape[1] > 1:
            largest = sizes.amax(-1)  # [B, T]
            ratios = largest / largest.median(dim=1, keepdim=True).values.clamp_min(1e-30)
            _keep(self.tokens, f"{name}|{place}|{x.shape[1]} tokens", ratios.amin(0), torch.minimum)

    def largest(self, name: str) -> torch.Tensor:
        """The maxima of a layer's channels over all places and halves, float32 [in].

        The maxima at the place where the channels differ most would not do: a channel that is small there and large
        elsewhere would be multiplied by a large factor everywhere.
        """
        found = [maxima for key, maxima in self.channels.items() if key.startswith(f"{name}|")]
        return torch.stack(found).amax(0)

    def is_in_flow(self, name: str) -> bool:
        """Whether a layer is part of the velocity network."""
        return any("/time" in key for key in self.channels if key.startswith(f"{name}|"))

    def outlier_tokens(self) -> dict[str, list[int]]:
        """Tokens that are outliers in every image, by layer and place."""
        found = {key: (ratio > OUTLIER).nonzero()[:, 0].tolist() for key, ratio in self.tokens.items()}
        return {key: tokens for key, tokens in found.items() if tokens}

    def mean_incoherence(self) -> dict[str, float]:
        """Largest of the channels' maxima divided by their mean, averaged over layers, by stage and network."""
        by_place: dict[str, list[float]] = {}
        for key, maxima in self.channels.items():
            stage, _, where = key.split("|")[1].partition("/")
            network = "token maps" if where == "maps" else "velocity"
            by_place.setdefault(f"{stage} {network}", []).append(incoherence(maxima))
        return {place: sum(values) / len(values) for place, values in sorted(by_place.items())}

    def reduce(self, world: World) -> None:
        """Replace the maxima by those over all ranks, on all ranks."""
        if world.size > 1:
            _reduce(self.channels, world, sign=1.0)
            _reduce(self.tokens, world, sign=-1.0)


def _keep(kept: dict[str, torch.Tensor], key: str, value: torch.Tensor, of_both: Any) -> None:
    kept[key] = of_both(kept[key], value) if key in kept else value


def _reduce(values: dict[str, torch.Tensor], world: World, sign: float) -> None:
    """The largest (sign 1) or smallest (-1) over ranks. A rank that drew no image has no keys."""
    # All ranks concatenate the same keys.
    sizes: dict[str, int] = {}
    for of_rank in world.gather({key: len(value) for key, value in values.items()}):
        sizes |= of_rank
    keys = sorted(sizes)
    nothing = torch.full((max(sizes.values()),), -math.inf, device=world.device)
    flat = torch.cat([sign * values[key] if key in values else nothing[: sizes[key]] for key in keys])

    parts = world.max(flat).split([sizes[key] for key in keys])
    values.clear()
    values.update({key: sign * part for key, part in zip(keys, parts, strict=True)})


@torch.no_grad()
def calibrate(trained: TrainedModel, world: World, *, images: int, batch_size: int, seed: int) -> Calibration:
    """Draw `images` images, of all classes in turn, and record what the layers see. The same on every rank.

    For layers that are already quantised, their inputs after balance and rotation are recorded.
    """
    found = Calibration()
    plan = SamplingPlan.from_config(trained.config, trained.device)
    watched = WatchedModel(trained.model, plan.null_label)
    layers: dict[str, nn.Module] = dict(quantizable(trained.model))
    layers |= {name: each for name, each in trained.model.named_modules() if isinstance(each, QuantizedLinear)}

    def see(name: str, x: torch.Tensor) -> None:
        layer = layers[name]
        seen = layer.transformed(x) if isinstance(layer, QuantizedLinear) else x
        found.see(name, watched.place.name, seen, watched.place.null)

    def draw() -> None:
        # A batch is the same whichever rank draws it.
        for number, indices in enumerate(torch.arange(images, device=trained.device).split(batch_size)):
            if number % world.size == world.rank:
                generate(watched, plan, indices % trained.config.data.num_classes, indices, seed)

    with inputs_seen(layers, see):
        world.together(draw)
    found.reduce(world)
    return found


def weights_digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """xxh3_128 of names and values."""
    digest = xxhash.xxh3_128()
    for name, value in tensors:
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_calibration(path: Path, found: Calibration, of: dict[str, str]) -> None:
    """Write a tensor file. `of`: what it belongs to, stored with it."""
    named = {f"{CHANNELS}|{key}": value for key, value in found.channels.items()}
    named |= {f"{TOKENS}|{key}": value for key, value in found.tokens.items()}
    entries = [
        TensorEntry(name, torch.float32, tuple(value.shape), lambda value=value: value)  # type: ignore[misc]
        for name, value in named.items()
    ]
    temporary = temporary_beside(path)
    try:
        write_tensor_file(temporary, entries, of)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_calibration(path: Path, of: dict[str, str], device: torch.device) -> Calibration:
    """Raises CheckpointError if the file is damaged, or belongs to a different model, data set or sampler than `of`."""
    again = "remove it, or give another --calibration"
    try:
        handle = open_tensors(path, "pt", MAX_JSON_BYTES)
        stored = handle.metadata() or {}
        for key, value in of.items():
            if stored.get(key) != value:
                raise CheckpointError(
                    f"{path} is a calibration for {key} {printable(str(stored.get(key)), 100)}, this model has "
                    f"{value}; {again}"
                )
        values = {name: handle.get_tensor(name).float().to(device) for name in handle.keys()}  # noqa: SIM118
    except (OSError, UntrustedError) as error:
        raise CheckpointError(f"{path} {reason_of(error)}; {again}") from None

    # Maxima by kind and key.
    found = Calibration()
    for name, value in values.items():
        kind, _, key = name.partition("|")
        (found.channels if kind == CHANNELS else found.tokens)[key] = value
    return found
