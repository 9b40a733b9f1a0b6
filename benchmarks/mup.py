"""Does the best learning rate stay the same as the width grows? ECAR on 8 x 8 digits, with and without `optim.mup`.

`python benchmarks/mup.py` trains 6 rates x 3 widths x 2 ways with one thread, in a few minutes; `--steps 4` is a
trial run. The last line is JSON.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rounds

from ecar_dist.config.read import config_from_dict
from ecar_dist.config.run import RunConfig
from ecar_dist.kinds.table import kind_of
from ecar_dist.models.layers import parameter_groups

WIDTHS = (32, 64, 128)
RATES = tuple(1e-3 * 2.0**power for power in range(1, 7))
BATCH = 64
LAST_SHARE = 0.2  # of the steps, over which the loss is averaged
WARM_UP_SHARE = 0.1


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="steps of each training run (default: 60)")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each row (default: 1)")
    parser.add_argument("--save", type=Path, help="also write the result to this JSON file")
    parser.add_argument("--hardware", help="what to call the machine (default: its cores and processor)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)

    # All training runs, narrow models first.
    images, labels = digits()
    todo = [(mup, width, rate) for width in WIDTHS for mup in (True, False) for rate in RATES]
    losses = {
        (mup, width, rate): statistics.mean(
            final_loss(run_config(mup, width, rate, seed), images, labels, options.steps)
            for seed in range(options.seeds)
        )
        for mup, width, rate in tqdm(todo, mininterval=5)
    }

    print(table(losses))
    best = {
        name: {str(width): min(RATES, key=lambda rate: losses[mup, width, rate]) for width in WIDTHS}
        for name, mup in (("mup", True), ("standard", False))
    }
    rows = [{"mup": mup, "width": width, "rate": rate, "loss": loss} for (mup, width, rate), loss in losses.items()]
    hardware = options.hardware or rounds.hardware()
    result = {"best rate": best, "rows": rows, "steps": options.steps, "seeds": options.seeds, "hardware": hardware}
    rounds.publish(result, options.save)


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """All digits as latents of unit variance [1797, 1, 8, 8], and their labels [1797]."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None]
    return (images - images.mean()) / images.std(), torch.from_numpy(found.target)


def run_config(mup: bool, width: int, rate: float, seed: int) -> RunConfig:
    return config_from_dict(
        {
            "run": {"name": "mup", "seed": seed},
            "model": {"kind": "ecar", "preset": "T", "width": width, "ar_depth": 2, "flow_depth": 2},
            "vae": {"kind": "dct"},
            "data": {"latents": "none", "num_classes": 10, "latent_size": 8, "latent_channels": 1},
            "optim": {"mup": mup, "mup_base_width": WIDTHS[0], "learning_rate": rate},
            "train": {"total_samples": BATCH},
            "batch": {"global_batch_size": BATCH, "micro_batch_size": BATCH},
        }
    )


def final_loss(config: RunConfig, images: torch.Tensor, labels: torch.Tensor, steps: int) -> float:
    """The mean loss of the last steps; the batches and all noise are the same for every width and rate.

    inf if a loss is not finite.
    """
    kind = kind_of(config)
    torch.manual_seed(config.run.seed)
    model = kind.build_model(config)
    objective = kind.objective(model, lambda values, noise: values, config, "fp32")
    groups = parameter_groups(model, config.optim.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=config.optim.betas, eps=config.optim.eps)

    found = []
    order = torch.Generator().manual_seed(config.run.seed)
    for step in range(steps):
        # The rate of this step, linear in the warm-up.
        warmed = min(1.0, (step + 1) / max(1, round(WARM_UP_SHARE * steps)))
        for group in optimizer.param_groups:
            group["lr"] = config.optim.learning_rate * warmed * group["rate"]

        chosen = torch.randint(len(images), (BATCH,), generator=order)
        loss, _, _ = objective(images[chosen], labels[chosen], torch.arange(step * BATCH, (step + 1) * BATCH))
        if not math.isfinite(loss.item()):
            return math.inf
        found.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_grad_norm)
        optimizer.step()
    return statistics.mean(found[-max(1, round(LAST_SHARE * steps)) :])


def table(losses: dict[tuple[bool, int, float], float]) -> str:
    """A row for each way and width, in markdown; the best rate of a row is in bold."""
    lines = ["| | width | " + " | ".join(f"{rate:g}" for rate in RATES) + " |", "|---" * (2 + len(RATES)) + "|"]
    for mup in (True, False):
        for width in WIDTHS:
            row = [losses[mup, width, rate] for rate in RATES]
            cells = [f"**{loss:.4f}**" if loss == min(row) else f"{loss:.4f}" for loss in row]
            lines.append(f"| {'muP' if mup else 'standard'} | {width} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
