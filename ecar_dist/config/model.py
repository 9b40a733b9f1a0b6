"""The sections that say what is trained and drawn: model, flow and sample.

Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticKnownError

from ecar_dist.flow.schedule import GAMMA_EXTREME, StageSchedule, uniform_ends
from ecar_dist.flow.solvers import SOLVERS
from ecar_dist.kinds.presets import PRESETS
from ecar_dist.kinds.table import KINDS

GAMMA_SAFE_MARGIN = 0.03  # exact states may be fed back only this far above the extreme (docs/ecar.md, "the trap")


class Section(BaseModel):
    """Base of all sections: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def one_of(names: Collection[str]) -> AfterValidator:
    """Restrict a text field to the keys of a table, as Literal does for names that are written out."""

    def check(value: str) -> str:
        if value in names:
            return value
        *most, last = map(repr, names)
        expected = f"{', '.join(most)} or {last}" if most else last
        raise PydanticKnownError("literal_error", {"expected": expected})

    return AfterValidator(check)


class ModelSection(Section):
    kind: Annotated[str, one_of(KINDS)] = Field("ecar", description="row of kinds/table.py: ECAR or a baseline")
    preset: Annotated[str, one_of(PRESETS)] = Field("T", description="row of kinds/presets.py")
    ar_depth: int | None = Field(None, ge=1, description="blocks of the AR transformer (mar: trunk); null: preset's")
    flow_depth: int | None = Field(None, ge=1, description="blocks of the velocity network (mar: head); null: preset's")
    patch_size: int = Field(2, ge=1, description="latent pixels per token side")
    label_dropout: float = Field(0.1, ge=0, lt=1, description="share of training samples that get the null label")


class ContextSection(Section):
    mode: Literal["noisy_state", "gamma_relaxed", "class_only"] = Field(
        "noisy_state", description="what the AR transformer sees of the coarser stages"
    )
    tau: float = Field(0.3, ge=0, allow_inf_nan=False, description="std of fresh noise added to the fed-back state")
    allow_unsafe: bool = Field(False, description="accept the degenerate setting (negative control only)")
    allow_small_tau: bool = Field(False, description="accept 0 < tau < 0.1, which needs many solver steps")


class FlowSection(Section):
    num_stages: int = Field(3, ge=1, le=6, description="K, resolutions from coarse to fine, each twice the last")
    ends: tuple[float, ...] | None = Field(None, description="data coefficient e_k at each stage's end; null: (k+1)/K")
    gamma: float = Field(GAMMA_EXTREME, description="correlation inside a block of jump noise, in [-1/3, 0)")
    context: ContextSection = ContextSection()
    stage_weights: tuple[float, ...] | None = Field(None, description="loss weight of each stage; null: 1/K each")
    token_draws: int = Field(4, ge=1, description="mar: times and noises drawn for each token and training step")

    @property
    def resolved_ends(self) -> tuple[float, ...]:
        return uniform_ends(self.num_stages) if self.ends is None else self.ends

    @property
    def schedule(self) -> StageSchedule:
        """Windows and jumps of the stages. Raises ConfigError where ends or gamma leave their range."""
        return StageSchedule(self.resolved_ends, self.gamma)

    @property
    def resolved_stage_weights(self) -> tuple[float, ...]:
        return (1.0 / self.num_stages,) * self.num_stages if self.stage_weights is None else self.stage_weights

    @model_validator(mode="after")
    def _check(self) -> FlowSection:
        K = self.num_stages
        if len(self.resolved_ends) != K:
            raise ValueError(f"flow.ends has {len(self.resolved_ends)} values, flow.num_stages={K}; give one per stage")
        _ = self.schedule  # checks ends and gamma
        weights = self.resolved_stage_weights
        if len(weights) != K or min(weights) < 0 or not 0 < sum(weights) < math.inf:  # a NaN compares false
            raise ValueError(f"flow.stage_weights must be {K} numbers >= 0, not all 0; null gives 1/K each")
        return self

    def check_context(self) -> None:
        """Raises ValueError where a model that is fed states would meet the trap (docs/ecar.md, section 5)."""
        gamma, context = self.gamma, self.context
        if self.num_stages == 1 or context.allow_unsafe:
            return
        relaxed = gamma > GAMMA_EXTREME + GAMMA_SAFE_MARGIN
        if context.mode == "noisy_state" and context.tau == 0:
            raise ValueError(
                "flow.context.mode=noisy_state with tau=0 feeds exact states back: samples lose their low-frequency "
                "variance; set flow.context.tau=0.3 (or flow.context.allow_unsafe=true for a negative control)"
            )
        if context.mode == "gamma_relaxed" and (context.tau != 0 or not relaxed):
            raise ValueError(
                f"flow.context.mode=gamma_relaxed needs tau=0 and gamma > {GAMMA_EXTREME + GAMMA_SAFE_MARGIN:.4f}, got "
                f"tau={context.tau} and gamma={gamma:.4f}; set flow.context.tau=0 and flow.gamma=-0.2"
            )


class SampleSection(Section):
    solver: Annotated[str, one_of(SOLVERS)] = Field("midpoint", description="row of flow/solvers.py")
    steps_per_stage: int = Field(8, ge=1, description="solver steps in each stage; midpoint and heun call twice a step")
    guidance_scale: float = Field(2.0, ge=0, description="1 is the conditional model, 0 the unconditional one")
    guidance_ramp: Literal["linear", "constant"] = Field("linear", description="linear: from 1 to the scale, by stage")
    ar_steps: int = Field(64, ge=1, description="mar: steps in which the tokens are drawn, at most one a token")
    every_samples: int = Field(0, ge=0, description="samples between strips in samples/ and TensorBoard; 0: none")
