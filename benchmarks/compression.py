"""Quantisation and token merging on a trained run: python benchmarks/compression.py runs/mine [--images 64]

Prints three tables: the ladder of ViDiT-Q, token merging by ratio on the run, and the CPU time of one velocity call
with merged tokens by grid, on random weights. All differences are from samples with the same noise, without
quantisation or merging.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from ecar_dist.compress.calibration import Calibration, calibrate
from ecar_dist.compress.model import Recipe, quantized_unit
from ecar_dist.compress.report import compare_samples, draw_samples
from ecar_dist.config.read import config_from_dict
from ecar_dist.kinds.table import kind_of
from ecar_dist.models.token_merger import TokenMerger
from ecar_dist.quantize.layers import exchange_all, quantizable
from ecar_dist.quantize.quantizer import largest_code, quantize_rows
from ecar_dist.runtime.placement import Placement
from ecar_dist.runtime.world import World
from ecar_dist.sample.load import TrainedModel, open_trained

BALANCES = (0.3, 0.5)
RATIOS = (0.0, 0.25, 0.5, 0.75)


class StaticLinear(nn.Module):
    """The lowest rung, simulated: one scale per output for weights, one scale for all activations in calibration."""

    def __init__(self, linear: nn.Linear, bits: int, largest: float) -> None:
        super().__init__()
        codes, scale = quantize_rows(linear.weight, bits)
        self.weight, self.bias = codes.float() * scale, linear.bias
        self.step = largest / largest_code(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes = (x.float() / self.step).round().clamp(-largest_code(8), largest_code(8))
        return F.linear(codes * self.step, self.weight, self.bias)


def static_layers(trained: TrainedModel, bits: int, calibration: Calibration) -> dict[str, nn.Module]:
    """Every quantised layer with one scale for its activations."""
    found: dict[str, nn.Module] = {}
    for name, linear in quantizable(trained.model).items():
        keys = [key for key in calibration.channels if key.startswith(f"{name}|")]
        found[name] = StaticLinear(linear, bits, max(float(calibration.channels[key].max()) for key in keys))
    return found


def layers_by(trained: TrainedModel, bits: int, calibration: Calibration, recipe: Recipe) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name in quantizable(trained.model):
        found |= quantized_unit(trained.model, (name,), bits, calibration, recipe)
    return found


def ladder(trained: TrainedModel, images: int) -> Iterator[str]:
    """A row for each rung and number of bits."""
    alone = World(Placement(), trained.device)
    calibration = calibrate(trained, alone, images=min(images, 32), batch_size=16, seed=0)
    labels = [number % trained.config.data.num_classes for number in range(images)]
    reference = draw_samples(trained, labels, 1, 32)
    rungs: dict[str, Recipe | None] = {"static, one scale": None, "dynamic, per token": Recipe(None, False)}
    rungs |= {f"+ balance, a = {alpha}": Recipe(alpha, False) for alpha in BALANCES}
    rungs |= {"+ rotation": Recipe(None, True)}
    rungs |= {f"+ both, a = {alpha}": Recipe(alpha, True) for alpha in BALANCES}

    yield "| bits | variant | SQNR of the velocity, dB | SQNR of the latents, dB | PSNR, dB | SSIM |"
    yield "|---|---|---|---|---|---|"
    for bits in (8, 4):
        for rung, recipe in rungs.items():
            if recipe is None:
                layers = static_layers(trained, bits, calibration)
            else:
                layers = layers_by(trained, bits, calibration, recipe)
            before = exchange_all(trained.model, layers)
            numbers = compare_samples(reference, draw_samples(trained, labels, 1, 32))
            exchange_all(trained.model, before)
            yield f"| W{bits}A8 | {rung} | " + " | ".join(f"{value:.4g}" for value in numbers.values()) + " |"


def merging(trained: TrainedModel, images: int) -> Iterator[str]:
    """A row for each ratio: differences from the samples without merging, and seconds."""
    labels = [number % trained.config.data.num_classes for number in range(images)]
    reference = draw_samples(trained, labels, 1, 32)
    yield "| ratio | SQNR of the latents, dB | PSNR, dB | SSIM | s |"
    yield "|---|---|---|---|---|"
    for ratio in RATIOS:
        merged = trained.with_settings({"merge_ratio": ratio})
        began = time.perf_counter()
        drawn = draw_samples(merged, labels, 1, 32)
        seconds = time.perf_counter() - began
        numbers = list(compare_samples(reference, drawn).values())[1:]
        shown = " | ".join("equal" if value is None else f"{value:.4g}" for value in numbers)
        yield f"| {ratio} | {shown} | {seconds:.2f} |"


@torch.no_grad()
def merged_calls(preset: str, sides: tuple[int, ...], repeats: int) -> Iterator[str]:
    """Milliseconds of CPU time of one guided velocity call of a `dit` with random weights, by grid and ratio."""
    yield "| tokens | " + " | ".join(f"ratio {ratio}" for ratio in RATIOS) + " |"
    yield "|---|" + "---|" * len(RATIOS)
    for side in sides:
        tree = {
            "run": {"name": "merging"},
            "model": {"kind": "dit", "preset": preset, "patch_size": 1},
            "flow": {"num_stages": 1},
            "vae": {"kind": "dct", "downsample": 8},
            "data": {"latents": "none", "num_classes": 10, "latent_channels": 12, "latent_size": side},
            "batch": {"global_batch_size": 1, "micro_batch_size": 1},
            "train": {"total_samples": 1},
        }
        config = config_from_dict(tree)
        model = kind_of(config).build_model(config).eval()
        x, labels = torch.randn(2, 12, side, side), torch.tensor([1, 10])
        cells = []
        for ratio in RATIOS:
            merger = TokenMerger(model.flow.transformer, ratio)
            if ratio:
                merger.learn(x[:1], x[1:], 1)
            times = []
            with merger.active():
                for _ in range(1 + repeats):
                    began = time.process_time()
                    model.velocity(x, torch.full((2,), 0.5), 0, None, labels)
                    times.append(time.process_time() - began)
            cells.append(f"{1e3 * min(times[1:]):.0f} ms")
        yield f"| {side**2} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run directory, or an export that is not quantised")
    parser.add_argument("--images", type=int, default=64, help="samples to compare (default: 64)")
    parser.add_argument("--preset", default="S", help="size of the model with random weights (default: S)")
    parser.add_argument("--sides", default="8,16,32", help="sides of its token grids (default: 8,16,32)")
    parsed = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = open_trained(parsed.run, device)
    for table in (
        ladder(trained, parsed.images),
        merging(trained, parsed.images),
        merged_calls(parsed.preset, tuple(map(int, parsed.sides.split(","))), repeats=2),
    ):
        for row in table:
            print(row, flush=True)
        print()


if __name__ == "__main__":
    main()
