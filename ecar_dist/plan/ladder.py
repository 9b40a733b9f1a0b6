"""`ecar-dist plan --ladder`: short runs of narrow models that find the learning rate of a wide one by muP.

Under muP (Yang et al., arXiv 2203.03466) the best learning rate does not depend on the width, so it is searched for at
widths where a run is cheap. Depth, batch and data are those of the wide model.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from ecar_dist.command_line import columns, counted
from ecar_dist.config.read import with_overrides
from ecar_dist.config.run import RunConfig
from ecar_dist.errors import ConfigError
from ecar_dist.kinds.flops import FLOPS_PER_MAC
from ecar_dist.kinds.presets import preset_of
from ecar_dist.kinds.table import kind_of

RATES = (0.25, 0.5, 1.0, 2.0, 4.0)  # times the config's own
RUNGS = 3  # at most; all are narrower than the config's model
SHARE = 0.1  # of the samples of the wide run


def ladder_lines(config: RunConfig, path: str, overrides: Sequence[str]) -> list[str]:
    """The runs, their costs, and how to start them. Raises ConfigError without muP, or without a narrower model.

    `path` and `overrides`: the config as given on the command line, which the commands repeat.
    """
    # From the base width on, each twice as wide as the one before.
    optim, width = config.optim, preset_of(config).flow_width
    if not optim.mup:
        raise ConfigError(
            "optim.mup=false: learning rates of narrow models say little about wide ones; set optim.mup=true"
        )
    widths = [optim.mup_base_width << rung for rung in range(RUNGS) if optim.mup_base_width << rung < width]
    if not widths:
        raise ConfigError(
            f"optim.mup_base_width={optim.mup_base_width} leaves no model narrower than {width}; set a smaller one"
        )

    # The cost of each, in training FLOPs.
    batch = config.batch.global_batch_size
    samples = max(1, round(config.train.total_samples * SHARE / batch)) * batch
    runs = [with_overrides(config, _changes(config, each, samples)) for each in widths]
    costs = [kind_of(run).training_macs(run) * samples * FLOPS_PER_MAC for run in runs]
    whole = kind_of(config).training_macs(config) * config.train.total_samples * FLOPS_PER_MAC

    # A row for each width, the total, and the loop that starts all runs.
    parameters = [kind_of(run).parameters(run).total for run in runs]
    rows = [("width", "parameters", "FLOP a run", "of the wide run")]
    rows += [
        (f"{each}", f"{count / 1e6:.1f}M", f"{cost:.2g}", f"{cost / whole:.2%}")
        for each, count, cost in zip(widths, parameters, costs, strict=True)
    ]
    rates = [f"{optim.learning_rate * factor:.3g}" for factor in RATES]
    total = sum(costs) * len(rates)
    given = shlex.join([path, *overrides])
    lengths = " ".join(f"{key}={value}" for key, value in _schedule(config).items())
    return [
        f"{counted(len(widths) * len(rates), 'run')} of {samples:,} samples, for a model of width {width}:",
        *columns(rows),
        f"learning rates: {', '.join(rates)}",
        f"total {total:.3g} FLOP, {total / whole:.1%} of the wide run; the best rate should be the same at each width",
        f"for width in {' '.join(map(str, widths))}; do for rate in {' '.join(rates)}; do",
        f"  ecar-dist train {given} model.width=$width optim.learning_rate=$rate train.total_samples={samples} \\",
        f"    {lengths} run.name={config.run.name}-w$width-lr$rate",
        "done; done",
    ]


def _changes(config: RunConfig, width: int, samples: int) -> dict[str, Any]:
    return {"model.width": width, "train.total_samples": samples, **_schedule(config)}


def _schedule(config: RunConfig) -> dict[str, int]:
    """Warm-up and cooldown in proportion; at least one sample if the config has one."""
    lengths = {key: getattr(config.optim, key) for key in ("warmup_samples", "cooldown_samples")}
    return {f"optim.{key}": min(length, max(1, round(length * SHARE))) for key, length in lengths.items()}
