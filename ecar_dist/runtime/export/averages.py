"""One average of a run's weights, read parameter by parameter: one the run kept, or one made of those it kept."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ecar_dist.averaging import Decay, PosthocFit, Snapshot, fit, half_life_decay, power_decay, sigma_rel_to_gamma
from ecar_dist.config.knobs_training import EmaSection
from ecar_dist.config.run import RunConfig
from ecar_dist.errors import CheckpointError, ConfigError
from ecar_dist.runtime.checkpoint.files import DamagedError, read_manifest
from ecar_dist.runtime.checkpoint.folder import CheckpointPlace, newest_whole, open_ema_place, open_place
from ecar_dist.runtime.checkpoint.load import meanings
from ecar_dist.runtime.checkpoint.manifest import Manifest
from ecar_dist.runtime.checkpoint.reader import FragmentReader
from ecar_dist.runtime.ema import tracked_decays
from ecar_dist.runtime.run.directory import RunDirectory

MAX_RESIDUAL = 0.03  # of a rebuilt average's profile, relative; at .1 the weights may be far off (test)
FIRST = "ema"  # name of the average that is drawn from
BLOCK = 1 << 22  # elements of a parameter that are summed at once, in fp64


@dataclass(frozen=True)
class Wanted:
    """Which average: by half-life in samples, or by the relative width of EDM2's power function; neither: the first."""

    half_life: int | None = None
    sigma_rel: float | None = None

    def __post_init__(self) -> None:
        if self.half_life is not None and self.sigma_rel is not None:
            raise ConfigError("--half-life and --sigma-rel name two averages; give one of them")
        if self.half_life is not None and self.half_life < 1:
            raise ConfigError(f"--half-life {self.half_life} must be at least 1 sample")
        if self.sigma_rel is not None and not 0 < self.sigma_rel < 0.28:
            raise ConfigError(f"--sigma-rel {self.sigma_rel} must lie in (0, 0.28), as in ema.sigma_rel")

    def tracked_as(self, section: EmaSection) -> str | None:
        """Its name in the run's checkpoints, or None where the run does not keep it."""
        names = list(tracked_decays(section))
        half_lives, widths = names[: len(section.half_life_samples)], names[len(section.half_life_samples) :]
        if self.sigma_rel is not None:
            return dict(zip(section.sigma_rel, widths, strict=True)).get(self.sigma_rel)
        if self.half_life is not None:
            return dict(zip(section.half_life_samples, half_lives, strict=True)).get(self.half_life)
        return names[0]

    def decay(self, section: EmaSection) -> Decay:
        if self.sigma_rel is not None:
            return functools.partial(power_decay, sigma_rel_to_gamma(self.sigma_rel))
        return functools.partial(half_life_decay, self.half_life or section.half_life_samples[0], section.rampup)

    def describe(self, section: EmaSection) -> dict[str, Any]:
        """As JSON, for people and for loaders."""
        if self.sigma_rel is not None:
            return {"sigma_rel": self.sigma_rel}
        return {"half_life_samples": self.half_life or section.half_life_samples[0], "rampup": section.rampup}


@dataclass(frozen=True)
class Average(Mapping[str, torch.Tensor]):
    """Parameters by name, fp32 on CPU, each read when it is asked for; `facts` say which average this is.

    terms: (coefficient, reader, name of the average there) of a sum; one term of coefficient 1 where the run kept it.
    """

    checkpoint: Path
    terms: tuple[tuple[float, FragmentReader, str], ...]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.terms[0][1].shapes

    def __getitem__(self, name: str) -> torch.Tensor:
        if len(self.terms) == 1:
            return self.terms[0][1].full(self.terms[0][2], name)
        shape = torch.Size(self.shapes[name])
        value = torch.empty(shape.numel())
        for start in range(0, shape.numel(), BLOCK):
            block = value[start : start + BLOCK]
            exact = torch.zeros(block.numel(), dtype=torch.float64)
            for coefficient, reader, kind in self.terms:
                exact.add_(reader.read(kind, name, start, block.numel()), alpha=coefficient)
            block.copy_(exact)
        return value.view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def open_average(run: Path, wanted: Wanted = Wanted(), checkpoint: Path | None = None) -> Average:
    """An average of a run as of `checkpoint`, by default its newest whole one.

    Raises CheckpointError where there is none, or where an average that was not kept cannot be rebuilt.
    """
    directory = RunDirectory(run)
    config = directory.load_config()
    checkpoint = checkpoint or newest_whole(open_place(config, run))
    manifest = read_manifest(checkpoint)
    kind = _names_there(manifest, config).get(wanted.tracked_as(config.ema) or "")
    facts = wanted.describe(config.ema)
    if kind is None and wanted == Wanted():  # the config has another first average since
        kind, facts = FIRST, {"meaning": manifest.averages[FIRST]}
    if kind is not None:
        reader = FragmentReader(checkpoint, manifest=manifest)
        return Average(checkpoint, ((1.0, reader, kind),), {"kind": kind, **facts})
    return _rebuilt(directory, config, wanted, checkpoint, manifest.progress.step)


def _rebuilt(directory: RunDirectory, config: RunConfig, wanted: Wanted, checkpoint: Path, step: int) -> Average:
    """The sum of kept averages that comes nearest to the one wanted (post-hoc EMA, see averaging)."""
    kept = _kept_averages(directory, config, step)
    found = fit(list(kept), tracked_decays(config.ema), wanted.decay(config.ema), step, config.batch.global_batch_size)
    _check_residual(found, wanted.describe(config.ema))
    readers = {path: FragmentReader(path) for path, _ in {kept[snapshot] for snapshot in found.coefficients}}
    terms = tuple(
        (coefficient, readers[kept[snapshot][0]], kept[snapshot][1])
        for snapshot, coefficient in found.coefficients.items()
    )
    facts = {"kind": "rebuilt", **wanted.describe(config.ema), "snapshots": len(terms)}
    return Average(checkpoint, terms, {**facts, "relative_residual": found.residual})


def _kept_averages(directory: RunDirectory, config: RunConfig, last_step: int) -> dict[Snapshot, tuple[Path, str]]:
    """Where each average lies, and its name there, as of each step that is on disk, whole, up to `last_step`.

    Those that were added, or changed, while the run went on are left out: their weights of the steps are others.
    """
    kept: dict[Snapshot, tuple[Path, str]] = {}
    for place, name in _committed(directory, config):
        try:
            path = place.fetch(name)
        except DamagedError as damage:
            print(
                f"warning: {place.where}/{name} is damaged ({damage.problem}); rebuilding without it", file=sys.stderr
            )
            continue
        manifest = read_manifest(path)
        progress, since = manifest.progress, manifest.averages_since
        if progress.samples_seen != progress.step * config.batch.global_batch_size:
            raise CheckpointError(
                f"{path} has {progress.samples_seen} samples after {progress.step} steps, not steps x "
                f"{config.batch.global_batch_size}: the batch size changed, and an average that was not kept cannot be "
                f"rebuilt; export one of {sorted(tracked_decays(config.ema))}"
            )
        if progress.step <= last_step:
            there = {kind: name for kind, name in _names_there(manifest, config).items() if since[name] == 0}
            kept.update({(progress.step, kind): (path, name) for kind, name in there.items()})
    if not kept:
        raise CheckpointError(
            f"no average in {directory.path} goes back to the first step, as a fit needs it; export one of "
            f"{sorted(tracked_decays(config.ema))}"
        )
    return kept


def _names_there(manifest: Manifest, config: RunConfig) -> dict[str, str]:
    """For each average of the config its name in a checkpoint, where it is there."""
    names = {meaning: name for name, meaning in manifest.averages.items()}
    return {kind: names[meaning] for kind, meaning in meanings(config.ema).items() if meaning in names}


def _committed(directory: RunDirectory, config: RunConfig) -> list[tuple[CheckpointPlace, str]]:
    places = open_ema_place(config, directory.path), open_place(config, directory.path)
    return [(place, name) for place in places for name in place.committed()]


def _check_residual(found: PosthocFit, facts: dict[str, Any]) -> None:
    if found.residual > MAX_RESIDUAL:
        name, value = next(iter(facts.items()))
        raise CheckpointError(
            f"an average with {name}={value} comes out of the {len(found.coefficients)} that were kept only to within "
            f"{found.residual:.1%}, {MAX_RESIDUAL:.0%} is the bound; keep more of them from now on "
            f"(ema.snapshot_every_samples), or ask for one nearer to those in ema.half_life_samples"
        )
