"""`train.init_from`: the weights that a new run starts from. A run directory, an export, or a file of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ecar_dist.config.read import load_config
from ecar_dist.config.run import RunConfig
from ecar_dist.errors import CheckpointError, reason_of
from ecar_dist.runtime.checkpoint.files import MANIFEST, DamagedError, open_tensors, read_manifest
from ecar_dist.runtime.checkpoint.manifest import flat_identity
from ecar_dist.runtime.export.ema import open_ema_weights
from ecar_dist.runtime.export.files import CONFIG, FACTS, MAX_HEADER_BYTES, ExportReader, is_export
from ecar_dist.runtime.export.names import CLASS_NAMES, class_names
from ecar_dist.runtime.run.directory import RunDirectory
from ecar_dist.storage.hashing import hash_file
from ecar_dist.storage.untrusted import UntrustedError, printable

FILE_SUFFIX = ".safetensors"
_FIX = "set train.init_from to a run directory, an export, or a .safetensors file"


@dataclass(frozen=True)
class InitialWeights:
    """Weights of another run.

    weights: parameters by name, on CPU, each read on access.
    config: of the run that they come from; None for a file, which has none.
    class_names: of that run's data; None if they are not known.
    step, digest: of the checkpoint or export; the digest is the xxh3_128 of the file that contains all other hashes.
    """

    path: Path
    weights: Mapping[str, torch.Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    what: str
    digest: str
    step: int | None = None
    config: RunConfig | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    class_names: list[str] | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What lineage.json records about the origin of a run's weights."""
        return {"path": str(self.path.absolute()), "what": self.what, "step": self.step, "xxh3_128": self.digest}


def open_initial_weights(path: Path) -> InitialWeights:
    """Raises CheckpointError, ConfigError or DataError if there are no complete weights at `path`."""
    if path.suffix == FILE_SUFFIX:
        return _of_file(path)
    if is_export(path) and (path / CONFIG).exists():
        return _of_export(path)
    if not RunDirectory(path).config.exists():
        what = "a folder without config.yaml" if path.is_dir() else "missing"
        raise CheckpointError(f"train.init_from={path} is {what}; {_FIX}")
    return _of_run(path)


def _of_run(path: Path) -> InitialWeights:
    """The first EMA of the newest checkpoint that is not damaged."""
    config = RunDirectory(path).load_config()
    weights = open_ema_weights(path)
    manifest = read_manifest(weights.checkpoint)
    return InitialWeights(
        path=path,
        weights=weights,
        shapes=weights.shapes,
        what=f"EMA of {weights.checkpoint.name}",
        digest=hash_file(weights.checkpoint / MANIFEST),
        step=manifest.progress.step,
        config=config,
        identity=flat_identity(manifest.identity),
        class_names=class_names(config, manifest.client_state.get(CLASS_NAMES)),
    )


def _of_export(path: Path) -> InitialWeights:
    """The weights of an export, whichever EMA they are."""
    config = load_config(path / CONFIG)
    weights = ExportReader(path)
    facts = weights.facts
    if facts.quantization is not None:
        raise CheckpointError(
            f"train.init_from={path} is a quantised export, whose weights are rounded; give the run or the export that "
            "it was made from"
        )
    return InitialWeights(
        path=path,
        weights=weights,
        shapes=weights.shapes,
        what=f"export of step {facts.progress.step}",
        digest=hash_file(path / FACTS),
        step=facts.progress.step,
        config=config,
        identity=flat_identity(facts.identity),
        class_names=class_names(config, facts.class_names),
    )


def _of_file(path: Path) -> InitialWeights:
    """A file of tensors, without information about their model."""
    try:
        handle = open_tensors(path, "pt", MAX_HEADER_BYTES)
        digest = hash_file(path)
    except DamagedError as damage:
        raise CheckpointError(f"train.init_from={path}: {damage.problem}; {_FIX}") from None
    except (OSError, UntrustedError) as error:
        raise CheckpointError(f"train.init_from={path}: {reason_of(error)}; {_FIX}") from None
    shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    return InitialWeights(path, _FileWeights(path, handle), shapes, what="file", digest=digest)


class _FileWeights(Mapping[str, torch.Tensor]):
    """The tensors of a file without a description. Raises CheckpointError for values that are not finite numbers."""

    def __init__(self, path: Path, handle: Any) -> None:
        self._path = path
        self._handle = handle
        self._names = list(handle.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        value: torch.Tensor = self._handle.get_tensor(name)
        if not value.is_floating_point() or not value.isfinite().all():
            raise CheckpointError(f"{self._path}: {printable(name)} has values that are not finite numbers; {_FIX}")
        return value

    def __iter__(self) -> Any:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
