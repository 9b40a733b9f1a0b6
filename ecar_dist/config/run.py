"""The run's configuration: every knob, its default, its rule. Typed, frozen, never mutated; read by read.py.

Nothing here imports torch, so `ecar-dist check` answers at once on a login node.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from ecar_dist.config.batch import grad_accum_steps
from ecar_dist.config.model import (
    FlowSection,
    ModelSection,
    SampleSection,
    Section,
    one_of,
)
from ecar_dist.kinds.table import KINDS
from ecar_dist.learning_rate import SCHEDULES
from ecar_dist.storage.redaction import redact
from ecar_dist.storage.untrusted import CONTROL_CHARACTER, is_one_line
from ecar_dist.vae.table import CODECS


def _one_line(value: str) -> str:
    if not is_one_line(value):
        raise ValueError(f"{value!a} has a character that is not printable, such as a newline; leave it out")
    return value


# a folder, URL or hub name: they go into job scripts, messages and lists of one line each
Place = Annotated[str, AfterValidator(_one_line)]


class RunSection(Section):
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200, description="name of the run, and of its directory"
    )
    dir: Place = Field("runs", description="folder that holds run directories; the run lives in <dir>/<name>")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of weights, sample order and all keyed randomness")

    @field_validator("dir")
    @classmethod
    def _local(cls, value: str) -> str:
        if "://" in value:
            raise ValueError(f"run.dir={redact(value)} is a URL; give a local folder (checkpoint.dir may be a URL)")
        return value


class VaeSection(Section):
    kind: Annotated[str, one_of(CODECS)] = Field(
        "kl", description="diffusers AutoencoderKL; AutoencoderDC; weight-free block DCT"
    )
    path: Place | None = Field(None, description="local folder or hub name of the autoencoder (kl and dc)")
    downsample: int = Field(8, ge=1, description="image pixels per latent pixel side")

    @model_validator(mode="after")
    def _check(self) -> VaeSection:
        if CODECS[self.kind].needs_path and not self.path:
            raise ValueError(f"vae.kind={self.kind} needs vae.path, a local folder or a hub name; or set vae.kind=dct")
        return self


class MixtureSource(Section):
    latents: Place = Field(description="folder or URL of one set of latent shards")
    weight: float = Field(gt=0, allow_inf_nan=False, description="its share of the samples, against the other weights")


class CacheSection(Section):
    """Where the shards of a URL are kept on each node."""

    dir: Place | None = Field(
        None, description="folder on a local disk; null: $ECAR_CACHE_DIR, or the temporary folder"
    )
    gib: float | None = Field(None, gt=0, description="GiB for each data set, then the least needed go; null: no limit")
    threads: int = Field(8, ge=1, le=64, description="ranges of 8 MiB that a rank downloads at once")


class DataSection(Section):
    latents: Place | None = Field(
        None, description="folder or URL that holds the latent shards and their manifest.json"
    )
    mixture: tuple[MixtureSource, ...] = Field((), description="several sets of latents instead, with weights")
    mixture_by: Literal["sample", "step"] = Field(
        "sample", description="step: each global batch comes from one set (resolution buckets)"
    )
    images: Place | None = Field(None, description="folder or URL of image shards instead: encoded while training")
    flip_images: bool = Field(False, description="mirror half of the images (latents: `ecar-data encode --flip store`)")
    resize: Literal["cubic", "adm"] = Field(
        "cubic", description="of images: cubic, or the reference of ADM and DiT (PIL)"
    )
    background: str = Field(
        "white",
        pattern=r"^(white|black|#[0-9a-fA-F]{6})$",
        description="behind transparent pixels of images: white, black or #rrggbb (latents: `ecar-data encode`)",
    )
    num_classes: int = Field(ge=1, description="labels are 0 .. num_classes-1; the null label is num_classes")
    latent_channels: int = Field(4, ge=1)
    latent_size: int = Field(32, ge=1, description="latent side at the finest stage")
    train_images: Place | None = Field(None, description="image shards that trained the scoring classifier")
    heldout_images: Place | None = Field(None, description="image shards that samples are scored against")
    backend: Literal["gather", "dali"] = Field("gather", description="who reads: strided gather (images: PIL), or DALI")
    prefetch: int = Field(2, ge=1, description="micro-batches read ahead per rank; more than fit a cache cost time")
    lanes: int | None = Field(None, ge=1, description="streams of the sample order; null: from the number of shards")
    window_shards: int = Field(4, ge=0, description="shards of a lane that are shuffled together; 0: all of them")
    cache: CacheSection = CacheSection()
    on_bad: Literal["fail", "substitute"] = Field(
        "fail", description="substitute: samples of damaged shards, or broken images, are replaced by others and listed"
    )
    max_bad: float | None = Field(
        None, ge=0, le=1, description="share of samples that may be replaced; null: 1e-5 of latents, 1e-3 of images"
    )

    @property
    def latent_sources(self) -> tuple[MixtureSource, ...]:
        """The sets of latents, one or several; empty where the run reads images."""
        return (MixtureSource(latents=self.latents, weight=1.0),) if self.latents else self.mixture

    @property
    def resolved_max_bad(self) -> float:
        return self.max_bad if self.max_bad is not None else 1e-3 if self.images else 1e-5

    @model_validator(mode="after")
    def _check(self) -> DataSection:
        given = [name for name in ("latents", "mixture", "images") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"data has {' and '.join(given) or 'no source'}; give one of latents, mixture and images")
        if self.flip_images and not self.images:
            raise ValueError(
                "data.flip_images=True mirrors images, and the data are latents; set it to false, and encode them with "
                "`ecar-data encode --flip store`"
            )
        return self


class BatchSection(Section):
    global_batch_size: int = Field(256, ge=1, description="samples per optimizer step, over all ranks")
    micro_batch_size: int = Field(32, ge=1, description="samples per rank and forward pass")


class OptimSection(Section):
    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate of AdamW")
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.02, ge=0, description="on matrices only")
    clip_grad_norm: float = Field(1.0, ge=0, description="0 switches clipping off")
    schedule: Annotated[str, one_of(SCHEDULES)] = Field(
        "constant", description="after warm-up; cooldown is constant, then linear to final_learning_rate"
    )
    warmup_samples: int = Field(0, ge=0, description="samples of linear warm-up")
    cooldown_samples: int = Field(0, ge=0, description="samples of the final linear decay (schedule=cooldown)")
    final_learning_rate: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> OptimSection:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas={list(self.betas)} must both lie in [0, 1); [0.9, 0.95] is the default")
        if (self.schedule == "cooldown") != (self.cooldown_samples > 0):
            raise ValueError(
                f"optim.schedule={self.schedule} with cooldown_samples={self.cooldown_samples}: cooldown_samples > 0 "
                "and schedule=cooldown go together; change one of the two"
            )
        return self


class EmaSection(Section):
    half_life_samples: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1_000_000,), description="one or several: samples after which a weight's share has halved; the first is drawn"
    )
    rampup: float = Field(0.1, gt=0, description="half-life is at most this share of samples seen")
    sigma_rel: tuple[Annotated[float, Field(gt=0, lt=0.28)], ...] = Field(
        (), description="further averages of EDM2's power-function form, by relative width, e.g. [0.05, 0.1]"
    )
    snapshot_every_samples: int = Field(
        0, ge=0, description="samples between copies of the averages alone, kept for post-hoc EMA; 0: none"
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
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="DeepSpeed's ZeRO stage")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on an accelerator, else fp32")
    offload_optimizer: bool = False
    offload_params: bool = False
    raw: dict[str, Any] = Field(default_factory=dict, description="merged last into DeepSpeed's own config")

    @model_validator(mode="after")
    def _check(self) -> DeepSpeedSection:
        derived = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"} & set(self.raw)
        if derived:
            raise ValueError(
                f"deepspeed.raw.{sorted(derived)[0]} is derived from batch.*; set it there, remove it here"
            )
        for name, taken in (("zero_optimization", "stage"), ("bf16", "enabled")):
            section = self.raw.get(name) or {}
            if not isinstance(section, dict):
                raise ValueError(f"deepspeed.raw.{name} must be a section with keys of its own; see DeepSpeed's docs")
            if taken in section:
                raise ValueError(
                    "deepspeed.raw sets the ZeRO stage or bf16; use deepspeed.zero_stage and precision instead"
                )
        if self.offload_params and self.zero_stage != 3:
            raise ValueError(f"deepspeed.offload_params needs zero_stage=3, got {self.zero_stage}")
        return self


class BadStepsSection(Section):
    """A step is bad where its loss or gradient norm is not finite, or far above the last ones: no weight moves."""

    spike_factor: float = Field(
        0.0, ge=0, description="bad above this multiple of the median gradient norm of the last steps; 0: never"
    )
    window: int = Field(128, ge=8, description="steps whose median counts")
    roll_back_after: int = Field(3, ge=1, description="bad steps in a row after which the last checkpoint is restored")
    stop_after: int = Field(2, ge=0, description="times that a run is rolled back; then it ends with exit status 93")


class TrainSection(Section):
    total_samples: int = Field(ge=1, description="the run ends when this many samples were seen")
    activation_checkpointing: bool = Field(
        False, description="recompute each block in the backward pass: less memory, about a third more compute"
    )
    hang_seconds: float = Field(
        600.0, ge=0, description="a rank that stays longer in one phase of a step is named and the job ended; 0: never"
    )
    bad_steps: BadStepsSection = BadStepsSection()


class CheckpointSection(Section):
    every_samples: int = Field(1_000_000, ge=1)
    keep: int = Field(3, ge=2, description="newest committed checkpoints that are kept")
    keep_every_samples: int = Field(0, ge=0, description="one of each so many samples is kept for good; 0: none")
    dir: Place | None = Field(
        None, description="folder or URL for checkpoints, in <dir>/<run.name>; null: checkpoints/ in the run directory"
    )
    overlap: bool = Field(True, description="training goes on while a checkpoint is written")
    max_failures: int = Field(3, ge=1, description="saves in a row that may fail before the run ends")


class LogSection(Section):
    every_steps: int = Field(10, ge=1)
    time_bins: int = Field(4, ge=1, le=32, description="bins of flow time, in each stage, that the loss is shown by")
    tensorboard: bool = True


class RunConfig(Section):
    """All that defines a run. The resolved copy is written to the run directory."""

    run: RunSection
    model: ModelSection = ModelSection()
    flow: FlowSection = FlowSection()
    vae: VaeSection
    data: DataSection
    batch: BatchSection = BatchSection()
    optim: OptimSection = OptimSection()
    ema: EmaSection = EmaSection()
    deepspeed: DeepSpeedSection = DeepSpeedSection()
    train: TrainSection
    checkpoint: CheckpointSection = CheckpointSection()
    sample: SampleSection = SampleSection()
    log: LogSection = LogSection()

    @property
    def run_directory(self) -> Path:
        return Path(self.run.dir) / self.run.name

    @property
    def stage_sizes(self) -> tuple[int, ...]:
        """Latent side of every stage, coarse to fine."""
        K = self.flow.num_stages
        return tuple(self.data.latent_size >> (K - 1 - k) for k in range(K))

    @property
    def stage_tokens(self) -> tuple[int, ...]:
        return tuple((side // self.model.patch_size) ** 2 for side in self.stage_sizes)

    @property
    def token_channels(self) -> int:
        """Numbers in one token: C p^2."""
        return self.data.latent_channels * self.model.patch_size**2

    @property
    def context_tau(self) -> float | None:
        """Std of the noise on the states that are fed back; None where the model is fed none."""
        return self.flow.context.tau if KINDS[self.model.kind].feeds_states else None

    @property
    def total_steps(self) -> int:
        return math.ceil(self.train.total_samples / self.batch.global_batch_size)

    @property
    def model_identity(self) -> dict[str, Any]:
        """What a checkpoint's weights mean, by dotted key; JSON values only. Compared whenever one is loaded."""
        return {
            "model.kind": self.model.kind,
            "model.preset": self.model.preset,
            "model.ar_depth": self.model.ar_depth,
            "model.flow_depth": self.model.flow_depth,
            "model.patch_size": self.model.patch_size,
            "data.num_classes": self.data.num_classes,
            "data.latent_channels": self.data.latent_channels,
            "data.latent_size": self.data.latent_size,
            "flow.num_stages": self.flow.num_stages,
            "flow.ends": list(self.flow.resolved_ends),
            "flow.gamma": self.flow.gamma,
            "flow.context.mode": self.flow.context.mode,
            "flow.context.tau": self.flow.context.tau,
        }

    def precision_on(self, device_type: str) -> Literal["fp32", "bf16"]:
        """`auto` is bf16 on an accelerator and fp32 on CPU."""
        if self.deepspeed.precision == "auto":
            return "fp32" if device_type == "cpu" else "bf16"
        return self.deepspeed.precision

    def grad_accum_steps(self, world_size: int) -> int:
        """Micro-steps per optimizer step. Raises ConfigError where the three numbers do not multiply out."""
        return grad_accum_steps(self.batch.global_batch_size, self.batch.micro_batch_size, world_size)

    @model_validator(mode="before")
    @classmethod
    def _check_leaves(cls, tree: Any) -> Any:
        _refuse_leaves(tree)
        return tree

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        KINDS[self.model.kind].check(self)
        divisor = self.model.patch_size * 2 ** (self.flow.num_stages - 1)
        if self.data.latent_size % divisor:
            raise ValueError(
                f"data.latent_size={self.data.latent_size} must be a multiple of patch_size x 2^(num_stages-1) = "
                f"{self.model.patch_size} x {2 ** (self.flow.num_stages - 1)} = {divisor}; change one of the three"
            )
        if self.optim.warmup_samples + self.optim.cooldown_samples > self.train.total_samples:
            raise ValueError(
                f"optim.warmup_samples + cooldown_samples = {self.optim.warmup_samples + self.optim.cooldown_samples} "
                f"exceed train.total_samples={self.train.total_samples}; shorten them"
            )
        self.grad_accum_steps(world_size=1)
        return self


def _refuse_leaves(tree: Any, dotted: str = "") -> None:
    """Raises ValueError for text that would break a line or a terminal, and for numbers that are not finite."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            _refuse_leaves(value, f"{dotted}.{key}" if dotted else str(key))
    elif isinstance(tree, list | tuple):
        for value in tree:
            _refuse_leaves(value, dotted)
    elif isinstance(tree, str) and (found := CONTROL_CHARACTER.search(tree)):
        raise ValueError(f"{dotted} holds the control character U+{ord(found[0]):04X}; write it without")
    elif isinstance(tree, float) and not math.isfinite(tree):
        raise ValueError(f"{dotted} holds {tree}; give a finite number")
