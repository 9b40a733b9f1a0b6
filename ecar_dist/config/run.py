"""RunConfig: all sections together, the rules between them, and the numbers that follow from them.

The knobs themselves are defined in knobs_model.py, knobs_data.py and knobs_training.py; read.py reads them from YAML.
Nothing here imports torch, so `ecar-dist check` is fast on a login node.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from ecar_dist.config.batch import grad_accum_steps
from ecar_dist.config.knob import OnResume, Section
from ecar_dist.config.knobs_data import DataSection
from ecar_dist.config.knobs_model import (
    FlowSection,
    ModelSection,
    ParSection,
    SampleSection,
    VaeSection,
)
from ecar_dist.config.knobs_training import (
    BatchSection,
    CheckpointSection,
    DeepSpeedSection,
    EmaSection,
    LogSection,
    OptimSection,
    RunSection,
    TrainSection,
)
from ecar_dist.flow.solvers import SOLVERS
from ecar_dist.kinds.table import KINDS
from ecar_dist.storage.untrusted import CONTROL_CHARACTER, is_one_line


class RunConfig(Section):
    """All settings of a run: typed, frozen, validated once. The resolved copy is written to the run directory."""

    run: RunSection
    model: ModelSection = ModelSection()
    par: ParSection = ParSection()
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
        """Number of values in one token: C p^2."""
        return self.data.latent_channels * self.model.patch_size**2

    @property
    def stage_steps(self) -> tuple[int, ...]:
        """Solver steps of every stage, coarse to fine."""
        steps = self.sample.steps_per_stage
        return steps * self.flow.num_stages if len(steps) == 1 else steps

    @property
    def context_tau(self) -> float | None:
        """Std of the noise on the states that are fed back; None if the model is fed no states."""
        return self.flow.context.tau if KINDS[self.model.kind].feeds_states else None

    @property
    def total_steps(self) -> int:
        return math.ceil(self.train.total_samples / self.batch.global_batch_size)

    @property
    def model_identity(self) -> dict[str, Any]:
        """What a checkpoint's weights mean, by dotted key; JSON values only. Compared whenever one is loaded."""
        identifying = {knob.key: knob for knob in self.knobs() if knob.on_resume is OnResume.MODEL}
        # A knob added later is left out at its default: older checkpoints lack it and were made with that value.
        return {
            key: value
            for key, value in self.values()
            if (knob := identifying.get(key)) and not (knob.added_later and value == knob.field.default)
        }

    def precision_on(self, device_type: str) -> Literal["fp32", "bf16"]:
        """`auto` is bf16 on an accelerator and fp32 on CPU."""
        if self.deepspeed.precision == "auto":
            return "fp32" if device_type == "cpu" else "bf16"
        return self.deepspeed.precision

    def compiles_on(self, device_type: str) -> bool:
        """Whether training is compiled; `auto` is true on an accelerator."""
        return device_type != "cpu" if self.train.compile == "auto" else self.train.compile

    def grad_accum_steps(self, world_size: int) -> int:
        """Micro-steps per optimizer step. Raises ConfigError if the three numbers do not divide evenly."""
        return grad_accum_steps(self.batch.global_batch_size, self.batch.micro_batch_size, world_size)

    @model_validator(mode="before")
    @classmethod
    def _check_leaves(cls, tree: Any) -> Any:
        _check_leaves(tree)
        return tree

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        KINDS[self.model.kind].check(self)

        # every stage has a whole number of tokens
        num_stages, patch_size = self.flow.num_stages, self.model.patch_size
        divisor = patch_size * 2 ** (num_stages - 1)
        if self.data.latent_size % divisor:
            raise ValueError(
                f"data.latent_size={self.data.latent_size} must be a multiple of model.patch_size x "
                f"2^(flow.num_stages-1) = {patch_size} x {2 ** (num_stages - 1)} = {divisor}; change one of the three"
            )

        # solver steps: one number, or one for each stage
        steps = self.sample.steps_per_stage
        if len(steps) not in (1, num_stages):
            raise ValueError(
                f"sample.steps_per_stage={list(steps)} has {len(steps)} values, flow.num_stages={num_stages}; give one "
                "number, or one per stage"
            )

        # a solver of average velocities needs a network that gives them
        if SOLVERS[self.sample.solver].averages and not self.flow.learns_mean_velocity:
            raise ValueError(
                f"sample.solver={self.sample.solver} needs average velocities, which flow.objective="
                f"{self.flow.objective} does not learn; set sample.solver=midpoint, or train with "
                "flow.objective=mean_velocity"
            )

        # the length of the run
        scheduled = self.optim.warmup_samples + self.optim.cooldown_samples
        if scheduled > self.train.total_samples:
            raise ValueError(
                f"optim.warmup_samples + optim.cooldown_samples = {scheduled} exceed "
                f"train.total_samples={self.train.total_samples}; shorten them"
            )
        self.grad_accum_steps(world_size=1)  # raises if the batch does not divide on a single rank
        return self


def _check_leaves(tree: Any, dotted: str = "") -> None:
    """Raises ValueError for text that would break a line or a terminal, and for numbers that are not finite.

    Text values go into job scripts, messages, and lists with one entry per line.
    """
    if isinstance(tree, dict):
        for key, value in tree.items():
            _check_leaves(value, f"{dotted}.{key}" if dotted else str(key))
    elif isinstance(tree, list | tuple):
        for value in tree:
            _check_leaves(value, dotted)
    elif isinstance(tree, str) and (CONTROL_CHARACTER.search(tree) or not is_one_line(tree)):
        bad = next(one for one in tree if CONTROL_CHARACTER.match(one) or not is_one_line(one))
        raise ValueError(f"{dotted} has the character U+{ord(bad):04X}, which is not printable; remove it")
    elif isinstance(tree, float) and not math.isfinite(tree):
        raise ValueError(f"{dotted}={tree} is not a finite number; give a finite one")
