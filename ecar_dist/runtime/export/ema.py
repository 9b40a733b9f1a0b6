"""The EMA weights of a run, read parameter by parameter. The run kept them, or they are rebuilt from those it kept."""

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
from ecar_dist.runtime.checkpoint.manifest import Manifest
from ecar_dist.runtime.checkpoint.reader import MASTER, FragmentReader
from ecar_dist.runtime.checkpoint.storage import newest_whole, open_ema_storage, open_storage
from ecar_dist.runtime.ema import ema_kinds, tracked_decays
from ecar_dist.runtime.run.directory import RunDirectory
from ecar_dist.storage.untrusted import printable

MAX_RESIDUAL = 0.03  # relative, of a rebuilt EMA's profile; at 0.1 the weights may be far off (see the tests)
FIRST = "ema"  # the kind that samples are drawn from
RAW = "raw"  # the name of the weights without an EMA
BLOCK = 1 << 22  # elements of a parameter that are summed at a time, in fp64


@dataclass(frozen=True)
class WantedEma:
    """Which EMA: by half-life in samples, by the relative width of EDM2's power function, or by its name.

    stored: a name in the checkpoint, such as `ema1`, or `raw` for the weights without an EMA. With none of the
    three: the first EMA.
    """

    half_life: int | None = None
    sigma_rel: float | None = None
    stored: str | None = None

    @staticmethod
    def parse(text: str) -> WantedEma:
        """`ema`, `ema1`, ..., `raw` (or `none`), `half-life=N` or `sigma-rel=X`. Raises ConfigError."""
        name, equals, value = text.partition("=")
        if not equals:
            return WantedEma(stored=RAW if text == "none" else text)
        try:
            if name == "half-life":
                return WantedEma(half_life=int(value.replace("_", "")))
            if name == "sigma-rel":
                return WantedEma(sigma_rel=float(value))
        except ValueError:
            pass
        raise ConfigError(
            f"--ema {printable(text, 60)} does not name any weights; give e.g. ema, ema1, raw, half-life=1000000 or "
            "sigma-rel=0.1"
        )

    def __post_init__(self) -> None:
        if self.half_life is not None and self.sigma_rel is not None:
            raise ConfigError("--half-life and --sigma-rel name two different EMAs; give only one of them")
        if self.half_life is not None and self.half_life < 1:
            raise ConfigError(f"--half-life {self.half_life} must be at least 1 sample")
        if self.sigma_rel is not None and not 0 < self.sigma_rel < 0.28:
            raise ConfigError(f"--sigma-rel {self.sigma_rel} must lie in (0, 0.28), as in ema.sigma_rel")

    def kind(self, section: EmaSection) -> str | None:
        """Its kind in checkpoints of this config, None if the config does not keep it."""
        kinds = list(tracked_decays(section))
        if self.sigma_rel is not None:
            widths = kinds[len(section.half_life_samples) :]
            return dict(zip(section.sigma_rel, widths, strict=True)).get(self.sigma_rel)
        if self.half_life is not None:
            half_lives = kinds[: len(section.half_life_samples)]
            return dict(zip(section.half_life_samples, half_lives, strict=True)).get(self.half_life)
        return kinds[0]

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
class EmaWeights(Mapping[str, torch.Tensor]):
    """Parameters by name, fp32 on CPU, each read on access.

    terms: (coefficient, reader, kind) of a sum; for an EMA that the run kept, one term with coefficient 1.
    facts: which EMA this is, as JSON.
    """

    checkpoint: Path
    terms: tuple[tuple[float, FragmentReader, str], ...]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.terms[0][1].shapes

    def __getitem__(self, name: str) -> torch.Tensor:
        if len(self.terms) == 1:
            _, reader, kind = self.terms[0]
            return reader.full(kind, name)

        # Sum block by block in fp64: coefficients may be large and of both signs.
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


def open_ema_weights(run: Path, wanted: WantedEma = WantedEma(), checkpoint: Path | None = None) -> EmaWeights:
    """An EMA of a run at `checkpoint`, by default the newest one that is not damaged.

    Raises CheckpointError if there is no checkpoint, or if an EMA that was not kept cannot be rebuilt.
    """
    directory = RunDirectory(run)
    config = directory.load_config()
    checkpoint = checkpoint or newest_whole(open_storage(config, run))
    manifest = read_manifest(checkpoint)
    if wanted.stored is not None:
        return _named(checkpoint, manifest, wanted.stored)
    kind = _stored_kinds(manifest, config).get(wanted.kind(config.ema) or "")
    facts = wanted.describe(config.ema)

    # The first EMA of the config may differ from the checkpoint's: the checkpoint decides.
    if kind is None and wanted == WantedEma():
        kind = FIRST
        facts = {"meaning": manifest.ema_kinds[FIRST]}
    if kind is not None:
        reader = FragmentReader(checkpoint, manifest=manifest)
        return EmaWeights(checkpoint, ((1.0, reader, kind),), {"kind": kind, **facts})
    return _rebuild(directory, config, wanted, checkpoint, manifest.progress.step)


def _named(checkpoint: Path, manifest: Manifest, name: str) -> EmaWeights:
    """The weights that a checkpoint stores under a name. Raises a CheckpointError that lists all names."""
    # An EMA snapshot has no raw weights.
    reader = FragmentReader(checkpoint, manifest=manifest)
    meanings = dict(manifest.ema_kinds)
    if MASTER in reader.kinds:
        meanings[RAW] = "without an EMA"
    if name not in meanings:
        has = ", ".join(f"{kind} ({meaning})" for kind, meaning in meanings.items())
        raise CheckpointError(f"{checkpoint} has no weights called {printable(name, 60)!r}; it has {has}")
    if name == RAW:
        return EmaWeights(checkpoint, ((1.0, reader, MASTER),), {"kind": RAW})
    return EmaWeights(checkpoint, ((1.0, reader, name),), {"kind": name, "meaning": meanings[name]})


def _rebuild(directory: RunDirectory, config: RunConfig, wanted: WantedEma, checkpoint: Path, step: int) -> EmaWeights:
    """The sum of kept EMAs that is closest to the wanted one at `step` (post-hoc EMA, see averaging)."""
    kept = _kept_emas(directory, config, step)
    found = fit(list(kept), tracked_decays(config.ema), wanted.decay(config.ema), step, config.batch.global_batch_size)
    _check_residual(found, wanted.describe(config.ema))

    # Several terms may be in one checkpoint.
    readers = {path: FragmentReader(path) for path, _ in {kept[snapshot] for snapshot in found.coefficients}}
    terms = []
    for snapshot, coefficient in found.coefficients.items():
        path, kind = kept[snapshot]
        terms.append((coefficient, readers[path], kind))
    facts = {"kind": "rebuilt", **wanted.describe(config.ema), "snapshots": len(terms)}
    return EmaWeights(checkpoint, tuple(terms), {**facts, "relative_residual": found.residual})


def _kept_emas(directory: RunDirectory, config: RunConfig, last_step: int) -> dict[Snapshot, tuple[Path, str]]:
    """(step, kind in the config) -> (checkpoint, kind there), for all EMAs on disk up to `last_step`.

    EMAs that were added or changed during the run are left out: a fit needs updates from step 0 on.
    """
    kept: dict[Snapshot, tuple[Path, str]] = {}
    for storage in (open_ema_storage(config, directory.path), open_storage(config, directory.path)):
        for name in storage.committed():
            try:
                path = storage.fetch(name)
            except DamagedError as damage:
                where = f"{storage.where}/{name}"
                print(f"warning: {where} is damaged ({damage.problem}); rebuilding without it", file=sys.stderr)
                continue

            # The profiles in a fit assume one batch size for the whole run.
            manifest = read_manifest(path)
            progress = manifest.progress
            if progress.samples_seen != progress.step * config.batch.global_batch_size:
                raise CheckpointError(
                    f"{path} has {progress.samples_seen} samples after {progress.step} steps, not steps x "
                    f"{config.batch.global_batch_size}: the batch size changed, so an EMA that was not kept cannot be "
                    f"rebuilt; export one of {sorted(tracked_decays(config.ema))}"
                )
            if progress.step <= last_step:
                for kind, stored in _stored_kinds(manifest, config).items():
                    if manifest.ema_since[stored] == 0:
                        kept[progress.step, kind] = (path, stored)
    if not kept:
        raise CheckpointError(
            f"{directory.path} has no EMA that started at step 0, which a fit needs; export one of "
            f"{sorted(tracked_decays(config.ema))}"
        )
    return kept


def _stored_kinds(manifest: Manifest, config: RunConfig) -> dict[str, str]:
    """For each EMA of the config that a checkpoint has, its kind there."""
    stored = {description: kind for kind, description in manifest.ema_kinds.items()}
    return {kind: stored[text] for kind, text in ema_kinds(config.ema).items() if text in stored}


def _check_residual(found: PosthocFit, facts: dict[str, Any]) -> None:
    if found.residual > MAX_RESIDUAL:
        name, value = next(iter(facts.items()))
        raise CheckpointError(
            f"an EMA with {name}={value} can be rebuilt from the {len(found.coefficients)} kept EMAs only to "
            f"within {found.residual:.1%}, the limit is {MAX_RESIDUAL:.0%}; keep more of them from now on "
            f"(ema.snapshot_every_samples), or choose one closer to those in ema.half_life_samples"
        )
