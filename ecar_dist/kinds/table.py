"""The values of `model.kind`. To add one, write a file like ecar.py, and add its entry here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ecar_dist.kinds.ecar import EcarKind
from ecar_dist.kinds.hybrid import HybridKind
from ecar_dist.kinds.kind import Kind
from ecar_dist.kinds.mar import MarKind
from ecar_dist.kinds.par import ParContinuousKind, ParKind
from ecar_dist.kinds.pyramid import PyramidKind

if TYPE_CHECKING:
    from ecar_dist.config.run import RunConfig

KINDS: dict[str, Kind] = {
    "ecar": EcarKind(),
    "dit": PyramidKind("a diffusion transformer trained by flow matching", one_stage=True),
    "pyramid": PyramidKind("a multistage flow without autoregression"),
    "mar": MarKind(),
    "par": ParKind(),
    "par_cont": ParContinuousKind(),
    "hybrid": HybridKind(),
}


def kind_of(config: RunConfig) -> Kind:
    """The entry of `config.model.kind`."""
    return KINDS[config.model.kind]
