"""Knobs of the training run: its name, batch, optimizer, EMA, DeepSpeed, failure limits, checkpoints and log."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ecar_dist.config.knob import REQUIRED, OneOf, OnResume, Section, knob
from ecar_dist.learning_rate import SCHEDULES
from ecar_dist.storage.redaction import redact


class RunSection(Section):
    """Name, directory and seed of the run."""

    name: str = knob(
        REQUIRED,
        "name of the run and of its directory; a new name starts a new run",
        allowed="letters, digits, `.`, `_` and `-`; a letter or digit first; at most 200",
        on_resume=OnResume.SAFE,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=200,
    )
    dir: str = knob("runs", "local folder of run directories; the run is in `<dir>/<name>`", on_resume=OnResume.SAFE)
    seed: int = knob(
        0,
        "seed of the weights, the sample order and all other random numbers",
        allowed="0 to 2^63 - 1",
        on_resume=OnResume.DATA_ORDER,
        ge=0,
        lt=2**63,
    )

    @field_validator("dir")
    @classmethod
    def _local(cls, value: str) -> str:
        if "://" in value:
            raise ValueError(f"run.dir={redact(value)} is a URL; give a local folder (checkpoint.dir may be a URL)")
        return value


class BatchSection(Section):
    """global_batch_size = micro_batch_size x gradient accumulation steps x ranks; the steps are derived."""

    global_batch_size: int = knob(
        256,
        "samples per optimizer step, over all ranks",
        unit="samples",
        allowed="a multiple of micro_batch_size x ranks",
        on_resume=OnResume.OPTIMISATION,
        ge=1,
    )
    micro_batch_size: int = knob(
        32, "samples per forward and backward pass of a rank", unit="samples", on_resume=OnResume.SAFE, ge=1
    )


class OptimSection(Section):
    """AdamW and its learning rate."""

    learning_rate: float = knob(
        1e-4, "peak learning rate of AdamW", unit="per step", on_resume=OnResume.OPTIMISATION, gt=0
    )
    betas: tuple[float, float] = knob(
        (0.9, 0.95),
        "decay of AdamW's first and second moment per step",
        unit="fraction",
        allowed="two numbers in [0, 1)",
        on_resume=OnResume.OPTIMISATION,
    )
    eps: float = knob(
        1e-8, "term added to AdamW's denominator, for stability", unit="gradient", on_resume=OnResume.OPTIMISATION, gt=0
    )
    weight_decay: float = knob(
        0.02,
        "decoupled weight decay, on matrices only",
        unit="per step, times learning rate",
        on_resume=OnResume.OPTIMISATION,
        ge=0,
    )
    mup: bool = knob(
        False,
        "maximal update parametrisation (muP): matrices whose input grows with the width start smaller and learn "
        "more slowly, so that the best learning_rate of a narrow model is also that of a wide one (ecar, pyramid and "
        "dit)",
        on_resume=OnResume.OPTIMISATION,
    )
    mup_base_width: int = knob(
        128,
        "mup only: width of the base model, to which learning_rate and weight_decay apply unchanged; mup has no effect "
        "at this width",
        unit="channels",
        on_resume=OnResume.OPTIMISATION,
        ge=1,
    )
    clip_grad_norm: float = knob(
        1.0,
        "gradients with a larger global norm are scaled down to this norm; 0: never",
        unit="gradient norm",
        on_resume=OnResume.OPTIMISATION,
        ge=0,
    )
    schedule: Annotated[str, OneOf(SCHEDULES)] = knob(
        "constant",
        "learning rate after warm-up. constant; cosine: cosine decay to final_learning_rate; cooldown: constant, then "
        "linear decay to final_learning_rate",
        on_resume=OnResume.OPTIMISATION,
    )
    warmup_samples: int = knob(0, "length of the linear warm-up", unit="samples", on_resume=OnResume.OPTIMISATION, ge=0)
    cooldown_samples: int = knob(
        0,
        "length of the final linear decay; required with schedule=cooldown, and only allowed with it",
        unit="samples",
        on_resume=OnResume.OPTIMISATION,
        ge=0,
    )
    final_learning_rate: float = knob(
        0.0,
        "learning rate at the end of cosine and cooldown",
        unit="per step",
        on_resume=OnResume.OPTIMISATION,
        ge=0,
    )

    @model_validator(mode="after")
    def _check(self) -> OptimSection:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas={list(self.betas)} must both be in [0, 1); [0.9, 0.95] is the default")
        if (self.schedule == "cooldown") != (self.cooldown_samples > 0):
            raise ValueError(
                f"optim.schedule={self.schedule} with optim.cooldown_samples={self.cooldown_samples}: "
                "schedule=cooldown and cooldown_samples > 0 go together; change one of the two"
            )
        return self


class EmaSection(Section):
    """Exponential moving averages (EMA) of the weights. The first one is used for sampling and export."""

    half_life_samples: tuple[Annotated[int, Field(ge=1)], ...] = knob(
        (1_000_000,),
        "half-life of the EMA, or a list with one per EMA: samples after which the share of past weights in the "
        "average has halved",
        unit="samples",
        allowed="one or more numbers >= 1",
        on_resume=OnResume.OPTIMISATION,
    )
    rampup: float = knob(
        0.1,
        "the half-life is at most this share of the samples seen, so that the EMA forgets the random start",
        unit="fraction",
        on_resume=OnResume.OPTIMISATION,
        gt=0,
    )
    sigma_rel: tuple[Annotated[float, Field(gt=0, lt=0.28)], ...] = knob(
        (),
        "relative widths of additional EMAs in EDM2's power-function form, e.g. [0.05, 0.1]",
        unit="fraction",
        allowed="any number of values in (0, 0.28)",
        on_resume=OnResume.OPTIMISATION,
    )
    snapshot_every_samples: int = knob(
        0,
        "interval between snapshots of only the EMA weights, kept for post-hoc EMA; 0: none",
        unit="samples",
        on_resume=OnResume.SAFE,
        ge=0,
    )

    @field_validator("half_life_samples", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _check(self) -> EmaSection:
        if not self.half_life_samples:
            raise ValueError("ema.half_life_samples is empty; give at least one, e.g. [1_000_000]")
        return self


class DeepSpeedSection(Section):
    """How DeepSpeed shards and stores the training state."""

    zero_stage: Literal[0, 1, 2, 3] = knob(
        2,
        "ZeRO: 0 shards nothing; 1 the optimizer state; 2 also the gradients; 3 also the weights",
        on_resume=OnResume.SAFE,
    )
    precision: Literal["auto", "fp32", "bf16"] = knob(
        "auto", "auto: bf16 on an accelerator, fp32 on CPU", on_resume=OnResume.OPTIMISATION
    )
    offload_optimizer: bool = knob(False, "keep the optimizer state in CPU memory", on_resume=OnResume.SAFE)
    offload_params: bool = knob(False, "keep the weights in CPU memory; needs zero_stage=3", on_resume=OnResume.SAFE)
    raw: dict[str, Any] = knob(
        {},
        "DeepSpeed's own settings, merged last into its config",
        allowed="all but the batch sizes, the ZeRO stage, bf16 and clipping, which have knobs",
        on_resume=OnResume.OPTIMISATION,
    )

    @model_validator(mode="after")
    def _check(self) -> DeepSpeedSection:
        batch_sizes = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}
        if derived := sorted(batch_sizes & self.raw.keys()):
            raise ValueError(f"deepspeed.raw.{derived[0]} is derived from batch.*; set it there, remove it here")

        # The guarded optimizer clips already.
        if "gradient_clipping" in self.raw:
            raise ValueError(
                "deepspeed.raw.gradient_clipping would clip twice; set optim.clip_grad_norm, remove it here"
            )

        for name, key, instead in (
            ("zero_optimization", "stage", "deepspeed.zero_stage"),
            ("bf16", "enabled", "deepspeed.precision"),
        ):
            section = self.raw.get(name) or {}
            if not isinstance(section, dict):
                raise ValueError(f"deepspeed.raw.{name} must be a section with keys of its own; see DeepSpeed's docs")
            if key in section:
                raise ValueError(f"deepspeed.raw.{name}.{key} has a knob of its own; set {instead}, remove it here")

        if self.offload_params and self.zero_stage != 3:
            raise ValueError(
                f"deepspeed.offload_params=true needs deepspeed.zero_stage=3, got {self.zero_stage}; change one of them"
            )
        return self


class BadStepsSection(Section):
    """Bad steps: the loss or the gradient norm is not finite, or the norm spikes. A bad step changes no weight."""

    spike_factor: float = knob(
        0.0,
        "a step is bad if its gradient norm exceeds this multiple of the median of the last steps; 0: never",
        unit="factor",
        on_resume=OnResume.OPTIMISATION,
        ge=0,
    )
    window: int = knob(128, "number of steps in the median", unit="steps", on_resume=OnResume.OPTIMISATION, ge=8)
    roll_back_after: int = knob(
        3,
        "number of bad steps in a row after which the last checkpoint is restored",
        unit="steps",
        on_resume=OnResume.OPTIMISATION,
        ge=1,
    )
    stop_after: int = knob(
        2,
        "number of roll-backs allowed; if one more is needed, the run ends with exit status 93",
        unit="roll-backs",
        on_resume=OnResume.OPTIMISATION,
        ge=0,
    )


class TrainSection(Section):
    """Length of the training, memory, and failure limits."""

    total_samples: int = knob(
        REQUIRED,
        "the run ends after this many samples",
        unit="samples",
        on_resume=OnResume.OPTIMISATION,
        ge=1,
    )
    init_from: str | None = knob(
        None,
        "run directory (EMA of its newest checkpoint), export, or .safetensors file whose weights a new run starts "
        "from. A run that already has a checkpoint resumes from it and ignores this knob",
        per_node=True,
        on_resume=OnResume.SAFE,
    )
    activation_checkpointing: bool = knob(
        False,
        "recompute each block in the backward pass: less memory, about a third more compute",
        on_resume=OnResume.SAFE,
    )
    compile: Literal["auto"] | bool = knob(
        "auto",
        "compile each block (torch.compile): faster steps after a start that takes minutes; auto: true on a GPU",
        on_resume=OnResume.OPTIMISATION,
    )
    validate_every_samples: int = knob(
        1_000_000,
        "interval between validation losses on data.heldout_latents, each computed at the next logged step, and once "
        "more at the last step; 0: none",
        unit="samples",
        on_resume=OnResume.SAFE,
        ge=0,
    )
    validate_samples: int = knob(
        1024,
        "maximum number of held-out samples per validation; the first ones of the set are used",
        unit="samples",
        on_resume=OnResume.SAFE,
        ge=1,
    )
    hang_seconds: float = knob(
        600.0,
        "a rank that stays longer than this in one phase of a step is reported, and the job is ended; 0: never",
        unit="seconds",
        on_resume=OnResume.SAFE,
        ge=0,
    )
    bad_steps: BadStepsSection = BadStepsSection()


class CheckpointSection(Section):
    """When checkpoints are saved, where, and how many are kept."""

    every_samples: int = knob(1_000_000, "interval between checkpoints", unit="samples", on_resume=OnResume.SAFE, ge=1)
    min_seconds: float = knob(
        0.0,
        "minimum time between two checkpoints; one that is due earlier waits; 0: only every_samples decides",
        unit="seconds",
        on_resume=OnResume.SAFE,
        ge=0,
    )
    keep: int = knob(3, "number of newest checkpoints to keep", unit="checkpoints", on_resume=OnResume.SAFE, ge=2)
    keep_every_samples: int = knob(
        0,
        "interval between milestones, checkpoints that are never deleted; 0: none",
        unit="samples",
        on_resume=OnResume.SAFE,
        ge=0,
    )
    dir: str | None = knob(
        None,
        "folder or URL; the checkpoints are in `<dir>/<run.name>`; null: checkpoints/ in the run directory",
        on_resume=OnResume.SAFE,
    )
    overlap: bool = knob(True, "continue training while a checkpoint is written", on_resume=OnResume.SAFE)
    max_failures: int = knob(
        3, "the run ends after this many failed saves in a row", unit="saves", on_resume=OnResume.SAFE, ge=1
    )


class LogSection(Section):
    """What is logged, and how often."""

    every_steps: int = knob(
        10, "interval between lines on the console and in metrics.jsonl", unit="steps", on_resume=OnResume.SAFE, ge=1
    )
    time_bins: int = knob(
        4,
        "number of bins of flow time t in each stage; the loss is logged for each bin",
        unit="bins",
        on_resume=OnResume.SAFE,
        ge=1,
        le=32,
    )
    wandb: str | None = knob(
        None,
        "Weights & Biases project that also receives the metrics and previews; null: none; needs "
        "`pip install 'ecar-dist[wandb]'`",
        on_resume=OnResume.SAFE,
    )
    mlflow: str | None = knob(
        None,
        "URI of an MLflow tracking server that also receives the metrics and previews; null: none; needs "
        "`pip install 'ecar-dist[mlflow]'`",
        on_resume=OnResume.SAFE,
    )
    tensorboard: bool = knob(True, "write TensorBoard files to tb/ in the run directory", on_resume=OnResume.SAFE)
