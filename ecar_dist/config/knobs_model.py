"""Knobs that define what is trained and how it is sampled: model, flow, vae and sample."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ecar_dist.config.knob import OneOf, OnResume, Section, knob
from ecar_dist.flow.discrete.region_order import GROUPS
from ecar_dist.flow.schedule import GAMMA_EXTREME, StageSchedule, uniform_ends
from ecar_dist.flow.solvers import SOLVERS
from ecar_dist.kinds.presets import PRESETS
from ecar_dist.kinds.table import KINDS
from ecar_dist.vae.table import CODECS

# Exact states may be fed back only with a larger gamma: then the jump noise itself spreads the start of a stage
# (docs/ecar.md, "the trap").
RELAXED_GAMMA = GAMMA_EXTREME + 0.03


class ModelSection(Section):
    """The network that is trained."""

    kind: Annotated[str, OneOf(KINDS)] = knob(
        "ecar", "architecture: ECAR or a baseline, a row of kinds/table.py", on_resume=OnResume.MODEL
    )
    preset: Annotated[str, OneOf(PRESETS)] = knob(
        "T", "width, heads and depths of the network, a row of kinds/presets.py", on_resume=OnResume.MODEL
    )
    width: int | None = knob(
        None,
        "width of all networks; null: the preset's. Each head keeps the preset's width, so the number of heads changes",
        unit="channels",
        on_resume=OnResume.MODEL,
        added_later=True,
        ge=1,
    )
    ar_depth: int | None = knob(
        None,
        "depth of the AR transformer (mar: of its trunk); null: the preset's",
        unit="blocks",
        on_resume=OnResume.MODEL,
        ge=1,
    )
    flow_depth: int | None = knob(
        None,
        "depth of the velocity network (mar: of its head); null: the preset's",
        unit="blocks",
        on_resume=OnResume.MODEL,
        ge=1,
    )
    patch_size: int = knob(2, "side length of a token", unit="latent pixels", on_resume=OnResume.MODEL, ge=1)
    codebook_size: int = knob(
        1024,
        "par and hybrid only: number of codes in the codebook stored with the latents (`ecar-data fit-codebook`)",
        unit="codes",
        on_resume=OnResume.MODEL,
        added_later=True,
        ge=2,
        le=1 << 16,
    )
    label_dropout: float = knob(
        0.1,
        "share of training samples that get the null label, for classifier-free guidance",
        unit="fraction",
        on_resume=OnResume.OPTIMISATION,
        ge=0,
        lt=1,
    )


class ParSection(Section):
    """Parallelised autoregression (par and par_cont only)."""

    group: int = knob(
        1,
        "n: number of regions of the token grid, and of tokens drawn at once after the first n; 1: plain "
        "autoregression",
        unit="tokens",
        allowed="1, 4 or 16; its square root divides the side of the token grid",
        on_resume=OnResume.MODEL,
        added_later=True,
    )

    @field_validator("group")
    @classmethod
    def _known(cls, value: int) -> int:
        if value not in GROUPS:
            raise ValueError(f"par.group={value} must be one of {', '.join(map(str, GROUPS))}; set par.group=4")
        return value


class ContextSection(Section):
    """What the AR transformer sees of the coarser stages (ecar only)."""

    mode: Literal["noisy_state", "gamma_relaxed", "class_only"] = knob(
        "noisy_state",
        "noisy_state: the state plus fresh noise; gamma_relaxed: the exact state, with a larger flow.gamma; "
        "class_only: only the class label",
        on_resume=OnResume.MODEL,
    )
    tau: float = knob(
        0.3,
        "noise added to the state before it is fed back",
        unit="standard deviation",
        on_resume=OnResume.MODEL,
        ge=0,
    )
    allow_unsafe: bool = knob(
        False,
        "accept tau=0 with noisy_state, which loses low-frequency variance (for a negative control)",
        on_resume=OnResume.SAFE,
    )
    allow_small_tau: bool = knob(False, "accept 0 < tau < 0.1, which needs many solver steps", on_resume=OnResume.SAFE)


class FlowSection(Section):
    """The stages of increasing resolution, and the flow-matching loss."""

    num_stages: int = knob(
        3,
        "K, the number of resolutions from coarse to fine; each is twice the previous one",
        unit="stages",
        on_resume=OnResume.MODEL,
        ge=1,
        le=6,
    )
    ends: tuple[float, ...] | None = knob(
        None,
        "data coefficient e_k at the end of each stage; null: (k+1)/K",
        unit="data coefficient",
        allowed="K strictly increasing numbers in (0, 1], the last one 1",
        on_resume=OnResume.MODEL,
    )
    gamma: float = knob(
        GAMMA_EXTREME,
        "correlation between the pixels of one 2x2 block of jump noise; -1/3 gives the least renoising",
        unit="correlation",
        allowed="[-1/3, 0)",
        on_resume=OnResume.MODEL,
    )
    context: ContextSection = ContextSection()
    stage_weights: tuple[float, ...] | None = knob(
        None,
        "loss weight of each stage; null: 1/K each",
        unit="weight",
        allowed="K numbers >= 0, not all 0",
        on_resume=OnResume.OPTIMISATION,
    )
    objective: Literal["velocity", "mean_velocity"] = knob(
        "velocity",
        "what the network learns. velocity: dx/du at one time; mean_velocity: its mean over an interval of a stage, "
        "which sample.solver=mean crosses in one call (ecar, pyramid and dit)",
        on_resume=OnResume.MODEL,
        added_later=True,
    )
    instant_share: float = knob(
        0.5,
        "mean_velocity only: share of the samples whose interval has length 0, which learn the velocity",
        unit="fraction",
        on_resume=OnResume.OPTIMISATION,
        gt=0,
        le=1,
    )
    whole_share: float = knob(
        0.0,
        "mean_velocity only: share of the other intervals that cover the full stage, as sampling with one call per "
        "stage needs",
        unit="fraction",
        on_resume=OnResume.OPTIMISATION,
        added_later=True,
        ge=0,
        le=0.75,
    )
    times: Literal["uniform", "logit_normal"] = knob(
        "uniform",
        "distribution of the training times within a stage (ecar, pyramid and dit). logit_normal: as in Stable "
        "Diffusion 3, with fewer times near both ends",
        on_resume=OnResume.OPTIMISATION,
        added_later=True,
    )
    token_draws: int = knob(
        4,
        "mar only: number of times and noises drawn per token in a training step",
        unit="draws",
        on_resume=OnResume.OPTIMISATION,
        ge=1,
    )

    @property
    def resolved_ends(self) -> tuple[float, ...]:
        return uniform_ends(self.num_stages) if self.ends is None else self.ends

    @property
    def resolved_stage_weights(self) -> tuple[float, ...]:
        return (1.0 / self.num_stages,) * self.num_stages if self.stage_weights is None else self.stage_weights

    @property
    def schedule(self) -> StageSchedule:
        """Windows and jumps of the stages. Raises ConfigError if ends or gamma are out of range."""
        return StageSchedule(self.resolved_ends, self.gamma)

    @property
    def learns_mean_velocity(self) -> bool:
        return self.objective == "mean_velocity"

    @property
    def gamma_is_relaxed(self) -> bool:
        return self.gamma > RELAXED_GAMMA

    @model_validator(mode="after")
    def _check(self) -> FlowSection:
        K = self.num_stages
        if len(self.resolved_ends) != K:
            raise ValueError(f"flow.ends has {len(self.resolved_ends)} values, flow.num_stages={K}; give one per stage")
        _ = self.schedule  # checks ends and gamma

        weights = self.resolved_stage_weights
        if len(weights) != K or min(weights) < 0 or not 0 < sum(weights) < math.inf:
            raise ValueError(
                f"flow.stage_weights={list(weights)} must be {K} finite numbers >= 0, not all 0; null gives 1/K each"
            )
        return self

    def check_context(self) -> None:
        """Raises ValueError if a model that is fed states would run into the trap (docs/ecar.md, section 5)."""
        if self.num_stages == 1 or self.context.allow_unsafe:
            return
        mode, tau = self.context.mode, self.context.tau
        if mode == "noisy_state" and tau == 0:
            raise ValueError(
                "flow.context.mode=noisy_state with flow.context.tau=0 feeds exact states back, and samples lose "
                "low-frequency variance; set flow.context.tau=0.3 (flow.context.allow_unsafe=true for a control run)"
            )
        if mode == "gamma_relaxed" and (tau != 0 or not self.gamma_is_relaxed):
            raise ValueError(
                f"flow.context.mode=gamma_relaxed needs flow.context.tau=0 and flow.gamma > {RELAXED_GAMMA:.4f}, got "
                f"tau={tau} and gamma={self.gamma:.4f}; set flow.context.tau=0 and flow.gamma=-0.2"
            )


class VaeSection(Section):
    """The autoencoder between images and latents."""

    kind: Annotated[str, OneOf(CODECS)] = knob(
        "kl",
        "kl: AutoencoderKL from diffusers; dc: AutoencoderDC from diffusers; dct: block DCT, without weights; "
        "identity: the pixels themselves",
        on_resume=OnResume.LATENTS,
    )
    path: str | None = knob(
        None,
        "local folder or Hugging Face name of the autoencoder; required for kl and dc. A copy at another path is fine: "
        "its weights are compared by hash",
        per_node=True,
        on_resume=OnResume.SAFE,
    )
    downsample: int = knob(
        8, "image pixels per latent pixel along one side", unit="pixels", on_resume=OnResume.LATENTS, ge=1
    )

    @model_validator(mode="after")
    def _check(self) -> VaeSection:
        if CODECS[self.kind].needs_path and not self.path:
            raise ValueError(f"vae.kind={self.kind} needs vae.path, a local folder or a hub name; or set vae.kind=dct")
        return self


class SampleSection(Section):
    """How images are sampled, for previews during training and by `ecar-dist sample`."""

    solver: Annotated[str, OneOf(SOLVERS)] = knob(
        "midpoint", "ODE solver, a row of flow/solvers.py", on_resume=OnResume.SAFE
    )
    steps_per_stage: tuple[Annotated[int, Field(ge=1)], ...] = knob(
        (8,),
        "solver steps per stage: one number for all stages, or a list with one per stage; euler calls the network once "
        "per step, midpoint and heun twice",
        unit="steps",
        allowed="one number >= 1, or K of them",
        on_resume=OnResume.SAFE,
    )
    time_shift: float = knob(
        1.0,
        "s > 1: the solver takes shorter steps near the noisy start of a stage; s < 1: near its end; 1: equal steps",
        unit="factor",
        on_resume=OnResume.SAFE,
        gt=0,
    )
    guidance_scale: float = knob(
        2.0,
        "weight of classifier-free guidance; 1 is the conditional model, 0 the unconditional one",
        unit="factor",
        on_resume=OnResume.SAFE,
        ge=0,
    )
    guidance_ramp: Literal["linear", "constant"] = knob(
        "linear",
        "linear: guidance rises by stage from 1 to guidance_scale; constant: the same in all stages",
        on_resume=OnResume.SAFE,
    )
    guidance_interval: tuple[float, float] = knob(
        (0.0, 1.0),
        "model times between which samples are guided, from 0 (noise) to 1 (data) over all stages; outside of them "
        "only the conditional model is evaluated, at half the cost",
        unit="model time",
        allowed="two numbers, 0 <= low < high <= 1",
        on_resume=OnResume.SAFE,
    )
    merge_ratio: float = knob(
        0.0,
        "share of the tokens of the last stage that the velocity network merges into similar ones; those that guidance "
        "changes most are never merged away; 0: none",
        unit="share",
        on_resume=OnResume.SAFE,
        ge=0,
        le=0.75,
    )
    ar_steps: int = knob(
        64,
        "mar only: number of steps in which the tokens are drawn, at most one per token",
        unit="steps",
        on_resume=OnResume.SAFE,
        ge=1,
    )
    temperature: float = knob(
        1.0,
        "par and hybrid only: divides the logits (hybrid: with its own schedule); 0: always the most probable code",
        unit="factor",
        on_resume=OnResume.SAFE,
        ge=0,
    )
    top_k: int = knob(
        0,
        "par only: codes are drawn from the k most probable ones; 0: from all codes",
        unit="codes",
        on_resume=OnResume.SAFE,
        ge=0,
    )
    code_steps: int = knob(
        12,
        "hybrid only: number of steps in which the codes are drawn, at most one per token",
        unit="steps",
        on_resume=OnResume.SAFE,
        ge=1,
    )
    residuals: bool = knob(
        True, "hybrid only: also draw what the codes leave out; false: codes only", on_resume=OnResume.SAFE
    )
    jacobi_window: int = knob(
        1,
        "par with par.group=1 only: number of tokens guessed and checked in one pass; draws the same images in fewer "
        "passes; 1: one token per pass",
        unit="tokens",
        on_resume=OnResume.SAFE,
        ge=1,
    )
    every_samples: int = knob(
        0,
        "interval between previews in samples/ and TensorBoard; all ranks wait for them; 0: none (`ecar-dist preview` "
        "draws them from checkpoints instead)",
        unit="training samples",
        on_resume=OnResume.SAFE,
        ge=0,
    )

    @field_validator("steps_per_stage", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int | float) else value

    @field_validator("guidance_interval")
    @classmethod
    def _rising(cls, value: tuple[float, float]) -> tuple[float, float]:
        low, high = value
        if not 0.0 <= low < high <= 1.0:
            raise ValueError(
                f"sample.guidance_interval={list(value)} must be two numbers with 0 <= low < high <= 1; [0, 1] guides "
                "at all times"
            )
        return value
